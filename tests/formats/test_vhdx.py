"""VHDX images against qemu-img and 7-Zip."""

from __future__ import annotations

import errno
import random
import uuid
from pathlib import Path

import pytest

from nbdserve.block import BlockDevice, Data, HostFile, Zero
from nbdserve.errors import FormatError, OpenError
from nbdserve.formats.vhdx import MIB
from nbdserve.formats.vhdx.checksum import crc32c
from nbdserve.formats.vhdx.create import create_image
from nbdserve.formats.vhdx.headers import Headers
from nbdserve.opening import open_image
from tests.conformance import check_block_device
from tests.formats import vhdx_images as vhdx
from tests.formats.usage import scribble, scribble_in_threads
from tests.reference import needs, qemu_content, qemu_img_create, qemu_info, qemu_io, run


def qemu_check(image: Path) -> None:
    assert "No errors" in run("qemu-img", "check", "-f", "vhdx", image)


def test_checksum() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    chosen = random.Random(0)
    for length in (*range(40), 4096, 65536):
        data = chosen.randbytes(length)
        state = 0xFFFFFFFF
        for byte in data:
            state ^= byte
            for _ in range(8):
                state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
        assert crc32c(data) == state ^ 0xFFFFFFFF


# Content


@needs("qemu-img", "qemu-io")
@pytest.mark.parametrize(
    ("subformat", "block_size", "zero"), [("dynamic", "1M", "on"), ("dynamic", "8M", "off"), ("fixed", "4M", "on")]
)
def test_reads_what_qemu_wrote(tmp_path: Path, subformat: str, block_size: str, zero: str) -> None:
    options = {"subformat": subformat, "block_size": block_size, "block_state_zero": zero, "log_size": "2M"}
    image = qemu_img_create(tmp_path / "a.vhdx", "10M", "vhdx", **options)
    qemu_io(image, "write -P 1 100k 3k", "write -P 2 5M 3M", "write -P 3 9215k 1k", format="vhdx")
    before = image.read_bytes()
    with open_image(image, read_only=True) as device:
        assert device.size == 10 * MIB
        assert device.read(0, device.size) == qemu_content(image, "vhdx")
    assert image.read_bytes() == before


@needs("qemu-img", "qemu-io")
@pytest.mark.parametrize("subformat", ["fixed", "dynamic"])
def test_qemu_reads_what_was_written_here(tmp_path: Path, subformat: str) -> None:
    image = qemu_img_create(tmp_path / "a.vhdx", "10M", "vhdx", subformat=subformat, block_size="4M")
    qemu_io(image, "write -P 1 1M 2M", format="vhdx")
    with vhdx.open_vhdx(image) as device:
        model = scribble(device, random.Random(2))
        device.discard(4 * MIB, 4 * MIB)
        model[4 * MIB : 8 * MIB] = device.read(4 * MIB, 4 * MIB)
        assert device.read(0, device.size) == model
    qemu_check(image)
    assert qemu_content(image, "vhdx") == model
    qemu_io(image, "write -P 7 9M 512", "write -P 8 5M 512", format="vhdx")  # QEMU can go on where we left
    model[9 * MIB : 9 * MIB + 512] = b"\7" * 512
    model[5 * MIB : 5 * MIB + 512] = b"\10" * 512
    with vhdx.open_vhdx(image) as device:
        assert device.read(0, device.size) == model


