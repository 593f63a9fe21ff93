"""What stands in a directory (sections 6 and 7): entries of 32 bytes, of which a file has three and more in a row."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntFlag

SIZE = 32
_FILE = struct.Struct("<2xHH 6x II x B x BB")
_STREAM = struct.Struct("<xB x B 4x Q 4x IQ")
_BITMAP, _UPCASE, _FILE_TYPE, _STREAM_TYPE, _NAME_TYPE = 0x81, 0x82, 0x85, 0xC0, 0xC1
_TABLE = struct.Struct("<20x IQ")
_NO_FAT_CHAIN = 2


class FileAttributes(IntFlag):
    """Attributes of a file (7.4.4)."""

    READ_ONLY = 0x01
    DIRECTORY = 0x10


@dataclass(frozen=True, slots=True)
class File:
    """A file.

    Attributes:
        index: which entry of the directory it begins with.
        first: its first cluster.
        size: bytes.
        valid: bytes that were written; those behind read as zeros.
        contiguous: whether it lies in one piece.
    """

    index: int
    name: bytes
    attributes: int
    mtime_ns: int
    atime_ns: int
    ctime_ns: int
    first: int
    size: int
    valid: int
    contiguous: bool


@dataclass(frozen=True, slots=True)
class Table:
    """The allocation bitmap or the up-case table: a first cluster and a size."""

    is_bitmap: bool
    first: int
    size: int


def parse_directory(content: bytes) -> Iterator[File | Table]:
    """What is in use in a directory; sets of entries that are damaged are passed over, as the specification says."""
    offset = 0
    while offset + SIZE <= len(content) and content[offset]:
        kind = content[offset]
        length = SIZE
        if kind in (_BITMAP, _UPCASE):
            yield Table(kind == _BITMAP, *_TABLE.unpack_from(content, offset))
        elif kind == _FILE_TYPE:
            length = SIZE * (1 + content[offset + 1])
            found = _parse_file(content[offset : offset + length], offset // SIZE)
            if found is None:
                length = SIZE
            else:
                yield found
        offset += length


def _parse_file(entries: bytes, index: int) -> File | None:
    if len(entries) < 3 * SIZE or len(entries) != SIZE * (1 + entries[1]) or entries[SIZE] != _STREAM_TYPE:
        return None
    checksum, attributes, modified, accessed, hundredths, modified_zone, accessed_zone = _FILE.unpack_from(entries)
    if _checksum(entries) != checksum:
        return None
    flags, length, valid, first, size = _STREAM.unpack_from(entries, SIZE)
    name = bytearray()
    for offset in range(2 * SIZE, len(entries), SIZE):
        if entries[offset] != _NAME_TYPE:
            break
        name += entries[offset + 2 : offset + SIZE]
    if len(name) < 2 * length:
        return None
    modified_ns = _nanoseconds(modified, hundredths, modified_zone)
    return File(
        index=index,
        name=bytes(name[: 2 * length]).decode("utf-16-le", "surrogatepass").encode("utf-8", "surrogatepass"),
        attributes=attributes,
        mtime_ns=modified_ns,
        atime_ns=_nanoseconds(accessed, 0, accessed_zone),
        ctime_ns=modified_ns,
        first=first,
        size=size,
        valid=min(valid, size),
        contiguous=bool(flags & _NO_FAT_CHAIN),
    )


def _checksum(entries: bytes) -> int:
    """Of all bytes of a set but those of the checksum itself (6.3.3)."""
    value = 0
    for index, byte in enumerate(entries):
        if index not in (2, 3):
            value = ((value >> 1 | value << 15) + byte) & 0xFFFF
    return value


def _nanoseconds(stamp: int, hundredths: int, zone: int) -> int:
    """A time in nanoseconds since 1970; 0 for one that makes no sense.

    Args:
        zone: quarters of an hour east of Greenwich in seven bits, valid if the eighth is set (7.4.10).
    """
    try:
        local = datetime(
            (stamp >> 25) + 1980,
            stamp >> 21 & 15,
            stamp >> 16 & 31,
            stamp >> 11 & 31,
            stamp >> 5 & 63,
            (stamp & 31) * 2,
            tzinfo=UTC,
        )
    except ValueError:
        return 0
    quarters = (zone & 0x7F ^ 0x40) - 0x40 if zone & 0x80 else 0
    return (int(local.timestamp()) - quarters * 900) * 10**9 + hundredths * 10**7
