"""zisofs: a file in a row of blocks that were compressed by zlib one by one.

Behind a header of 16 bytes lie the places of all blocks, as offsets from the start of the file, and one more that says
where the last one ends. An empty block stands for zeros. (The kernel's fs/isofs/compress.c and the documentation of
zisofs-tools say the same.)
"""

from __future__ import annotations

import errno
import struct
import zlib
from collections.abc import Callable
from functools import lru_cache

from fusemount.filesystems.base import error

_MAGIC = b"\x37\xe4\x53\x96\xc9\xdb\xd6\x07"
_BLOCK_SIZES = range(15, 18)  # log2


class CompressedFile:
    """A file's content, unpacked.

    Args:
        read: (offset, length) -> the bytes as they are stored.
        stored: how many these are.
        log2, size: what Rock Ridge says of the blocks and the real size.
    """

    def __init__(self, read: Callable[[int, int], bytes], stored: int, log2: int, size: int) -> None:
        """Raises EIO when the header is damaged."""
        header = read(0, 16)
        if len(header) < 16 or header[:8] != _MAGIC or log2 not in _BLOCK_SIZES:
            raise error(errno.EIO)
        real, words, header_log2 = struct.unpack_from("<8xIBB", header)
        if (real, header_log2) != (size, log2):
            raise error(errno.EIO)
        self._read = read
        self._stored = stored
        self._table = words * 4
        self._block = 1 << log2
        self.size = size
        self._unpack = lru_cache(8)(self._unpack_block)

    def read(self, offset: int, length: int) -> bytes:
        """The bytes from offset on. Raises EIO when they are damaged."""
        end = min(offset + length, self.size)
        if offset >= end:
            return b""
        first = offset // self._block
        content = b"".join(self._unpack(index) for index in range(first, -(-end // self._block)))
        return content[offset - first * self._block : end - first * self._block]

    def _unpack_block(self, index: int) -> bytes:
        size = min(self._block, self.size - index * self._block)
        places = self._read(self._table + 4 * index, 8)
        if len(places) < 8:
            raise error(errno.EIO)
        start, end = struct.unpack("<II", places)
        if start == end:
            return bytes(size)
        if not start < end <= self._stored or end - start > 2 * self._block:
            raise error(errno.EIO)
        try:
            content = zlib.decompressobj().decompress(self._read(start, end - start), size)
        except zlib.error:
            raise error(errno.EIO) from None
        if len(content) != size:
            raise error(errno.EIO)
        return content
