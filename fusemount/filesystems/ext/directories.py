"""Directory blocks: struct ext4_dir_entry_2, one behind the other, filling the block to its end.

What it keeps: an entry is believed only as far as it lies inside its block; what a chain of entries says behind a
broken one is not looked at. Source: Documentation/filesystems/ext4/directory.rst of the kernel.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from typing import NamedTuple

ENTRY = struct.Struct("<IHBB")
TAIL_SIZE = 12
_TAIL = struct.Struct("<IHBB")
_TAIL_TYPE = 0xDE

TYPES = (0, stat.S_IFREG, stat.S_IFDIR, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFLNK)
"""What the file types in entries mean: index -> type bits of the mode, 0 where it is unknown."""

TYPE_NUMBERS = {kind: number for number, kind in enumerate(TYPES)}


class Found(NamedTuple):
    """An entry, used or not, at `offset` in its block, `length` bytes long with the room behind the name.

    Attributes:
        type: type bits of a mode, 0 where the entry does not tell.
    """

    offset: int
    length: int
    inode: int
    name: bytes
    type: int

    @property
    def needed(self) -> int:
        """The bytes it cannot do without."""
        return size_of(len(self.name)) if self.inode else 0


class BrokenBlock(ValueError):
    """The chain of entries in a block does not hold."""


class Part(NamedTuple):
    """A stretch of a directory: `block` begins at byte `base` of it, its first entry at `start`; None when damaged."""

    base: int
    start: int
    block: bytes | bytearray | None

    def entries(self, has_types: bool) -> Iterator[Found]:
        """See parse()."""
        if self.block is None:
            raise BrokenBlock
        return parse(self.block, self.start, has_types=has_types)


def size_of(name_length: int) -> int:
    """The bytes that an entry with a name of this length takes."""
    return (ENTRY.size + name_length + 3) & ~3


def parse(block: bytes | bytearray, start: int = 0, *, has_types: bool = True) -> Iterator[Found]:
    """The entries of a block from offset `start` on, unused ones too. Raises BrokenBlock where the chain breaks."""
    end = len(block)
    offset = start
    unpack = ENTRY.unpack_from
    while offset < end:
        if end - offset < ENTRY.size:
            raise BrokenBlock
        inode, length, name_length, kind = unpack(block, offset)
        if length & 3 or not length:
            length = _decoded(length)
        if not has_types:
            name_length |= kind << 8
            kind = 0
        if length < ENTRY.size or offset + length > end or ENTRY.size + name_length > length or name_length > 255:
            raise BrokenBlock
        name = bytes(block[offset + 8 : offset + 8 + name_length])
        yield Found(offset, length, inode, name, TYPES[kind] if kind < 8 else 0)
        offset += length


def length_of(block: bytearray, offset: int) -> int:
    """The length of the entry at an offset."""
    return _decoded(int.from_bytes(block[offset + 4 : offset + 6], "little"))


def _decoded(length: int) -> int:
    """rec_len as it is stored: lengths of 64 KiB do not fit into its 16 bits, so its two lowest ones are more of it."""
    return 65536 if length in (0, 65535) else length & 0xFFFC | (length & 3) << 16


def room_for(block: bytearray, start: int, end: int, name: bytes, has_types: bool) -> tuple[int, int] | None:
    """Where the first entry lies that has room for one more with this name, and what it needs itself (0: unused).

    `start`: an entry, to begin with; `end`: where the entries stop. None when there is no room. Raises BrokenBlock.
    """
    wanted = size_of(len(name))
    offset = start
    unpack = ENTRY.unpack_from
    while offset + ENTRY.size <= end:
        inode, length, name_length, kind = unpack(block, offset)
        if length & 3 or not length:
            length = _decoded(length)
        if not has_types:
            name_length |= kind << 8
        needed = name_length + 11 & ~3 if inode else 0
        if length < ENTRY.size or offset + length > end or needed > length:
            raise BrokenBlock
        if length - needed >= wanted:
            return offset, needed
        offset += length
    return None


def put(block: bytearray, offset: int, length: int, inode: int, name: bytes, kind: int) -> None:
    """Write an entry; `kind` is the number that stands for a file type, 0 where the file system keeps none."""
    stored = length if length < 65536 else 65535
    ENTRY.pack_into(block, offset, inode, stored, len(name), kind)
    block[offset + 8 : offset + 8 + len(name)] = name


def is_shown(name: bytes) -> bool:
    """Whether a name may leave the image: not `.` and `..`, and nothing that would be taken for a path."""
    return bool(name) and b"/" not in name and b"\0" not in name and name not in (b".", b"..")


def has_tail(block: bytes | bytearray) -> bool:
    """Whether the block ends in the false entry that holds a checksum."""
    return _TAIL.unpack_from(block, len(block) - TAIL_SIZE) == (0, TAIL_SIZE, 0, _TAIL_TYPE)


def put_tail(block: bytearray) -> None:
    """Write that entry, its checksum still zero."""
    _TAIL.pack_into(block, len(block) - TAIL_SIZE, 0, TAIL_SIZE, 0, _TAIL_TYPE)
    block[-4:] = bytes(4)


def index_table(block: bytes | bytearray) -> int | None:
    """Where the table of a block of a directory's hash index begins; None when the block holds entries."""
    first, length, name_length, _ = ENTRY.unpack_from(block)
    if first == 0 and name_length == 0 and length in (len(block), 65535, 0):
        return 8
    if length == 12 and name_length == 1 and ENTRY.unpack_from(block, 12)[1] in (len(block) - 12, 65524):
        reserved, _, info_length = struct.unpack_from("<IBB", block, 24)
        if reserved == 0 and info_length == 8:
            return 32
    return None


def pack(entries: list[Found], size: int, numbers: bool) -> bytearray:
    """A block of `size` bytes with the given entries, the last of which takes the room that is left."""
    block = bytearray(size)
    offset = 0
    for index, entry in enumerate(entries):
        length = entry.needed if index + 1 < len(entries) else size - offset
        put(block, offset, length, entry.inode, entry.name, TYPE_NUMBERS.get(entry.type, 0) if numbers else 0)
        offset += length
    if not entries:
        put(block, 0, size, 0, b"", 0)
    return block
