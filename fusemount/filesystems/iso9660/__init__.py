"""ISO 9660, read-only: the file system of CDs, DVDs and installation images, with Rock Ridge or Joliet.

    records     volume descriptors and directory records (ECMA-119)
    rockridge   what Rock Ridge adds to a directory record (SUSP 1.12, RRIP 1.12)
    zisofs      files that were compressed one by one
    reading     IsoReader, the file system

Directories are read when they are asked for, so that even a large image opens at once.
"""

from __future__ import annotations

from fusemount.filesystems.base import Condition, FileSystem
from fusemount.filesystems.iso9660.reading import IsoReader
from fusemount.filesystems.iso9660.records import find_volumes
from nbdserve.block import BlockDevice
from nbdserve.errors import FormatError, OpenError

_ONLY_READ = "ISO 9660: this kind of file system cannot be changed, only read"


def examine(device: BlockDevice) -> Condition:
    """In which state the file system is."""
    try:
        volume = find_volumes(device)[0]
    except FormatError as failure:
        return Condition.unreadable(failure)
    remark = _ONLY_READ
    if volume.size > device.size:
        remark = f"ISO 9660: the image was cut off, {volume.size - device.size} of {volume.size} bytes are missing"
    return Condition(readable=True, writable=False, dirty=False, remark=remark)


def open_filesystem(device: BlockDevice, *, writable: bool) -> FileSystem:
    """Open the file system.

    Raises:
        OpenError: it is asked for writing.
        FormatError: it is damaged.
    """
    if writable:
        raise OpenError(_ONLY_READ)
    return IsoReader(device, find_volumes(device))
