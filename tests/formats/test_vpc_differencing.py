"""Differencing VHDs, judged by 7-Zip (QEMU has none), and new VHDs, judged by QEMU."""

from __future__ import annotations

import random
import struct
from contextlib import suppress
from pathlib import Path

import pytest

from nbdserve.block import BlockDevice, Data
from nbdserve.errors import FormatError, OpenError
from nbdserve.formats.vpc.bitmaps import mirrored, run_of_bits, set_bits
from nbdserve.formats.vpc.create import create_image
from nbdserve.opening import open_image
from tests.conformance import check_block_device
from tests.formats import vhd_images as vhd
from tests.formats.usage import use_damaged
from tests.formats.vhdx_images import seven_zip_content
from tests.reference import needs, qemu_content, qemu_img_create

SIZE = 40 * 4096 + 512
PARENT = random.Random(0).randbytes(SIZE)


def _family(directory: Path, *, block_size: int = 4096) -> tuple[Path, Path]:
    """A parent full of bytes, and a child of it."""
    parent, child = directory / "parent.vhd", directory / "child.vhd"
    vhd.make_parent(parent, PARENT, 65536)
    vhd.make_child(child, "parent.vhd", block_size)
    return parent, child


def test_bits() -> None:
    bitmap = bytearray(3)
    set_bits(bitmap, 3, 13)
    assert bitmap == bytes([0b11111000, 0b00011111, 0])
    assert run_of_bits(bitmap, 0, 24) == (False, 3)
    assert run_of_bits(bitmap, 5, 24) == (True, 8)
    assert run_of_bits(bitmap, 5, 9) == (True, 4)
    assert run_of_bits(bitmap, 13, 24) == (False, 11)
    assert mirrored(bitmap) == bytes([0b00011111, 0b11111000, 0])
    set_bits(bitmap, 0, 24)
    assert run_of_bits(bitmap, 1, 24) == (True, 23)


@needs("7zz")
@pytest.mark.parametrize("block_size", [4096, 2 << 20])
def test_conforms(tmp_path: Path, block_size: int) -> None:
    _, child = _family(tmp_path, block_size=block_size)

    def make() -> BlockDevice:
        vhd.make_child(child, "parent.vhd", block_size)
        return vhd.open_vhd(child)

    def reopen(device: BlockDevice) -> BlockDevice:
        device.close()
        return vhd.open_vhd(child)

    def judge(model: bytearray) -> None:
        assert seven_zip_content(child) == model

    check_block_device(make, reopen, judge, examples=8)


def test_sectors_are_the_childs_or_the_parents(tmp_path: Path) -> None:
    parent, child = _family(tmp_path)
    before = parent.read_bytes()
    with vhd.open_vhd(child) as device:
        device.write(4096 + 512, b"c" * 1024)
        device.flush()
        extents = list(device.extents(4096, 4096))
        assert [(type(extent), extent.length, extent.depth) for extent in extents] == [
            (Data, 512, 1),
            (Data, 1024, 0),
            (Data, 2560, 1),
        ]
        assert device.locate(4096 + 512, 1024) is not None
        assert device.locate(4096, 1024) is None
        assert device.write_nowait(4096 + 512, b"d" * 512)
        assert not device.write_nowait(4096, b"d" * 512)
        device.zero(8192, 4096)
        assert not any(device.read(8192, 4096))
        device.discard(0, 4096)  # the parent's bytes stay
        assert device.read(0, 4096) == PARENT[:4096]
    content = child.read_bytes()
    entry = struct.unpack_from(">I", content, vhd.TABLE_OFFSET + 4)[0]
    assert content[entry * 512] == 0b01100000  # the highest bit is the first sector
    assert parent.read_bytes() == before


def test_chain_through_the_gate(tmp_path: Path) -> None:
    _, child = _family(tmp_path)
    grandchild = tmp_path / "grandchild.vhd"
    with vhd.open_vhd(child) as device:
        device.write(1000, b"c" * 100)
    vhd.make_child(grandchild, "child.vhd", 65536)
    with open_image(grandchild, format="vpc") as device:
        device.write(1050, b"g" * 100)
        expected = bytearray(PARENT)
        expected[1000:1150] = b"c" * 50 + b"g" * 100
        assert device.read(0, device.size) == expected
    (tmp_path / "elsewhere").mkdir()
    grandchild.rename(tmp_path / "elsewhere" / "grandchild.vhd")
    with pytest.raises(OpenError, match=r"parent disk: .*no such file"):
        open_image(tmp_path / "elsewhere" / "grandchild.vhd", format="vpc")