@needs("qemu-img", "7zz")
@pytest.mark.parametrize("subformat", ["fixed", "dynamic", "differencing"])
@pytest.mark.parametrize("sector_size", [512, 4096])
def test_conforms(tmp_path: Path, subformat: str, sector_size: int) -> None:
    image, parent = tmp_path / "a.vhdx", tmp_path / "parent.vhdx"
    size = 3 * MIB + 10 * sector_size  # 7-Zip refuses odd numbers of sectors
    if subformat == "differencing":
        create_image(parent, size - 8192, block_size=2 * MIB, sector_size=sector_size)
        with vhdx.open_vhdx(parent) as device:
            device.write(MIB // 2, random.Random(0).randbytes(MIB))

    def make() -> BlockDevice:
        if subformat == "differencing":
            vhdx.make_child(image, "parent.vhdx")
        else:
            image.unlink(missing_ok=True)
            create_image(image, size, subformat=subformat, block_size=MIB, sector_size=sector_size)
        return vhdx.open_vhdx(image)

    def reopen(device: BlockDevice) -> BlockDevice:
        device.close()
        return vhdx.open_vhdx(image)

    def judge(model: bytearray) -> None:
        if subformat != "differencing" and sector_size == 512:
            qemu_check(image)
            assert qemu_content(image, "vhdx") == model
        else:  # QEMU has no differencing disks, and takes the size of disks with large sectors wrong
            assert vhdx.seven_zip_content(image) == model

    check_block_device(make, reopen, judge, examples=8)


def test_blocks_are_given_back_and_used_again(tmp_path: Path) -> None:
    image = tmp_path / "a.vhdx"
    create_image(image, 8 * MIB, block_size=MIB)
    with vhdx.open_vhdx(image) as device:
        for number in range(1, 9):
            device.write(0, bytes([number]) * 4 * MIB)
            device.flush()
            device.discard(0, 4 * MIB)
            assert device.map(0, 8 * MIB) == Zero(4 * MIB, allocated=False)
            device.flush()
        device.write(5 * MIB, b"x")
        assert device.read(5 * MIB, MIB) == b"x" + bytes(MIB - 1)
    assert image.stat().st_size <= vhdx.BLOCKS + 8 * MIB
    with vhdx.open_vhdx(image) as device:  # places that were free when it was closed are found again
        device.write(0, b"y" * 4 * MIB)
        assert device.read(MIB, 100) == b"y" * 100
    assert image.stat().st_size <= vhdx.BLOCKS + 8 * MIB


def test_a_freed_block_waits_for_those_who_look_at_it(tmp_path: Path) -> None:
    image = tmp_path / "a.vhdx"
    create_image(image, 4 * MIB, block_size=MIB)
    with vhdx.open_vhdx(image) as device:
        device.write(0, b"a" * MIB)
        device.flush()
        pin = device.pins.take()
        seen = device.map(0, MIB)
        assert isinstance(seen, Data)
        device.discard(0, MIB)
        device.flush()
        device.write(MIB, b"b" * MIB)
        assert seen.file.read(seen.host_offset, MIB) == b"a" * MIB
        device.pins.drop(pin)
        device.flush()
        device.write(2 * MIB, b"c" * MIB)
        assert device.map(2 * MIB, MIB) == Data(MIB, device.file, seen.host_offset)


def test_fast_paths(tmp_path: Path) -> None:
    image, child = tmp_path / "a.vhdx", tmp_path / "b.vhdx"
    create_image(image, 4 * MIB, block_size=MIB)
    with vhdx.open_vhdx(image) as device:
        device.write(MIB, b"a" * MIB)
    with vhdx.open_vhdx(image) as device:
        assert device.locate(MIB, 512) is None  # its table is not in memory
        assert device.map_nowait(MIB, 512) is None
        place = device.map(MIB, 512)
        assert isinstance(place, Data)
        assert device.map_nowait(MIB, 512) == place
        assert device.locate(MIB, 512) == (place.file, place.host_offset)
        assert not device.write_nowait(MIB, b"b" * 4096)  # the headers must be changed first
        assert image.read_bytes()[place.host_offset] == ord("a")
        device.write(MIB, b"b")
        assert device.write_nowait(MIB, b"c" * 4096)
        assert device.locate(2 * MIB - 256, 512) is None  # crosses into another block
    vhdx.make_child(child, "a.vhdx", block_size=2 * MIB)
    with vhdx.open_vhdx(child) as device:
        device.write(MIB + 512, b"d" * 1024)
        assert device.locate(MIB + 512, 1024) is not None
        assert device.locate(MIB + 512, 1025) is None
        assert not device.write_nowait(MIB, b"e" * 512)
        assert device.write_nowait(MIB + 1024, b"f" * 512)
        assert device.read(MIB, 2048) == b"c" * 512 + b"d" * 512 + b"f" * 512 + b"c" * 512


def test_headers_change_before_the_first_write_only(tmp_path: Path) -> None:
    image = tmp_path / "a.vhdx"
    create_image(image, 4 * MIB)

    def header() -> object:
        file = HostFile.open(image, writable=False)
        current = Headers(file).current
        file.close()
        return current

    first = header()
    vhdx.open_vhdx(image).close()
    assert header() == first  # opened for writing, but not changed
    with vhdx.open_vhdx(image) as device:
        device.write(0, b"x")
        second = header()
        device.write(5, b"y")
        device.discard(0, 100)
        device.flush()
        assert header() == second
    assert second.sequence == first.sequence + 2  # type: ignore[attr-defined]
    assert second.data_write_guid != first.data_write_guid  # type: ignore[attr-defined]
    assert second.file_write_guid != first.file_write_guid  # type: ignore[attr-defined]


class FailingFile(HostFile):
    """A host file that has no room for data."""

    full = False

    def write_all(self, offset: int, pieces: object) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "no room")
        super().write_all(offset, pieces)  # type: ignore[arg-type]


