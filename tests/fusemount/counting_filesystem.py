"""A file system in memory that counts what it gives out and what is held, to test what stands above the adapters."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections import Counter
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
from nbdserve.block.file import ReadBuffer


@dataclass
class Node:
    mode: int
    uid: int = 0
    gid: int = 0
    links: int = 1
    content: bytearray = field(default_factory=bytearray)
    target: bytes = b""
    device: int = 0
    names: dict[bytes, Inode] = field(default_factory=dict)
    positions: dict[bytes, int] = field(default_factory=dict)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    atime_ns: int = field(default_factory=time.time_ns)
    mtime_ns: int = field(default_factory=time.time_ns)
    ctime_ns: int = field(default_factory=time.time_ns)


class CountingFileSystem(FileSystem):
    """Attributes for tests:

    nowait: with `slow`, reading calls raise BlockingIOError while it is set.
    given: how often each inode has been given out and not been forgotten.
    held: how often each is held.
    broken: inodes whose attributes and content are EIO.
    syncs: how often sync() was called; closed: whether close() was.
    """

    def __init__(self, *, read_only: bool = False, slow: bool = False) -> None:
        self.root = Inode(2)
        self.read_only = read_only
        self.nowait = False
        self.slow = slow
        self.given: Counter[Inode] = Counter()
        self.held: Counter[Inode] = Counter()
        self.broken: set[Inode] = set()
        self.syncs = 0
        self.closed = False
        self._nodes = {self.root: Node(stat.S_IFDIR | 0o755, links=2)}
        self._next = 10

    # Making a tree without going through the contract

    def put(self, path: str, content: bytes | str = b"", mode: int = 0o644, uid: int = 0, gid: int = 0) -> Inode:
        """A file (bytes), or a symbolic link to a target (str); directories on the way are made."""
        *above, name = path.strip("/").split("/")
        directory = self.put_directory("/".join(above))
        made = Node(stat.S_IFREG | mode, uid, gid, content=bytearray(content if isinstance(content, bytes) else b""))
        if isinstance(content, str):
            made.mode, made.target = stat.S_IFLNK | 0o777, os.fsencode(content)
        return self._enter(directory, os.fsencode(name), made)

    def put_directory(self, path: str, mode: int = 0o755) -> Inode:
        inode = self.root
        for name in path.strip("/").split("/") if path.strip("/") else []:
            known = self._nodes[inode].names.get(os.fsencode(name))
            inode = known or self._enter(inode, os.fsencode(name), Node(stat.S_IFDIR | mode, links=2))
        return inode

    def inode(self, path: str) -> Inode:
        inode = self.root
        for name in path.strip("/").split("/"):
            inode = self._nodes[inode].names[os.fsencode(name)]
        return inode

    def content(self, path: str) -> bytes:
        return bytes(self._nodes[self.inode(path)].content)

    def __contains__(self, inode: Inode) -> bool:
        return inode in self._nodes

    def _enter(self, directory: Inode, name: bytes, made: Node) -> Inode:
        inode = Inode(self._next)
        self._next += 1
        self._nodes[inode] = made
        self._add(directory, name, inode)
        return inode

    def _add(self, directory: Inode, name: bytes, inode: Inode) -> None:
        parent = self._nodes[directory]
        parent.names[name] = inode
        parent.positions[name] = max(parent.positions.values(), default=0) + 1
        parent.mtime_ns = parent.ctime_ns = time.time_ns()
        if stat.S_ISDIR(self._nodes[inode].mode):
            parent.links += 1

    # Looking

    def _node(self, inode: Inode, kind: int | None = None) -> Node:
        if self.slow and self.nowait:
            raise BlockingIOError
        if inode in self.broken:
            raise error(errno.EIO)
        node = self._nodes.get(inode)
        if node is None:
            raise error(errno.ENOENT)
        if kind == stat.S_IFDIR and not stat.S_ISDIR(node.mode):
            raise error(errno.ENOTDIR)
        return node

    def lookup(self, directory: Inode, name: bytes) -> Inode:
        found = self._node(directory, stat.S_IFDIR).names.get(name)
        if found is None:
            raise error(errno.ENOENT)
        self.given[found] += 1
        return found

    def attributes(self, inode: Inode) -> Attributes:
        node = self._node(inode)
        size = len(node.target) if stat.S_ISLNK(node.mode) else len(node.content)
        times = (node.atime_ns, node.mtime_ns, node.ctime_ns)
        return Attributes(
            inode, node.mode, node.links, node.uid, node.gid, size, -(-size // 512), *times, device=node.device
        )

    def entries(self, directory: Inode, position: int = 0) -> Iterator[Entry]:
        node = self._node(directory, stat.S_IFDIR)
        for name, at in sorted(node.positions.items(), key=lambda item: item[1]):
            if at > position and name in node.names:
                inode = node.names[name]
                yield Entry(at, name, inode, stat.S_IFMT(self._nodes[inode].mode))

    def read(self, inode: Inode, offset: int, length: int) -> ReadBuffer:
        return bytes(self._node(inode).content[offset : offset + length])

    def read_link(self, inode: Inode) -> bytes:
        node = self._node(inode)
        if not stat.S_ISLNK(node.mode):
            raise error(errno.EINVAL)
        return node.target

    def xattr_names(self, inode: Inode) -> list[bytes]:
        return list(self._node(inode).xattrs)

    def xattr(self, inode: Inode, name: bytes) -> bytes:
        try:
            return self._node(inode).xattrs[name]
        except KeyError:
            raise error(errno.ENODATA) from None

    def space(self) -> Space:
        return Space(4096, 1000, 500, 100, 50)

    # Holding

    def hold(self, inode: Inode) -> None:
        self.held[inode] += 1

    def let_go(self, inode: Inode) -> None:
        self.held[inode] -= 1
        assert self.held[inode] >= 0
        self._drop_if_gone(inode)

    def forget(self, inode: Inode, count: int = 1) -> None:
        self.given[inode] -= count
        assert self.given[inode] >= 0, f"{inode} was forgotten more often than given"

    def _drop_if_gone(self, inode: Inode) -> None:
        if self._nodes[inode].links == 0 and not self.held[inode]:
            del self._nodes[inode]

    # Changing

    def _change(self) -> None:
        if self.read_only:
            raise error(errno.EROFS)

    def _new(self, directory: Inode, name: bytes, made: Node) -> Inode:
        self._change()
        if name in self._node(directory, stat.S_IFDIR).names:
            raise error(errno.EEXIST)
        inode = self._enter(directory, name, made)
        self.given[inode] += 1
        return inode

    def create(self, directory: Inode, name: bytes, mode: int, uid: int, gid: int, device: int = 0) -> Inode:
        kind = stat.S_IFMT(mode) or stat.S_IFREG
        return self._new(directory, name, Node(kind | stat.S_IMODE(mode), uid, gid, device=device))

    def make_directory(self, directory: Inode, name: bytes, mode: int, uid: int, gid: int) -> Inode:
        return self._new(directory, name, Node(stat.S_IFDIR | stat.S_IMODE(mode), uid, gid, links=2))

    def make_symlink(self, directory: Inode, name: bytes, target: bytes, uid: int, gid: int) -> Inode:
        return self._new(directory, name, Node(stat.S_IFLNK | 0o777, uid, gid, target=target))

    def link(self, inode: Inode, directory: Inode, name: bytes) -> None:
        self._change()
        if name in self._node(directory, stat.S_IFDIR).names:
            raise error(errno.EEXIST)
        self._nodes[inode].links += 1
        self._add(directory, name, inode)

    def _take(self, directory: Inode, name: bytes) -> Inode:
        """Take an entry from a directory, and leave what it stands for."""
        parent = self._nodes[directory]
        inode = parent.names.pop(name)
        del parent.positions[name]
        parent.mtime_ns = parent.ctime_ns = time.time_ns()
        if stat.S_ISDIR(self._nodes[inode].mode):
            parent.links -= 1
        return inode

    def _remove(self, directory: Inode, name: bytes) -> None:
        inode = self._take(directory, name)
        node = self._nodes[inode]
        node.links = 0 if stat.S_ISDIR(node.mode) else node.links - 1
        node.ctime_ns = time.time_ns()
        self._drop_if_gone(inode)

    def unlink(self, directory: Inode, name: bytes) -> None:
        self._change()
        inode = self._node(directory, stat.S_IFDIR).names.get(name)
        if inode is None:
            raise error(errno.ENOENT)
        if stat.S_ISDIR(self._nodes[inode].mode):
            raise error(errno.EISDIR)
        self._remove(directory, name)

    def remove_directory(self, directory: Inode, name: bytes) -> None:
        self._change()
        inode = self._node(directory, stat.S_IFDIR).names.get(name)
        if inode is None:
            raise error(errno.ENOENT)
        if self._node(inode, stat.S_IFDIR).names:
            raise error(errno.ENOTEMPTY)
        self._remove(directory, name)

    def rename(
        self, directory: Inode, name: bytes, new_directory: Inode, new_name: bytes, *, replace: bool = True
    ) -> None:
        self._change()
        inode = self._node(directory, stat.S_IFDIR).names.get(name)
        if inode is None:
            raise error(errno.ENOENT)
        old = self._node(new_directory, stat.S_IFDIR).names.get(new_name)
        if old == inode:
            return
        if old is not None:
            if not replace:
                raise error(errno.EEXIST)
            if stat.S_ISDIR(self._nodes[old].mode):
                self.remove_directory(new_directory, new_name)
            else:
                self.unlink(new_directory, new_name)
        self._add(new_directory, new_name, self._take(directory, name))

    def write(self, inode: Inode, offset: int, data: ReadBuffer) -> None:
        self._change()
        node = self._node(inode)
        if len(node.content) < offset:
            node.content.extend(bytes(offset - len(node.content)))
        node.content[offset : offset + len(data)] = data
        node.mtime_ns = node.ctime_ns = time.time_ns()

    def truncate(self, inode: Inode, size: int) -> None:
        self._change()
        node = self._node(inode)
        del node.content[size:]
        node.content.extend(bytes(size - len(node.content)))
        node.mtime_ns = node.ctime_ns = time.time_ns()

    def change(self, inode: Inode, changes: Changes) -> None:
        self._change()
        node = self._node(inode)
        if changes.mode is not None:
            node.mode = stat.S_IFMT(node.mode) | changes.mode
        for name in ("uid", "gid", "atime_ns", "mtime_ns"):
            if getattr(changes, name) is not None:
                setattr(node, name, getattr(changes, name))
        node.ctime_ns = time.time_ns()

    def set_xattr(self, inode: Inode, name: bytes, value: bytes, flags: int = 0) -> None:
        self._change()
        xattrs = self._node(inode).xattrs
        if flags == XATTR_CREATE and name in xattrs:
            raise error(errno.EEXIST)
        if flags == XATTR_REPLACE and name not in xattrs:
            raise error(errno.ENODATA)
        xattrs[name] = value

    def remove_xattr(self, inode: Inode, name: bytes) -> None:
        self._change()
        if self._node(inode).xattrs.pop(name, None) is None:
            raise error(errno.ENODATA)

    def sync(self) -> None:
        self.syncs += 1

    def close(self) -> None:
        self.closed = True
