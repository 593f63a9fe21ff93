"""New, empty VHDX images: dynamic, fixed or differencing ([MS-VHDX] 2.1)."""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import Iterator
from typing import BinaryIO

from nbdserve.errors import OpenError
from nbdserve.formats.vhdx import HEADER_SECTION, MAXIMUM_SIZE, MIB, SIGNATURE
from nbdserve.formats.vhdx.checksum import checksum_of
from nbdserve.formats.vhdx.headers import HEADER_PLACES, NO_GUID, Header
from nbdserve.formats.vhdx.layout import (
    BAT,
    BITS_IN_BITMAP_BLOCK,
    FILE_PARAMETERS,
    HAS_PARENT,
    IS_REQUIRED,
    IS_VIRTUAL_DISK,
    ITEM,
    LEAVE_BLOCKS_ALLOCATED,
    LOGICAL_SECTOR_SIZE,
    METADATA,
    METADATA_TABLE,
    METADATA_TABLE_SIZE,
    PAGE_83,
    PARENT_LOCATOR,
    PHYSICAL_SECTOR_SIZE,
    REGION,
    REGION_TABLE,
    REGION_TABLE_SIZE,
    REGION_TABLES,
    VIRTUAL_DISK_SIZE,
    table_entries,
)
from nbdserve.formats.vhdx.parent import build_locator
from nbdserve.formats.vhdx.table import State

_CREATOR = "nbdserve"
_TABLE_PIECE = 1 << 17  # entries that are written at once


