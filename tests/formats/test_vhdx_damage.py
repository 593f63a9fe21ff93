"""VHDX images that are damaged, or made to do harm: one line, or bytes of the right length."""

from __future__ import annotations

import errno
import random
import uuid
from contextlib import suppress
from pathlib import Path

import pytest

from nbdserve.errors import FormatError, OpenError, Unsupported
from nbdserve.formats.vhdx import MIB
from nbdserve.formats.vhdx.create import create_image
from nbdserve.formats.vhdx.layout import BAT, FILE_PARAMETERS
from tests.formats import vhdx_images as vhdx
from tests.formats.usage import use_damaged

REGIONS = 16  # where the entries begin in the region table
ITEMS = 32  # and in the metadata table
VALUES = vhdx.METADATA + (64 << 10)  # block size, flags, disk size, page 83, sector sizes


def _image(path: Path, *, differencing: bool = False) -> Path:
    if differencing:
        create_image(path.with_name("parent.vhdx"), 4 * MIB, block_size=MIB)
        vhdx.make_child(path, "parent.vhdx")
    else:
        create_image(path, 4 * MIB, block_size=MIB)
    with vhdx.open_vhdx(path) as device:
        device.write(100, b"x" * MIB)
    return path


def number(value: int, length: int = 8) -> bytes:
    return value.to_bytes(length, "little")


