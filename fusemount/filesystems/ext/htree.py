"""The hash index of large directories (dir_index): finding the leaf for a name, splitting leaves, growing the index.

Theory of operation. Leaves are ordinary blocks of entries. The index above them maps the hash of a name to the leaf
that holds all names of hashes from there on; it lies in block 0 (the root, disguised as `.` and `..`) and, in larger
directories, in more blocks below it. The lowest bit of a hash in the index says that names of the hash before it go on
in this leaf. What it keeps: a leaf is split before the index learns of its new half, and no table is believed whose
numbers do not fit its block. Source: Documentation/filesystems/ext4/directory.rst of the kernel.
"""

from __future__ import annotations

import errno
import struct
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusemount.filesystems.base import error
from fusemount.filesystems.ext import directories
from fusemount.filesystems.ext.directories import Found
from fusemount.filesystems.ext.inodes import Flag, Record
from fusemount.filesystems.ext.superblock import Incompat

if TYPE_CHECKING:
    from fusemount.filesystems.ext.store import Store

_ROOT_TABLE = 32
_NODE_TABLE = 8
_INFO = 24  # where struct dx_root_info begins in block 0
_BLOCK_MASK = 0x0FFFFFFF
_NEWEST_HASH = 2  # half MD4 and TEA and the legacy one before them
_CHECKSUM_SIZE = 8


@dataclass(slots=True)
class Node:
    """A block of the index: its table of (hash, block), whose first hash counts as 0, and the entry that was taken."""

    number: int
    block: bytearray
    table: int
    entries: list[tuple[int, int]]
    limit: int
    at: int = 0

    @property
    def is_full(self) -> bool:
        return len(self.entries) >= self.limit