def test_a_failed_write_leaves_the_image_as_it_was(tmp_path: Path) -> None:
    image = tmp_path / "a.vhdx"
    create_image(image, 4 * MIB, block_size=MIB)
    with vhdx.open_vhdx(image, file_type=FailingFile) as device:
        device.write(0, b"a" * 1000)
        device.file.full = True  # type: ignore[attr-defined]
        for _ in range(20):
            with pytest.raises(OSError, match="no room"):
                device.write(MIB, b"b" * 1000)
        assert not any(device.read(MIB, MIB))
        device.file.full = False  # type: ignore[attr-defined]
        device.write(2 * MIB, b"c" * 1000)
    with vhdx.open_vhdx(image) as device:
        assert device.read(2 * MIB, 1001) == b"c" * 1000 + b"\0"
    assert image.stat().st_size == vhdx.BLOCKS + 2 * MIB  # the place of the failed writes was used again


@needs("qemu-img")
def test_threads_that_write_flush_and_zero_at_once(tmp_path: Path) -> None:
    image = tmp_path / "a.vhdx"
    share, threads = MIB + 512, 4  # neighbours share a block
    create_image(image, share * threads, block_size=MIB)
    with vhdx.open_vhdx(image) as device:
        model = scribble_in_threads(device, threads, steps=80, flush_every=20, lengths=(1, 600, 9000, MIB))
    qemu_check(image)
    assert qemu_content(image, "vhdx") == model


# Creating


@needs("qemu-img")
@pytest.mark.parametrize(
    ("subformat", "size"),
    [
        *(("dynamic", size) for size in (512, 3 * MIB + 512, 200 << 30, 64 << 40)),
        *(("fixed", size) for size in (512, 3 * MIB + 512, 200 << 30)),
    ],
)
def test_qemu_takes_what_was_created(tmp_path: Path, subformat: str, size: int) -> None:
    image = tmp_path / "a.vhdx"
    create_image(image, size, subformat=subformat, log_size=3 * MIB)
    qemu_check(image)
    theirs = qemu_info(qemu_img_create(tmp_path / "b.vhdx", size, "vhdx", subformat="dynamic"), "vhdx")
    ours = qemu_info(image, "vhdx")
    assert (ours["virtual-size"], ours["cluster-size"]) == (size, theirs["cluster-size"])
    with pytest.raises(FileExistsError):
        create_image(image, size)
    with vhdx.open_vhdx(image, read_only=True) as device:
        assert device.size == size
        assert device.read(max(0, size - 512), min(size, 512)) == bytes(min(size, 512))


@needs("qemu-img")
@pytest.mark.parametrize("subformat", ["fixed", "dynamic"])
def test_convert_there_and_back(tmp_path: Path, subformat: str) -> None:
    raw, theirs, ours = tmp_path / "a.raw", tmp_path / "b.vhdx", tmp_path / "c.vhdx"
    content = bytearray(9 * MIB)
    content[MIB : 4 * MIB] = random.Random(0).randbytes(3 * MIB)
    content[-512:] = b"e" * 512
    raw.write_bytes(content)
    run("qemu-img", "convert", "-f", "raw", "-O", "vhdx", "-o", f"subformat={subformat}", raw, theirs)
    create_image(ours, len(content), subformat=subformat, block_size=2 * MIB)
    with vhdx.open_vhdx(theirs, read_only=True) as source, vhdx.open_vhdx(ours) as target:
        assert source.read(0, source.size) == content
        position = 0
        for extent in source.extents(0, source.size):
            if not isinstance(extent, Zero):
                target.write(position, source.read(position, extent.length))
            position += extent.length
    run("qemu-img", "compare", "-f", "vhdx", "-F", "raw", ours, raw)


