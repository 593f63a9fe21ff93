"""squashfs, read-only by nature: the compressed file system of live systems, snaps and firmware.

    compression   the compressors
    superblock    where the tables are
    metadata      tables of metadata: blocks of 8 KiB, compressed
    inodes        what an inode says
    reading       SquashReader, the file system

Written from the format as the kernel's fs/squashfs/squashfs_fs.h declares it (version 4.0).
"""

from __future__ import annotations

from fusemount.filesystems.base import Condition, FileSystem
from fusemount.filesystems.squashfs.compression import decompressor
from fusemount.filesystems.squashfs.reading import SquashReader
from fusemount.filesystems.squashfs.superblock import read_superblock
from nbdserve.block import BlockDevice
from nbdserve.errors import OpenError

_ONLY_READ = "squashfs: this kind of file system cannot be changed, only read"


def examine(device: BlockDevice) -> Condition:
    """In which state the file system is."""
    try:
        decompressor(read_superblock(device).compressor)
    except OpenError as failure:
        return Condition.unreadable(failure)
    return Condition(readable=True, writable=False, dirty=False, remark=_ONLY_READ)


def open_filesystem(device: BlockDevice, *, writable: bool) -> FileSystem:
    """Open the file system.

    Raises:
        OpenError: it is asked for writing.
        FormatError: it is damaged.
        Unsupported: it uses a compressor that is not known here.
    """
    if writable:
        raise OpenError(_ONLY_READ)
    superblock = read_superblock(device)
    return SquashReader(device, superblock, decompressor(superblock.compressor))
