"""Directory blocks: struct ext4_dir_entry_2, one behind the other, filling the block to its end.

What it keeps: an entry is believed only as far as it lies inside its block; what a chain of entries says behind a broken
one is not looked at. Source: Documentation/filesystems/ext4/directory.rst of the kernel.
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
        if end > 65532 and length in (0, 65535):
            length = 65536
        elif length & 3:
            length = length & 0xFFFC | (length & 3) << 16
        if not has_types:
            name_length |= kind << 8
            kind = 0
        if length < ENTRY.size or offset + length > end or ENTRY.size + name_length > length or name_length > 255:
            raise BrokenBlock
        name = bytes(block[offset + 8 : offset + 8 + name_length])
        yield Found(offset, length, inode, name, TYPES[kind] if kind < 8 else 0)
        offset += length


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
