"""VMDKs that qemu-img does not make: ESX's kinds of sparse extents, and damaged or unusual hosted ones."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from nbdserve.errors import OpenError
from nbdserve.opening import open_image

SECTOR = 512
GRAIN = 4096  # bytes, of the extents made here

# Offsets of fields of the hosted sparse header.
VERSION, FLAGS, CAPACITY, GRAIN_SIZE, DESCRIPTOR, DESCRIPTOR_SIZE = 4, 8, 12, 20, 28, 36
SLOTS, REDUNDANT, DIRECTORY, OVERHEAD, UNCLEAN, LINE_ENDS, COMPRESSION = 44, 48, 56, 64, 72, 73, 77


def cid_of(image: Path) -> int:
    """The content ID in an image's descriptor."""
    found = re.search(rb"^CID=([0-9a-f]+)", image.read_bytes(), re.MULTILINE)
    assert found is not None
    return int(found[1], 16)


def descriptor(extents: list[str], create_type: str = "custom", *more: str) -> str:
    """The text of a descriptor."""
    lines = ["# Disk DescriptorFile", "version=1", "CID=12345678", "parentCID=ffffffff", f'createType="{create_type}"']
    return "\n".join([*lines, *more, *extents, ""])


def without_tables(image: Path) -> None:
    """Take an empty sparse image's grain tables away, as if they were still to be made."""
    raw = bytearray(image.read_bytes())
    (capacity, grain), (slots,) = struct.unpack_from("<QQ", raw, CAPACITY), struct.unpack_from("<I", raw, SLOTS)
    tables = -(-capacity // (grain * slots))
    for field in (REDUNDANT, DIRECTORY):
        start = struct.unpack_from("<Q", raw, field)[0] * SECTOR
        raw[start : start + 4 * tables] = bytes(4 * tables)
    image.write_bytes(raw)


def cowd(sectors: int, grains: dict[int, bytes]) -> bytes:
    """A COWD extent that holds these grains, by number."""
    tables = -(-sectors // (4096 * GRAIN // SECTOR))
    at = 4 + -(-4 * tables // SECTOR)
    directory, content, data = [0] * tables, b"", b""
    for index in sorted({number // 4096 for number in grains}):
        directory[index] = at + len(content) // SECTOR
        content += bytes(4096 * 4)
    raw = bytearray(content)
    for number, grain in grains.items():
        slot = (directory[number // 4096] - at) * SECTOR + number % 4096 * 4
        struct.pack_into("<I", raw, slot, at + (len(raw) + len(data)) // SECTOR)
        data += grain
    header = struct.pack("<4s7I", b"COWD", 1, 3, sectors, GRAIN // SECTOR, 4, tables, 0)
    first = struct.pack(f"<{tables}I", *directory)
    return header.ljust(4 * SECTOR, b"\0") + first.ljust((at - 4) * SECTOR, b"\0") + bytes(raw) + data


def se_sparse(sectors: int, grains: dict[int, bytes | int], *, replay: int = 0) -> bytes:
    """An seSparse extent that holds these grains, by number; a number instead of bytes is an entry's kind, 1 or 2."""
    tables = -(-sectors // (4096 * 8))
    directory_size = -(-8 * tables // SECTOR)
    present = sorted({number // 4096 for number in grains})
    directory = [0] * tables
    for position, index in enumerate(present):
        directory[index] = 0x10000000 << 32 | position
    directory_at = 8
    tables_at = directory_at + directory_size
    grains_at = tables_at + 64 * len(present)
    raw, data = bytearray(64 * SECTOR * len(present)), b""
    for number, grain in grains.items():
        if isinstance(grain, int):
            entry = grain << 60
        else:
            place = len(data) // GRAIN
            entry = 3 << 60 | (place & 0xFFF) << 48 | place >> 12
            data += grain
        struct.pack_into("<Q", raw, present.index(number // 4096) * 64 * SECTOR + number % 4096 * 8, entry)
    header = struct.pack(
        "<26Q",
        *(0xCAFEBABE, 0x200000001, sectors, 8, 64, 0, 0, 0, 0, 0, 1, 1, 2, 1, 3, 1),
        *(directory_at, directory_size, tables_at, 64 * len(present), 4, 1, 5, 1, grains_at, len(data) // SECTOR),
    )
    volatile = struct.pack("<4Q", 0xCAFECAFE, 0, 0, replay)
    start = (header.ljust(SECTOR, b"\0") + volatile).ljust(directory_at * SECTOR, b"\0")
    first = struct.pack(f"<{tables}Q", *directory).ljust(directory_size * SECTOR, b"\0")
    return start + first + bytes(raw) + data


def content_of(image: Path, **options: object) -> bytes:
    with open_image(image, read_only=True, **options) as device:  # type: ignore[arg-type]
        return bytes(device.read(0, device.size))


def refused(image: Path, words: str, **options: object) -> None:
    with pytest.raises(OpenError, match=words) as caught:
        content_of(image, **options)
    assert "\n" not in str(caught.value)