@pytest.mark.parametrize(
    ("size", "options", "words"),
    [
        (1, {}, "whole sectors"),
        ((64 << 40) + 512, {}, "64 TiB"),
        (512, {"sector_size": 4096}, "whole sectors"),
        (512, {"sector_size": 1024}, "512 or 4096"),
        (512, {"block_size": MIB + 512}, "power of two"),
        (512, {"block_size": 512 * MIB}, "power of two"),
        (512, {"log_size": 4 << 30}, "log"),
        (512, {"subformat": "sparse"}, "sparse"),
        (512, {"subformat": "differencing"}, "needs a parent"),
        (512, {"parent": "a", "parent_guid": uuid.uuid4()}, "others have none"),
    ],
)
def test_what_cannot_be_created(tmp_path: Path, size: int, options: dict[str, object], words: str) -> None:
    with pytest.raises(OpenError, match=words):
        create_image(tmp_path / "a.vhdx", size, **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


# The largest disks


def test_a_table_of_half_a_gigabyte_is_read_in_pages(tmp_path: Path) -> None:
    image = tmp_path / "a.vhdx"
    size = 64 << 40
    create_image(image, size, block_size=MIB)
    with vhdx.open_vhdx(image) as device:
        for number in range(1, 400):  # more pages than are kept
            device.write(number * (size // 400), number.to_bytes(2, "big"))
        assert len(device._table.pages) <= 256
        for number in range(1, 400):
            assert device.read(number * (size // 400), 2) == number.to_bytes(2, "big")
        device.flush()
        assert device.read(size // 400, 2) == b"\0\1"
        assert sum(extent.length for extent in device.extents(0, 100 << 30)) == 100 << 30
    with vhdx.open_vhdx(image, read_only=True) as device:
        assert device.read(399 * (size // 400), 2) == (399).to_bytes(2, "big")


# Parents


def test_chain_of_three(tmp_path: Path) -> None:
    names = ["a.vhdx", "b.vhdx", "c.vhdx"]
    create_image(tmp_path / "a.vhdx", 4 * MIB, block_size=MIB)
    model = bytearray(4 * MIB)
    for number, name in enumerate(names):
        if number:
            vhdx.make_child(tmp_path / name, names[number - 1], block_size=MIB << number)
        with vhdx.open_vhdx(tmp_path / name) as device:
            offset = number * 700_001
            device.write(offset, bytes([number + 1]) * MIB)
            model[offset : offset + MIB] = bytes([number + 1]) * MIB
    with open_image(tmp_path / "c.vhdx", format="vhdx") as device:
        assert device.read(0, device.size) == model
        assert [extent.depth for extent in device.extents(0, MIB)] == [2, 1]
        device.zero(MIB, MIB)
        device.discard(2 * MIB, 100)
        assert not any(device.read(MIB, MIB))


def test_zeroed_blocks_hide_the_parent(tmp_path: Path) -> None:
    create_image(tmp_path / "a.vhdx", 4 * MIB)
    with vhdx.open_vhdx(tmp_path / "a.vhdx") as device:
        device.write(0, b"p" * 4 * MIB)
    vhdx.make_child(tmp_path / "b.vhdx", "a.vhdx")
    with vhdx.open_vhdx(tmp_path / "b.vhdx") as device:
        device.zero(MIB, 2 * MIB)
        device.discard(100, 1000)  # less than a block, and nothing of it is there: stays
        device.write(MIB + 512, b"x")
    with vhdx.open_vhdx(tmp_path / "b.vhdx") as device:
        assert device.read(0, MIB) == b"p" * MIB
        assert device.read(MIB, 2 * MIB) == bytes(512) + b"x" + bytes(2 * MIB - 513)
    assert (tmp_path / "b.vhdx").stat().st_size <= vhdx.BLOCKS + 2 * MIB


def test_a_changed_parent_is_refused(tmp_path: Path) -> None:
    create_image(tmp_path / "a.vhdx", 4 * MIB)
    vhdx.make_child(tmp_path / "b.vhdx", "a.vhdx")
    vhdx.open_vhdx(tmp_path / "b.vhdx").close()
    with vhdx.open_vhdx(tmp_path / "a.vhdx") as device:
        device.write(0, b"x")
    with pytest.raises(FormatError, match=r"'a\.vhdx' has been changed"):
        vhdx.open_vhdx(tmp_path / "b.vhdx")
    (tmp_path / "a.vhdx").unlink()
    with pytest.raises(OpenError, match=r"parent disk: .*no such file"):
        vhdx.open_vhdx(tmp_path / "b.vhdx")


def test_parents_are_found_by_windows_paths(tmp_path: Path) -> None:
    from nbdserve.formats.vpc.parents import local_names

    assert local_names([r".\a\b.vhdx"], []) == ["a/b.vhdx"]
    assert local_names([r"..\a.vhdx"], [r"\\?\Volume{1}\x\p.vhdx", r"d:\x\p.vhdx", "/srv/q.vhdx"]) == [
        "../a.vhdx",
        "p.vhdx",
        "/srv/q.vhdx",
        "q.vhdx",
    ]
