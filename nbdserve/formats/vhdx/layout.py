"""What the region table and the metadata say, checked once ([MS-VHDX] 2.2.3 and 2.6).

Everything is checked against the file's length, the caps of the format, and the rest: regions lie on whole MiB inside
the file and do not overlap, metadata items lie inside their region, the table has room for every block of the disk.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from construct import Bytes, Const, Int16ul, Int32ul, Int64ul, Padding, Struct

from nbdserve.block.file import HostFile
from nbdserve.errors import FormatError, Unsupported
from nbdserve.formats.vhdx import HEADER_SECTION, MAXIMUM_SIZE, MIB
from nbdserve.formats.vhdx.checksum import is_intact
from nbdserve.formats.vhdx.headers import Header
from nbdserve.formats.vhdx.log import ReplayedFile

REGION_TABLE_SIZE = 64 << 10
REGION_TABLES = (192 << 10, 256 << 10)
METADATA_TABLE_SIZE = 64 << 10
MOST_ENTRIES = 2047  # of either table
BITS_IN_BITMAP_BLOCK = 8 * MIB

BAT = uuid.UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
METADATA = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
FILE_PARAMETERS = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
VIRTUAL_DISK_SIZE = uuid.UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
PAGE_83 = uuid.UUID("beca12ab-b2e6-4523-93ef-c309e000c746")
LOGICAL_SECTOR_SIZE = uuid.UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f")
PHYSICAL_SECTOR_SIZE = uuid.UUID("cda348c7-445d-4471-9cc9-e9885251c556")
PARENT_LOCATOR = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
_KNOWN_ITEMS = {FILE_PARAMETERS, VIRTUAL_DISK_SIZE, PAGE_83, LOGICAL_SECTOR_SIZE, PHYSICAL_SECTOR_SIZE, PARENT_LOCATOR}

REGION_TABLE = Struct("signature" / Const(b"regi"), "checksum" / Int32ul, "count" / Int32ul, Padding(4))
REGION = Struct("guid" / Bytes(16), "offset" / Int64ul, "length" / Int32ul, "required" / Int32ul)
METADATA_TABLE = Struct("signature" / Const(b"metadata"), Padding(2), "count" / Int16ul, Padding(20))
ITEM = Struct("guid" / Bytes(16), "offset" / Int32ul, "length" / Int32ul, "flags" / Int32ul, Padding(4))

IS_USER = 1
IS_VIRTUAL_DISK = 2
IS_REQUIRED = 4
LEAVE_BLOCKS_ALLOCATED = 1
HAS_PARENT = 2


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a disk keeps what; offsets and lengths in bytes.

    Attributes:
        size: of the disk.
        block_size: guest bytes of a payload block, a power of two from 1 to 256 MiB.
        sector_size: of the guest's logical sectors, 512 or 4096.
        is_fixed: blocks stay allocated for good.
        parent_locator: the metadata item that names the parent; None in a disk without parent.
        table_offset: where the block allocation table begins.
        blocks: payload blocks of the disk.
        regions: the ranges (start, end) of the file that no block may touch, in order.
    """

    size: int
    block_size: int
    sector_size: int
    is_fixed: bool
    parent_locator: bytes | None
    table_offset: int
    blocks: int
    regions: tuple[tuple[int, int], ...]

    @property
    def chunk_ratio(self) -> int:
        """Payload blocks per sector bitmap block, a power of two (2.4)."""
        return BITS_IN_BITMAP_BLOCK * self.sector_size // self.block_size


