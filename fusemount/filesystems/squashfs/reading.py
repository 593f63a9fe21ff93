"""SquashReader: the files of a squashfs image.

A file's number is the reference of its inode and one more, since a reference may be zero; so any file can be found
again without having read the way to it, and hard links have one number.
"""

from __future__ import annotations

import errno
import itertools
import stat
import struct
from collections.abc import Iterator
from functools import lru_cache

from fusemount.filesystems.base import Attributes, Entry, FileSystem, Inode, Space, error
from fusemount.filesystems.squashfs.compression import Decompress
from fusemount.filesystems.squashfs.inodes import SquashInode, parse_inode, type_of
from fusemount.filesystems.squashfs.metadata import SIZE, Cursor, Metadata
from fusemount.filesystems.squashfs.superblock import NOTHING, Flags, Superblock
from nbdserve.block import BlockDevice
from nbdserve.block.file import ReadBuffer

_GROUP = struct.Struct("<III")  # of a directory: entries less one, block of the inode table, number of an inode
_ENTRY = struct.Struct("<HhHH")
_FRAGMENT = struct.Struct("<QII")
_XATTR_TABLE = struct.Struct("<QII")
_XATTR_ID = struct.Struct("<QII")
_XATTR_NAME = struct.Struct("<HH")
_XATTR_PREFIXES = (b"user.", b"trusted.", b"security.")
_ELSEWHERE = 0x100
_STORED = 1 << 24
_LARGEST_DIRECTORY = 1 << 28
_LARGEST_XATTR = 64 << 10
_MOST_XATTRS = 4096
_KEPT_DIRECTORIES = 256
_CACHE = 16 << 20  # bytes of unpacked data


