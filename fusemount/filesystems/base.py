"""FileSystem: the interface of every guest file system, whatever engine reads it.

Theory of operation. A file system is a tree of inodes, each named by a number. Everything asked of it is asked by
number, in the terms of the VFS of the kernel (lookup, attributes, entries, read, ...), so that the FUSE layer, the
image tools and the tests need no other view. An adapter stands on one block device (a partition) and knows neither
FUSE nor paths of the host.

Contract of every adapter, checked by the conformance suite in tests/fusemount/conformance.py:

- Synchronous. One call at a time: the caller holds a lock around each. Nothing is read before the log of the file
  system was looked at: opened read-only with a dirty log, an adapter shows the tree as it is *after* a replay, in
  memory, and the device stays untouched; opened for writing, it replays for real first.
- Inode numbers are below 2**48, and keep their meaning from the moment a call returned one until forget() was called
  for it as often as calls returned it (lookup, create, make_directory, ..., not entries). A file that was unlinked
  while it is held (see hold) keeps its content until it is let go.
- Failures are OSError with the errno that the kernel would give: ENOENT, ENOTDIR, EEXIST, ENOTEMPTY, ENOSPC, ENODATA,
  EROFS when it was opened read-only ... Damaged metadata is EIO for what it concerns, and all else goes on working.
- Names are bytes, 1 to 255 of them, without `/` and NUL, and never `.` or `..`: an entry of the image whose name breaks
  this is not shown. File systems that store characters give UTF-8; where they store 255 units of UTF-16, names have up
  to 765 bytes (LONGEST_UTF16_NAME), which FUSE hands on (its limit is 1024) and ls, find and tar take. Space tells.
- What was changed is seen by the next call at once, and survives a crash once a later sync() has returned.
- A read-only method may raise BlockingIOError when its device does, having changed nothing: it is called again later.
"""

from __future__ import annotations

import errno
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, NewType

from nbdserve.block.file import ReadBuffer
from nbdserve.errors import OpenError

Inode = NewType("Inode", int)
"""The number of a file in its file system."""

LONGEST_UTF16_NAME = 255 * 3
"""How many bytes of UTF-8 255 units of UTF-16 can become: none more than three, for a pair of surrogates makes four."""

XATTR_CREATE = 1
XATTR_REPLACE = 2
"""Flags of set_xattr(), as in setxattr(2)."""


@dataclass(frozen=True, slots=True)
class Condition:
    """In which state a file system is, and what can be done with it.

    Attributes:
        readable, writable: whether open_filesystem() will succeed in that mode.
        dirty: whether it was not cleanly unmounted.
        remark: one line on why it is not readable or not writable, and what still works; "" when all is well.
    """

    readable: bool
    writable: bool
    dirty: bool
    remark: str = ""

    @classmethod
    def unreadable(cls, failure: OpenError) -> Condition:
        """That of a file system which cannot be opened at all."""
        return cls(readable=False, writable=False, dirty=False, remark=str(failure))


class Attributes(NamedTuple):
    """What stat(2) tells of an inode.

    Attributes:
        mode: type and permission bits (stat.S_IF...).
        blocks: space used, in units of 512 bytes.
        device: major and minor number of a device node, as os.makedev packs them.
        atime_ns, mtime_ns, ctime_ns: nanoseconds since 1970.
    """

    inode: Inode
    mode: int
    links: int
    uid: int
    gid: int
    size: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    device: int = 0

    @property
    def is_directory(self) -> bool:
        """Whether it has entries."""
        return stat.S_ISDIR(self.mode)


class Entry(NamedTuple):
    """One name in a directory.

    Attributes:
        position: where entries() has to go on to get the entry behind this one; positive.
        type: the type bits alone (stat.S_IFMT of the mode).
    """

    position: int
    name: bytes
    inode: Inode
    type: int


@dataclass(frozen=True, slots=True)
class Changes:
    """New values for some attributes of an inode; None leaves one as it is.

    Attributes:
        mode: permission bits (07777).
    """

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Space:
    """What statvfs(3) tells: sizes in blocks of block_size bytes, counts of inodes, the longest name in bytes."""

    block_size: int
    blocks: int
    free_blocks: int
    inodes: int
    free_inodes: int
    longest_name: int = 255


