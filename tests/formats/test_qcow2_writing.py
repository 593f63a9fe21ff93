"""Images written by us: QEMU's tools must find them sound, without a leak, and see the same bytes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from nbdserve.block import BlockDevice, Computed, Data, HostFile, Zero
from nbdserve.errors import FormatError
from nbdserve.formats.qcow2.create import CreateOptions, create_image
from nbdserve.formats.qcow2.writable import WritableQcow2Image
from tests.conformance import check_block_device
from tests.formats.qcow2_images import open_qcow2
from tests.reference import needs, qemu_check, qemu_content, qemu_img_create, qemu_info, qemu_io, run

pytestmark = needs("qemu-img", "qemu-io")

KiB, MiB = 1 << 10, 1 << 20


def _plain(directory: Path, **options: str | int) -> Path:
    return qemu_img_create(directory / "a.qcow2", 512 * KiB + 512, **options)


def _compressed(directory: Path, **options: str | int) -> Path:
    content = bytearray(random.Random(1).randbytes(256) * 2048)
    content[100 * KiB : 200 * KiB] = random.Random(2).randbytes(100 * KiB)
    (directory / "plain").write_bytes(content)
    image = directory / "a.qcow2"
    listed = ",".join(f"{name}={value}" for name, value in options.items())
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", listed, str(directory / "plain"), str(image))
    return image


def _overlay(directory: Path, base_size: int, **options: str | int) -> Path:
    base = qemu_img_create(directory / "base", base_size, "raw")
    qemu_io(base, f"write -P 77 0 {base_size}", "write -z 64k 40k", format="raw")
    return qemu_img_create(directory / "a.qcow2", 512 * KiB + 512, backing_file="base", backing_fmt="raw", **options)


def _with_snapshot(directory: Path, **options: str | int) -> Path:
    image = _plain(directory, **options)
    qemu_io(image, "write -P 5 0 200k", "write -z 100k 20k", "write -P 6 300k 1k")
    run("qemu-img", "snapshot", "-c", "before", str(image))
    qemu_io(image, "write -P 7 100k 50k")
    return image


CASES = {
    "small clusters": (_plain, {"cluster_size": 512, "compat": "1.1"}),
    "v2": (_plain, {"cluster_size": 4096, "compat": "0.10"}),
    "refcounts of 1 bit": (_plain, {"cluster_size": 4096, "refcount_bits": 1}),
    "refcounts of 64 bits": (_plain, {"cluster_size": 512, "refcount_bits": 64}),
    "large clusters": (_plain, {"cluster_size": 2 * MiB}),
    "preallocated": (_plain, {"cluster_size": 4096, "preallocation": "metadata"}),
    "zlib": (_compressed, {"cluster_size": 4096}),
    "zstd": (_compressed, {"cluster_size": 65536, "compression_type": "zstd"}),
    "short base": (lambda d, **o: _overlay(d, 200 * KiB, **o), {"cluster_size": 4096}),
    "long base, v2": (lambda d, **o: _overlay(d, 700 * KiB, **o), {"cluster_size": 4096, "compat": "0.10"}),
    "snapshot": (_with_snapshot, {"cluster_size": 4096}),
    "snapshot, small clusters": (_with_snapshot, {"cluster_size": 512}),
}


@pytest.mark.parametrize("case", CASES)
def test_conformance(tmp_path: Path, case: str) -> None:
    maker, options = CASES[case]
    original = maker(tmp_path, **options)
    pristine = original.read_bytes()
    image = tmp_path / "work.qcow2"
    snapshots = case.startswith("snapshot")
    before = qemu_content(original, "qcow2", "-l", "before") if snapshots else b""

    def make() -> BlockDevice:
        image.write_bytes(pristine)
        return open_qcow2(image)

    def reopen(device: BlockDevice) -> BlockDevice:
        device.close()
        return open_qcow2(image)

    def judge(model: bytearray) -> None:
        qemu_check(image)
        assert qemu_content(image, "qcow2") == model
        if snapshots:
            assert qemu_content(image, "qcow2", "-l", "before") == before

    check_block_device(make, reopen, judge, examples=8)


def test_refcounts_grow_with_the_file(tmp_path: Path) -> None:
    """With 64 refcounts a block and 64 blocks a table cluster, the table has to move again and again."""
    image = qemu_img_create(tmp_path / "a.qcow2", 16 * MiB, cluster_size=512, refcount_bits=64)
    chosen = random.Random(1)
    content = chosen.randbytes(16 * MiB)
    offsets = list(range(0, 16 * MiB, 256 * KiB))
    chosen.shuffle(offsets)
    with open_qcow2(image) as device:
        for number, offset in enumerate(offsets):
            device.write(offset, content[offset : offset + 256 * KiB])
            if number % 10 == 0:
                device.flush()
    qemu_check(image)
    assert qemu_content(image, "qcow2") == content


def test_many_more_tables_than_the_cache_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdserve.formats.qcow2.mapping._CACHE", 8 * 512)
    monkeypatch.setattr("nbdserve.formats.qcow2.refcounts._CACHE", 8 * 512)
    image = qemu_img_create(tmp_path / "a.qcow2", 8 * MiB, cluster_size=512, refcount_bits=64)
    model = bytearray(8 * MiB)
    chosen = random.Random(2)
    with open_qcow2(image) as device:
        assert isinstance(device, WritableQcow2Image)
        for number in range(1500):
            offset = chosen.randrange(8 * MiB - 4096)
            data = bytes([number & 0xFF]) * chosen.choice((100, 512, 4000))
            device.write(offset, data)
            model[offset : offset + len(data)] = data
            if number % 50 == 0:
                device.zero(offset, 100 * KiB if offset < 7 * MiB else 512)
                model[offset : offset + (100 * KiB if offset < 7 * MiB else 512)] = bytes(
                    100 * KiB if offset < 7 * MiB else 512
                )
            tables = device._mapping.tables
            assert len(tables.recent) + len(tables._older) <= 8 + 8
        assert device.read(0, device.size) == model
    qemu_check(image)
    assert qemu_content(image, "qcow2") == model


def test_discarded_space_is_given_back_and_used_again(tmp_path: Path) -> None:
    image = qemu_img_create(tmp_path / "a.qcow2", 32 * MiB)
    with open_qcow2(image) as device:
        for round in range(4):
            device.write(0, bytes([round + 1]) * 8 * MiB)
            device.flush()
            full = os.stat(image).st_blocks * 512
            device.discard(0, 8 * MiB)
            device.flush()
            assert os.stat(image).st_blocks * 512 <= full - 8 * MiB
            device.flush()
        assert image.stat().st_size < 12 * MiB
    qemu_check(image)


def test_freed_space_waits_for_those_who_look_at_it(tmp_path: Path) -> None:
    image = qemu_img_create(tmp_path / "a.qcow2", 8 * MiB)
    with open_qcow2(image) as device:
        device.write(0, b"old" * 65536)
        pin = device.pins.take()
        place = device.map(0, 65536)
        assert isinstance(place, Data)
        device.discard(0, 3 * 65536)
        device.flush()
        device.write(4 * MiB, b"new" * 65536)
        assert place.file.read(place.host_offset, 6) == b"oldold"
        device.pins.drop(pin)
        device.flush()
        device.write(5 * MiB, b"again" * 30000)
        again = device.map(5 * MiB, 65536)
        assert isinstance(again, Data)
        assert again.host_offset == place.host_offset
    qemu_check(image)


def test_nothing_is_reused_where_the_host_cannot_punch(tmp_path: Path) -> None:
    class Unpunchable(HostFile):
        def punch_hole(self, offset: int, length: int) -> bool:
            return False

    image = qemu_img_create(tmp_path / "a.qcow2", 8 * MiB)
    with open_qcow2(image, file_type=Unpunchable) as device:
        places = set()
        for round in range(5):
            device.write(0, bytes([round]) * 65536)
            extent = device.map(0, 65536)
            assert isinstance(extent, Data)
            assert extent.host_offset not in places
            places.add(extent.host_offset)
            device.discard(0, 65536)
            device.flush()
    qemu_check(image)


def test_a_snapshot_keeps_its_bytes(tmp_path: Path) -> None:
    image = _with_snapshot(tmp_path, cluster_size=65536)
    before = qemu_content(image, "qcow2", "-l", "before")
    with open_qcow2(image) as device:
        assert device.locate_writable(0, 512) is None
        device.write(0, b"x" * device.size)
        assert device.locate_writable(0, 512) is not None
        device.discard(0, device.size)
    qemu_check(image)
    assert qemu_content(image, "qcow2", "-l", "before") == before
    with open_qcow2(image, read_only=True, snapshot="before") as device:
        assert device.read(0, device.size) == before


def test_zeroing_a_terabyte_is_quick(tmp_path: Path) -> None:
    image = qemu_img_create(tmp_path / "a.qcow2", "4T")
    with open_qcow2(image) as device:
        device.write(3 << 40, b"x")
        device.zero(0, device.size)
        device.zero(0, device.size, unmap=False)
        assert device.zeroes_fast
        assert device.map(0, device.size) == Zero(512 * MiB * 6144, allocated=False)
    qemu_check(image)
    assert image.stat().st_size < 4 * MiB


def test_keeping_zeroed_space(tmp_path: Path) -> None:
    image = qemu_img_create(tmp_path / "a.qcow2", 8 * MiB)
    with open_qcow2(image) as device:
        device.write(0, b"x" * MiB)
        before = device.locate(0, MiB)
        device.zero(0, MiB, unmap=False)
        assert device.map(0, 65536) == Zero(65536, allocated=True)
        device.write(10, b"y")
        device.write(65536, b"z" * 100000)
        assert device.locate(0, 65536) == before
        assert device.read(0, 65536) == bytes(10) + b"y" + bytes(65525)
    qemu_check(image)


def test_overwriting_compressed_clusters_frees_them(tmp_path: Path) -> None:
    image = _compressed(tmp_path, cluster_size=4096)
    model = qemu_content(image, "qcow2")
    with open_qcow2(image) as device:
        assert isinstance(device.map(0, 4096), Computed)
        for offset in range(0, device.size, 3 * 4096):
            device.write(offset + 5, b"new")
            model[offset + 5 : offset + 8] = b"new"
            if offset % 7 == 0:
                device.flush()
    qemu_check(image)
    assert qemu_content(image, "qcow2") == model


def test_fresh_clusters_are_written_at_once(tmp_path: Path) -> None:
    image = _overlay(tmp_path, 256 * KiB, cluster_size=4096)
    with open_qcow2(image) as device:
        assert not device.write_nowait(400 * KiB, b"n" * 100)  # the refcounts have to be looked at first
        device.write(400 * KiB, b"w" * 100)
        assert device.write_nowait(300 * KiB + 100, b"n" * 9000)
        assert device.read(300 * KiB, 9200) == bytes(100) + b"n" * 9000 + bytes(100)
        below = device.read(200 * KiB, 8192)
        assert any(below)
        assert device.write_nowait(200 * KiB + 4000, b"n" * 200)  # the base is in the page cache
        assert device.read(200 * KiB, 8192) == below[:4000] + b"n" * 200 + below[4200:]
        device.zero(100 * KiB, 8192)
        assert device.write_nowait(100 * KiB, b"n" * 100)
        assert device.read(100 * KiB, 8192) == b"n" * 100 + bytes(8092)
    qemu_check(image)


def test_what_has_to_be_decompressed_below_is_not_copied_at_once(tmp_path: Path) -> None:
    plain = tmp_path / "plain.raw"
    plain.write_bytes(b"base" * (64 * KiB))
    run("qemu-img", "convert", "-c", "-O", "qcow2", plain, tmp_path / "base.qcow2")
    image = qemu_img_create(
        tmp_path / "a.qcow2", 512 * KiB, backing_file=str(tmp_path / "base.qcow2"), backing_fmt="qcow2"
    )
    with open_qcow2(image) as device:
        device.write(400 * KiB, b"w" * 100)
        assert not device.write_nowait(100 * KiB, b"n" * 100)
        device.write(100 * KiB, b"n" * 100)
        assert device.read(100 * KiB - 4, 108) == b"base" + b"n" * 100 + b"base"
    qemu_check(image)


_WRITER = """
import random, sys
from pathlib import Path
from tests.formats.qcow2_images import open_qcow2
device = open_qcow2(Path(sys.argv[1]))
chosen = random.Random(int(sys.argv[2]))
for number in range(1, 1 << 30):
    device.write(number % 64 * 512, number.to_bytes(4, "big") * 128)
    for _ in range(8):
        offset = 65536 + chosen.randrange(1 << 20)
        chosen.choice((device.write, device.write, lambda at, _: device.discard(at, 40000)))(offset, b"x" * 9000)
    device.flush()
    print(number, flush=True)
