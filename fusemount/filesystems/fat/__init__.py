"""FAT12, FAT16 and FAT32 with long names, as Windows and Linux (vfat) write them; read and write, an own driver.

    boot         the boot sector: where everything lies, checked once
    table        the allocation table: which cluster follows which, and which are free
    chain        the clusters of one file, as runs
    names        long names, 8.3 names and what relates them
    entries      the 32 bytes of a directory entry, its times and attributes
    directory    one directory in memory: finding, adding and removing entries
    volume       the device with all that, and the marks that say whether it was cleanly unmounted
    inodes       which file has which inode number
    reading      the part of the file system that only looks
    content      the part that changes what is in files
    writing      the part that changes names and directories, and the order of all writes

Source: "Microsoft Extensible Firmware Initiative FAT32 File System Specification", version 1.03 (2000), called the
specification in this package. Where it leaves room, what Linux's vfat does is followed. Times are taken for UTC, since
the volume does not say in which time zone they were written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusemount.filesystems.base import Condition, FileSystem
    from nbdserve.block import BlockDevice


def examine(device: BlockDevice) -> Condition:
    """In which state the volume on a device is.

    Raises:
        FormatError, Unsupported: it is no FAT volume, or one that is not handled.
    """
    from fusemount.filesystems.fat.volume import Volume

    return Volume(device).condition()


def open_filesystem(device: BlockDevice, *, writable: bool) -> FileSystem:
    """Mount the volume on a device.

    Raises:
        OpenError: it is no FAT volume, is damaged, or cannot be written to; the message says which.
    """
    from fusemount.filesystems.fat.reading import FatReader
    from fusemount.filesystems.fat.volume import Volume
    from fusemount.filesystems.fat.writing import FatFileSystem
    from nbdserve.errors import OpenError

    volume = Volume(device)
    if not writable:
        return FatReader(volume)
    condition = volume.condition()
    if not condition.writable:
        raise OpenError(f"FAT volume: {condition.remark}")
    return FatFileSystem(volume)
