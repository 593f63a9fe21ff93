"""Directories: the $I30 index of file names.

An index is a B-tree whose nodes all hold entries: the root node is the $INDEX_ROOT attribute, the others are the blocks
of $INDEX_ALLOCATION that $BITMAP calls used. Reading every used block once, in the order on disk, finds every entry,
is fast, and cannot run in circles however the tree is damaged.
"""

from __future__ import annotations

import errno
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import NamedTuple
from zlib import crc32

from fusemount.filesystems.base import error
from fusemount.filesystems.ntfs.boot import Geometry
from fusemount.filesystems.ntfs.records import Reference, Type, apply_fixups
from fusemount.filesystems.ntfs.volume import FIRST_USER, Node

_INDEX = "$I30"
_HEADER = struct.Struct("<III B")
_ENTRY = struct.Struct("<Q HH H")
_KEY = struct.Struct("<56x II BB")  # FILE_NAME: attributes, reparse tag, length, name space
_LAST = 2  # the entry without a key at the end of a node
_DOS = 2
_LARGEST_INDEX = 1 << 32


class Name(NamedTuple):
    """One entry of a directory.

    Attributes:
        flags: the file attributes as this name's copy has them (FileAttributes).
        tag: the reparse tag, where the flags say that there is one.
    """

    reference: Reference
    flags: int
    tag: int


class Directory:
    """The names of a directory, kept in memory: {name in UTF-8: Name}."""

    def __init__(self, names: dict[bytes, Name]) -> None:
        self.names = names
        self._order: list[tuple[int, bytes]] | None = None
        self._folded: dict[str, bytes] | None = None

    def add(self, name: bytes, entry: Name) -> None:
        """A name was given."""
        self.names[name] = entry
        self._order = self._folded = None

    def remove(self, name: bytes) -> None:
        """A name was taken away."""
        self.names.pop(name, None)
        self._order = self._folded = None

    def folded(self, fold: Callable[[bytes], str]) -> dict[str, bytes]:
        """The names by what they are without regard to case."""
        if self._folded is None:
            self._folded = {fold(name): name for name in self.names}
        return self._folded

    def behind(self, position: int) -> list[tuple[int, bytes]]:
        """The entries behind a position, as pairs of their position and name.

        A position says which file an entry names, not how many are in front of it: so it keeps its meaning when the
        directory is changed. It also puts files in the order of their MFT records.
        """
        if self._order is None:
            self._order = sorted((position_of(name, entry), name) for name, entry in self.names.items())
        return self._order[bisect_right(self._order, (position, b"\xff" * 1024)) :]


def position_of(name: bytes, entry: Name) -> int:
    """Where an entry stands in the directory; the hash tells two links to one file apart."""
    return entry.reference.number << 31 | crc32(name) >> 1


def read_directory(node: Node, geometry: Geometry) -> Directory:
    """Read all names. Raises ENOTDIR, and EIO when the index is damaged."""
    if not node.is_directory:
        raise error(errno.ENOTDIR)
    names: dict[bytes, Name] = {}
    for block in _blocks(node, geometry):
        for key, reference in _entries(block):
            flags, tag, length, space = _KEY.unpack_from(key)
            encoded = key[_KEY.size : _KEY.size + 2 * length]
            if len(encoded) != 2 * length:
                raise error(errno.EIO)
            if space == _DOS or reference.number < FIRST_USER or reference.number >> 32:
                continue
            name = encoded.decode("utf-16-le", "surrogatepass").encode("utf-8", "surrogatepass")
            if is_name(name):
                names[name] = Name(reference, flags, tag)
    return Directory(names)


def is_name(name: bytes) -> bool:
    """Whether a name may be shown."""
    return bool(name) and b"/" not in name and b"\0" not in name and name not in (b".", b"..")


def _blocks(node: Node, geometry: Geometry) -> Iterator[bytes]:
    """The index headers of all nodes, each with the entries behind it."""
    root = node.stream(Type.INDEX_ROOT, _INDEX)
    content = bytes(root.read(0, geometry.record))
    if len(content) < 32:
        raise error(errno.EIO)
    kind, _, size = struct.unpack_from("<III", content)
    if kind != Type.FILE_NAME or not 512 <= size <= 65536 or size & (size - 1):
        raise error(errno.EIO)
    yield content[16:]
    if not node.has(Type.INDEX_ALLOCATION, _INDEX):
        return
    blocks = node.stream(Type.INDEX_ALLOCATION, _INDEX)
    bitmap = node.stream(Type.BITMAP, _INDEX)
    if blocks.size > _LARGEST_INDEX:
        raise error(errno.EIO)
    used = bytes(bitmap.read(0, blocks.size // size // 8 + 1))
    step = max(1, (1 << 18) // size)
    for first in range(0, blocks.size // size, step):
        part = memoryview(bytes(blocks.read(first * size, step * size)))
        for index in range(first, first + len(part) // size):
            if index // 8 < len(used) and used[index // 8] >> (index & 7) & 1:
                block = bytearray(part[(index - first) * size : (index - first + 1) * size])
                apply_fixups(block, b"INDX")
                yield bytes(block[24:])


def _entries(block: bytes) -> Iterator[tuple[bytes, Reference]]:
    """The keys (FILE_NAME) of a node, and the files they stand for."""
    offset, length, _, _ = _HEADER.unpack_from(block)
    if length > len(block):
        raise error(errno.EIO)
    while True:
        if offset + 16 > length:
            raise error(errno.EIO)
        reference, size, key, flags = _ENTRY.unpack_from(block, offset)
        if flags & _LAST:
            return
        if size < 16 + _KEY.size or size & 7 or offset + size > length or not _KEY.size <= key <= size - 16:
            raise error(errno.EIO)
        yield block[offset + 16 : offset + 16 + key], Reference.unpack(reference)
        offset += size
