"""Compressed grains -> guest bytes (VDF, "Stream-Optimized Compressed Sparse Extents")."""

from __future__ import annotations

import errno
import struct
import threading
import zlib
from collections import OrderedDict

from nbdserve.block.file import HostFile
from nbdserve.formats.vmdk import SECTOR

GRAIN_MARKER = struct.Struct("<QI")  # the grain's first sector in the guest, and the bytes of compressed data
_REMEMBERED_BYTES = 4 << 20  # so that small sequential reads inflate a grain once


class GrainReader:
    """Reads compressed grains of one extent, and remembers the latest."""

    def __init__(self, file: HostFile, grain_size: int, *, markers: bool) -> None:
        self._file = file
        self._grain_size = grain_size
        self._markers = markers
        self._lock = threading.Lock()
        self._recent: OrderedDict[int, bytes] = OrderedDict()
        self._most = max(2, _REMEMBERED_BYTES // grain_size)

    def read(self, sector: int, needed: int) -> bytes:
        """The guest bytes of the grain at a sector of the file: at least `needed`, at most a grain.

        Raises:
            OSError: EIO, the data is damaged or lies outside the file.
        """
        with self._lock:
            content = self._recent.get(sector)
            if content is not None:
                self._recent.move_to_end(sector)
        if content is None:
            content = self._inflate(sector)
            with self._lock:
                self._recent[sector] = content
                while len(self._recent) > self._most:
                    self._recent.popitem(last=False)
        if len(content) < needed:
            raise self._damaged(sector)
        return content

    def _inflate(self, sector: int) -> bytes:
        stream = zlib.decompressobj()
        try:
            content = stream.decompress(self._compressed(sector), self._grain_size + 1)
        except zlib.error:
            raise self._damaged(sector) from None
        if len(content) > self._grain_size or not stream.eof:
            raise self._damaged(sector)
        return content

    def _compressed(self, sector: int) -> bytearray:
        offset = sector * SECTOR
        left = self._file.size - offset
        if not self._markers:
            return self._file.read(offset, max(0, min(left, self._grain_size)))
        length = 0
        if left > GRAIN_MARKER.size:
            _, length = GRAIN_MARKER.unpack(self._file.read(offset, GRAIN_MARKER.size))
        if not 0 < length <= min(left - GRAIN_MARKER.size, 2 * self._grain_size):
            raise self._damaged(sector)
        return self._file.read(offset + GRAIN_MARKER.size, length)

    def _damaged(self, sector: int) -> OSError:
        return OSError(errno.EIO, f"the compressed grain at sector {sector} is damaged", self._file.name)
