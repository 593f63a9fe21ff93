"""qcow2 images encrypted with LUKS: QEMU and we see the same bytes, alone, in chains, with snapshots, after crashes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nbdserve.block import BlockDevice, Computed, Zero
from nbdserve.errors import OpenError, ReadOnly, Unsupported
from nbdserve.formats.luks.create import HEADER_SIZE, build_header
from nbdserve.formats.luks.create import create_image as create_luks
from nbdserve.formats.qcow2.create import CreateOptions, create_image
from nbdserve.formats.qcow2.resizing import resize
from nbdserve.formats.qcow2.snapshots import apply_snapshot, create_snapshot
from nbdserve.formats.qcow2.writable import WritableQcow2Image
from tests.conformance import check_block_device
from tests.formats import luks_images as luks
from tests.formats import qcow2_images
from tests.formats.crashes import crash_everywhere
from tests.formats.qcow2_crashes import Recorder
from tests.formats.usage import scribble, scribble_in_threads
from tests.reference import needs, run

pytestmark = needs("qemu-img", "qemu-io", "module:cryptography")

KIB, MIB = 1 << 10, 1 << 20
SIZE = 300 * KIB + 512


def open_qcow2(path: Path, *, read_only: bool = False, **options) -> BlockDevice:
    return qcow2_images.open_qcow2(path, read_only=read_only, passphrase=luks.passphrase, **options)


def made(path: Path, size: int = SIZE, **options) -> Path:
    """An image made here, whose passphrase is tried quickly."""
    create_image(path, size, CreateOptions(luks_header=build_header(luks.passphrase, milliseconds=1), **options))
    return path


def _over_a_raw_base(directory: Path) -> Path:
    (directory / "base").write_bytes(random.Random(1).randbytes(200 * KIB))
    return made(directory / "a.qcow2", cluster_size=4096, backing="base", backing_format="raw")


def _over_an_encrypted_base(directory: Path) -> Path:
    base = made(directory / "base", 200 * KIB)
    luks.qemu_io_on(base, "write -P 77 0 200k", "write -z 64k 40k", format="qcow2")
    return made(directory / "a.qcow2", cluster_size=4096, backing="base", backing_format="qcow2")


def _with_snapshot(directory: Path) -> Path:
    image = made(directory / "a.qcow2", cluster_size=4096)
    luks.qemu_io_on(image, "write -P 5 0 200k", "write -z 100k 20k", format="qcow2")
    with open_qcow2(image) as device:
        assert isinstance(device, WritableQcow2Image)
        create_snapshot(device, "before")
    luks.qemu_io_on(image, "write -P 7 100k 50k", format="qcow2")
    return image


CASES = {
    "large clusters": lambda d: made(d / "a.qcow2"),
    "small clusters": lambda d: made(d / "a.qcow2", cluster_size=512),
    "v2": lambda d: made(d / "a.qcow2", cluster_size=4096, version=2),
    "subclusters": lambda d: made(d / "a.qcow2", extended_l2=True, cluster_size=16384),
    "raw base": _over_a_raw_base,
    "encrypted base": _over_an_encrypted_base,
    "snapshot": _with_snapshot,
}

BELOW = {
    "raw base": ",backing.driver=raw,backing.file.filename={base}",
    "encrypted base": ",backing.driver=qcow2,backing.encrypt.key-secret=s,backing.file.filename={base}",
}


@pytest.mark.parametrize("case", CASES)
def test_conformance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    luks.remember_keys(monkeypatch)
    pristine = CASES[case](tmp_path).read_bytes()
    image = tmp_path / "work.qcow2"
    more = BELOW.get(case, "").format(base=tmp_path / "base")

    def make() -> BlockDevice:
        image.write_bytes(pristine)
        return open_qcow2(image)

    def reopen(device: BlockDevice) -> BlockDevice:
        device.close()
        return open_qcow2(image)

    def judge(model: bytearray) -> None:
        luks.qemu_check_of(image, more)
        assert luks.qemu_content_of(image, "qcow2", more) == model

    check_block_device(make, reopen, judge, examples=3)


def test_qemu_writes_and_we_read(tmp_path: Path) -> None:
    image = luks.qemu_create(tmp_path / "a.qcow2", 4 * MIB, "qcow2")
    luks.qemu_io_on(image, "write -P 7 100k 3M", "write -P 8 1M 512", "write -z 2M 128k", format="qcow2")
    with open_qcow2(image, read_only=True) as device:
        assert device.read(0, 4 * MIB) == luks.qemu_content_of(image, "qcow2")
        assert device.read(MIB - 512, 1024) == b"\7" * 512 + b"\x08" * 512
        assert isinstance(device.map(0, 4 * MIB), Zero)
        assert isinstance(device.map(MIB, 4096), Computed)
        assert device.locate(MIB, 512) is None
    with open_qcow2(image) as device:
        model = scribble(device, random.Random(1))
    luks.qemu_check_of(image)
    assert luks.qemu_content_of(image, "qcow2") == model


def test_nothing_is_written_in_the_clear(tmp_path: Path) -> None:
    words = b"the guest's secret" * 100
    for number, options in enumerate(({}, {"cluster_size": 512}, {"extended_l2": True}, {"data_file": "data"})):
        image = made(tmp_path / f"{number}.qcow2", MIB, **options)
        with open_qcow2(image) as device:
            device.write(1000, words)
            device.flush()
            assert not device.write_nowait(100, words)
            device.write(700 * KIB, words)
            device.write(1500, words[:40])
            assert device.read(1000, 500) == words[:500]
            assert device.locate(1000, 16) is None
            assert device.locate_writable(1000, 16) is None
        for file in tmp_path.iterdir():
            assert words[:18] not in file.read_bytes()


def test_with_a_data_file(tmp_path: Path) -> None:
    image = made(tmp_path / "a.qcow2", MIB, data_file="data")
    more = f",data-file.driver=file,data-file.filename={tmp_path / 'data'}"
    luks.qemu_io_on(image, "write -P 7 100k 300k", format="qcow2", more=more)
    with open_qcow2(image) as device:
        assert device.read(99 * KIB, 2 * KIB) == bytes(KIB) + b"\7" * KIB
        model = scribble(device, random.Random(2))
    assert luks.qemu_content_of(image, "qcow2", more) == model


def test_snapshots(tmp_path: Path) -> None:
    image = _with_snapshot(tmp_path)
    with open_qcow2(image, snapshot="before") as device:
        before = device.read(0, device.size)
    assert before[90 * KIB : 101 * KIB] == b"\5" * 10 * KIB + bytes(KIB)
    with open_qcow2(image) as device:
        model = scribble(device, random.Random(3))
    assert luks.qemu_content_of(image, "qcow2") == model
    with open_qcow2(image) as device:
        assert isinstance(device, WritableQcow2Image)
        apply_snapshot(device, "before")
        assert device.read(0, device.size) == before
    luks.qemu_check_of(image)
    assert luks.qemu_content_of(image, "qcow2") == before


def test_another_length(tmp_path: Path) -> None:
    image = made(tmp_path / "a.qcow2", SIZE)
    with open_qcow2(image) as device:
        assert isinstance(device, WritableQcow2Image)
        device.write(0, b"x" * SIZE)
        resize(device, 900 * KIB)
        assert device.read(0, 900 * KIB) == b"x" * SIZE + bytes(900 * KIB - SIZE)
        resize(device, 100 * KIB)
        resize(device, 200 * KIB)
        model = device.read(0, 200 * KIB)
        assert model == b"x" * 100 * KIB + bytes(100 * KIB)
    luks.qemu_check_of(image)
    assert luks.qemu_content_of(image, "qcow2") == model


def test_threads_that_share_sectors(tmp_path: Path) -> None:
    image = made(tmp_path / "a.qcow2", 4 * 20_011 // 512 * 512)
    with open_qcow2(image) as device:
        model = scribble_in_threads(device, 4, steps=80, flush_every=20, lengths=(1, 100, 600, 9000))
        assert device.read(0, device.size) == model
    luks.qemu_check_of(image)
    assert luks.qemu_content_of(image, "qcow2") == model


@pytest.mark.parametrize("options", [{"cluster_size": 512}, {"extended_l2": True, "cluster_size": 16384}], ids=str)
def test_no_crash_corrupts_loses_or_invents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options) -> None:
    luks.remember_keys(monkeypatch)
    image = made(tmp_path / "a.qcow2", 32 * KIB, **options)

    def recorded(path: Path) -> tuple[BlockDevice, Recorder]:
        device = open_qcow2(path, file_type=Recorder)
        file = device.file  # type: ignore[attr-defined]
        assert isinstance(file, Recorder)
        return device, file

    def reopen(path: Path, read_only: bool) -> BlockDevice:
        return open_qcow2(path, read_only=read_only)

    def judge(path: Path) -> None:
        run("qemu-img", "check", "-r", "leaks", *luks.as_qemu_opens(path, "qcow2"))

    assert crash_everywhere(image, recorded, reopen, judge, 1) > 100


# What is refused


def test_passphrases(tmp_path: Path) -> None:
    image = made(tmp_path / "a.qcow2", MIB)
    before = image.read_bytes()
    for read_only in (True, False):
        with pytest.raises(OpenError, match="give its passphrase with --passphrase-file"):
            qcow2_images.open_qcow2(image, read_only=read_only)
        with pytest.raises(OpenError, match="does not open it"):
            qcow2_images.open_qcow2(image, read_only=read_only, passphrase=lambda: b"x")
    assert image.read_bytes() == before


def test_a_base_whose_passphrase_is_missing(tmp_path: Path) -> None:
    create_luks(tmp_path / "base", MIB, luks.passphrase, milliseconds=1)
    create_image(tmp_path / "a.qcow2", MIB, CreateOptions(backing="base", backing_format="luks"))
    with pytest.raises(OpenError, match="base: is encrypted"):
        qcow2_images.open_qcow2(tmp_path / "a.qcow2")


def test_over_a_luks_base(tmp_path: Path) -> None:
    create_luks(tmp_path / "base", MIB, luks.passphrase, milliseconds=1)
    luks.qemu_io_on(tmp_path / "base", "write -P 3 0 1M")
    create_image(tmp_path / "a.qcow2", MIB, CreateOptions(backing="base", backing_format="luks"))
    with open_qcow2(tmp_path / "a.qcow2") as device:
        assert device.read(0, MIB) == b"\3" * MIB
        device.write(1000, b"x" * 100)
        assert device.read(900, 300) == b"\3" * 100 + b"x" * 100 + b"\3" * 100


def test_the_old_way_to_encrypt(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    options = "encrypt.format=aes,encrypt.key-secret=s"
    run("qemu-img", "create", "-q", "-f", "qcow2", *luks.SECRET, "-o", options, image, "1M")
    with pytest.raises(Unsupported, match="old way"):
        open_qcow2(image)


def test_compressed_writing(tmp_path: Path) -> None:
    with open_qcow2(made(tmp_path / "a.qcow2")) as device:
        assert isinstance(device, WritableQcow2Image)
        with pytest.raises(ReadOnly):
            device.write_compressed(0, bytes(65536))


@pytest.mark.parametrize("options", [{"preallocation": "metadata"}, {"data_file": "data", "data_file_raw": True}])
def test_what_does_not_go_together(tmp_path: Path, options) -> None:
    with pytest.raises(OpenError, match="exclude each other"):
        made(tmp_path / "a.qcow2", **options)
    assert not list(tmp_path.iterdir())


def test_a_guest_cannot_reach_the_luks_header(tmp_path: Path) -> None:
    image = made(tmp_path / "a.qcow2", cluster_size=65536)
    with open_qcow2(image) as device:
        device.write(0, b"x" * 512)
    content = bytearray(image.read_bytes())
    place = content.index(b"LUKS\xba\xbe")
    l1 = int.from_bytes(content[40:48], "big")
    l2 = int.from_bytes(content[l1 : l1 + 8], "big") & (1 << 56) - 512
    content[l2 : l2 + 8] = (1 << 63 | place).to_bytes(8, "big")
    image.write_bytes(content)
    with open_qcow2(image) as device, pytest.raises(OSError, match="lets the guest write to tables"):
        device.write(0, b"y" * 512)
    assert image.read_bytes()[place : place + HEADER_SIZE] == content[place : place + HEADER_SIZE]


def test_the_header_of_version_2_is_not_for_qcow2(tmp_path: Path) -> None:
    image = made(tmp_path / "a.qcow2")
    content = bytearray(image.read_bytes())
    content[content.index(b"LUKS\xba\xbe") + 7] = 2
    image.write_bytes(content)
    with pytest.raises(OpenError, match="no copy whose checksum is right"):
        open_qcow2(image)