def table_entries(blocks: int, chunk_ratio: int, *, has_parent: bool) -> int:
    """Entries that the block allocation table of so many payload blocks must have (2.5)."""
    if has_parent:
        return -(-blocks // chunk_ratio) * (chunk_ratio + 1)
    return blocks + (blocks - 1) // chunk_ratio if blocks else 0


def read_layout(file: HostFile | ReplayedFile, header: Header) -> Layout:
    """Read the region table and the metadata.

    Raises:
        FormatError: they are damaged, or do not fit the file.
        Unsupported: a valid file needs something that is not known here.
    """
    regions = _read_regions(file)
    taken = _check_overlap(file.name, [*regions.values(), (header.log_offset, header.log_offset + header.log_length)])
    for guid, what in ((BAT, "block allocation table"), (METADATA, "metadata region")):
        if guid not in regions:
            raise FormatError(f"{file.name}: has no {what}; the image is damaged")
    items = _read_items(file, *regions[METADATA])
    flags = _number(file.name, items, FILE_PARAMETERS, 8) >> 32
    layout = Layout(
        size=_number(file.name, items, VIRTUAL_DISK_SIZE, 8),
        block_size=_number(file.name, items, FILE_PARAMETERS, 8) & 0xFFFFFFFF,
        sector_size=_number(file.name, items, LOGICAL_SECTOR_SIZE, 4),
        is_fixed=flags & (HAS_PARENT | LEAVE_BLOCKS_ALLOCATED) == LEAVE_BLOCKS_ALLOCATED,
        parent_locator=_locator(file.name, items) if flags & HAS_PARENT else None,
        table_offset=regions[BAT][0],
        blocks=0,
        regions=taken,
    )
    return _checked(file.name, layout, regions[BAT][1] - regions[BAT][0])


def _checked(name: str, layout: Layout, table_length: int) -> Layout:
    """The layout with the number of its blocks, when its numbers agree with each other."""
    if layout.sector_size not in (512, 4096):
        raise FormatError(f"{name}: logical sectors of {layout.sector_size} bytes; a VHDX has 512 or 4096")
    if not MIB <= layout.block_size <= 256 * MIB or layout.block_size & (layout.block_size - 1):
        raise FormatError(f"{name}: the block size {layout.block_size} is not a power of two from 1 to 256 MiB")
    if layout.size > MAXIMUM_SIZE or layout.size % layout.sector_size:
        raise FormatError(
            f"{name}: the disk size {layout.size} is no multiple of its sectors up to 64 TiB; the image is damaged"
        )
    blocks = -(-layout.size // layout.block_size)
    entries = table_entries(blocks, layout.chunk_ratio, has_parent=layout.parent_locator is not None)
    if 8 * entries > table_length:
        raise FormatError(
            f"{name}: the block allocation table has {table_length // 8} entries, but the disk needs {entries}; "
            "the image is damaged"
        )
    return replace(layout, blocks=blocks)


def _read_regions(file: HostFile | ReplayedFile) -> dict[uuid.UUID, tuple[int, int]]:
    """The regions by their GUIDs, from the first region table that is valid."""
    for place in REGION_TABLES:
        table = bytes(file.read(place, REGION_TABLE_SIZE))
        if table[:4] == b"regi" and is_intact(table, 4):
            break
    else:
        raise FormatError(f"{file.name}: neither of the two region tables is valid; the image is damaged")
    regions: dict[uuid.UUID, tuple[int, int]] = {}
    for entry in _entries(file.name, table, REGION_TABLE, REGION, "region table"):
        guid, start, end = uuid.UUID(bytes_le=entry.guid), entry.offset, entry.offset + entry.length
        if guid not in (BAT, METADATA) and entry.required & 1:
            raise Unsupported(f"{file.name}: needs the region {guid}, which is not known here")
        if start % MIB or entry.length % MIB or not HEADER_SECTION <= start < end <= file.size or guid in regions:
            raise FormatError(
                f"{file.name}: the region {guid} at {start} ({entry.length} bytes) is not whole MiB inside the file's "
                f"{file.size} bytes, or named twice; the image is truncated or damaged"
            )
        regions[guid] = (start, end)
    return regions


def _check_overlap(name: str, ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The ranges and the header section, in order."""
    ordered = sorted([(0, HEADER_SECTION), *(each for each in ranges if each[0] < each[1])])
    for (_, end), (start, _) in pairwise(ordered):
        if start < end:
            raise FormatError(f"{name}: two regions of the file overlap at {start}; the image is damaged")
    return tuple(ordered)


def _read_items(file: HostFile | ReplayedFile, start: int, end: int) -> dict[uuid.UUID, bytes]:
    """The known metadata items."""
    table = bytes(file.read(start, METADATA_TABLE_SIZE))
    if not table.startswith(b"metadata"):
        raise FormatError(f"{file.name}: no metadata table at {start}; the image is damaged")
    items: dict[uuid.UUID, bytes] = {}
    for entry in _entries(file.name, table, METADATA_TABLE, ITEM, "metadata table"):
        guid = uuid.UUID(bytes_le=entry.guid)
        if entry.flags & IS_USER or guid not in _KNOWN_ITEMS:
            if entry.flags & IS_REQUIRED:
                raise Unsupported(f"{file.name}: needs the metadata item {guid}, which is not known here")
            continue
        inside = METADATA_TABLE_SIZE <= entry.offset and start + entry.offset + entry.length <= end
        if guid in items or not inside or entry.length > MIB:
            raise FormatError(
                f"{file.name}: the metadata item {guid} at {entry.offset} ({entry.length} bytes) does not fit into its "
                "region, or is there twice; the image is damaged"
            )
        items[guid] = bytes(file.read(start + entry.offset, entry.length))
    return items


def _entries(name: str, table: bytes, head: Any, entry: Any, what: str) -> list[Any]:
    """The entries that follow a table's head."""
    count = head.parse(table).count
    if count > MOST_ENTRIES:
        raise FormatError(f"{name}: the {what} has {count} entries, more than {MOST_ENTRIES}; the image is damaged")
    size, first = entry.sizeof(), head.sizeof()
    return [entry.parse(table[first + index * size : first + (index + 1) * size]) for index in range(count)]


def _number(name: str, items: dict[uuid.UUID, bytes], guid: uuid.UUID, length: int) -> int:
    """A metadata item that is a number of so many bytes."""
    item = items.get(guid)
    if item is None or len(item) < length:
        raise FormatError(f"{name}: the metadata item {guid} is missing or too short; the image is damaged")
    return int.from_bytes(item[:length], "little")


def _locator(name: str, items: dict[uuid.UUID, bytes]) -> bytes:
    if PARENT_LOCATOR not in items:
        raise FormatError(f"{name}: is a differencing disk, but does not say of which parent; the image is damaged")
    return items[PARENT_LOCATOR]
