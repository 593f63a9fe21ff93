"""New, empty VDI images."""

from __future__ import annotations

import os
import struct
import uuid

from nbdserve.errors import OpenError
from nbdserve.formats.newfile import new_file
from nbdserve.formats.vdi.header import (
    LAYOUT,
    MAX_BLOCK_SIZE,
    MAX_BLOCKS,
    MIN_BLOCK_SIZE,
    NO_UUID,
    SECTOR,
    SIGNATURE,
    VERSION,
    Header,
    ImageType,
)

_TEXT = b"<<< nbdserve VirtualBox Disk Image >>>\n"
_FIELDS_SIZE = 400  # VirtualBox's own: the four UUIDs and one more geometry
_ALIGNMENT = 4096
_PIECE = 1 << 16  # map entries written at once


def create_image(
    path: str | os.PathLike[str],
    size: int,
    *,
    static: bool = False,
    block_size: int = 1 << 20,
    parent: Header | None = None,
) -> None:
    """Create an image whose disk has `size` bytes and reads as zeros, or as its parent.

    An existing file is never overwritten, and nothing is found under the name before the image is complete.

    Args:
        size: in bytes, rounded up to whole sectors.
        static: give every block its place at once, as holes in the file; not with a parent.
        block_size: bytes, a power of two; QEMU and most other programs know only 1 MiB.
        parent: the header of the image to stand on, which must be found beside this one.

    Raises:
        OpenError: the size is too large for such blocks.
        FileExistsError: there is such a file.
    """
    assert MIN_BLOCK_SIZE <= block_size <= MAX_BLOCK_SIZE and not block_size & (block_size - 1)
    assert not (static and parent)
    size = -(-size // SECTOR) * SECTOR
    blocks = -(-size // block_size)
    if blocks > MAX_BLOCKS:
        raise OpenError(f"{os.fspath(path)}: {size} bytes are too many, a VDI holds {MAX_BLOCKS * block_size} here")
    data_offset = -(-(SECTOR + 4 * blocks) // _ALIGNMENT) * _ALIGNMENT
    with new_file(path) as file:
        file.write(_header(size, blocks, block_size, data_offset, static, parent))
        for start in range(0, blocks, _PIECE):
            stop = min(blocks, start + _PIECE)
            numbers = range(start, stop) if static else [0xFFFFFFFF] * (stop - start)
            file.write(struct.pack(f"<{stop - start}I", *numbers))
        file.truncate(data_offset + (blocks * block_size if static else 0))


def _header(size: int, blocks: int, block_size: int, data_offset: int, static: bool, parent: Header | None) -> bytes:
    image_type = ImageType.STATIC if static else ImageType.DIFFERENCING if parent else ImageType.DYNAMIC
    raw: bytes = LAYOUT.build(
        {
            "text": _TEXT.ljust(64, b"\0"),
            "signature": SIGNATURE,
            "version": VERSION,
            "header_size": _FIELDS_SIZE,
            "image_type": image_type,
            "flags": 0,
            "description": bytes(256),
            "map_offset": SECTOR,
            "data_offset": data_offset,
            "geometry": bytes(12),
            "sector_size": SECTOR,
            "disk_size": size,
            "block_size": block_size,
            "block_extra": 0,
            "blocks": blocks,
            "blocks_allocated": blocks if static else 0,
            "image_uuid": uuid.uuid4().bytes_le,
            "modification_uuid": uuid.uuid4().bytes_le,
            "parent_uuid": (parent.image_uuid if parent else NO_UUID).bytes_le,
            "parent_modification_uuid": (parent.modification_uuid if parent else NO_UUID).bytes_le,
        }
    )
    # The newer geometry, of which only the sector size has to be right.
    return raw[:468] + SECTOR.to_bytes(4, "little") + raw[472:]
