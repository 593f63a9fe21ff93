"""The two structures that describe a VHD: the footer and, in dynamic disks, the header it leads to.

All fields are big-endian. Everything is checked here, once, against the file's length and the caps; those who hold a
Footer or a Layout need not look again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from construct import Bytes, Const, Int8ub, Int16ub, Int32ub, Int64ub, Padding, Struct

from nbdserve.block.file import HostFile
from nbdserve.errors import FormatError, Unsupported
from nbdserve.formats.vpc import COOKIE, FOOTER_SIZE, checksum

SECTOR = 512
MAX_SECTORS = 0xFF000000  # 2040 GiB: what Microsoft's tools and QEMU take
MIN_BLOCK_SIZE = 8 * SECTOR  # in smaller ones QEMU sees no bitmap where the specification has one
MAX_BLOCKS = 1 << 22  # a table of 16 MiB: the largest disk in blocks of 512 KiB
HEADER_SIZE = 1024
_HEADER_COOKIE = b"cxsparse"
_HEADER_CHECKSUM = slice(36, 40)

# Creators whose disks are as long as the footer's current size says. All others, Virtual PC first, mean what the
# geometry gives, unless that is the largest geometry there is and so says nothing.
_SIZE_IS_EXACT = (b"win ", b"qem2", b"d2v ", b"CTXS", b"tap\0")
_LARGEST_GEOMETRY = 65535 * 16 * 255

_FOOTER = Struct(  # "Hard Disk Footer Format"
    "cookie" / Const(COOKIE),
    Padding(8),
    "header_offset" / Int64ub,
    "timestamp" / Int32ub,
    "creator" / Bytes(4),
    Padding(16),
    "current_size" / Int64ub,
    "cylinders" / Int16ub,
    "heads" / Int8ub,
    "sectors_per_track" / Int8ub,
    "disk_type" / Int32ub,
    Padding(4),
    "unique_id" / Bytes(16),
)

_HEADER = Struct(  # "Dynamic Disk Header Format"
    "cookie" / Bytes(8),
    Padding(8),
    "table_offset" / Int64ub,
    Padding(4),
    "table_entries" / Int32ub,
    "block_size" / Int32ub,
)


class DiskType(IntEnum):
    """The footer's disk type."""

    FIXED = 2
    DYNAMIC = 3
    DIFFERENCING = 4


@dataclass(frozen=True, slots=True)
class Footer:
    """What a valid footer says.

    Attributes:
        content: its 512 bytes, to be written again behind a file that has grown.
        size: the length of the disk in bytes.
        disk_type: a number that need not be a DiskType.
        header_offset: where the dynamic header begins in the file, in bytes; not checked yet.
        timestamp: when the disk was made, in seconds since the start of 2000 (UTC).
        unique_id: by which a differencing disk knows its parent.
    """

    content: bytes
    size: int
    disk_type: int
    header_offset: int
    timestamp: int
    unique_id: bytes

    @classmethod
    def parse(cls, sector: bytes, name: str) -> Footer:
        """Take a sector apart that is_footer() has accepted.

        Raises:
            FormatError: the disk would be larger than a VHD may be.
        """
        fields = _FOOTER.parse(sector)
        sectors = fields.cylinders * fields.heads * fields.sectors_per_track
        if fields.creator.startswith(_SIZE_IS_EXACT) or sectors == _LARGEST_GEOMETRY:
            sectors = fields.current_size // SECTOR
        if sectors > MAX_SECTORS:
            raise FormatError(
                f"{name}: the VHD footer announces {sectors * SECTOR} bytes, but a VHD holds 2040 GiB at most; "
                "the footer is damaged"
            )
        return cls(
            sector,
            sectors * SECTOR,
            fields.disk_type,
            fields.header_offset,
            fields.timestamp,
            fields.unique_id,
        )


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a dynamic disk keeps what, in bytes.

    Attributes:
        block_size: guest bytes of a block, a power of two.
        bitmap_size: the sector bitmap in front of each block's data, whole sectors.
        table_offset: where the block allocation table begins in the file.
        blocks: how many of its entries belong to the disk.
        metadata: the ranges (start, end) of the file that no block may touch.
    """

    block_size: int
    bitmap_size: int
    table_offset: int
    blocks: int
    metadata: tuple[tuple[int, int], ...]

    @classmethod
    def read(cls, file: HostFile, footer: Footer, end: int) -> Layout:
        """Read the dynamic header that a footer leads to; `end` is where the file's part before any footer ends.

        Raises:
            FormatError: the header is damaged, or contradicts the footer or the file.
            Unsupported: a valid disk in blocks so small that its table does not fit the cap.
        """
        start = footer.header_offset
        if not FOOTER_SIZE <= start <= end - HEADER_SIZE:
            raise FormatError(
                f"{file.name}: the footer puts the dynamic header at {start}, outside the file's {end} bytes"
            )
        raw = bytes(file.read(start, HEADER_SIZE))
        if not raw.startswith(_HEADER_COOKIE):
            raise FormatError(f"{file.name}: no dynamic disk header at {start}; the image is damaged")
        if int.from_bytes(raw[_HEADER_CHECKSUM], "big") != checksum(raw, _HEADER_CHECKSUM):
            raise FormatError(f"{file.name}: the dynamic disk header's checksum is wrong; the image is damaged")
        fields = _HEADER.parse(raw)
        return cls._checked(
            file.name, footer.size, start, end, fields.table_offset, fields.table_entries, fields.block_size
        )

    @classmethod
    def _checked(
        cls, name: str, size: int, header: int, end: int, table_offset: int, entries: int, block_size: int
    ) -> Layout:
        if block_size < SECTOR or block_size & (block_size - 1):
            raise FormatError(f"{name}: the block size {block_size} is not a power of two of at least {SECTOR} bytes")
        if block_size < MIN_BLOCK_SIZE:
            raise Unsupported(f"{name}: blocks of {block_size} bytes are not handled, {MIN_BLOCK_SIZE} is the least")
        blocks = -(-size // block_size)
        if blocks > entries:
            raise FormatError(f"{name}: the block table has {entries} entries, but the disk has {blocks} blocks")
        if blocks > MAX_BLOCKS:
            raise Unsupported(
                f"{name}: {blocks} blocks of {block_size} bytes, more than the {MAX_BLOCKS} handled here; "
                "convert the image to larger blocks"
            )
        table = (table_offset, table_offset + 4 * entries)
        if not FOOTER_SIZE <= table[0] <= table[1] <= end or (table[0] < header + HEADER_SIZE and header < table[1]):
            raise FormatError(
                f"{name}: the block table at {table_offset} ({entries} entries) does not fit into the file's {end} "
                "bytes beside its headers; the image is truncated or damaged"
            )
        bitmap_size = -(-block_size // (SECTOR * 8 * SECTOR)) * SECTOR
        metadata = ((0, FOOTER_SIZE), (header, header + HEADER_SIZE), table)
        return cls(block_size, bitmap_size, table_offset, blocks, metadata)
