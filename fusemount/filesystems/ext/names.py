"""Changing directories: entries put into their blocks, taken out of them, pointed elsewhere.

What it keeps: an entry never moves in a directory without a hash index, and in one with an index a name's place follows
from its hash alone; so whoever reads a directory piece by piece sees every name that stays exactly once. Where a
directory could get an index at any time (it has one block, or lies in its inode) it is shown in the order of hashes
too.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from fusemount.filesystems.base import Entry, Inode, error
from fusemount.filesystems.ext import directories
from fusemount.filesystems.ext.directories import BrokenBlock, Found
from fusemount.filesystems.ext.htree import HashIndex
from fusemount.filesystems.ext.inodes import Flag, Record
from fusemount.filesystems.ext.superblock import Compat, Incompat

if TYPE_CHECKING:
    from fusemount.filesystems.ext.store import Store

_MOST_PLACES = 10_000
_TIES = 256  # names of equal hashes that can be told apart


class Place(NamedTuple):
    """Where an entry was found: the logical block, its bytes, the entry and the one before it in the block."""

    logical: int
    block: bytearray
    found: Found
    before: Found | None


class DirectoryWriter:
    """Changes the directories of one file system."""

    def __init__(self, filesystem: Store) -> None:
        self._fs = filesystem
        self._super = filesystem.superblock
        self._size = self._super.block_size
        self._has_types = self._super.has(Incompat.FILETYPE)
        self._has_index = self._super.has(Compat.DIR_INDEX)
        self._tail = directories.TAIL_SIZE if self._super.checksum_seed is not None else 0
        self._places: dict[tuple[int, int], int] = {}  # directory and block -> the entry that had room last
        self._first_with_room: dict[int, int] = {}  # directory without index -> its blocks before this one are full
        self.index = HashIndex(filesystem)

    # Blocks

    def used(self, block: bytearray) -> list[Found]:
        """The entries of a block that stand for something."""
        try:
            return [found for found in self._entries(block) if found.inode]
        except BrokenBlock:
            raise error(errno.EIO) from None

    def pack(self, entries: list[Found]) -> bytearray:
        """A block with these entries; its checksum is not set yet."""
        block = directories.pack(entries, self._size - self._tail, self._has_types) + bytes(self._tail)
        if self._tail:
            directories.put_tail(block)
        return block

    def place(self, directory: Record, logical: int, block: bytearray, name: bytes, inode: int, kind: int) -> bool:
        """Put an entry where a block of a directory has room for it and write the block; False when it has none.

        The search goes on where it ended last time, for a directory is mostly filled in one go.
        """
        end = len(block) - (directories.TAIL_SIZE if self._tail and directories.has_tail(block) else 0)
        try:
            start = self._places.get((directory.number, logical), 0)
            room = directories.room_for(block, start, end, name, self._has_types)
            if room is None and start:
                room = directories.room_for(block, 0, end, name, self._has_types)
        except BrokenBlock:
            raise error(errno.EIO) from None
        if room is None:
            return False
        offset, needed = room
        length = directories.length_of(block, offset)
        if needed:
            self._set_length(block, offset, needed)
        number = directories.TYPE_NUMBERS[kind] if self._has_types else 0
        directories.put(block, offset + needed, length - needed, inode, name, number)
        self._fs.write_directory_block(directory, logical, block)
        if len(self._places) > _MOST_PLACES:
            self._places.clear()
        self._places[directory.number, logical] = offset + needed
        return True

    def rewritten(self, directory: Record, logical: int) -> None:
        """The entries of a block lie elsewhere in it now."""
        self._places.pop((directory.number, logical), None)

    def _entries(self, block: bytearray) -> Iterator[Found]:
        tail = directories.TAIL_SIZE if self._tail and directories.has_tail(block) else 0
        return directories.parse(block[: len(block) - tail] if tail else block, has_types=self._has_types)

    @staticmethod
    def _set_length(block: bytearray, offset: int, length: int) -> None:
        struct.pack_into("<H", block, offset + 4, length if length < 65536 else 65535)

    # Directories

    def is_indexed(self, directory: Record) -> bool:
        """Whether a directory has a hash index that counts."""
        return self._has_index and bool(directory.flags & Flag.INDEX)

    def add(self, directory: Record, name: bytes, inode: int, kind: int) -> None:
        """Add a name that is not there. The directory is not inline."""
        if self.is_indexed(directory):
            self.index.insert(directory, name, inode, kind)
            return
        directory.flags &= ~Flag.INDEX
        blocks = directory.size // self._size
        for logical in range(self._first_with_room.get(directory.number, 0), blocks):
            if not self._fs.has_block(directory, logical):
                continue
            block = self._fs.read_directory_block(directory, logical)
            if self.place(directory, logical, block, name, inode, kind):
                self._first_with_room[directory.number] = logical
                self._fs.name_added(directory, name, inode, kind)
                return
        if blocks == 1 and self._has_index:
            self.index.make(directory)
            self._fs.names_unknown(directory)
            self.index.insert(directory, name, inode, kind)
            return
        block = self.pack([Found(0, 0, inode, name, kind)])
        self._first_with_room[directory.number] = self._fs.add_directory_block(directory, block)
        self._fs.name_added(directory, name, inode, kind)

    def find(self, directory: Record, name: bytes) -> Place:
        """The entry with a name. Raises ENOENT, EIO."""
        for logical in self._may_hold(directory, name):
            if name not in self._fs.unverified_block(directory, logical):
                continue
            block = self._fs.read_directory_block(directory, logical)
            before = None
            try:
                for found in self._entries(block):
                    if found.name == name and found.inode:
                        return Place(logical, block, found, before)
                    before = found
            except BrokenBlock:
                raise error(errno.EIO) from None
        raise error(errno.ENOENT)

    def remove(self, directory: Record, name: bytes) -> None:
        """Take a name out."""
        logical, block, found, before = self.find(directory, name)
        if before is not None:
            self._set_length(block, before.offset, before.length + found.length)
        else:
            block[found.offset : found.offset + 4] = bytes(4)
        self._fs.write_directory_block(directory, logical, block)
        self.rewritten(directory, logical)
        if logical < self._first_with_room.get(directory.number, 0):
            self._first_with_room[directory.number] = logical
        self._fs.name_removed(directory, name)

    def point(self, directory: Record, name: bytes, inode: int, kind: int) -> None:
        """Let a name stand for another inode."""
        logical, block, found, _ = self.find(directory, name)
        struct.pack_into("<I", block, found.offset, inode)
        if self._has_types:
            block[found.offset + 7] = directories.TYPE_NUMBERS[kind]
        self._fs.write_directory_block(directory, logical, block)
        self._fs.name_added(directory, name, inode, kind)

    def forget(self, directory: Record) -> None:
        """The directory is gone."""
        self.index.forget(directory)
        self._first_with_room.pop(directory.number, None)
        for place in [place for place in self._places if place[0] == directory.number]:
            del self._places[place]

    def _may_hold(self, directory: Record, name: bytes) -> Iterator[int]:
        if self.is_indexed(directory) and name != b"..":
            return self.index.candidates(directory, name)
        return iter(range(directory.size // self._size))

    # Listing

    def is_in_hash_order(self, directory: Record) -> bool:
        """Whether a directory is to be listed by hashes rather than by places."""
        if not self._has_index:
            return False
        return self.is_indexed(directory) or directory.has_inline_data or directory.size <= self._size

    def in_hash_order(self, directory: Record, position: int) -> Iterator[Entry]:
        """The entries of a directory from a position on, by the order of their hashes. Raises EIO for a bad index."""
        version = self.index.version(directory)
        for entries in self._batches(directory, position):
            ranked = []
            for found in entries:
                if directories.is_shown(found.name):
                    major, minor = self.index.hash(version, found.name)
                    ranked.append((major << 31 | minor & ~(_TIES - 1), found.name, found))
            previous, tie = -1, 0
            for key, name, found in sorted(ranked, key=lambda item: item[:2]):
                tie = min(tie + 1, _TIES - 1) if key == previous else 0
                previous = key
                place = key + tie + 1
                if place > position:
                    yield Entry(place, name, Inode(found.inode), found.type or self._fs.type_of(found.inode))

    def _batches(self, directory: Record, position: int) -> Iterator[list[Found]]:
        """The entries, in pieces whose hashes do not overlap."""
        batch: list[Found] = []
        if not self.is_indexed(directory):
            for part in self._fs.directory_parts(directory):
                try:
                    batch += [found for found in part.entries(self._has_types) if found.inode]
                except BrokenBlock:
                    continue
            yield batch
            return
        for start, leaf in self.index.leaves(directory, max(position - 1, 0) >> 31 & ~1):
            if not start & 1:
                yield batch
                batch = []
            try:
                batch += self.used(self._fs.read_directory_block(directory, leaf))
            except BlockingIOError:
                raise
            except OSError:
                continue
        yield batch