class FileSystem(ABC):
    """A mounted guest file system.

    Attributes:
        root: the inode of its root directory.
        read_only: whether every method that changes something fails with EROFS.
        has_owners: whether files have owners and permissions of their own; else those of the caller are shown.
        names_last: whether what lookup() says of a name holds until a change that is made by this very name. Not so
            where a file answers to several spellings (upper and lower case, short names).
    """

    root: Inode
    read_only: bool = True
    has_owners: bool = True
    names_last: bool = True

    # Looking

    @abstractmethod
    def lookup(self, directory: Inode, name: bytes) -> Inode:
        """The inode that a name stands for. Raises ENOENT, ENOTDIR."""

    @abstractmethod
    def attributes(self, inode: Inode) -> Attributes:
        """What is known about an inode."""

    @abstractmethod
    def entries(self, directory: Inode, position: int = 0) -> Iterator[Entry]:
        """The entries of a directory from a position on (0: the first), without `.` and `..`.

        The directory may be changed between two calls: entries that stay are then shown exactly once all the same.
        """

    def lookup_entry(self, directory: Inode, entry: Entry) -> Inode:
        """What lookup() of the entry's name says, counted like it, just after entries() has given it.

        An adapter that knows the inode from the entry alone saves the search.
        """
        return self.lookup(directory, entry.name)

    @abstractmethod
    def read(self, inode: Inode, offset: int, length: int) -> ReadBuffer:
        """The bytes of a file from offset on: `length` of them, fewer only at its end."""

    def read_link(self, inode: Inode) -> bytes:
        """Where a symbolic link points, the bytes as they are stored."""
        raise error(errno.EINVAL)

    def xattr_names(self, inode: Inode) -> list[bytes]:
        """The full names (b"user.x") of an inode's extended attributes."""
        return []

    def xattr(self, inode: Inode, name: bytes) -> bytes:
        """The value of an extended attribute; raises ENODATA."""
        raise error(errno.ENODATA)

    @abstractmethod
    def space(self) -> Space:
        """How large it is and how full."""

    # Holding

    def hold(self, inode: Inode) -> None:
        """The inode has been opened: unlinking its last name must not take its content. Nests."""
        return

    def let_go(self, inode: Inode) -> None:
        """One hold() less; the content of an inode without name goes with the last."""
        return

    def forget(self, inode: Inode, count: int = 1) -> None:
        """The caller drops the number `count` of the times that it was given to it."""
        return

    # Changing

    def create(self, directory: Inode, name: bytes, mode: int, uid: int, gid: int, device: int = 0) -> Inode:
        """A new regular file, or by the type bits in mode a device node, fifo or socket. Raises EEXIST."""
        raise error(errno.EROFS)

    def make_directory(self, directory: Inode, name: bytes, mode: int, uid: int, gid: int) -> Inode:
        """A new, empty directory. Raises EEXIST."""
        raise error(errno.EROFS)

    def make_symlink(self, directory: Inode, name: bytes, target: bytes, uid: int, gid: int) -> Inode:
        """A new symbolic link. Raises EEXIST."""
        raise error(errno.EROFS)

    def link(self, inode: Inode, directory: Inode, name: bytes) -> None:
        """One more name for a file. Raises EEXIST."""
        raise error(errno.EROFS)

    def unlink(self, directory: Inode, name: bytes) -> None:
        """Take a name away from a file; the file goes with its last name. Raises EISDIR for a directory."""
        raise error(errno.EROFS)

    def remove_directory(self, directory: Inode, name: bytes) -> None:
        """Remove an empty directory. Raises ENOTEMPTY, ENOTDIR."""
        raise error(errno.EROFS)

    def rename(
        self, directory: Inode, name: bytes, new_directory: Inode, new_name: bytes, *, replace: bool = True
    ) -> None:
        """Move a name, over what has the new one already if `replace` (else EEXIST), as rename(2) does it."""
        raise error(errno.EROFS)

    def write(self, inode: Inode, offset: int, data: ReadBuffer) -> None:
        """Put bytes into a file, which grows as needed; what lies between its old end and offset reads as zeros."""
        raise error(errno.EROFS)

    def truncate(self, inode: Inode, size: int) -> None:
        """Cut a file to a size, or let it grow to it with zeros."""
        raise error(errno.EROFS)

    def change(self, inode: Inode, changes: Changes) -> None:
        """Set attributes; ctime becomes now."""
        raise error(errno.EROFS)

    def set_xattr(self, inode: Inode, name: bytes, value: bytes, flags: int = 0) -> None:
        """Set an extended attribute; XATTR_CREATE fails with EEXIST, XATTR_REPLACE with ENODATA."""
        raise error(errno.EROFS)

    def remove_xattr(self, inode: Inode, name: bytes) -> None:
        """Remove an extended attribute; raises ENODATA."""
        raise error(errno.EROFS)

    def sync(self) -> None:
        """Return when everything changed so far is on stable storage."""
        return

    def close(self) -> None:
        """Write what is left, mark it cleanly unmounted, let go of it. Does not close the device. Idempotent."""
        return


def error(number: int) -> OSError:
    """The OSError of an errno, ready to be raised."""
    return OSError(number, os.strerror(number))
