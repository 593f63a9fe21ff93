"""qcow2 images against qemu-img and qemu-io: both directions, every option, and what is left after a crash."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from nbdserve.block import BlockDevice, HostFile, Zero
from nbdserve.errors import NbdserveError
from nbdserve.formats import OpenOptions
from nbdserve.formats.qcow2.create import CreateOptions, create_image
from nbdserve.formats.qcow2.opening import open_qcow2
from nbdserve.opening import open_image
from tests.conformance import check_block_device
from tests.reference import needs, qemu_check, qemu_content, qemu_img_create, qemu_io, qemu_map, run

MIB = 1 << 20
pytestmark = needs("qemu-img", "qemu-io")

OPTIONS = [
    {"cluster_size": 512},
    {"cluster_size": 4096, "compat": "0.10"},
    {"cluster_size": 65536},
    {"cluster_size": 2 * MIB},
    {"cluster_size": 65536, "refcount_bits": 1},
    {"cluster_size": 4096, "refcount_bits": 2},
    {"cluster_size": 512, "refcount_bits": 64},
    {"cluster_size": 65536, "compression_type": "zstd"},
    {"cluster_size": 65536, "preallocation": "metadata"},
]


def name_of(options: dict[str, str | int]) -> str:
    return "-".join(str(value) for value in options.values())


def written(image: Path) -> Path:
    """Some of everything, by qemu-io."""
    qemu_io(
        image,
        *("write -P 1 0 300k", "write -P 2 1M 64k", "write -z 1064k 200k", "write -P 3 3333k 1500", "write -P 4 5M 1M"),
        *("discard 5M 256k", "write -z -u 100k 64k", "write -P 9 8388096 512"),
    )
    return image


@needs("qemu-img", "qemu-io")
@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
@pytest.mark.parametrize("base", [None, "raw", "qcow2", "longer"])
def test_content_and_zeros_are_qemus(tmp_path: Path, options: dict[str, str | int], base: str | None) -> None:
    chosen = dict(options)
    if base is not None:
        chosen.pop("preallocation", None)  # an overlay has nothing to preallocate
        size = 12 * MIB if base == "longer" else 3 * MIB + 512
        below = qemu_img_create(tmp_path / "base", size, "raw" if base == "raw" else "qcow2")
        qemu_io(below, f"write -P 77 0 {size - 4096}", format="raw" if base == "raw" else "qcow2")
        chosen |= {"backing_file": "base", "backing_fmt": "raw" if base == "raw" else "qcow2"}
    image = written(qemu_img_create(tmp_path / "image", 8 * MIB, **chosen))
    with open_image(image, format="qcow2", read_only=True) as device:
        assert device.read(0, device.size) == qemu_content(image, "qcow2")
        for extent in qemu_map(image, "qcow2"):
            if extent["zero"]:
                ours = device.extents(extent["start"], extent["length"])
                assert all(isinstance(each, Zero) for each in ours), extent


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", [4096, 65536])
def test_compressed_clusters(tmp_path: Path, compression: str, cluster_size: int) -> None:
    raw = tmp_path / "raw"
    rng = random.Random(1)
    raw.write_bytes(b"".join(bytes([rng.randrange(256)]) * rng.randrange(1, 9000) for _ in range(900))[: 3 * MIB + 700])
    os.truncate(raw, 3 * MIB + 1024)
    image = tmp_path / "image"
    options = f"compression_type={compression},cluster_size={cluster_size}"
    run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", options, str(raw), str(image))
    model = bytearray(raw.read_bytes())
    with open_image(image, format="qcow2") as device:
        assert device.read(0, device.size) == model
        for _ in range(40):
            offset = rng.randrange(len(model) - 5000)
            data = rng.randbytes(rng.randrange(1, 5000))
            device.write(offset, data)
            model[offset : offset + len(data)] = data
        assert device.read(0, device.size) == model
    qemu_check(image)
    assert qemu_content(image, "qcow2") == model


def check_conformance(image: Path, make: Callable[[], BlockDevice], examples: int) -> None:
    """The suite of every device, with qemu-img as the judge of the image that make() makes."""

    def reopen(device: BlockDevice) -> BlockDevice:
        device.close()
        return open_image(image, format="qcow2")

    def judge(model: bytearray) -> None:
        qemu_check(image)
        assert qemu_content(image, "qcow2") == model

    check_block_device(make, reopen, judge, examples=examples)


@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_conformance(tmp_path: Path, options: dict[str, str | int]) -> None:
    template = written(qemu_img_create(tmp_path / "template", 8 * MIB, **options))
    image = tmp_path / "image"

    def make() -> BlockDevice:
        shutil.copyfile(template, image)
        return open_image(image, format="qcow2")

    check_conformance(image, make, examples=5)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_conformance_over_a_base(tmp_path: Path, compat: str) -> None:
    base = qemu_img_create(tmp_path / "base", 3 * MIB + 512, "qcow2")
    qemu_io(base, "write -P 7 0 1M", "write -P 8 2M 1000k")
    image = tmp_path / "image"
    before = base.read_bytes()

    def make() -> BlockDevice:
        image.unlink(missing_ok=True)
        qemu_img_create(image, 5 * MIB, compat=compat, cluster_size=4096, backing_file="base", backing_fmt="qcow2")
        return open_image(image, format="qcow2")

    check_conformance(image, make, examples=12)
    assert base.read_bytes() == before


def test_snapshots_are_shown_and_kept(tmp_path: Path) -> None:
    image = qemu_img_create(tmp_path / "image", 4 * MIB, cluster_size=4096)
    qemu_io(image, "write -P 1 0 2M")
    run("qemu-img", "snapshot", "-c", "first", str(image))
    qemu_io(image, "write -P 2 1M 64k")
    run("qemu-img", "snapshot", "-c", "second", str(image))
    with open_image(image, format="qcow2") as device:  # every cluster is shared with a snapshot now
        device.write(4096 + 100, b"x" * 9000)
        device.discard(MIB, 8192)
        model = device.read(0, device.size)
    qemu_check(image)
    assert qemu_content(image, "qcow2") == model
    for name, expected in (("first", b"\1" * 2 * MIB), ("2", b"\1" * MIB + b"\2" * 65536 + b"\1" * (MIB - 65536))):
        with open_image(image, format="qcow2", snapshot=name) as device:
            assert device.read_only
            assert device.read(0, device.size) == expected + bytes(2 * MIB)
    with pytest.raises(NbdserveError, match=r"first \(ID 1\), second"):
        open_image(image, format="qcow2", snapshot="third")


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 * MIB])
def test_created_images_are_qemus(tmp_path: Path, cluster_size: int) -> None:
    image = tmp_path / "image"
    create_image(image, 40 * MIB + 512, CreateOptions(cluster_size=cluster_size))
    qemu_check(image)
    with open_image(image, format="qcow2") as device:
        assert device.size == 40 * MIB + 512
        device.write(device.size - 512, b"e" * 512)
    qemu_check(image)
    qemu_io(image, f"read -P {ord('e')} {40 * MIB} 512", f"read -P 0 0 {40 * MIB}")


def test_refcounts_grow(tmp_path: Path) -> None:
    image = qemu_img_create(tmp_path / "image", 64 * MIB, cluster_size=512, refcount_bits=64)
    rng = random.Random(3)
    model = bytearray(64 * MIB)
    with open_image(image, format="qcow2") as device:
        for step in range(12):
            offset = rng.randrange(60) * MIB
            data = rng.randbytes(4096) * 256
            device.write(offset, data)
            model[offset : offset + MIB] = data
            if step % 4 == 3:
                device.flush()
    qemu_check(image)
    assert qemu_content(image, "qcow2") == model


class RecordingFile(HostFile):
    """A host file that notes every write, hole and sync, in order."""

    log: list[tuple[str, int, bytes]]

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.log.append(("write", offset, bytes(data)))
        super().write(offset, data)

    def write_all(self, offset: int, pieces: list[bytes]) -> None:  # type: ignore[override]
        self.write(offset, b"".join(pieces))

    def punch_hole(self, offset: int, length: int) -> bool:
        self.log.append(("punch", offset, bytes(length)))
        return super().punch_hole(offset, length)

    def sync(self) -> None:
        self.log.append(("sync", 0, b""))
        super().sync()


def apply(content: bytearray, changes: list[tuple[str, int, bytes]]) -> None:
    for kind, offset, data in changes:
        if kind == "write" or (kind == "punch" and offset < len(content)):
            content.extend(bytes(max(0, offset - len(content))))
            content[offset : offset + len(data)] = data


@pytest.mark.parametrize("cluster_size", [512, 4096])
def test_no_crash_breaks_the_image(tmp_path: Path, cluster_size: int) -> None:
    """Any writes between two syncs may reach the disk or not; what was flushed is there and check finds no error."""
    rng = random.Random(cluster_size)
    image = qemu_img_create(tmp_path / "image", 2 * MIB, cluster_size=cluster_size)
    qemu_io(image, "write -P 5 0 700k")
    content = bytearray(image.read_bytes())
    file = RecordingFile.open(image, writable=True)
    file.log = log = []
    device = open_qcow2(file, OpenOptions(False, lambda name, format: pytest.fail("no backing")))
    model = device.read(0, device.size)
    # What each sector may hold after a crash: what it held at the last flush, or anything written since.
    allowed = {sector: {bytes(model[sector * 512 : sector * 512 + 512])} for sector in range(2 * MIB // 512)}
    history = [(0, {key: set(value) for key, value in allowed.items()})]
    for step in range(60):
        offset = rng.randrange(2 * MIB // 512 - 64) * 512
        length = rng.randrange(1, 64) * 512
        if step % 3 == 2:
            device.discard(offset, length)
            after = bytes(device.read(offset, length))
        else:
            after = bytes([step + 10]) * length
            device.write(offset, after)
        for sector in range(offset // 512, (offset + length) // 512):
            at = sector * 512 - offset
            allowed[sector] = allowed[sector] | {after[at : at + 512]}
        if step % 7 == 6:
            device.flush()
            state = device.read(0, device.size)
            allowed = {sector: {bytes(state[sector * 512 : sector * 512 + 512])} for sector in allowed}
            history.append((len(log), {key: set(value) for key, value in allowed.items()}))
    device.close()
    crash = tmp_path / "crash"
    for _ in range(45):
        stop = rng.randrange(len(log) + 1)
        syncs = [at for at, (kind, _, _) in enumerate(log[:stop]) if kind == "sync"]
        certain = syncs[-1] if syncs else 0
        state = bytearray(content)
        apply(state, log[:certain])
        apply(state, [change for change in log[certain:stop] if rng.random() < 0.5])
        crash.write_bytes(state)
        result = subprocess.run(["qemu-img", "check", "-f", "qcow2", crash], capture_output=True, text=True)
        assert result.returncode in (0, 3), f"crash at {stop} of {len(log)}: {result.stdout}{result.stderr}"
        # Everything since the last completed flush may be there or not, but nothing else.
        last = max(at for at, (position, _) in enumerate(history) if position <= certain or at == 0)
        fine = {sector: set(values) for sector, values in history[last][1].items()}
        shown = qemu_content(crash, "qcow2")
        later = {bytes([value]) * 512 for value in range(10, 71)} | {bytes(512)}
        for sector, values in fine.items():
            piece = bytes(shown[sector * 512 : sector * 512 + 512])
            assert piece in values or piece in later, f"sector {sector} after a crash at {stop}"


def test_damaged_images_give_errors_and_nothing_else(tmp_path: Path) -> None:
    image = written(qemu_img_create(tmp_path / "image", 8 * MIB, cluster_size=4096))
    run("qemu-img", "snapshot", "-c", "one", str(image))
    good = image.read_bytes()
    rng = random.Random(7)
    broken = tmp_path / "broken"
    tables = [
        at for at in range(0, len(good) - 4096, 4096) if any(good[at : at + 8]) and good[at : at + 1] in b"\x80\0Q"
    ]
    for _ in range(300):
        content = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            place = rng.choice((0, 0, *tables)) + rng.randrange(112)
            content[place] = rng.randrange(256)
        if rng.random() < 0.1:
            del content[rng.randrange(len(content)) :]
        broken.write_bytes(content)
        with suppress(NbdserveError, OSError), open_image(broken, format="qcow2") as device:
            if device.size <= 64 * MIB:
                assert len(device.read(0, device.size)) == device.size
                device.write(0, bytes(device.size // 2))


def patched(image: Path, offset: int, number: int) -> None:
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(number.to_bytes(8, "big"))


def number_at(image: Path, offset: int) -> int:
    return int.from_bytes(image.read_bytes()[offset : offset + 8], "big")


def test_a_damaged_entry_never_frees_a_table(tmp_path: Path) -> None:
    image = qemu_img_create(tmp_path / "image", 8 * MIB, cluster_size=4096)
    qemu_io(image, "write -P 1 0 1M")
    l1 = number_at(image, 40)
    l2 = number_at(image, l1) & 0x00FFFFFFFFFFFE00
    patched(image, l2, l1)  # guest cluster 0 claims to lie on the L1 table, shared
    before = number_at(image, l1)
    with open_image(image, format="qcow2") as device:
        device.write(0, b"y" * 4096)
        device.discard(8192, 4096)
        device.flush()
        device.flush()
        for cluster in range(300, 400):
            device.write(cluster * 4096, b"y" * 4096)
    assert number_at(image, l1) == before
    assert qemu_content(image, "qcow2")[4096:8192] == b"\1" * 4096


def test_tables_that_overlap_are_not_written(tmp_path: Path) -> None:
    image = qemu_img_create(tmp_path / "image", 8 * MIB, cluster_size=4096)
    qemu_io(image, "write -P 1 0 1M")
    l1 = number_at(image, 40)
    refcount_block = number_at(image, number_at(image, 48))
    for target in (refcount_block, l1, number_at(image, l1) & 0x00FFFFFFFFFFFE00):
        patched(image, l1 + 8, target | 1 << 63)
        before = image.read_bytes()
        with pytest.raises(NbdserveError, match="two tables claim"):
            open_image(image, format="qcow2")
        assert image.read_bytes() == before
