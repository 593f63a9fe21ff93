"""ext2, ext3 and ext4.

    superblock    what a file system is made of, checked
    inodes        inodes on disk and in memory
    mapping       which blocks a file has
    directories   the blocks of directories
    xattrs        extended attributes and ACLs
    checksum      CRC-32C and the journal's older CRC-32
    journal       a dirty log, and the device as it is after it was replayed
    recovery      what to do with a file system that was not unmounted
    reading       ExtFileSystem: all of that as a file system that is read
    library       libext2fs, for writing
    content       the blocks of files, changed
    htree         the hash index of directories, changed
    names         directories, changed
    order         which changes reach the device before others
    store         inodes, orphans and the state of the whole, kept right while it is changed
    writing       the operations on top of that

Reading needs no library and is Python all through, so that a damaged image can do no harm. Writing leaves to libext2fs
what has to be consistent across the whole file system: bitmaps and counts, inodes with their checksums, extent trees,
extended attributes.
"""

from __future__ import annotations

import errno

from fusemount.filesystems.base import Condition, FileSystem
from fusemount.filesystems.ext import library, recovery
from nbdserve.block.device import BlockDevice
from nbdserve.errors import FormatError, NbdserveError, OpenError


def examine(device: BlockDevice) -> Condition:
    """In which state the file system on a device is. Changes nothing."""
    try:
        found = recovery.find(device)
        recovery.view(found)
    except NbdserveError as problem:
        return Condition(False, False, False, str(problem))
    except OSError as problem:
        if problem.errno != errno.EIO:
            raise
        return Condition(False, False, False, _DAMAGED)
    refusal = found.refusal
    if not refusal and library.load() is None:
        refusal = library.MISSING
    if not refusal and device.read_only:
        refusal = "its image was opened read-only"
    return Condition(True, not refusal, found.dirty, refusal)


def open_filesystem(device: BlockDevice, *, writable: bool) -> FileSystem:
    """The file system on a device.

    Opened to be read, the device stays untouched whatever its state. Raises OpenError with one line when it cannot be
    opened in that way.
    """
    found = recovery.find(device)
    try:
        reading = recovery.view(found)
        if not writable:
            return reading
        if found.refusal:
            raise OpenError(f"this ext file system cannot be written: {found.refusal}")
        if device.read_only:
            raise OpenError("this ext file system cannot be written: its image was opened read-only")
        if library.load() is None:
            raise OpenError(library.MISSING)
        from fusemount.filesystems.ext.writing import open_for_writing

        return open_for_writing(device, found)
    except OSError as problem:
        if problem.errno != errno.EIO:
            raise
        raise FormatError(_DAMAGED) from None


_DAMAGED = "the ext file system is damaged where it is needed first of all (root directory, orphans); run e2fsck on it"
