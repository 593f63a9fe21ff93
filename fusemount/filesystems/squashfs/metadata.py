"""Tables of metadata: rows of blocks that hold 8 KiB each and are compressed one by one.

In front of each block stand two bytes: its size as it is stored, and whether it is compressed. What is in a table is
found by a reference: the place of a block in the table, and the offset of the first byte in its content; it may go on
in the blocks behind.
"""

from __future__ import annotations

import errno
import struct
from functools import lru_cache

from fusemount.filesystems.base import error
from fusemount.filesystems.squashfs.compression import Decompress
from nbdserve.block import BlockDevice

SIZE = 8192
_STORED = 0x8000
_KEPT = 512


class Metadata:
    """The blocks of metadata of a file system of `size` bytes."""

    def __init__(self, device: BlockDevice, size: int, decompress: Decompress) -> None:
        self._device = device
        self._size = size
        self._decompress = decompress
        self.block = lru_cache(_KEPT)(self._read_block)

    def _read_block(self, place: int) -> tuple[bytes, int]:
        """The content of the block at a place, and where the next one is."""
        header = int.from_bytes(self.raw(place, 2), "little")
        stored = header & ~_STORED
        if not 0 < stored <= SIZE:
            raise error(errno.EIO)
        content = self.raw(place + 2, stored)
        if not header & _STORED:
            content = self._decompress(content, SIZE)
        return content, place + 2 + stored

    def raw(self, place: int, length: int) -> bytes:
        """Bytes as they are stored. Raises EIO outside the file system."""
        if place < 0 or place + length > self._size:
            raise error(errno.EIO)
        return bytes(self._device.read(place, length))

    def cursor(self, place: int, offset: int) -> Cursor:
        """Reads from the content of the block at a place on."""
        return Cursor(self, place, offset)

    def indexed(self, table: int, size: int, index: int) -> bytes:
        """Entry `index` of a table of entries of `size` bytes, whose blocks' places are listed at `table`."""
        block, offset = divmod(index * size, SIZE)
        place = int.from_bytes(self.raw(table + 8 * block, 8), "little")
        return self.cursor(place, offset).take(size)


class Cursor:
    """A place in a table, to read on from."""

    def __init__(self, metadata: Metadata, place: int, offset: int) -> None:
        self._metadata = metadata
        self._content, self._next = metadata.block(place)
        self._offset = offset
        if offset > len(self._content):
            raise error(errno.EIO)

    def take(self, length: int) -> bytes:
        """The next bytes."""
        piece = self._content[self._offset : self._offset + length]
        self._offset += len(piece)
        if len(piece) == length:
            return piece
        pieces = [piece]
        left = length - len(piece)
        while left:
            self._content, self._next = self._metadata.block(self._next)
            piece = self._content[:left]
            self._offset = len(piece)
            if not piece:
                raise error(errno.EIO)
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    def unpack(self, fields: struct.Struct) -> tuple[int, ...]:
        """The next fields."""
        return fields.unpack(self.take(fields.size))
