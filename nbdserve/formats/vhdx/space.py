"""Which parts of the file are in use, in whole MiB, as blocks are laid out ([MS-VHDX] 2.1).

One byte a MiB is kept, so the map of the largest file (128 TiB) takes 128 MiB and of a usual one next to nothing. It is
made from the whole block allocation table when an image is opened for writing; on that occasion two blocks that claim
the same place are found, and the image is refused, because writing to one would change the other.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from nbdserve.block.file import HostFile
from nbdserve.errors import FormatError
from nbdserve.formats.vhdx import MIB


class HostSpace:
    """Hands out places for blocks, which read as zeros.

    Args:
        regions: ranges (start, end), in bytes, that are not for blocks.
        blocks: ranges of the blocks that are there already.
    """

    def __init__(self, file: HostFile, regions: Iterable[tuple[int, int]], blocks: Iterable[tuple[int, int]]) -> None:
        self._file = file
        self._used = bytearray(-(-file.size // MIB))
        for start, end in regions:
            self._used[start // MIB : end // MIB] = b"\1" * ((end - start) // MIB)
        for start, end in blocks:
            self._claim(start // MIB, end // MIB)
        self._from = 0  # nothing before this is free

    def _claim(self, first: int, end: int) -> None:
        # The last block of a fixed disk may be cut off at the end of the file, but its place is taken.
        self._used.extend(bytes(max(0, end - len(self._used))))
        if self._used.find(1, first, end) >= 0:
            raise FormatError(
                f"{self._file.name}: two blocks claim the same place near {first * MIB}; the image is damaged, open it "
                "read-only and copy it"
            )
        self._used[first:end] = b"\1" * (end - first)

    def allocate(self, length: int) -> int:
        """A place of `length` bytes, whole MiB, that reads as zeros; the file grows if need be.

        Raises:
            OSError: there is no room.
        """
        count = length // MIB
        first = self._used.find(bytes(count), self._from)
        if first < 0:
            first = self._used.rfind(1) + 1
        start, old_size = first * MIB, self._file.size
        if start + length > old_size:
            self._grow(start + length)
        if start < old_size:
            self._clear(start, min(length, old_size - start))
        self._used[first : first + count] = b"\1" * count
        if first == self._from:
            self._from += count
        return start

    def _grow(self, size: int) -> None:
        if self._file.is_device:
            raise OSError(errno.ENOSPC, "the block device that holds this VHDX is full", self._file.name)
        os.ftruncate(self._file.fd, size)

    def _clear(self, start: int, length: int) -> None:
        if not self._file.punch_hole(start, length) and not self._file.zero_range(start, length):
            self._file.write_zeros(start, length)

    def release(self, start: int, length: int) -> None:
        """Take a place back that nobody refers to any more, on the disk or in flight."""
        if not self._file.is_device:
            self._file.punch_hole(start, length)
        self._used[start // MIB : (start + length) // MIB] = bytes(length // MIB)
        self._from = min(self._from, start // MIB)
