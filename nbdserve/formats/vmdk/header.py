"""Hosted sparse extents, magic KDMV (VDF, "Hosted Sparse Extents" and "Stream-Optimized Compressed Sparse Extents").

Everything is checked here, once, against the file's length and the caps; who holds a Layout need not look again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from construct import Bytes, Const, Int8ul, Int16ul, Int32ul, Int64ul, Padding, Struct

from nbdserve.block.file import HostFile
from nbdserve.errors import FormatError, Unsupported
from nbdserve.formats.vmdk import SECTOR
from nbdserve.formats.vmdk.descriptor import MAXIMUM_SIZE
from nbdserve.formats.vmdk.layout import Layout, check_geometry, read_directory, table_places

MAGIC = b"KDMV"
UNCLEAN_SHUTDOWN = 72  # where this byte of the header lies
LINE_ENDS = b"\n \r\n"
AT_END = 0xFFFFFFFFFFFFFFFF

NEWLINE_TEST, REDUNDANT, ZEROED_GRAINS, COMPRESSED, MARKERS = 1 << 0, 1 << 1, 1 << 2, 1 << 16, 1 << 17
DEFLATE = 1

END_OF_STREAM, TABLE_MARKER, DIRECTORY_MARKER, FOOTER_MARKER = range(4)

_MAXIMUM_SLOTS = 512

HEADER = Struct(
    "magic" / Const(MAGIC),
    "version" / Int32ul,
    "flags" / Int32ul,
    "capacity" / Int64ul,
    "grain_size" / Int64ul,
    "descriptor_offset" / Int64ul,
    "descriptor_size" / Int64ul,
    "slots" / Int32ul,
    "redundant_offset" / Int64ul,
    "directory_offset" / Int64ul,
    "overhead" / Int64ul,
    "unclean" / Int8ul,
    "line_ends" / Bytes(4),
    "compression" / Int16ul,
    Padding(433),
)

MARKER = Struct("value" / Int64ul, "size" / Int32ul, "type" / Int32ul, Padding(SECTOR - 16))


@dataclass(frozen=True, slots=True)
class Described:
    """A header that describes no extent itself: its descriptor, at (start, end) in the file, names the extents."""

    descriptor: tuple[int, int]


def is_sparse(sector: bytes) -> bool:
    """Whether a file that begins with this sector is a hosted sparse extent."""
    return sector.startswith(MAGIC)


def read_header(file: HostFile) -> Layout | Described:
    """Read and check the header, the footer if that is what counts, and the grain directories.

    Raises:
        FormatError: they are damaged, or do not fit the file.
        Unsupported: a valid extent that uses something not handled here.
    """
    name, length = file.name, file.size
    if length < SECTOR:
        raise FormatError(f"{name}: too short for a VMDK extent ({length} bytes); the file is truncated")
    raw = bytes(file.read(0, SECTOR))
    if not is_sparse(raw):
        raise FormatError(f"{name}: not a sparse VMDK extent; check the format you gave")
    fields = HEADER.parse(raw)
    descriptor = _descriptor_place(fields, name, length)
    if not fields.capacity and descriptor[1]:
        return Described(descriptor)
    if fields.directory_offset == AT_END:
        fields = _read_footer(file, fields)
    _check_features(fields, name)
    tables = check_geometry(name, fields.capacity, fields.grain_size, fields.slots)
    if fields.slots > _MAXIMUM_SLOTS:
        raise FormatError(f"{name}: {fields.slots} entries to a grain table; the header is damaged")
    if fields.overhead * SECTOR > length:
        raise FormatError(f"{name}: {fields.overhead} sectors of tables, but the file has {length} bytes; truncated")
    layout = Layout(
        size=fields.capacity * SECTOR,
        grain_size=fields.grain_size * SECTOR,
        slots=fields.slots,
        directory_offset=fields.directory_offset * SECTOR,
        directory=_directory(file, fields.directory_offset, tables, fields.slots, "grain directory"),
        data_offset=fields.overhead * SECTOR,
        descriptor=descriptor,
        zeroed_grains=bool(fields.flags & ZEROED_GRAINS),
        compressed=fields.compression == DEFLATE,
        markers=bool(fields.flags & MARKERS),
        frozen=_why_frozen(fields),
        unclean=bool(fields.unclean),
    )
    taken = ((0, SECTOR), descriptor) if descriptor[1] else ((0, SECTOR),)
    if not fields.flags & REDUNDANT:
        return replace(layout, taken=taken)
    second = _directory(file, fields.redundant_offset, tables, fields.slots, "redundant grain directory")
    return replace(layout, taken=taken, redundant=second, redundant_offset=fields.redundant_offset * SECTOR)


def _directory(file: HostFile, sector: int, tables: int, slots: int, what: str) -> Any:
    return table_places(read_directory(file, sector * SECTOR, tables, 4, what), 4 * slots, file.size)


def _descriptor_place(fields: Any, name: str, length: int) -> tuple[int, int]:
    start, size = fields.descriptor_offset * SECTOR, fields.descriptor_size * SECTOR
    if not start or not size:
        return 0, 0
    if size > MAXIMUM_SIZE or start + size > length:
        raise FormatError(f"{name}: the VMDK descriptor of {size} bytes at {start} does not fit the file; damaged")
    return start, start + size


def _read_footer(file: HostFile, header: Any) -> Any:
    """The footer of a stream: a copy of the header, between two markers at the file's end, that knows the directory."""
    start = file.size - 3 * SECTOR
    raw = bytes(file.read(max(0, start), 3 * SECTOR))
    before, footer, after = raw[:SECTOR], raw[SECTOR : 2 * SECTOR], raw[2 * SECTOR :]
    first, last = MARKER.parse(before), MARKER.parse(after)
    if (
        start < SECTOR
        or (first.size, first.type) != (0, FOOTER_MARKER)
        or (last.value, last.size, last.type) != (0, 0, END_OF_STREAM)
        or not is_sparse(footer)
    ):
        raise FormatError(f"{file.name}: a stream-optimized VMDK without its footer; the file is truncated")
    fields = HEADER.parse(footer)
    if (fields.capacity, fields.grain_size) != (header.capacity, header.grain_size):
        raise FormatError(f"{file.name}: the VMDK footer contradicts the header; the file is damaged")
    return fields


def _check_features(fields: Any, name: str) -> None:
    if not 1 <= fields.version <= 3:
        raise Unsupported(f"{name}: VMDK version {fields.version} is not handled; 1 to 3 are")
    if fields.flags & NEWLINE_TEST and fields.line_ends != LINE_ENDS:
        raise FormatError(f"{name}: was damaged by a transfer that took it for text; transfer it again, as binary")
    if fields.compression not in (0, DEFLATE):
        raise Unsupported(f"{name}: VMDK compression {fields.compression} is not handled; deflate (1) is")


def _why_frozen(fields: Any) -> str | None:
    if fields.compression:
        return "stream-optimized VMDKs can only be read; open it read-only (-r), or convert it"
    if fields.version == 3:
        return "VMDKs of version 3 (changed block tracking) can only be read; open it read-only (-r)"
    return None
