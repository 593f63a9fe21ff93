"""The superblock of squashfs: where its tables are.

The rule of this file: every table begins inside the file system, and that inside the device.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntFlag

from nbdserve.block import BlockDevice
from nbdserve.errors import FormatError, Unsupported

_SUPERBLOCK = struct.Struct("<4sIIII HHH HHH QQ QQQQQQ")
_LARGEST_BLOCK = 1 << 20
NOTHING = 0xFFFFFFFFFFFFFFFF
"""The place of a table that is not there."""


class Flags(IntFlag):
    """Flags of the superblock that matter for reading; each block says for itself whether it is compressed."""

    NO_XATTRS = 0x0200


@dataclass(frozen=True, slots=True)
class Superblock:
    """What it says; places are bytes from its start.

    Attributes:
        block: bytes in a block of data.
        fragments, ids: how many of each there are.
        root: the reference of the root directory's inode.
        size: bytes of the whole file system.
    """

    inodes: int
    block: int
    fragments: int
    compressor: int
    flags: int
    ids: int
    root: int
    size: int
    id_table: int
    xattr_table: int
    inode_table: int
    directory_table: int
    fragment_table: int


def read_superblock(device: BlockDevice) -> Superblock:
    """Read and check it.

    Raises:
        FormatError: it is damaged, or the device was cut off.
        Unsupported: it is of another version.
    """
    if device.size < _SUPERBLOCK.size:
        raise FormatError("squashfs: the image is too small to hold a superblock")
    fields = _SUPERBLOCK.unpack(device.read(0, _SUPERBLOCK.size))
    magic, inodes, _, block, fragments, compressor, log, flags, ids, major, minor, root, size = fields[:13]
    if magic != b"hsqs":
        raise FormatError("squashfs: the image does not begin with a superblock; is this the right partition?")
    if (major, minor) != (4, 0):
        raise Unsupported(f"squashfs: version {major}.{minor} is not known here, only 4.0")
    if not 4096 <= block <= _LARGEST_BLOCK or block != 1 << log:
        raise FormatError(f"squashfs: the superblock is damaged (blocks of {block} bytes)")
    if size > device.size:
        raise FormatError(f"squashfs: the image was cut off, {size - device.size} of {size} bytes are missing")
    tables = fields[13:18]
    for place in tables:
        if place != NOTHING and not _SUPERBLOCK.size <= place <= size:
            raise FormatError("squashfs: the superblock is damaged (a table lies outside)")
    if tables[2] + (root >> 16) >= size:
        raise FormatError("squashfs: the superblock is damaged (the root directory lies outside)")
    return Superblock(inodes, block, fragments, compressor, flags, ids, root, size, *tables)
