"""NTFS: read in Python, written with libntfs-3g.

    boot        the boot sector: sizes and where the MFT lies
    records     MFT records and the attributes in them
    runs        where the clusters of an attribute lie
    lznt1       the decompression of files
    streams     the content of an attribute
    volume      a volume: files by number
    directory   the names in a directory
    links       symbolic links and special files
    state       whether a volume may be written to
    reading     NtfsReader, the read-only file system
    library     libntfs-3g over a block device
    writing     NtfsWriter, the file system that can be changed

The library is loaded when a volume is opened for writing, and not before. It is under the GNU GPL, and no part of this
project: whoever wants to write installs it.
"""

from __future__ import annotations

from fusemount.filesystems.base import Condition, FileSystem
from fusemount.filesystems.ntfs.reading import NtfsReader
from fusemount.filesystems.ntfs.state import obstacle
from fusemount.filesystems.ntfs.volume import ROOT, Volume
from nbdserve.block import BlockDevice
from nbdserve.errors import FormatError, OpenError

_READ_ONLY = "NTFS: the image was opened read-only; open it for writing to change files"


def examine(device: BlockDevice) -> Condition:
    """In which state the volume is; nothing is changed."""
    try:
        volume = _open_volume(device)
    except FormatError as failure:
        return Condition.unreadable(failure)
    dirty, remark = obstacle(volume)
    if not remark and device.read_only:
        remark = _READ_ONLY
    if not remark:
        from fusemount.filesystems.ntfs.library import missing

        remark = missing()
    return Condition(readable=True, writable=not remark, dirty=dirty, remark=remark)


def open_filesystem(device: BlockDevice, *, writable: bool) -> FileSystem:
    """Open a volume.

    Raises:
        OpenError: it cannot be read, or not be written to; the message says why.
    """
    volume = _open_volume(device)
    if not writable:
        return NtfsReader(volume)
    _, remark = obstacle(volume)
    if remark or device.read_only:
        raise OpenError(remark or _READ_ONLY)
    from fusemount.filesystems.ntfs.writing import NtfsWriter

    return NtfsWriter(volume)


def _open_volume(device: BlockDevice) -> Volume:
    try:
        volume = Volume(device)
        volume.system(ROOT)
    except BlockingIOError:
        raise
    except OSError:
        raise FormatError("NTFS: the file table of the volume is damaged; let Windows check it (chkdsk /f)") from None
    return volume