"""


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_a_killed_writer_leaves_what_it_has_flushed(tmp_path: Path, cluster_size: int) -> None:
    image = qemu_img_create(tmp_path / "a.qcow2", 2 * MiB, cluster_size=cluster_size)
    command = [sys.executable, "-c", _WRITER, image, str(cluster_size)]
    root = Path(__file__).parent.parent.parent
    flushed = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            flushed = int(line)
            if flushed == 40:
                writer.kill()
    assert flushed >= 40
    qemu_check(image, leaks_allowed=True)
    content = qemu_content(image, "qcow2")
    for number in range(max(1, flushed - 62), flushed + 1):
        start = number % 64 * 512
        found = int.from_bytes(content[start : start + 4], "big")
        assert found in (number, number + 64), f"{found} where {number} was flushed"


def _failing_at(moments: Iterator[int], which: int) -> type[HostFile]:
    class Failing(HostFile):
        armed = False

        def _count(self) -> None:
            if self.armed and next(moments) == which:
                raise OSError(28, os.strerror(28))

        def write(self, offset: int, data: bytes) -> None:
            self._count()
            super().write(offset, data)

        def sync(self) -> None:
            self._count()
            super().sync()

    return Failing


@pytest.mark.parametrize("which", range(12))
def test_a_flush_that_failed_is_made_good_by_the_next(tmp_path: Path, which: int) -> None:
    image = qemu_img_create(tmp_path / "a.qcow2", 4 * MiB, cluster_size=512, refcount_bits=64)
    chosen = random.Random(which)
    model = bytearray(4 * MiB)
    with open_qcow2(image, file_type=_failing_at(count(), which)) as device:
        assert isinstance(device, WritableQcow2Image)
        for number in range(8):
            offset = chosen.randrange(4 * MiB - 100 * KiB)
            device.write(offset, bytes([number + 1]) * 100 * KiB)
            model[offset : offset + 100 * KiB] = bytes([number + 1]) * 100 * KiB
            device.discard(offset, 20 * KiB)
            model[offset : offset + 20 * KiB] = device.read(offset, 20 * KiB)
            device.file.armed = True  # type: ignore[attr-defined]
            try:
                device.flush()
            except OSError as error:
                assert error.errno == 28  # noqa: PT017
                assert device.read(0, device.size) == model
            device.file.armed = False  # type: ignore[attr-defined]
        device.flush()
    qemu_check(image)
    assert qemu_content(image, "qcow2") == model


def test_threads_write_flush_and_discard_together(tmp_path: Path) -> None:
    image = qemu_img_create(tmp_path / "a.qcow2", 8 * MiB, cluster_size=4096)
    model = bytearray(8 * MiB)
    failures: list[BaseException] = []
    with open_qcow2(image) as device:

        def work(part: int) -> None:
            chosen = random.Random(part)
            try:
                for number in range(200):
                    offset = part * 2 * MiB + chosen.randrange(2 * MiB - 40000)
                    length = chosen.choice((512, 4096, 40000))
                    verb = chosen.choice(("write", "write", "nowait", "zero", "flush"))
                    data = bytes([number + 1]) * length
                    if verb == "flush":
                        device.flush()
                        continue
                    if verb == "zero":
                        device.zero(offset, length)
                        data = bytes(length)
                    elif verb == "write" or not device.write_nowait(offset, data):
                        device.write(offset, data)
                    model[offset : offset + length] = data
                    assert device.read(offset, length) == data
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures[0]
        assert device.read(0, device.size) == model
    qemu_check(image)
    assert qemu_content(image, "qcow2") == model


def test_unknown_autoclear_features_are_cleared(tmp_path: Path) -> None:
    image = qemu_img_create(tmp_path / "a.qcow2", MiB)
    run("qemu-img", "bitmap", "--add", str(image), "changes")
    with image.open("r+b") as file:
        file.seek(95)
        file.write(bytes([0x81]))
    with open_qcow2(image, read_only=True):
        assert image.read_bytes()[88:96] == bytes(7) + b"\x81"
    with open_qcow2(image):
        assert image.read_bytes()[88:96] == bytes(7) + b"\x01"  # bitmaps are kept right


def test_overlapping_tables_are_not_written(tmp_path: Path) -> None:
    image = qemu_img_create(tmp_path / "a.qcow2", MiB)
    qemu_io(image, "write -P 1 0 64k")
    content = bytearray(image.read_bytes())
    l1_offset = int.from_bytes(content[40:48], "big")
    content[l1_offset : l1_offset + 8] = (1 << 63 | l1_offset).to_bytes(8, "big")
    image.write_bytes(content)
    with pytest.raises(FormatError, match="two tables claim"):
        open_qcow2(image)


def test_guests_do_not_write_to_tables(tmp_path: Path) -> None:
    image = qemu_img_create(tmp_path / "a.qcow2", MiB)
    qemu_io(image, "write -P 1 0 64k")
    content = bytearray(image.read_bytes())
    l1_offset = int.from_bytes(content[40:48], "big")
    l2_offset = int.from_bytes(content[l1_offset : l1_offset + 8], "big") & ((1 << 56) - 1)
    content[l2_offset : l2_offset + 8] = (1 << 63 | l1_offset).to_bytes(8, "big")
    image.write_bytes(content)
    with open_qcow2(image) as device:
        assert device.locate_writable(0, 512) is None
        with pytest.raises(OSError, match="lets the guest write to tables"):
            device.write(0, b"x" * 512)
        with pytest.raises(OSError, match="lets the guest write to tables"):
            device.zero(0, 65536)
    assert image.read_bytes()[: l2_offset + 65536] == content[: l2_offset + 65536]


def test_tables_are_not_freed_through_shared_entries(tmp_path: Path) -> None:
    image = qemu_img_create(tmp_path / "a.qcow2", MiB)
    qemu_io(image, "write -P 1 0 64k")
    content = bytearray(image.read_bytes())
    l1_offset = int.from_bytes(content[40:48], "big")
    l2_offset = int.from_bytes(content[l1_offset : l1_offset + 8], "big") & ((1 << 56) - 1)
    content[l2_offset : l2_offset + 8] = l1_offset.to_bytes(8, "big")
    image.write_bytes(content)
    with open_qcow2(image) as device:
        device.write(0, b"x" * 65536)
        device.flush()
        device.flush()
        device.write(65536, b"y" * 512 * KiB)
    qemu_check(image, leaks_allowed=True)
    assert qemu_content(image, "qcow2")[:65536] == b"x" * 65536


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 * MiB])
def test_new_images(tmp_path: Path, version: int, cluster_size: int) -> None:
    base = qemu_img_create(tmp_path / "base", 3 * MiB, "raw")
    qemu_io(base, "write -P 9 0 3M", format="raw")
    image = tmp_path / "a.qcow2"
    options = CreateOptions(cluster_size=cluster_size, version=version, backing="base", backing_format="raw")
    create_image(image, 1 << 34, options)
    qemu_check(image)
    info = qemu_info(image)
    assert info["virtual-size"] == 1 << 34
    assert info["cluster-size"] == cluster_size
    assert (info["backing-filename"], info["backing-filename-format"]) == ("base", "raw")
    assert info["format-specific"]["data"]["compat"] == ("0.10" if version == 2 else "1.1")
    with open_qcow2(image) as device:
        device.write((1 << 34) - 5, b"hello")
        assert device.read(0, 3 * MiB) == b"\x09" * 3 * MiB
    qemu_check(image)
