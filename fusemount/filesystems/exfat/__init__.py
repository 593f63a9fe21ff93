"""exFAT, read-only: the file system of large memory cards.

    boot        the boot sector: sizes and places
    clusters    chains of clusters, and reading them
    entries     what stands in a directory
    reading     ExfatReader, the file system

Written from Microsoft's "exFAT file system specification"; section numbers refer to it.
"""

from __future__ import annotations

from fusemount.filesystems.base import Condition, FileSystem
from fusemount.filesystems.exfat.boot import read_geometry
from fusemount.filesystems.exfat.reading import ExfatReader
from nbdserve.block import BlockDevice
from nbdserve.errors import FormatError, OpenError

_ONLY_READ = "exFAT: this kind of file system is only read here, not written"


def examine(device: BlockDevice) -> Condition:
    """In which state the file system is."""
    try:
        geometry = read_geometry(device)
    except FormatError as failure:
        return Condition.unreadable(failure)
    remark = _ONLY_READ
    if geometry.dirty:
        remark = "exFAT: the volume was not cleanly unmounted; fsck.exfat (or chkdsk) checks it. Reading works"
    return Condition(readable=True, writable=False, dirty=geometry.dirty, remark=remark)


def open_filesystem(device: BlockDevice, *, writable: bool) -> FileSystem:
    """Open the file system.

    Raises:
        OpenError: it is asked for writing.
        FormatError: it is damaged.
    """
    if writable:
        raise OpenError(_ONLY_READ)
    return ExfatReader(device, read_geometry(device))