@pytest.mark.parametrize(
    ("place", "at", "data", "error", "words"),
    [
        (0, None, b"vhdxfilf", FormatError, "not a VHDX"),
        (192 << 10, 8, number(2048, 4), FormatError, "2048 entries"),
        (192 << 10, REGIONS, uuid.UUID(int=7).bytes_le, Unsupported, "needs the region"),
        (192 << 10, REGIONS + 16, number(5), FormatError, "whole MiB inside"),
        (192 << 10, REGIONS + 16, number(0), FormatError, "whole MiB inside"),
        (192 << 10, REGIONS + 16, number(1 << 63), FormatError, "whole MiB inside"),
        (192 << 10, REGIONS + 16, number(vhdx.METADATA), FormatError, "overlap"),
        (192 << 10, REGIONS + 16, number(vhdx.LOG), FormatError, "overlap"),
        (192 << 10, REGIONS + 24, number(0, 4), FormatError, "whole MiB inside"),
        (192 << 10, REGIONS + 32, BAT.bytes_le, FormatError, "named twice"),
        (192 << 10, 8, number(1, 4), FormatError, "no metadata region"),
        (vhdx.METADATA, None, b"metadatb", FormatError, "no metadata table"),
        (vhdx.METADATA + 10, None, number(2048, 2), FormatError, "2048 entries"),
        (vhdx.METADATA + ITEMS, None, uuid.UUID(int=7).bytes_le, Unsupported, "needs the metadata item"),
        (vhdx.METADATA + ITEMS + 32, None, FILE_PARAMETERS.bytes_le, FormatError, "there twice"),
        (vhdx.METADATA + ITEMS + 16, None, number(8, 4), FormatError, "does not fit"),
        (vhdx.METADATA + ITEMS + 16, None, number(MIB, 4), FormatError, "does not fit"),
        (vhdx.METADATA + ITEMS + 20, None, number(2 * MIB, 4), FormatError, "does not fit"),
        (vhdx.METADATA + ITEMS + 20, None, number(7, 4), FormatError, "missing or too short"),
        (vhdx.METADATA + 10, None, number(3, 2), FormatError, "missing or too short"),
        (VALUES, None, number(MIB // 2, 4), FormatError, "power of two"),
        (VALUES, None, number(3 * MIB, 4), FormatError, "power of two"),
        (VALUES, None, number(1 << 31, 4), FormatError, "power of two"),
        (VALUES + 4, None, number(2, 4), FormatError, "does not say of which parent"),
        (VALUES + 8, None, number(4 * MIB + 1), FormatError, "64 TiB"),
        (VALUES + 8, None, number(1 << 63), FormatError, "64 TiB"),
        (VALUES + 8, None, number(1 << 40), FormatError, "the disk needs"),
        (VALUES + 32, None, number(1024, 4), FormatError, "512 or 4096"),
    ],
)
def test_refused_in_one_line(
    tmp_path: Path, place: int, at: int | None, data: bytes, error: type[OpenError], words: str
) -> None:
    image = _image(tmp_path / "a.vhdx")
    if at is None:
        vhdx.patch(image, place, data)
    else:
        vhdx.patch_sealed(image, place, at, data, size=64 << 10)
    before = image.read_bytes()
    with pytest.raises(error, match=words) as caught:
        vhdx.open_vhdx(image)
    assert "\n" not in str(caught.value)
    assert str(image) in str(caught.value)
    assert image.read_bytes() == before


@pytest.mark.parametrize(
    ("at", "data", "words"),
    [
        (66, number(2, 2), "version 2"),
        (64, number(1, 2), "log version 1"),
        (68, number(5, 4), "puts the log"),
        (72, number(MIB - 1), "puts the log"),
        (72, number(0), "puts the log"),
        (72, number(1 << 40), "puts the log"),
        (72, number(vhdx.TABLE), "overlap"),
        (8, b"\xff" * 8, "leaves no room"),
        (8, number(1), "same number"),
    ],
)
def test_headers_are_refused_in_one_line(tmp_path: Path, at: int, data: bytes, words: str) -> None:
    image = _image(tmp_path / "a.vhdx")
    for slot, place in enumerate(vhdx.HEADERS):
        if slot or data != b"\xff" * 8:
            vhdx.patch_sealed(image, place, at, data)
        vhdx.patch_sealed(image, place, 16, bytes([slot]))  # they differ
    with pytest.raises(OpenError, match=words):
        vhdx.open_vhdx(image)


def test_one_of_each_is_enough(tmp_path: Path) -> None:
    image = _image(tmp_path / "a.vhdx")
    good = image.read_bytes()
    for places in (vhdx.HEADERS, vhdx.REGION_TABLES):
        for place in places:
            image.write_bytes(good)
            vhdx.patch(image, place + 100, b"damage")
            with vhdx.open_vhdx(image) as device:
                device.write(0, b"y")
                assert device.read(0, 102) == b"y" + bytes(99) + b"xx"
        for place in places:
            vhdx.patch(image, place + 100, b"damage")
        with pytest.raises(FormatError, match="neither of the two"):
            vhdx.open_vhdx(image)
    image.write_bytes(good)
    header = good[vhdx.HEADERS[0] :][:4096]
    vhdx.patch(image, vhdx.HEADERS[1], header)  # as Disk2vhd has it
    vhdx.open_vhdx(image).close()


@pytest.mark.parametrize("state", [1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("place", [0, vhdx.LOG, vhdx.TABLE, vhdx.METADATA, 100 * MIB, 1 << 63])
def test_crafted_entries_reach_nothing(tmp_path: Path, state: int, place: int) -> None:
    image = _image(tmp_path / "a.vhdx")
    vhdx.patch(image, vhdx.TABLE + 8 * 3, number(place | state))
    before = image.read_bytes()
    with vhdx.open_vhdx(image) as device:
        if state in (1, 2, 3, 5):  # whose places say nothing
            assert device.read(3 * MIB, MIB) == bytes(MIB)
            device.write(3 * MIB, b"good")
            assert device.read(3 * MIB, 5) == b"good\0"
        else:
            for act in (
                lambda: device.read(3 * MIB, 1),
                lambda: device.write(3 * MIB + 7, b"x" * 4000),
                lambda: device.zero(3 * MIB, MIB),
                lambda: device.discard(3 * MIB, MIB),
            ):
                with pytest.raises(OSError, match="damaged") as caught:
                    act()
                assert caught.value.errno == errno.EIO
            assert device.locate(3 * MIB, 512) is None
            assert device.locate_writable(3 * MIB, 512) is None
        device.write(0, b"good")
    after = image.read_bytes()
    assert after[vhdx.METADATA : vhdx.METADATA + MIB] == before[vhdx.METADATA : vhdx.METADATA + MIB]
    assert after[vhdx.LOG : vhdx.TABLE] == before[vhdx.LOG : vhdx.TABLE]


def test_two_blocks_in_one_place_are_not_written(tmp_path: Path) -> None:
    image = _image(tmp_path / "a.vhdx")
    vhdx.patch(image, vhdx.TABLE + 8 * 3, image.read_bytes()[vhdx.TABLE : vhdx.TABLE + 8])
    with pytest.raises(FormatError, match="two blocks claim"):
        vhdx.open_vhdx(image)
    with vhdx.open_vhdx(image, read_only=True) as device:
        assert device.read(3 * MIB, MIB) == device.read(0, MIB)


def test_partial_blocks_need_a_bitmap(tmp_path: Path) -> None:
    image = _image(tmp_path / "a.vhdx", differencing=True)
    vhdx.patch(image, vhdx.TABLE + 8 * 4096, bytes(8))
    with vhdx.open_vhdx(image) as device, pytest.raises(OSError, match="no sector bitmap"):
        device.read(MIB, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda item: item[:10], "damaged"),
        (lambda item: uuid.UUID(int=1).bytes_le + item[16:], "locator of kind"),
        (lambda item: item[:18] + b"\xff\xff" + item[20:], "damaged"),
        (lambda item: item[:20] + b"\xff" * 12 + item[32:], "damaged"),
        (lambda item: item.replace("parent_linkage".encode("utf-16-le"), b"x" * 28), "damaged"),
        (lambda item: item.replace("relative_path".encode("utf-16-le"), b"x" * 26), "names no parent"),
        (lambda item: item.replace("{".encode("utf-16-le"), "?".encode("utf-16-le")), "damaged"),
        (lambda item: item.replace("parent.vhdx".encode("utf-16-le"), "elsewh.vhdx".encode("utf-16-le")), "no such"),
    ],
)
def test_damaged_parent_locators(tmp_path: Path, change: object, words: str) -> None:
    image = _image(tmp_path / "a.vhdx", differencing=True)
    entry = vhdx.METADATA + ITEMS + 5 * 32
    content = image.read_bytes()
    offset, length = (int.from_bytes(content[entry + at : entry + at + 4], "little") for at in (16, 20))
    place = vhdx.METADATA + offset
    new = change(content[place : place + length])  # type: ignore[operator]
    vhdx.patch(image, place, new)
    vhdx.patch(image, entry + 20, number(len(new), 4))
    with pytest.raises(OpenError, match=words) as caught:
        vhdx.open_vhdx(image, read_only=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("differencing", [False, True])
def test_mutations_are_refused_or_read(tmp_path: Path, differencing: bool) -> None:
    chosen = random.Random(7)
    image = _image(tmp_path / "a.vhdx", differencing=differencing)
    good = image.read_bytes()
    opened = 0
    for _ in range(100):
        image.write_bytes(good)
        for _ in range(chosen.randint(1, 3)):
            _mutate(image, chosen)
        if chosen.random() < 0.1:
            with image.open("r+b") as file:
                file.truncate(chosen.randrange(len(good)))
        with suppress(OpenError), vhdx.open_vhdx(image, read_only=chosen.random() < 0.3) as device:
            opened += 1
            use_damaged(device, chosen)
    assert 10 < opened < 95


def _mutate(image: Path, chosen: random.Random) -> None:
    data = chosen.choice((chosen.randbytes(4), b"\0\0\0\xff", b"\xff" * 4, bytes(4), number(chosen.randrange(8), 4)))
    match chosen.choice(("header", "regions", "metadata", "values", "table", "table")):
        case "header":
            vhdx.patch_sealed(image, chosen.choice(vhdx.HEADERS), chosen.randrange(8, 80), data)
        case "regions":
            at = chosen.randrange(8, 80)
            for place in vhdx.REGION_TABLES:
                vhdx.patch_sealed(image, place, at, data, size=64 << 10)
        case "metadata":
            vhdx.patch(image, vhdx.METADATA + chosen.randrange(8, 32 + 6 * 32), data)
        case "values":
            vhdx.patch(image, VALUES + chosen.randrange(40), data)
        case "table":
            entry = chosen.choice((chosen.randbytes(8), number(chosen.randrange(8) * MIB | chosen.randrange(8))))
            vhdx.patch(image, vhdx.TABLE + 8 * chosen.choice((0, 1, 2, 3, 4096)), entry)
