"""MFT records and the attributes in them, taken apart and checked.

Everything of a file is an attribute of its MFT record: times, names, data, index. A record is protected against torn
writes by an update sequence: the last two bytes of every 512 are replaced by a number, and kept in an array in front.
Layouts: "NTFS On-Disk Format" (FILE record, attribute headers), as in the headers of libntfs-3g.

The rule of this file: an Attribute that it returns lies wholly inside its record, and its sizes are not negative.
Damage is OSError EIO, which concerns the file that owns the record and nobody else.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import NamedTuple

from fusemount.filesystems.base import error
from fusemount.filesystems.ntfs.boot import BLOCK

_RECORD = struct.Struct("<4s HH Q HH HH II Q H")
_HEADER = struct.Struct("<II BBH HH")
_RESIDENT = struct.Struct("<IH")
_NON_RESIDENT = struct.Struct("<qq H B 5x qqq")
_LIST_ENTRY = struct.Struct("<IH BB q Q H")
_END = 0xFFFFFFFF


class Type(IntEnum):
    """Attribute types that matter here."""

    STANDARD_INFORMATION = 0x10
    ATTRIBUTE_LIST = 0x20
    FILE_NAME = 0x30
    VOLUME_INFORMATION = 0x70
    DATA = 0x80
    INDEX_ROOT = 0x90
    INDEX_ALLOCATION = 0xA0
    BITMAP = 0xB0
    REPARSE_POINT = 0xC0
    EA = 0xE0


class RecordFlags(IntFlag):
    """Flags of an MFT record."""

    IN_USE = 1
    DIRECTORY = 2


class DataFlags(IntFlag):
    """Flags of an attribute."""

    COMPRESSED = 0x00FF
    ENCRYPTED = 0x4000
    SPARSE = 0x8000


class Reference(NamedTuple):
    """A file reference: the number of an MFT record, and how often it had been used when the reference was made."""

    number: int
    sequence: int

    @classmethod
    def unpack(cls, value: int) -> Reference:
        """From the 64 bits on disk."""
        return cls(value & 0xFFFFFFFFFFFF, value >> 48)


@dataclass(frozen=True, slots=True)
class Attribute:
    """One attribute record.

    Attributes:
        value: the content when it is resident, else None; then the rest counts.
        lowest: the first cluster of the attribute (VCN) that `mapping` speaks of.
        mapping: the mapping pairs, still packed.
        allocated, size, initialized: bytes; behind `initialized` it reads as zeros. Right only where lowest is 0.
        stored: bytes that are really allocated, for compressed and sparse ones.
        unit: log2 of the clusters in a compression unit; 0 when not compressed.
    """

    type: int
    name: str
    flags: int
    instance: int
    value: bytes | None
    lowest: int = 0
    mapping: bytes = b""
    allocated: int = 0
    size: int = 0
    initialized: int = 0
    stored: int = 0
    unit: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """One MFT record.

    Attributes:
        base: the reference of the record that this one extends; 0 when it is a base record itself.
    """

    number: int
    sequence: int
    links: int
    flags: int
    base: int
    attributes: tuple[Attribute, ...]


def apply_fixups(block: bytearray, magic: bytes) -> None:
    """Put back the bytes that the update sequence replaced, in a record or an index block.

    Raises:
        OSError: EIO, it has another magic or was only written in part.
    """
    offset, count = struct.unpack_from("<4xHH", block)
    if block[:4] != magic or count != len(block) // BLOCK + 1 or offset + 2 * count > BLOCK - 2 or offset < 8:
        raise error(errno.EIO)
    number = block[offset : offset + 2]
    for index in range(1, count):
        end = index * BLOCK
        if block[end - 2 : end] != number:
            raise error(errno.EIO)
        block[end - 2 : end] = block[offset + 2 * index : offset + 2 * index + 2]


def parse_record(number: int, block: bytearray) -> Record:
    """Take an MFT record apart; the block is changed. Raises EIO when it is damaged, ENOENT when it is not in use."""
    apply_fixups(block, b"FILE")
    _, _, _, _, sequence, links, first, flags, used, _, base, _ = _RECORD.unpack_from(block)
    if not flags & RecordFlags.IN_USE:
        raise error(errno.ENOENT)
    if not _RECORD.size <= first <= used <= len(block):
        raise error(errno.EIO)
    return Record(number, sequence, links, flags, base, tuple(_attributes(bytes(block[:used]), first)))


def _attributes(block: bytes, offset: int) -> Iterator[Attribute]:
    while True:
        if offset + 4 > len(block):
            raise error(errno.EIO)
        if block[offset : offset + 4] == b"\xff\xff\xff\xff":
            return
        if offset + _HEADER.size + _RESIDENT.size > len(block):
            raise error(errno.EIO)
        kind, length, outside, name_length, name_offset, flags, instance = _HEADER.unpack_from(block, offset)
        if length < _HEADER.size + _RESIDENT.size or length & 7 or offset + length > len(block):
            raise error(errno.EIO)
        body = block[offset : offset + length]
        name = body[name_offset : name_offset + 2 * name_length]
        if len(name) != 2 * name_length:
            raise error(errno.EIO)
        text = name.decode("utf-16-le", "surrogatepass")
        yield (_non_resident if outside else _resident)(body, kind, text, flags, instance)
        offset += length


def _resident(body: bytes, kind: int, name: str, flags: int, instance: int) -> Attribute:
    length, offset = _RESIDENT.unpack_from(body, _HEADER.size)
    if offset + length > len(body):
        raise error(errno.EIO)
    value = body[offset : offset + length]
    return Attribute(kind, name, flags, instance, value, size=length, initialized=length, allocated=-(-length // 8) * 8)


def _non_resident(body: bytes, kind: int, name: str, flags: int, instance: int) -> Attribute:
    if len(body) < _HEADER.size + _NON_RESIDENT.size:
        raise error(errno.EIO)
    lowest, _, mapping, unit, allocated, size, initialized = _NON_RESIDENT.unpack_from(body, _HEADER.size)
    if min(lowest, allocated, size, initialized) < 0 or not _HEADER.size <= mapping <= len(body) or unit > 8:
        raise error(errno.EIO)
    stored = allocated
    if flags & (DataFlags.COMPRESSED | DataFlags.SPARSE) and lowest == 0 and mapping >= 72:
        stored = struct.unpack_from("<q", body, 64)[0]
    return Attribute(
        kind, name, flags, instance, None, lowest, body[mapping:], allocated, size, initialized, stored, unit
    )


class ListEntry(NamedTuple):
    """Where one attribute record of a file lies, when they do not all fit in its base record."""

    type: int
    lowest: int
    record: Reference
    instance: int


def parse_attribute_list(value: bytes) -> Iterator[ListEntry]:
    """The entries of an $ATTRIBUTE_LIST; raises EIO where it is damaged."""
    offset = 0
    while offset < len(value):
        if offset + _LIST_ENTRY.size > len(value):
            raise error(errno.EIO)
        kind, length, _, _, lowest, reference, instance = _LIST_ENTRY.unpack_from(value, offset)
        if length < _LIST_ENTRY.size:
            raise error(errno.EIO)
        yield ListEntry(kind, lowest, Reference.unpack(reference), instance)
        offset += length
