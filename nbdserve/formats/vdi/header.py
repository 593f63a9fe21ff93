"""The VDI header, version 1.1: the first sector of the file, little-endian.

Everything is checked here, once, against the file's length and the caps, at least as strictly as QEMU 7.2 does; those
who hold a Header need not look again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from uuid import UUID

from construct import Bytes, Int32ul, Int64ul, Padding, Struct

from nbdserve.block.file import HostFile
from nbdserve.errors import FormatError, Unsupported

SECTOR = 512
HEADER_SIZE = 512  # what the fields and their reserve fill; the block map begins no earlier
SIGNATURE = 0xBEDA107F
VERSION = 0x00010001
LEAST_HEADER_FIELD = 0x180  # of the header that knows four UUIDs, counted from behind the version
MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = 4096, 64 << 20
MAX_BLOCKS = 1 << 24  # a map of 64 MiB: 16 TiB in blocks of 1 MiB

BLOCKS_ALLOCATED = 388  # where these fields lie, for those who change them alone
MODIFICATION_UUID = 408
NO_UUID = UUID(int=0)

LAYOUT = Struct(
    "text" / Bytes(64),
    "signature" / Int32ul,
    "version" / Int32ul,
    "header_size" / Int32ul,
    "image_type" / Int32ul,
    "flags" / Int32ul,
    "description" / Bytes(256),
    "map_offset" / Int32ul,
    "data_offset" / Int32ul,
    "geometry" / Bytes(12),
    "sector_size" / Int32ul,
    Padding(4),
    "disk_size" / Int64ul,
    "block_size" / Int32ul,
    "block_extra" / Int32ul,
    "blocks" / Int32ul,
    "blocks_allocated" / Int32ul,
    "image_uuid" / Bytes(16),
    "modification_uuid" / Bytes(16),
    "parent_uuid" / Bytes(16),
    "parent_modification_uuid" / Bytes(16),
    Padding(56),
)


class ImageType(IntEnum):
    """The header's image type."""

    DYNAMIC = 1
    STATIC = 2
    UNDO = 3
    DIFFERENCING = 4


@dataclass(frozen=True, slots=True)
class Header:
    """What the header says. Offsets and sizes are in bytes, and lie inside the file.

    Attributes:
        size: of the disk, whole sectors.
        map_offset: where the block map begins.
        blocks: its entries, of 4 bytes each.
        data_offset: where block 0 of the file begins; all blocks follow each other from there.
        block_size: a power of two.
        blocks_allocated: how many blocks the file is said to hold; not believed.
        image_uuid: the name of this image, for those that stand on it.
        modification_uuid: changes when the image is written for the first time after it was opened.
        parent_uuid: the image_uuid of the image that this one stands on, or NO_UUID.
        parent_modification_uuid: what the parent's modification_uuid must be, or NO_UUID for any.
    """

    image_type: ImageType
    size: int
    map_offset: int
    blocks: int
    data_offset: int
    block_size: int
    blocks_allocated: int
    image_uuid: UUID
    modification_uuid: UUID
    parent_uuid: UUID
    parent_modification_uuid: UUID


def is_vdi(sector: bytes) -> bool:
    """Whether a file that begins with this sector is a VDI, of whatever version."""
    return len(sector) >= 68 and int.from_bytes(sector[64:68], "little") == SIGNATURE


def uuids_of(sector: bytes) -> tuple[UUID, UUID] | None:
    """The UUIDs (image, modification) of a file that begins with this sector; None when it is no VDI 1.1."""
    if len(sector) < HEADER_SIZE or not is_vdi(sector):
        return None
    fields = LAYOUT.parse(sector)
    if fields.version != VERSION:
        return None
    return UUID(bytes_le=fields.image_uuid), UUID(bytes_le=fields.modification_uuid)