class SquashReader(FileSystem):
    """An image."""

    def __init__(self, device: BlockDevice, superblock: Superblock, decompress: Decompress) -> None:
        self._superblock = superblock
        self._metadata = Metadata(device, superblock.size, decompress)
        self._decompress = decompress
        self._names = lru_cache(_KEPT_DIRECTORIES)(self._names_in)
        self._node = lru_cache(4096)(self._read_node)
        self._id = lru_cache(4096)(self._read_id)
        self._unpacked = lru_cache(max(4, _CACHE // superblock.block))(self._unpack)
        self._placed: tuple[Inode, list[int]] = (Inode(0), [])
        self.root = Inode(superblock.root + 1)

    def lookup(self, directory: Inode, name: bytes) -> Inode:
        found = self._names(directory).get(name)
        if found is None:
            raise error(errno.ENOENT)
        return found[0]

    def attributes(self, inode: Inode) -> Attributes:
        node = self._node(inode)
        time = node.mtime * 10**9
        stored = sum(size & ~_STORED for size in node.blocks) if node.blocks else node.size
        return Attributes(
            inode=inode,
            mode=node.mode,
            links=node.links,
            uid=self._id(node.uid),
            gid=self._id(node.gid),
            size=node.size,
            blocks=-(-stored // 512),
            atime_ns=time,
            mtime_ns=time,
            ctime_ns=time,
            device=node.device,
        )

    def entries(self, directory: Inode, position: int = 0) -> Iterator[Entry]:
        names = self._names(directory)
        for index, (name, (inode, kind)) in enumerate(itertools.islice(names.items(), position, None), position + 1):
            yield Entry(index, name, inode, kind)

    def read(self, inode: Inode, offset: int, length: int) -> ReadBuffer:
        node = self._node(inode)
        if stat.S_ISDIR(node.mode):
            raise error(errno.EISDIR)
        if not stat.S_ISREG(node.mode):
            raise error(errno.EINVAL)
        end = min(offset + length, node.size)
        if offset >= end:
            return b""
        block = self._superblock.block
        first = offset // block
        pieces = [self._block_of(inode, node, index) for index in range(first, -(-end // block))]
        content = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return content[offset - first * block : end - first * block]

    def read_link(self, inode: Inode) -> bytes:
        node = self._node(inode)
        if not stat.S_ISLNK(node.mode):
            raise error(errno.EINVAL)
        return node.target

    def xattr_names(self, inode: Inode) -> list[bytes]:
        return list(self._xattrs(inode))

    def xattr(self, inode: Inode, name: bytes) -> bytes:
        values = self._xattrs(inode)
        if name not in values:
            raise error(errno.ENODATA)
        return values[name]

    def space(self) -> Space:
        block = self._superblock.block
        return Space(block, -(-self._superblock.size // block), 0, self._superblock.inodes, 0)

    # Inodes

    def _read_node(self, inode: Inode) -> SquashInode:
        reference = inode - 1
        place, offset = self._superblock.inode_table + (reference >> 16), reference & 0xFFFF
        return parse_inode(self._metadata.cursor(place, offset), self._superblock.block)

    def _read_id(self, index: int) -> int:
        if index >= self._superblock.ids:
            raise error(errno.EIO)
        return int.from_bytes(self._metadata.indexed(self._superblock.id_table, 4, index), "little")

    # Directories

    def _names_in(self, directory: Inode) -> dict[bytes, tuple[Inode, int]]:
        """The names in a directory: {name: (number, type)}."""
        node = self._node(directory)
        if not stat.S_ISDIR(node.mode):
            raise error(errno.ENOTDIR)
        return dict(self._read_names(node))

    def _read_names(self, node: SquashInode) -> Iterator[tuple[bytes, tuple[Inode, int]]]:
        left = node.size - 3  # the size counts `.` and `..`, which are not there
        if left <= 0:
            return
        if left > _LARGEST_DIRECTORY:
            raise error(errno.EIO)
        cursor = self._metadata.cursor(self._superblock.directory_table + node.start, node.offset)
        while left > 0:
            count, block, _ = cursor.unpack(_GROUP)
            left -= _GROUP.size
            for _ in range(count + 1):
                offset, _, number, length = cursor.unpack(_ENTRY)
                name = cursor.take(length + 1)
                left -= _ENTRY.size + length + 1
                if left < 0 or offset >= SIZE:
                    raise error(errno.EIO)
                if length < 255 and b"/" not in name and b"\0" not in name and name not in (b".", b".."):
                    yield name, (Inode((block << 16 | offset) + 1), type_of(number))

    # Content

    def _block_of(self, inode: Inode, node: SquashInode, index: int) -> bytes:
        """One block of a file, unpacked; the last one may be short."""
        block = self._superblock.block
        length = min(block, node.size - index * block)
        if index >= len(node.blocks):
            return self._tail(node, length)
        size = node.blocks[index]
        if size == 0:
            return bytes(length)
        content = self._unpacked(self._places(inode)[index], size)
        if len(content) != length:
            raise error(errno.EIO)
        return content

    def _tail(self, node: SquashInode, length: int) -> bytes:
        if node.fragment is None or node.fragment >= self._superblock.fragments:
            raise error(errno.EIO)
        entry = self._metadata.indexed(self._superblock.fragment_table, _FRAGMENT.size, node.fragment)
        place, size, _ = _FRAGMENT.unpack(entry)
        content = self._unpacked(place, size)[node.offset : node.offset + length]
        if len(content) != length:
            raise error(errno.EIO)
        return content

    def _places(self, inode: Inode) -> list[int]:
        """Where the blocks of a file are, which lie behind each other."""
        if self._placed[0] != inode:
            node = self._node(inode)
            sizes = (size & ~_STORED for size in node.blocks)
            self._placed = inode, list(itertools.accumulate(sizes, initial=node.start))
        return self._placed[1]

    def _unpack(self, place: int, size: int) -> bytes:
        """A block of data at a place; its size says whether it is compressed."""
        length = size & ~_STORED
        if length > self._superblock.block:
            raise error(errno.EIO)
        content = self._metadata.raw(place, length)
        return content if size & _STORED else self._decompress(content, self._superblock.block)

    # Extended attributes

    def _xattrs(self, inode: Inode) -> dict[bytes, bytes]:
        index, table = self._node(inode).xattrs, self._superblock.xattr_table
        if index is None or table == NOTHING or self._superblock.flags & Flags.NO_XATTRS:
            return {}
        start, ids, _ = _XATTR_TABLE.unpack(self._metadata.raw(table, _XATTR_TABLE.size))
        if index >= ids:
            raise error(errno.EIO)
        entry = self._metadata.indexed(table + _XATTR_TABLE.size, _XATTR_ID.size, index)
        reference, count, _ = _XATTR_ID.unpack(entry)
        if count > _MOST_XATTRS:
            raise error(errno.EIO)
        cursor = self._xattr_cursor(start, reference)
        values = {}
        for _ in range(count):
            kind, length = cursor.unpack(_XATTR_NAME)
            name = cursor.take(length)
            value = self._xattr_value(cursor)
            if kind & _ELSEWHERE:
                value = self._xattr_value(self._xattr_cursor(start, int.from_bytes(value, "little")))
            if kind & 0xFF < len(_XATTR_PREFIXES):
                values[_XATTR_PREFIXES[kind & 0xFF] + name] = value
        return values

    def _xattr_cursor(self, start: int, reference: int) -> Cursor:
        return self._metadata.cursor(start + (reference >> 16), reference & 0xFFFF)

    @staticmethod
    def _xattr_value(cursor: Cursor) -> bytes:
        length = int.from_bytes(cursor.take(4), "little")
        if length > _LARGEST_XATTR:
            raise error(errno.EIO)
        return cursor.take(length)