@pytest.mark.parametrize(
    ("at", "data", "words"),
    [(68, b"\1" * 16, "another disk"), (24, b"\xff\xff\xff\xff", "newer than this disk")],
)
def test_another_parent_is_refused(tmp_path: Path, at: int, data: bytes, words: str) -> None:
    parent, child = _family(tmp_path)
    content = parent.read_bytes()
    ends = vhd.seal(content[:at] + data + content[at + len(data) : 512], 64)
    parent.write_bytes(ends + content[512:-512] + ends)
    with pytest.raises(FormatError, match=words) as caught:
        vhd.open_vhd(child)
    assert "\n" not in str(caught.value)
    parent.write_bytes(b"not a VHD" * 1000)
    with pytest.raises(FormatError, match=r"parent disk: .*not a VHD"):
        vhd.open_vhd(child)


def test_crafted_paths_and_entries_reach_nothing(tmp_path: Path) -> None:
    _, child = _family(tmp_path)
    content = child.read_bytes()
    header = content[512:1536]
    far = header[:584] + struct.pack(">IIQ", 10, 0, 1 << 60) + header[600:]
    child.write_bytes(content[:512] + vhd.seal(far, 36) + content[1536:])
    with pytest.raises(FormatError, match="outside the file"):
        vhd.open_vhd(child)
    path_at = struct.unpack_from(">Q", header, 592)[0]
    entry = struct.pack(">I", path_at // 512)
    table_end = vhd.TABLE_OFFSET + 4
    child.write_bytes(content[: vhd.TABLE_OFFSET] + entry + content[table_end:] + bytes(8192) + content[:512])
    with vhd.open_vhd(child) as device, pytest.raises(OSError, match="damaged"):
        device.write(0, b"x")


def test_mutations_are_refused_or_read(tmp_path: Path) -> None:
    chosen = random.Random(5)
    _, child = _family(tmp_path)
    with vhd.open_vhd(child) as device:
        device.write(1000, b"c" * 9000)
    good = child.read_bytes()
    opened = 0
    for _ in range(100):
        mutant = bytearray(good)
        for _ in range(chosen.randint(1, 3)):
            start = chosen.choice((chosen.randrange(90), 512 + chosen.randrange(620), 1536 + chosen.randrange(200)))
            mutant[start : start + 4] = chosen.choice((chosen.randbytes(4), b"\0\0\0\xff", b"\xff" * 4, bytes(4)))
        mutant[512:1536] = vhd.seal(bytes(mutant[512:1536]), 36)
        mutant[:512] = vhd.seal(bytes(mutant[:512]), 64)
        mutant[-512:] = mutant[:512]
        child.write_bytes(mutant)
        with suppress(OpenError), vhd.open_vhd(child) as device:
            opened += 1
            assert not device.read_only
            use_damaged(device, chosen)
    assert 10 < opened < 95


# Creating


@needs("qemu-img")
@pytest.mark.parametrize("subformat", ["fixed", "dynamic"])
@pytest.mark.parametrize("force_size", [False, True])
@pytest.mark.parametrize("size", [0, 512, 8 << 20, (1 << 30) + 512, 127 << 30, 130 << 30, 2040 << 30])
def test_created_as_qemu_creates(tmp_path: Path, subformat: str, force_size: bool, size: int) -> None:
    ours, theirs = tmp_path / "ours.vhd", tmp_path / "theirs.vhd"
    create_image(ours, size, subformat=subformat, force_size=force_size)
    qemu_img_create(theirs, size, "vpc", subformat=subformat, force_size="on" if force_size else "off")
    assert ours.stat().st_size == theirs.stat().st_size
    assert _without_identity(ours) == _without_identity(theirs)
    with pytest.raises(FileExistsError):
        create_image(ours, size)


def _without_identity(path: Path) -> tuple[bytes, bytes]:
    """The start and the end of a file without what differs between any two VHDs: time stamp, ID and checksum."""
    with path.open("rb") as file:
        start = bytearray(file.read(1 << 20))
        file.seek(-512, 2)
        end = bytearray(file.read())
    start = start[: min(2048, path.stat().st_size - 512)]
    for footer in (end, start) if start.startswith(b"conectix") else (end,):
        footer[64:84] = b""
        footer[24:28] = b""
    return bytes(start), bytes(end)


@needs("qemu-img")
def test_qemu_reads_a_created_parent(tmp_path: Path) -> None:
    image = tmp_path / "a.vhd"
    vhd.make_parent(image, PARENT, 2 << 20)
    assert qemu_content(image, "vpc") == PARENT


@pytest.mark.parametrize(
    ("size", "options", "words"),
    [
        ((2040 << 30) + 512, {}, "2040 GiB"),
        (512, {"subformat": "sparse"}, "sparse"),
        (512, {"subformat": "differencing"}, "needs a parent"),
        (512, {"block_size": 4097}, "power of two"),
        (2040 << 30, {"block_size": 4096}, "larger ones"),
    ],
)
def test_what_cannot_be_created(tmp_path: Path, size: int, options: dict[str, object], words: str) -> None:
    with pytest.raises(OpenError, match=words):
        create_image(tmp_path / "a.vhd", size, **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
