"""Files of a guest, written to the host.

The rule this file keeps: *whatever the names and links in an image are, nothing is written outside the target.* Below
the target everything is opened by its name in a directory that is open already (openat(2)), and never through a
symbolic link, be it one that was there before or one that the image holds.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from fusemount.vfs import Node
from nbdserve.cli.img.common import warn
from nbdserve.cli.img.guest_tree import Found, Guest, is_zero, kind_of
from nbdserve.errors import OpenError

_NOT_ALLOWED = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EINVAL, errno.ENOSPC, errno.E2BIG)
_BLOCK = 64 << 10  # bytes; zeros of this length become holes


class Extraction:
    """Copies files out, with modes, times, owners (where that is allowed), holes, hard links and user attributes.

    Args:
        target: the directory to write to, which may be reached by any path.

    Attributes:
        left_out: how many files could not be copied; each was told of.
    """

    def __init__(self, guest: Guest, target: str) -> None:
        self.guest = guest
        self.left_out = 0
        self._root = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._linked: dict[Node, bytes] = {}

    def close(self) -> None:
        """Let go of the target."""
        os.close(self._root)

    def copy(self, found: Found, name: bytes) -> None:
        """Copy a file or directory into the target, under a name."""
        self._copy(found, self._root, name, name, frozenset())

    def _copy(self, found: Found, parent: int, name: bytes, path: bytes, above: frozenset[Node]) -> None:
        try:
            mode = found.attributes.mode
            if stat.S_ISDIR(mode):
                self._copy_directory(found, parent, name, path, above)
            elif found.node in self._linked:
                self._make_room(parent, name)
                os.link(self._linked[found.node], name, src_dir_fd=self._root, dst_dir_fd=parent, follow_symlinks=False)
            elif self._copy_other(found, parent, name) and found.attributes.links > 1:
                self._linked[found.node] = path
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            self._leave_out(path, error.strerror or str(error))
        except OpenError as error:
            self._leave_out(path, str(error))

    def _leave_out(self, path: bytes, reason: str) -> None:
        self.left_out += 1
        warn(f"{os.fsdecode(path)}: {reason}; left out")

    def _copy_directory(self, found: Found, parent: int, name: bytes, path: bytes, above: frozenset[Node]) -> None:
        self.guest.check_depth(found.node, path, above)
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=parent)
        directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            children = self.guest.children(found.node)
            for child in children:
                self._copy(child, directory, child.name, path + b"/" + child.name, above | {found.node})
            self.guest.release(children)
            self._dress(found, directory)
        finally:
            os.close(directory)

    def _copy_other(self, found: Found, parent: int, name: bytes) -> bool:
        """A file that is no directory; False if it was left out."""
        mode = found.attributes.mode
        if stat.S_ISREG(mode):
            self._copy_content(found, parent, name)
        elif stat.S_ISLNK(mode):
            self._make_room(parent, name)
            os.symlink(self.guest.tree.stored_target(found.node), name, dir_fd=parent)
            self._dress_link(found, parent, name)
        elif stat.S_ISFIFO(mode):
            self._make_room(parent, name)
            os.mkfifo(name, stat.S_IMODE(mode) & 0o777, dir_fd=parent)
        else:
            self._leave_out(name, f"is a {kind_of(mode)} of the guest's")
            return False
        return True

    @staticmethod
    def _make_room(parent: int, name: bytes) -> None:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=parent)

    def _copy_content(self, found: Found, parent: int, name: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.open(name, flags, 0o600, dir_fd=parent)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(errno.EEXIST, "there is something else of this name")
            os.ftruncate(file, 0)
            try:
                self._write_content(found, file)
            except OSError:
                os.unlink(name, dir_fd=parent)  # half a file would pass for a whole one
                raise
            self._dress(found, file)
        finally:
            os.close(file)

    def _write_content(self, found: Found, file: int) -> None:
        for offset, piece in self.guest.content(found):
            for at in range(0, len(piece), _BLOCK):
                block = piece[at : at + _BLOCK]
                if not is_zero(block):
                    _write_all(file, block, offset + at)
        os.ftruncate(file, found.attributes.size)

    def _dress(self, found: Found, file: int) -> None:
        """Owner, attributes, mode and times, in this order: each could change those before it otherwise."""
        attributes = found.attributes
        mode = stat.S_IMODE(attributes.mode)
        if self.guest.tree.split(found.node)[0].fs.has_owners and os.geteuid() == 0:
            os.fchown(file, attributes.uid, attributes.gid)
        else:
            mode &= 0o777  # set-user-ID of somebody else's would be ours
        for name in self.guest.tree.xattr_names(found.node):
            if name.startswith(b"user."):
                try:
                    os.setxattr(file, name, self.guest.tree.xattr(found.node, name))
                except OSError as error:
                    if error.errno not in _NOT_ALLOWED:
                        raise
        os.fchmod(file, mode)
        os.utime(file, ns=(attributes.atime_ns, attributes.mtime_ns))

    def _dress_link(self, found: Found, parent: int, name: bytes) -> None:
        attributes = found.attributes
        if self.guest.tree.split(found.node)[0].fs.has_owners and os.geteuid() == 0:
            os.chown(name, attributes.uid, attributes.gid, dir_fd=parent, follow_symlinks=False)
        times = (attributes.atime_ns, attributes.mtime_ns)
        os.utime(name, ns=times, dir_fd=parent, follow_symlinks=False)


def _write_all(file: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(file, data, offset)
        data, offset = data[done:], offset + done


def copy_out(guest: Guest, paths: list[bytes], destination: str, *, recursive: bool) -> int:
    """Copy files of the guest to a directory of the host, or one under a new name; returns how many were left out.

    Raises:
        OpenError: a file is not there, or the destination is no directory where it has to be one.
        OSError: from the host.
    """
    into = os.path.isdir(destination)
    if len(paths) > 1 and not into:
        raise OpenError(f"{destination}: is no directory, so several files cannot go there")
    target = destination if into else os.path.dirname(destination) or "."
    extraction = Extraction(guest, target)
    try:
        for path in paths:
            found = guest.find(path, follow=not recursive)
            if found.attributes.is_directory and not recursive:
                raise OpenError(f"{guest.image}:/{os.fsdecode(path)}: is a directory; copy it with -r")
            name = path.rstrip(b"/").rpartition(b"/")[2] if into else os.fsencode(os.path.basename(destination))
            if name in (b"", b".", b".."):
                for child in guest.children(found.node):
                    extraction.copy(child, child.name)
                continue
            extraction.copy(found, name)
    finally:
        extraction.close()
    return extraction.left_out
