"""One open host file (or block device), with positioned access that threads may share.

Nothing here uses the file's cursor for data, so any number of threads read and write through one descriptor. Calls
either do all that was asked or raise OSError; a read past the end of the file gives zeros, because an image's last
cluster need not be written out in full.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Self, TypeAlias

from nbdserve.errors import OpenError

ReadBuffer: TypeAlias = bytes | bytearray | memoryview
WriteBuffer: TypeAlias = bytearray | memoryview

_PAGE = 4096
_TMPFS_MAGIC = 0x01021994
_ZEROS = bytes(1 << 20)

# fallocate(2), include/uapi/linux/falloc.h
_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02
_ZERO_RANGE = 0x10
_NOT_OFFERED = frozenset((errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY))


class HostFile:
    """A descriptor and what is known about the file behind it.

    Attributes:
        fd: the descriptor, for os.preadv, os.sendfile and the like.
        name: the path as it was given, for messages.
        writable: whether it was opened for writing.
        is_device: whether it is a block device rather than a regular file.
        nowait: flags for os.preadv() that make it fail rather than wait for the disk: RWF_NOWAIT, or 0 where the file
            lies in memory (tmpfs does not know the flag).
        durable: whether sync() does anything; False while the file is being made and nobody can rely on it yet.
        may_be_sent: whether sendfile may take bytes from it. Not where space is reused in pieces of a page: pages that
            wait in a socket would change.
    """

    def __init__(self, fd: int, name: str, *, writable: bool) -> None:
        self.fd = fd
        self.name = name
        self.writable = writable
        self.is_device = stat.S_ISBLK(os.fstat(fd).st_mode)
        self.nowait = _nowait_flags(fd)
        self.durable = True
        self.may_be_sent = True
        self._data = (0, 0)  # a range known to hold no hole; one tuple, because threads look at it without a lock
        self._syncing = threading.Lock()
        self._syncs = 0  # how many were begun; changed under the lock
        self._sync_failed = False

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, writable: bool, opener: Callable[[str, int], int] = os.open
    ) -> HostFile:
        """Open a regular file or block device.

        Args:
            opener: makes a descriptor from the path and flags, as for Python's open().

        Raises:
            OpenError: it does not exist, may not be opened, or is neither of the two.
        """
        name = os.fspath(path)
        if not name:
            raise OpenError("the name of an image is empty; give its path")
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
        try:
            # O_NONBLOCK: opening a fifo that nobody writes to must not hang; files and disks ignore it.
            fd = opener(name, flags | os.O_NONBLOCK)
        except OSError as error:
            raise OpenError(_why_not_opened(name, error, writable)) from None
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            os.close(fd)
            kind = "a directory" if stat.S_ISDIR(mode) else "neither a file nor a block device"
            raise OpenError(f"{name}: this is {kind}; give the path of a disk image")
        return cls(fd, name, writable=writable)

    @property
    def size(self) -> int:
        """The length in bytes at this moment."""
        if self.is_device:
            return os.lseek(self.fd, 0, os.SEEK_END)
        return os.fstat(self.fd).st_size

    def read_into(self, offset: int, buffer: WriteBuffer) -> None:
        """Fill the buffer with the bytes from offset on; what lies past the end of the file reads as zeros."""
        view = memoryview(buffer)
        while view:
            count = os.preadv(self.fd, [view], offset)
            if count == 0:
                view[:] = bytes(len(view))
                return
            view = view[count:]
            offset += count

    def read(self, offset: int, length: int) -> bytearray:
        """The `length` bytes from offset on, zero-filled past the end of the file."""
        buffer = bytearray(length)
        self.read_into(offset, buffer)
        return buffer

    def write(self, offset: int, data: ReadBuffer) -> None:
        """Write all of data at offset."""
        done = os.pwrite(self.fd, data, offset)
        while done < len(data):
            done += os.pwrite(self.fd, memoryview(data)[done:], offset + done)

    def write_all(self, offset: int, pieces: Sequence[ReadBuffer]) -> None:
        """Write the pieces one behind the other, in one system call where the kernel takes them at once."""
        done = os.pwritev(self.fd, pieces, offset)
        for piece in pieces:
            if done >= len(piece):
                done -= len(piece)
                offset += len(piece)
            else:
                self.write(offset + done, memoryview(piece)[done:])
                offset += len(piece)
                done = 0

    def write_zeros(self, offset: int, length: int) -> None:
        """Write zero bytes, so that the host space stays set aside."""
        while length:
            count = os.pwrite(self.fd, memoryview(_ZEROS)[: min(length, len(_ZEROS))], offset)
            offset += count
            length -= count

    def zero_range(self, offset: int, length: int) -> bool:
        """Make the range read as zeros while it stays allocated; False where the host cannot do that quickly."""
        return self._fallocate(_ZERO_RANGE | _KEEP_SIZE, offset, length)

    def punch_hole(self, offset: int, length: int) -> bool:
        """Give the range back to the host, to read as zeros from now on; False where the host cannot.

        The pages leave the page cache, so replies that still refer to them (sendfile) keep the old bytes, even when
        the range is written again: that is what makes freed clusters safe to reuse.
        """
        self._data = (0, 0)
        return self._fallocate(_PUNCH_HOLE | _KEEP_SIZE, offset, length)

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        error = _fallocate()(self.fd, mode, offset, length)
        if error and error not in _NOT_OFFERED:
            raise OSError(error, os.strerror(error), self.name)
        return not error

    def data_extent(self, offset: int, length: int) -> tuple[bool, int]:
        """Whether data or a hole starts at offset, and for how many bytes of the next `length` (SEEK_DATA, SEEK_HOLE).

        A host that knows no holes says data for all of it. The range must lie inside the file.
        """
        end = offset + length
        first, stop = self._data
        if not first <= offset < stop:
            try:
                start = os.lseek(self.fd, offset, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return False, length
                if error.errno in (errno.EINVAL, *_NOT_OFFERED):
                    return True, length
                raise
            if start > offset:
                return False, min(start, end) - offset
            # Only what is data is remembered: writes turn holes into data, but nothing save punch_hole() does
            # the opposite.
            stop = os.lseek(self.fd, offset, os.SEEK_HOLE)
            self._data = (offset, stop)
        return True, min(stop, end) - offset

    def is_known_data(self, offset: int, length: int) -> bool:
        """Whether data_extent() has lately found the range to hold no hole; a cheap look that asks nobody."""
        first, stop = self._data
        return first <= offset and offset + length <= stop

    def read_at_hand(self, offset: int, buffer: WriteBuffer) -> bool:
        """Fill the buffer from the page cache; False where the disk is needed, the file ends, or reading fails."""
        try:
            return os.preadv(self.fd, (buffer,), offset, self.nowait) == len(buffer)
        except OSError:
            return False

    def is_cached(self, offset: int, length: int) -> bool:
        """Whether the page cache seems to hold the range, by looking at one byte in every 512 KiB and the last one.

        For sendfile, which has no way to ask; so no where sendfile must not be used. A wrong yes costs one wait for the
        disk, no more.
        """
        return self.may_be_sent and self._is_cached(offset, length)

    def _is_cached(self, offset: int, length: int) -> bool:
        probe = [bytearray(1)]
        last = offset + length - 1
        try:
            for position in range(offset, last, 1 << 19):
                os.preadv(self.fd, probe, position, self.nowait)
            os.preadv(self.fd, probe, last, self.nowait)
        except OSError:
            return False
        return True

    def writes_at_once(self, offset: int, length: int) -> bool:
        """Whether a write there needs no old bytes from the disk first: whole pages, or page ends that are cached."""
        if not (offset | length) & (_PAGE - 1):
            return True
        return self._is_cached(offset, length)

    def resize(self, size: int) -> None:
        """Set the length of a regular file; what is new reads as zeros."""
        os.ftruncate(self.fd, size)

    def sync(self) -> None:
        """Return when everything written so far is on stable storage, or at once if the file need not be `durable`.

        Once this has failed it fails for good: the kernel reports a failed write-back once and takes the pages for
        clean from then on, so that a later success would say nothing about the bytes that were lost. Therefore no call
        may overlap with one that fails, either; those who wait meanwhile share the next one.

        Raises:
            OSError: the storage failed, now or earlier.
        """
        if not self.durable:
            return
        begun = self._syncs
        with self._syncing:
            if self._sync_failed:
                raise OSError(errno.EIO, "an earlier flush failed, so what was written may be lost", self.name)
            if self._syncs > begun:  # another thread has begun one since we were called, and it has succeeded
                return
            self._syncs += 1
            try:
                os.fdatasync(self.fd)
            except OSError:
                self._sync_failed = True
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor; calling it again does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def _why_not_opened(name: str, error: OSError, writable: bool) -> str:
    match error.errno:
        case errno.ENOENT:
            return f"{name}: no such file; check the path"
        case errno.EACCES | errno.EPERM if writable:
            return f"{name}: no permission to write; open it read-only (-r) or change its mode"
        case errno.EACCES | errno.EPERM:
            return f"{name}: no permission to read; change its mode or run as its owner"
        case errno.EROFS:
            return f"{name}: lies on a read-only file system; open it read-only (-r)"
        case errno.EISDIR:
            return f"{name}: this is a directory; give the path of a disk image"
        case _:
            return f"{name}: {error.strerror}"


def _nowait_flags(fd: int) -> int:
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP and _lies_in_memory(fd):
            return 0
    return os.RWF_NOWAIT


def _lies_in_memory(fd: int) -> bool:
    """Whether the file lies on tmpfs (statfs(2))."""
    import ctypes

    status = (ctypes.c_long * 32)()  # struct statfs begins with f_type, a long on the systems that have 64-bit files
    return ctypes.CDLL(None).fstatfs(fd, status) == 0 and status[0] == _TMPFS_MAGIC


@cache
def _fallocate() -> Callable[[int, int, int, int], int]:
    """libc's fallocate as a function that returns an errno; Python itself offers only the posix_ one."""
    import ctypes

    call = ctypes.CDLL(None, use_errno=True).fallocate
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

    def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
        while call(fd, mode, offset, length):
            error = ctypes.get_errno()
            if error != errno.EINTR:
                return error
        return 0

    return fallocate
