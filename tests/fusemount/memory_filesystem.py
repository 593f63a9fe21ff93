"""The smallest file system that keeps the contract: it shows that the conformance suite can be passed, and can fail.

Its tree lives in an attribute of the device, so that it is there again when the device is opened again.
"""

from __future__ import annotations

import errno
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from fusemount.filesystems.base import (
    XATTR_CREATE,
    XATTR_REPLACE,
    Attributes,
    Changes,
    Entry,
    FileSystem,
    Inode,
    Space,
    error,
)
from nbdserve.block import BlockDevice, MemoryDevice
from nbdserve.block.file import ReadBuffer


@dataclass
class File:
    mode: int
    uid: int
    gid: int
    links: int = 1
    held: int = 0
    atime_ns: int = field(default_factory=time.time_ns)
    mtime_ns: int = field(default_factory=time.time_ns)
    content: bytearray = field(default_factory=bytearray)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    entries: dict[bytes, tuple[int, Inode]] = field(default_factory=dict)  # name -> position, inode


class TreeDevice(MemoryDevice):
    """A device that carries a tree of files."""

    def __init__(self) -> None:
        super().__init__(bytearray(4096))
        self.files = {Inode(1): File(stat.S_IFDIR | 0o755, 0, 0)}


class MemoryFileSystem(FileSystem):
    def __init__(self, device: BlockDevice, *, writable: bool) -> None:
        self.device = device
        while not isinstance(device, TreeDevice):
            device = device.whole  # type: ignore[attr-defined]
        self.files = device.files
        self.root = Inode(1)
        self.read_only = not writable
        places = [place for file in self.files.values() for place, _ in file.entries.values()]
        self.next = max([*self.files, *places])

    def _file(self, inode: Inode, kind: int = 0) -> File:
        file = self.files[inode]
        self.device.read(inode % self.device.size, 1)  # as if it lay there
        if kind == stat.S_IFDIR and not stat.S_ISDIR(file.mode):
            raise error(errno.ENOTDIR)
        if kind == stat.S_IFREG and stat.S_ISDIR(file.mode):
            raise error(errno.EISDIR)
        return file

    def lookup(self, directory: Inode, name: bytes) -> Inode:
        found = self._file(directory, stat.S_IFDIR).entries.get(name)
        if found is None:
            raise error(errno.ENOENT)
        return found[1]

    def attributes(self, inode: Inode) -> Attributes:
        file = self._file(inode)
        size = len(file.content)
        times = file.atime_ns, file.mtime_ns, file.mtime_ns
        return Attributes(inode, file.mode, file.links, file.uid, file.gid, size, -(-size // 512), *times)

    def entries(self, directory: Inode, position: int = 0) -> Iterator[Entry]:
        for name, (place, inode) in self._file(directory, stat.S_IFDIR).entries.items():
            if place > position:
                yield Entry(place, name, inode, stat.S_IFMT(self.files[inode].mode))

    def read(self, inode: Inode, offset: int, length: int) -> ReadBuffer:
        return self._file(inode, stat.S_IFREG).content[offset : offset + length]

    def read_link(self, inode: Inode) -> bytes:
        if not stat.S_ISLNK(self._file(inode).mode):
            raise error(errno.EINVAL)
        return bytes(self._file(inode).content)

    def xattr_names(self, inode: Inode) -> list[bytes]:
        return list(self._file(inode).xattrs)

    def xattr(self, inode: Inode, name: bytes) -> bytes:
        if name not in self._file(inode).xattrs:
            raise error(errno.ENODATA)
        return self._file(inode).xattrs[name]

    def space(self) -> Space:
        used = sum(len(file.content) for file in self.files.values())
        return Space(1, 1 << 40, (1 << 40) - used, 1 << 20, 1 << 19)

    def hold(self, inode: Inode) -> None:
        self._file(inode).held += 1

    def let_go(self, inode: Inode) -> None:
        self._file(inode).held -= 1
        self._reap(inode)

    def _reap(self, inode: Inode) -> None:
        if not self.files[inode].links and not self.files[inode].held:
            self.files[inode].content.clear()

    def _changing(self) -> None:
        if self.read_only:
            raise error(errno.EROFS)

    def _add(self, directory: Inode, name: bytes, inode: Inode) -> None:
        parent = self._file(directory, stat.S_IFDIR)
        if len(name) > 255:
            raise error(errno.ENAMETOOLONG)
        if name in parent.entries:
            raise error(errno.EEXIST)
        self.next += 1
        parent.entries[name] = self.next, inode
        parent.mtime_ns = time.time_ns()

    def create(self, directory: Inode, name: bytes, mode: int, uid: int, gid: int, device: int = 0) -> Inode:
        self._changing()
        self.next += 1
        inode = Inode(self.next)
        self._add(directory, name, inode)
        self.files[inode] = File(mode, uid, gid)
        return inode

    def make_directory(self, directory: Inode, name: bytes, mode: int, uid: int, gid: int) -> Inode:
        return self.create(directory, name, stat.S_IFDIR | mode, uid, gid)

    def make_symlink(self, directory: Inode, name: bytes, target: bytes, uid: int, gid: int) -> Inode:
        inode = self.create(directory, name, stat.S_IFLNK | 0o777, uid, gid)
        self.files[inode].content[:] = target
        return inode

    def link(self, inode: Inode, directory: Inode, name: bytes) -> None:
        self._changing()
        if stat.S_ISDIR(self._file(inode).mode):
            raise error(errno.EPERM)
        self._add(directory, name, inode)
        self._file(inode).links += 1

    def _remove(self, directory: Inode, name: bytes) -> None:
        _, inode = self._file(directory).entries.pop(name)
        self._file(directory).mtime_ns = time.time_ns()
        self._file(inode).links -= 1
        self._reap(inode)

    def unlink(self, directory: Inode, name: bytes) -> None:
        self._changing()
        self._file(self.lookup(directory, name), stat.S_IFREG)
        self._remove(directory, name)

    def remove_directory(self, directory: Inode, name: bytes) -> None:
        self._changing()
        if self._file(self.lookup(directory, name), stat.S_IFDIR).entries:
            raise error(errno.ENOTEMPTY)
        self._remove(directory, name)

    def rename(
        self, directory: Inode, name: bytes, new_directory: Inode, new_name: bytes, *, replace: bool = True
    ) -> None:
        self._changing()
        inode = self.lookup(directory, name)
        target = self._file(new_directory, stat.S_IFDIR).entries.get(new_name)
        if len(new_name) > 255:
            raise error(errno.ENAMETOOLONG)
        if target and not replace:
            raise error(errno.EEXIST)
        if new_directory in self._below(inode):
            raise error(errno.EINVAL)
        if target and target[1] == inode:
            return
        if target:
            if stat.S_ISDIR(self._file(inode).mode) != stat.S_ISDIR(self._file(target[1]).mode):
                raise error(errno.EISDIR if stat.S_ISDIR(self._file(target[1]).mode) else errno.ENOTDIR)
            if self._file(target[1]).entries:
                raise error(errno.ENOTEMPTY)
            self._remove(new_directory, new_name)
        self._add(new_directory, new_name, inode)
        self._file(inode).links += 1
        self._remove(directory, name)

    def _below(self, inode: Inode) -> set[Inode]:
        below = {inode} if stat.S_ISDIR(self._file(inode).mode) else set()
        return below.union(*(self._below(child) for _, child in self._file(inode).entries.values()))

    def write(self, inode: Inode, offset: int, data: ReadBuffer) -> None:
        self._changing()
        file = self._file(inode, stat.S_IFREG)
        if data:
            file.content.extend(bytes(max(0, offset - len(file.content))))
            file.content[offset : offset + len(data)] = data
            file.mtime_ns = time.time_ns()

    def truncate(self, inode: Inode, size: int) -> None:
        self._changing()
        file = self._file(inode, stat.S_IFREG)
        file.content[:] = file.content[:size].ljust(size, b"\0")
        file.mtime_ns = time.time_ns()

    def change(self, inode: Inode, changes: Changes) -> None:
        self._changing()
        file = self._file(inode)
        if changes.mode is not None:
            file.mode = stat.S_IFMT(file.mode) | changes.mode
        for name in ("uid", "gid", "atime_ns", "mtime_ns"):
            if getattr(changes, name) is not None:
                setattr(file, name, getattr(changes, name))

    def set_xattr(self, inode: Inode, name: bytes, value: bytes, flags: int = 0) -> None:
        self._changing()
        present = name in self._file(inode).xattrs
        if flags == XATTR_CREATE and present:
            raise error(errno.EEXIST)
        if flags == XATTR_REPLACE and not present:
            raise error(errno.ENODATA)
        self._file(inode).xattrs[name] = value

    def remove_xattr(self, inode: Inode, name: bytes) -> None:
        self._changing()
        self.xattr(inode, name)
        del self._file(inode).xattrs[name]