def read_header(file: HostFile) -> Header:
    """Read and check the header.

    Raises:
        FormatError: it is damaged, or does not fit the file.
        Unsupported: a valid image, of a kind that is not handled here.
    """
    name, length = file.name, file.size
    raw = bytes(file.read(0, HEADER_SIZE))
    if not is_vdi(raw):
        raise FormatError(f"{name}: not a VDI image; check the format you gave")
    if length < HEADER_SIZE:
        raise FormatError(f"{name}: too short for a VDI image ({length} bytes); the file is truncated")
    fields = LAYOUT.parse(raw)
    if fields.version != VERSION:
        raise Unsupported(
            f"{name}: VDI version {fields.version >> 16}.{fields.version & 0xFFFF} is not handled; 1.1 is, to which "
            "VirtualBox can clone it"
        )
    header = Header(
        image_type=_image_type(fields.image_type, name),
        size=-(-fields.disk_size // SECTOR) * SECTOR,  # some tools write odd sizes; QEMU rounds up as well
        map_offset=fields.map_offset,
        blocks=fields.blocks,
        data_offset=fields.data_offset,
        block_size=fields.block_size,
        blocks_allocated=fields.blocks_allocated,
        image_uuid=UUID(bytes_le=fields.image_uuid),
        modification_uuid=UUID(bytes_le=fields.modification_uuid),
        parent_uuid=UUID(bytes_le=fields.parent_uuid),
        parent_modification_uuid=UUID(bytes_le=fields.parent_modification_uuid),
    )
    if fields.header_size < LEAST_HEADER_FIELD or fields.sector_size != SECTOR:
        raise FormatError(
            f"{name}: a header of {fields.header_size} bytes and sectors of {fields.sector_size}; it is damaged"
        )
    if fields.block_extra:
        raise Unsupported(f"{name}: blocks with {fields.block_extra} extra bytes are not handled; clone the image")
    _check_parent(header, name)
    _check_blocks(header, name)
    _check_places(header, name, length)
    return header


def _image_type(number: int, name: str) -> ImageType:
    if number not in tuple(ImageType):
        raise FormatError(f"{name}: VDI image type {number} does not exist; the header is damaged")
    if number == ImageType.UNDO:
        raise Unsupported(f"{name}: undo images (VDI type 3) are not handled; merge it in VirtualBox first")
    return ImageType(number)


def _check_parent(header: Header, name: str) -> None:
    if header.image_type == ImageType.DIFFERENCING:
        if header.parent_uuid == NO_UUID:
            raise FormatError(f"{name}: a differencing VDI that names no parent; the header is damaged")
    elif header.parent_uuid != NO_UUID or header.parent_modification_uuid != NO_UUID:
        raise FormatError(f"{name}: names a parent although it is no differencing image; the header is damaged")


def _check_blocks(header: Header, name: str) -> None:
    size = header.block_size
    if size & (size - 1) or not size:
        raise FormatError(f"{name}: the block size {size} is not a power of two; the header is damaged")
    if not MIN_BLOCK_SIZE <= size <= MAX_BLOCK_SIZE:
        raise Unsupported(
            f"{name}: blocks of {size} bytes are not handled, only {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE} bytes are"
        )
    if header.blocks > MAX_BLOCKS:
        raise Unsupported(f"{name}: {header.blocks} blocks of {size} bytes, more than the {MAX_BLOCKS} handled here")
    if header.size > header.blocks * size:
        raise FormatError(
            f"{name}: the disk has {header.size} bytes, but its block map only {header.blocks} blocks of {size}; "
            "the header is damaged"
        )


def _check_places(header: Header, name: str, length: int) -> None:
    if header.map_offset % SECTOR or header.data_offset % SECTOR:
        raise FormatError(
            f"{name}: block map at {header.map_offset} and data at {header.data_offset}, not on sectors; "
            "the header is damaged"
        )
    map_end = header.map_offset + 4 * header.blocks
    if header.map_offset < HEADER_SIZE or map_end > header.data_offset:
        raise FormatError(
            f"{name}: the block map at {header.map_offset} does not fit between the header and the data at "
            f"{header.data_offset}; the header is damaged"
        )
    if header.data_offset > length:
        raise FormatError(f"{name}: data begins at {header.data_offset}, but the file has {length} bytes; truncated")
