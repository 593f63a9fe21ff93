"""New, empty VHD images: dynamic, fixed or differencing.

The size follows QEMU's rule, which readers follow too (see header): a disk is as long as its geometry says, rounded up
from what was asked for, unless the geometry is the largest there is; then, and when that is asked for, the exact size
counts (VHD specification, "CHS Calculation"; QEMU, block/vpc, force_size).
"""

from __future__ import annotations

import os
import time
import uuid

from nbdserve.errors import OpenError
from nbdserve.formats.vpc import COOKIE, FOOTER_SIZE, checksum
from nbdserve.formats.vpc.header import HEADER_SIZE, MAX_BLOCKS, MAX_SECTORS, MIN_BLOCK_SIZE, SECTOR, DiskType, Footer
from nbdserve.formats.vpc.parents import windows_name

_EPOCH = 946684800  # 2000-01-01 00:00 UTC, from which VHD counts seconds
_NOWHERE = 0xFFFFFFFFFFFFFFFF
_TABLE_OFFSET = FOOTER_SIZE + HEADER_SIZE
_LARGEST = (65535, 16, 255)
_TYPES = {"fixed": DiskType.FIXED, "dynamic": DiskType.DYNAMIC, "differencing": DiskType.DIFFERENCING}


def create_image(
    path: str | os.PathLike[str],
    size: int,
    *,
    subformat: str = "dynamic",
    force_size: bool = False,
    block_size: int = 2 << 20,
    parent: str | None = None,
    parent_footer: Footer | None = None,
) -> None:
    """Create an image whose disk has at least `size` bytes and reads as zeros, or as its parent.

    An existing file is never overwritten.

    Args:
        subformat: "dynamic", "fixed" or "differencing".
        force_size: the disk has exactly `size` bytes, as whole sectors, whatever its geometry says.
        block_size: bytes of a block, a power of two from 4 KiB; QEMU and Microsoft's tools take 2 MiB.
        parent: for a differencing disk, the parent's path as the image is to find it, relative to itself; `size` must
            be the parent's.
        parent_footer: the parent's `footer`.

    Raises:
        OpenError: such a disk cannot be, with the reason in one line.
        FileExistsError: there is such a file.
    """
    name = os.fspath(path)
    if subformat not in _TYPES:
        raise OpenError(f"{name}: a VHD is dynamic, fixed or differencing, not {subformat!r}")
    if (subformat == "differencing") != (parent is not None and parent_footer is not None):
        raise OpenError(f"{name}: a differencing disk needs a parent and its footer, and others have none")
    if block_size < MIN_BLOCK_SIZE or block_size & (block_size - 1):
        raise OpenError(f"{name}: the block size of a VHD is a power of two of at least {MIN_BLOCK_SIZE} bytes")
    if not 0 <= size <= MAX_SECTORS * SECTOR:
        raise OpenError(f"{name}: a VHD holds 2040 GiB at most, not {size} bytes")
    if parent_footer is None:
        sectors, geometry = _rounded(-(-size // SECTOR), exact=force_size)
        ends = _footer(sectors * SECTOR, geometry, _TYPES[subformat], creator=b"qem2" if force_size else b"qemu")
    else:
        if size != parent_footer.size:
            raise OpenError(f"{name}: a differencing disk is as long as its parent, {parent_footer.size} bytes")
        sectors = size // SECTOR
        ends = _child_footer(parent_footer)
    blocks = -(-sectors * SECTOR // block_size)
    if blocks > MAX_BLOCKS:
        raise OpenError(f"{name}: {size} bytes are too many for blocks of {block_size}; take larger ones")
    with open(path, "xb") as file:
        if subformat == "fixed":
            file.seek(sectors * SECTOR)
        else:
            file.write(ends + _in_front_of_blocks(blocks, block_size, parent, parent_footer))
        file.write(ends)
        file.flush()
        os.fsync(file.fileno())


def geometry_of(sectors: int) -> tuple[int, int, int]:
    """Cylinders, heads and sectors per track of a disk of so many sectors, which they may fall short of."""
    sectors = min(sectors, 65535 * 16 * 255)
    if sectors >= 65535 * 16 * 63:
        return sectors // 255 // 16, 16, 255
    tracks = sectors // 17
    heads = max(4, (tracks + 1023) // 1024)
    if tracks < heads * 1024 and heads <= 16:
        return tracks // heads, heads, 17
    for per_track in (31, 63):
        tracks = sectors // per_track
        if tracks < 16 * 1024:
            break
    return tracks // 16, 16, per_track


def _rounded(sectors: int, *, exact: bool) -> tuple[int, tuple[int, int, int]]:
    """The sectors and the geometry of a disk of at least so many sectors."""
    if exact:
        return sectors, _LARGEST
    wanted = tried = min(sectors, 65535 * 16 * 255)
    geometry = (0, 0, 0)
    while geometry[0] * geometry[1] * geometry[2] < wanted:
        geometry = geometry_of(tried)
        tried += 1
    if geometry == _LARGEST:
        return sectors, geometry
    return geometry[0] * geometry[1] * geometry[2], geometry


def _now() -> int:
    return int(time.time()) - _EPOCH


def _footer(size: int, geometry: tuple[int, int, int], disk_type: DiskType, *, creator: bytes) -> bytes:
    offset = _NOWHERE if disk_type == DiskType.FIXED else FOOTER_SIZE
    fields = (
        *((COOKIE, 8), (2, 4), (0x10000, 4), (offset, 8), (_now(), 4), (creator, 4), (0x50003, 4), (b"Wi2k", 4)),
        *((size, 8), (size, 8), (geometry[0], 2), (geometry[1], 1), (geometry[2], 1), (disk_type, 4), (0, 4)),
        (uuid.uuid4().bytes, 16),
    )
    return _sealed(_packed(fields, FOOTER_SIZE), 64)


def _child_footer(parent: Footer) -> bytes:
    """The parent's footer, and so its size and geometry by whichever rule, for a disk of another type and identity."""
    footer = bytearray(parent.content)
    footer[16:24] = FOOTER_SIZE.to_bytes(8, "big")
    footer[24:28] = max(_now(), parent.timestamp).to_bytes(4, "big")
    footer[60:64] = DiskType.DIFFERENCING.to_bytes(4, "big")
    footer[68:84] = uuid.uuid4().bytes
    return _sealed(bytes(footer), 64)


def _in_front_of_blocks(blocks: int, block_size: int, parent: str | None, parent_footer: Footer | None) -> bytes:
    """The dynamic header, the table with no block in it, and the path to the parent."""
    table = (b"\xff" * (4 * blocks)).ljust(-(-4 * blocks // SECTOR) * SECTOR, b"\xff")
    fields: list[tuple[int | bytes, int]] = [
        *((b"cxsparse", 8), (_NOWHERE, 8), (_TABLE_OFFSET, 8), (0x10000, 4), (blocks, 4), (block_size, 4), (0, 4))
    ]
    path = b""
    if parent is not None and parent_footer is not None:
        path = windows_name(parent).encode("utf-16-le")
        name = os.path.basename(parent).encode("utf-16-be")[:510]
        space = -(-len(path) // SECTOR) * SECTOR
        fields += [(parent_footer.unique_id, 16), (parent_footer.timestamp, 4), (0, 4), (name.ljust(512, b"\0"), 512)]
        fields += [(b"W2ru", 4), (space, 4), (len(path), 4), (0, 4), (_TABLE_OFFSET + len(table), 8)]
        path = path.ljust(space, b"\0")
    return _sealed(_packed(fields, HEADER_SIZE), 36) + table + path


def _packed(fields: list[tuple[int | bytes, int]] | tuple[tuple[int | bytes, int], ...], length: int) -> bytes:
    """Big-endian numbers and strings of the given widths, and zeros behind them."""
    parts = (field if isinstance(field, bytes) else field.to_bytes(width, "big") for field, width in fields)
    return b"".join(parts).ljust(length, b"\0")


def _sealed(header: bytes, field: int) -> bytes:
    """The header with its checksum at `field`."""
    where = slice(field, field + 4)
    return header[:field] + checksum(header, where).to_bytes(4, "big") + header[field + 4 :]
