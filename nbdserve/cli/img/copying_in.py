"""Files of the host, written into a guest's file system."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from fusemount.filesystems.base import Changes
from fusemount.vfs import Node
from nbdserve.cli.img.common import warn
from nbdserve.cli.img.guest_tree import DEEPEST, Found, Guest, is_zero
from nbdserve.errors import OpenError

_PIECE = 1 << 20
_BLOCK = 64 << 10  # bytes; zeros of this length become holes
_UNKNOWN_THERE = (errno.ENOTSUP, errno.EPERM, errno.EROFS, errno.EINVAL)


class Insertion:
    """Copies files in, with modes, times, holes, hard links and user attributes as far as the file system has them.

    Args:
        owner: user and group of everything that is copied; None: those that it has on the host.

    Attributes:
        left_out: how many files could not be copied; each was told of.
    """

    def __init__(self, guest: Guest, owner: tuple[int, int] | None) -> None:
        self.guest = guest
        self.left_out = 0
        self._owner = owner
        self._linked: dict[tuple[int, int], Node] = {}

    def copy(self, source: str, parent: Found, name: bytes) -> None:
        """Copy a file or directory into a directory of the guest, under a name; links are copied as links."""
        self._copy(os.fsencode(source), parent.node, name, 0)

    def _copy(self, source: bytes, parent: Node, name: bytes, depth: int) -> None:
        status = os.lstat(source)
        there = self.guest.tree.peek(parent, name)
        try:
            if stat.S_ISDIR(status.st_mode):
                self._copy_directory(source, status, parent, name, depth)
                return
            if there is not None and there[1].is_directory:
                raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
            if stat.S_ISREG(status.st_mode):
                self._copy_file(source, status, parent, name)
            elif stat.S_ISLNK(status.st_mode):
                self._remove(parent, name)
                uid, gid = self._owner_of(status)
                node, _ = self.guest.tree.make_symlink(parent, name, os.readlink(source), uid, gid)
                self._change(node, Changes(atime_ns=status.st_atime_ns, mtime_ns=status.st_mtime_ns))
            elif stat.S_ISFIFO(status.st_mode):
                self._remove(parent, name)
                node, _ = self.guest.tree.create(parent, name, status.st_mode, *self._owner_of(status))
                self._dress(source, status, node)
            else:
                self._leave_out(source, "is neither a file, a directory nor a link")
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EROFS, errno.EIO):
                raise OSError(error.errno, error.strerror, self.guest.image) from None
            self._leave_out(source, error.strerror or str(error))

    def _leave_out(self, source: bytes, reason: str) -> None:
        self.left_out += 1
        warn(f"{os.fsdecode(source)}: {reason}; left out")

    def _owner_of(self, status: os.stat_result) -> tuple[int, int]:
        return self._owner or (status.st_uid, status.st_gid)

    def _remove(self, parent: Node, name: bytes) -> None:
        with suppress(FileNotFoundError):
            self.guest.tree.unlink(parent, name)

    def _copy_directory(self, source: bytes, status: os.stat_result, parent: Node, name: bytes, depth: int) -> None:
        if depth >= DEEPEST:
            raise OSError(errno.ELOOP, "lies too deep")
        tree = self.guest.tree
        try:
            node, _ = tree.make_directory(parent, name, stat.S_IMODE(status.st_mode), *self._owner_of(status))
        except FileExistsError:
            node, attributes = tree.lookup(parent, name)
            if not attributes.is_directory:
                raise
        for child in sorted(os.listdir(source)):
            self._copy(os.path.join(source, child), node, child, depth + 1)
        self._dress(source, status, node)

    def _copy_file(self, source: bytes, status: os.stat_result, parent: Node, name: bytes) -> None:
        tree, identity = self.guest.tree, (status.st_dev, status.st_ino)
        if identity in self._linked:
            with suppress(OSError):  # a file system without hard links gets a copy
                self._remove(parent, name)
                tree.link(self._linked[identity], parent, name)
                return
        there = tree.peek(parent, name)
        if there is not None and not stat.S_ISREG(there[1].mode):
            self._remove(parent, name)
            there = None
        if there is None:
            mode = stat.S_IFREG | stat.S_IMODE(status.st_mode)
            node, _ = tree.create(parent, name, mode, *self._owner_of(status))
        else:
            node, _ = tree.lookup(parent, name)
            tree.change(node, Changes(), size=0)
        self._copy_content(source, node)
        self._dress(source, status, node)
        if status.st_nlink > 1:
            self._linked[identity] = node

    def _copy_content(self, source: bytes, node: Node) -> None:
        with open(source, "rb", buffering=0) as file:
            end = os.fstat(file.fileno()).st_size
            offset = 0
            while offset < end:
                try:
                    offset = os.lseek(file.fileno(), offset, os.SEEK_DATA)
                except OSError as error:
                    if error.errno != errno.ENXIO:
                        raise
                    break
                piece = memoryview(os.pread(file.fileno(), min(_PIECE, end - offset), offset))
                if not piece:
                    break
                for at in range(0, len(piece), _BLOCK):
                    if not is_zero(piece[at : at + _BLOCK]):
                        self.guest.tree.write(node, offset + at, piece[at : at + _BLOCK])
                offset += len(piece)
            self.guest.tree.change(node, Changes(), size=end)

    def _dress(self, source: bytes, status: os.stat_result, node: Node) -> None:
        for name in os.listxattr(source, follow_symlinks=False):
            if name.startswith("user."):
                try:
                    self.guest.tree.set_xattr(node, os.fsencode(name), os.getxattr(source, name, follow_symlinks=False))
                except OSError as error:
                    if error.errno not in _UNKNOWN_THERE:
                        raise
        uid, gid = self._owner_of(status)
        self._change(node, Changes(uid=uid, gid=gid))
        self._change(node, Changes(mode=stat.S_IMODE(status.st_mode)))
        self._change(node, Changes(atime_ns=status.st_atime_ns, mtime_ns=status.st_mtime_ns))

    def _change(self, node: Node, changes: Changes) -> None:
        """Set what the file system can hold."""
        try:
            self.guest.tree.change(node, changes)
        except OSError as error:
            if error.errno not in _UNKNOWN_THERE or self.guest.tree.split(node)[0].fs.read_only:
                raise


def copy_in(guest: Guest, sources: list[str], path: bytes, *, recursive: bool, owner: tuple[int, int] | None) -> int:
    """Copy files of the host to a directory of the guest, or one under a new name; returns how many were left out.

    Raises:
        OpenError: a file is not there, or the destination is no directory where it has to be one.
        OSError: from the host, or the guest's file system is full.
    """
    shown = f"{guest.image}:/{os.fsdecode(path)}"
    insertion = Insertion(guest, owner)
    for source in sources:
        if os.path.isdir(source) and not os.path.islink(source) and not recursive:
            raise OpenError(f"{source}: is a directory; copy it with -r")
    try:
        into: Found | None = guest.find(path)
    except OpenError:
        into = None
    if into is not None and into.attributes.is_directory:
        for source in sources:
            insertion.copy(source, into, os.fsencode(os.path.basename(os.path.abspath(source))))
        return insertion.left_out
    head, _, name = path.rstrip(b"/").rpartition(b"/")
    parent = guest.find(head)
    if len(sources) > 1 or not parent.attributes.is_directory or (path.endswith(b"/") and into is None):
        raise OpenError(f"{shown}: is no directory")
    insertion.copy(sources[0], parent, name)
    return insertion.left_out