def create_image(
    path: str | os.PathLike[str],
    size: int,
    *,
    subformat: str = "dynamic",
    block_size: int | None = None,
    log_size: int = MIB,
    sector_size: int = 512,
    parent: str | None = None,
    parent_guid: uuid.UUID | None = None,
) -> None:
    """Create an image whose disk has `size` bytes and reads as zeros, or as its parent.

    An existing file is never overwritten.

    Args:
        subformat: "dynamic", "fixed" or "differencing".
        block_size: bytes, a power of two from 1 to 256 MiB; None for what QEMU takes, or 2 MiB with a parent.
        log_size: bytes of the log, rounded up to whole MiB.
        sector_size: of the guest's logical sectors, 512 or 4096.
        parent: for a differencing disk, the parent's path as the image is to find it, relative to itself.
        parent_guid: the parent's data_write_guid.

    Raises:
        OpenError: such a disk cannot be, with the reason in one line.
        FileExistsError: there is such a file.
    """
    name = os.fspath(path)
    block_size = block_size or _usual_block_size(size, subformat)
    log_length = max(1, -(-log_size // MIB)) * MIB
    _check(name, size, subformat, block_size, log_length, sector_size)
    if (subformat == "differencing") != (parent is not None and parent_guid is not None):
        raise OpenError(f"{name}: a differencing disk needs a parent and its GUID, and others have none")
    blocks = -(-size // block_size)
    ratio = BITS_IN_BITMAP_BLOCK * sector_size // block_size
    entries = table_entries(blocks, ratio, has_parent=parent is not None)
    table_at = HEADER_SECTION + log_length
    table_length = max(1, -(-8 * entries // MIB)) * MIB
    metadata_at = table_at + table_length
    end = metadata_at + MIB
    locator = None if parent is None or parent_guid is None else build_locator(parent, parent_guid)
    with open(path, "xb") as file:
        file.truncate(end + (blocks * block_size if subformat == "fixed" else 0))
        _write_at(file, 0, SIGNATURE + _CREATOR.encode("utf-16-le"))
        _write_headers(file, log_length)
        _write_at(file, metadata_at, _metadata(size, block_size, sector_size, subformat, locator))
        regions = _region_table([(BAT, table_at, table_length), (METADATA, metadata_at, MIB)])
        for place in REGION_TABLES:
            _write_at(file, place, regions)
        if subformat == "fixed":
            file.seek(table_at)
            file.writelines(_full_table(entries, ratio, end, block_size))
        file.flush()
        os.fsync(file.fileno())


def _usual_block_size(size: int, subformat: str) -> int:
    if subformat == "differencing":
        return 2 * MIB
    for limit, block_size in ((32 << 40, 64 * MIB), (100 << 30, 32 * MIB), (1 << 30, 16 * MIB)):
        if size > limit:
            return block_size
    return 8 * MIB


def _check(name: str, size: int, subformat: str, block_size: int, log_length: int, sector_size: int) -> None:
    if subformat not in ("dynamic", "fixed", "differencing"):
        raise OpenError(f"{name}: a VHDX is dynamic, fixed or differencing, not {subformat!r}")
    if sector_size not in (512, 4096):
        raise OpenError(f"{name}: a VHDX has sectors of 512 or 4096 bytes, not {sector_size}")
    if not 0 <= size <= MAXIMUM_SIZE or size % sector_size:
        raise OpenError(f"{name}: the size of a VHDX is whole sectors up to 64 TiB, which {size} bytes are not")
    if not MIB <= block_size <= 256 * MIB or block_size & (block_size - 1):
        raise OpenError(f"{name}: the block size of a VHDX is a power of two from 1 to 256 MiB, not {block_size}")
    if log_length >= 1 << 32:
        raise OpenError(f"{name}: the log of a VHDX is shorter than 4 GiB")


def _write_at(file: BinaryIO, offset: int, data: bytes) -> None:
    file.seek(offset)
    file.write(data)


def _write_headers(file: BinaryIO, log_length: int) -> None:
    first = random.getrandbits(32)
    guids = uuid.uuid4(), uuid.uuid4()
    for number, place in enumerate(HEADER_PLACES):
        _write_at(file, place, Header(first + number, *guids, NO_GUID, HEADER_SECTION, log_length).build())


def _region_table(regions: list[tuple[uuid.UUID, int, int]]) -> bytes:
    table = REGION_TABLE.build({"checksum": 0, "count": len(regions)})
    for guid, offset, length in regions:
        table += REGION.build({"guid": guid.bytes_le, "offset": offset, "length": length, "required": 1})
    table = table.ljust(REGION_TABLE_SIZE, b"\0")
    return (
        REGION_TABLE.build({"checksum": checksum_of(table, 4), "count": len(regions)}) + table[REGION_TABLE.sizeof() :]
    )


def _metadata(size: int, block_size: int, sector_size: int, subformat: str, locator: bytes | None) -> bytes:
    """The metadata table and, behind it, the items."""
    flags = {"dynamic": 0, "fixed": LEAVE_BLOCKS_ALLOCATED, "differencing": HAS_PARENT}[subformat]
    of_disk = IS_REQUIRED | IS_VIRTUAL_DISK
    items = [
        (FILE_PARAMETERS, IS_REQUIRED, block_size.to_bytes(4, "little") + flags.to_bytes(4, "little")),
        (VIRTUAL_DISK_SIZE, of_disk, size.to_bytes(8, "little")),
        (PAGE_83, of_disk, uuid.uuid4().bytes_le),
        (LOGICAL_SECTOR_SIZE, of_disk, sector_size.to_bytes(4, "little")),
        (PHYSICAL_SECTOR_SIZE, of_disk, (4096).to_bytes(4, "little")),
    ]
    if locator is not None:
        items.append((PARENT_LOCATOR, IS_REQUIRED, locator))
    table = METADATA_TABLE.build({"count": len(items)})
    content = b""
    for guid, flags, item in items:
        offset = METADATA_TABLE_SIZE + len(content)
        table += ITEM.build({"guid": guid.bytes_le, "offset": offset, "length": len(item), "flags": flags})
        content += item
    return table.ljust(METADATA_TABLE_SIZE, b"\0") + content


def _full_table(entries: int, ratio: int, start: int, block_size: int) -> Iterator[bytes]:
    """The table of a fixed disk, whose blocks lie in a row from `start` on."""
    for first in range(0, entries, _TABLE_PIECE):
        piece = bytearray()
        for index in range(first, min(entries, first + _TABLE_PIECE)):
            chunk, inside = divmod(index, ratio + 1)
            block = chunk * ratio + inside
            piece += (0 if inside == ratio else start + block * block_size | State.FULL).to_bytes(8, "little")
        yield bytes(piece)