class HashIndex:
    """Works on the indexes of all directories of one file system."""

    def __init__(self, filesystem: Store) -> None:
        self._fs = filesystem
        self._super = filesystem.superblock
        self._size = self._super.block_size
        ffi = filesystem.engine.ffi
        self._seed = ffi.new("uint32_t[4]", self._super.hash_seed) if any(self._super.hash_seed) else ffi.NULL
        self._hashes = ffi.new("uint32_t[2]")
        self._dirhash = filesystem.engine.lib.ext2fs_dirhash

    def version(self, directory: Record) -> int:
        """The hash function of an indexed directory, or else the one that a new index would have."""
        if not directory.flags & Flag.INDEX:
            return min(self._super.hash_version, _NEWEST_HASH)
        return self._root(directory).block[_INFO + 4]

    def hash(self, version: int, name: bytes) -> tuple[int, int]:
        """The two hashes of a name; the lowest bit of the first is 0."""
        version += 3 if self._super.unsigned_hash else 0
        code = self._dirhash(version, name, len(name), self._seed, self._hashes, self._hashes + 1)
        self._fs.engine.check(code)
        return int(self._hashes[0]), int(self._hashes[1])

    def leaves(self, directory: Record, hash: int) -> Iterator[tuple[int, int]]:
        """From the leaf for a hash on, all leaves: the hash by which the index knows each, and its block."""
        return self._leaves_from(directory, self._path(directory, self._root(directory), hash))

    def candidates(self, directory: Record, name: bytes) -> Iterator[int]:
        """The leaves that may hold a name: one, more only where hashes collide."""
        root = self._root(directory)
        hash, _ = self.hash(root.block[_INFO + 4], name)
        leaves = self._leaves_from(directory, self._path(directory, root, hash))
        yield next(leaves)[1]
        for start, leaf in leaves:
            if start != hash | 1:
                return
            yield leaf

    def insert(self, directory: Record, name: bytes, inode: int, kind: int) -> None:
        """Put a name that is not there into the leaf that it belongs to."""
        while True:
            root = self._root(directory)
            version = root.block[_INFO + 4]
            nodes = self._path(directory, root, self.hash(version, name)[0])
            leaf = nodes[-1].entries[nodes[-1].at][1]
            block = self._fs.read_directory_block(directory, leaf)
            if self._fs.names.place(directory, leaf, block, name, inode, kind):
                return
            if nodes[-1].is_full:
                self._grow(directory, nodes)
            else:
                self._split_leaf(directory, nodes, leaf, block, version, directories.size_of(len(name)))

    def make(self, directory: Record) -> None:
        """Give a directory of one block an index, with its entries in a second block."""
        block = self._fs.read_directory_block(directory, 0)
        entries = self._fs.names.used(block)
        self._check(len(entries) >= 2 and [entry.name for entry in entries[:2]] == [b".", b".."])
        self._fs.add_directory_block(directory, self._pack(entries[2:]))
        self._fs.names.rewritten(directory, 0)
        root = bytearray(self._size)
        kind = directories.TYPE_NUMBERS[entries[0].type]
        directories.put(root, 0, 12, entries[0].inode, b".", kind)
        directories.put(root, 12, self._size - 12, entries[1].inode, b"..", kind)
        struct.pack_into("<IBBBB", root, _INFO, 0, min(self._super.hash_version, _NEWEST_HASH), 8, 0, 0)
        directory.flags |= Flag.INDEX
        self._write(directory, Node(0, root, _ROOT_TABLE, [(0, 1)], self._limit(_ROOT_TABLE)))
        self._fs.save(directory)

    @property
    def _most_levels(self) -> int:
        return 3 if self._super.has(Incompat.LARGEDIR) else 2

    def _root(self, directory: Record) -> Node:
        """The root of a directory's index. Raises EIO when it is none."""
        root = self._read(directory, 0, _ROOT_TABLE)
        version, length, levels = root.block[_INFO + 4 : _INFO + 7]
        self._check(version <= _NEWEST_HASH and length == 8 and levels < self._most_levels)
        return root

    def _path(self, directory: Record, root: Node, hash: int) -> list[Node]:
        """The nodes from the root to the leaf for a hash."""
        nodes = [root]
        for _ in range(root.block[_INFO + 6]):
            self._descend(nodes[-1], hash)
            nodes.append(self._read(directory, nodes[-1].entries[nodes[-1].at][1], _NODE_TABLE))
        self._descend(nodes[-1], hash)
        return nodes

    def _leaves_from(self, directory: Record, nodes: list[Node]) -> Iterator[tuple[int, int]]:
        start = 0
        for _ in range(directory.size // self._size):  # there are no more leaves than that
            yield start, nodes[-1].entries[nodes[-1].at][1]
            level = len(nodes) - 1
            while nodes[level].at + 1 >= len(nodes[level].entries):
                if not level:
                    return
                level -= 1
            nodes[level].at += 1
            start = nodes[level].entries[nodes[level].at][0]
            for below in range(level + 1, len(nodes)):
                parent = nodes[below - 1]
                nodes[below] = self._read(directory, parent.entries[parent.at][1], _NODE_TABLE)

    def _split_leaf(
        self, directory: Record, nodes: list[Node], leaf: int, block: bytearray, version: int, needed: int
    ) -> None:
        """Make room in a leaf: by moving its entries together, or the upper half of them into a new leaf."""
        entries = self._fs.names.used(block)
        if sum(entry.needed for entry in entries) + needed <= self._room:
            self._rewrite(directory, leaf, entries)
            return
        hashed = sorted((self.hash(version, entry.name)[0], entry.offset, entry) for entry in entries)
        self._check(len(hashed) >= 2)
        size, middle = 0, len(hashed)
        while middle > 1 and size + hashed[middle - 1][2].needed <= self._room // 2:
            middle -= 1
            size += hashed[middle][2].needed
        middle = min(middle, len(hashed) - 1)
        start = hashed[middle][0] | (hashed[middle][0] == hashed[middle - 1][0])
        new = self._fs.add_directory_block(directory, self._pack([entry for _, _, entry in hashed[middle:]]))
        self._rewrite(directory, leaf, [entry for _, _, entry in hashed[:middle]])
        lowest = nodes[-1]
        lowest.entries.insert(lowest.at + 1, (start, new))
        self._write(directory, lowest)

    def _rewrite(self, directory: Record, leaf: int, entries: list[Found]) -> None:
        self._fs.names.rewritten(directory, leaf)
        self._fs.write_directory_block(directory, leaf, self._pack(entries))

    def _grow(self, directory: Record, nodes: list[Node]) -> None:
        """Make room in the lowest node: split the highest node below one that has room, or add a level."""
        level = len(nodes) - 1
        while level and nodes[level - 1].is_full:
            level -= 1
        full = nodes[level]
        if level:
            middle = len(full.entries) // 2
            upper = full.entries[middle:]
            new = self._add_node(directory, [(0, upper[0][1]), *upper[1:]])
            full.entries = full.entries[:middle]
            self._write(directory, full)
            nodes[level - 1].entries.insert(nodes[level - 1].at + 1, (upper[0][0], new))
            self._write(directory, nodes[level - 1])
            return
        if len(nodes) >= self._most_levels:
            raise error(errno.ENOSPC)
        full.entries = [(0, self._add_node(directory, full.entries))]
        full.block[_INFO + 6] += 1
        self._write(directory, full)

    def _add_node(self, directory: Record, entries: list[tuple[int, int]]) -> int:
        block = bytearray(self._size)
        directories.put(block, 0, self._size, 0, b"", 0)
        node = Node(0, block, _NODE_TABLE, entries, self._limit(_NODE_TABLE))
        self._pack_table(node)
        return self._fs.add_directory_block(directory, block)

    def _read(self, directory: Record, number: int, table: int) -> Node:
        block = self._fs.read_directory_block(directory, number)
        limit, count = struct.unpack_from("<HH", block, table)
        self._check(directories.index_table(block) == table and limit == self._limit(table) and 1 <= count <= limit)
        flat = struct.unpack_from(f"<{2 * count}I", block, table)
        entries = list(zip((0, *flat[2::2]), [number & _BLOCK_MASK for number in flat[1::2]], strict=True))
        return Node(number, block, table, entries, limit)

    def _write(self, directory: Record, node: Node) -> None:
        self._pack_table(node)
        self._fs.write_directory_block(directory, node.number, node.block)

    @staticmethod
    def _pack_table(node: Node) -> None:
        struct.pack_into("<HHI", node.block, node.table, node.limit, len(node.entries), node.entries[0][1])
        flat = [number for entry in node.entries[1:] for number in entry]
        struct.pack_into(f"<{len(flat)}I", node.block, node.table + 8, *flat)

    @staticmethod
    def _descend(node: Node, hash: int) -> None:
        node.at = max(bisect_right(node.entries, (hash, _BLOCK_MASK)) - 1, 0)

    def _limit(self, table: int) -> int:
        checksum = _CHECKSUM_SIZE if self._super.checksum_seed is not None else 0
        return (self._size - table - checksum) // 8

    @property
    def _room(self) -> int:
        return self._size - (directories.TAIL_SIZE if self._super.checksum_seed is not None else 0)

    def _pack(self, entries: list[Found]) -> bytearray:
        return self._fs.names.pack(entries)

    @staticmethod
    def _check(valid: bool) -> None:
        if not valid:
            raise error(errno.EIO)
