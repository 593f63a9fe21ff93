"""The block map of a VDI: one entry a guest block, the number of the block in the file that holds it.

Three invariants are kept here:

- No write ends up outside the data area, or in another guest block's place, because an entry said so. Entries beyond
  the map's own number of blocks, past the end of the file, or claimed by two guest blocks are taken for damaged when
  the map is read: every access to such a block is EIO. Their bytes on disk stay as they are, and the blocks that they
  name are never given to others.
- An entry reaches the disk no earlier than the block it names. New entries wait in memory until flush(): it brings
  everything written so far to stable storage, writes just those, and syncs again.
- The header's count of blocks covers every entry on the disk at every moment, because other programs put their next
  block there: it is written before the sync that precedes the entries. A crash between the two leaks blocks; they are
  found as gaps when the map is read for writing, and given out first.

The whole map is in memory: 4 bytes a block, 64 MiB at most (header.MAX_BLOCKS), and a byte a block more while it is
read.
"""

from __future__ import annotations

import errno
import heapq
import sys
import threading
from array import array

from nbdserve.block.file import HostFile
from nbdserve.formats.entries import rows_of
from nbdserve.formats.vdi.header import BLOCKS_ALLOCATED, Header

UNALLOCATED = 0xFFFFFFFF
ZERO = 0xFFFFFFFE
DAMAGED = 0xFFFFFFFD  # in memory only; on disk such a number is out of range, and so damaged as well

_MOST_WAITING = 1 << 16  # entries in memory alone, before they are flushed unasked
_USED = 1  # of a block of the file: some entry names it, even a damaged one
_CHUNK = 1 << 16  # entries looked at together: whole chunks of a map that has just been created are unallocated


class BlockMap:
    """The map in memory.

    Attributes:
        entries: for each guest block the number of its block in the file; or UNALLOCATED, ZERO, DAMAGED.
    """

    def __init__(self, file: HostFile, header: Header) -> None:
        self._file = file
        self._header = header
        self._waiting: dict[int, int] = {}
        self._waiting_lock = threading.Lock()
        self._flushing = threading.Lock()
        self._count = 0  # one more than the highest block in use
        self._count_on_disk = header.blocks_allocated
        self._gaps: list[int] = []
        self.entries = self._read()

    def _read(self) -> array[int]:
        entries = array("I")
        assert entries.itemsize == 4
        entries.frombytes(self._file.read(self._header.map_offset, 4 * self._header.blocks))
        if sys.byteorder == "big":
            entries.byteswap()
        inside = max(0, self._file.size - self._header.data_offset)
        limit = -(-inside // self._header.block_size)
        owners = bytearray(len(entries))  # of each block of the file, see _USED
        unused = array("I", [UNALLOCATED]) * _CHUNK
        count, highest = 0, -1
        for start in range(0, len(entries), _CHUNK):
            chunk = entries[start : start + _CHUNK]
            if chunk == unused:
                continue
            numbers = [number for number in chunk if number < ZERO]
            count += len(numbers)
            highest = max(highest, max(numbers, default=-1))
            for number in numbers:
                if number < len(owners):
                    owners[number] = _USED
        if highest >= min(limit, len(owners)) or owners.count(_USED) != count:
            self._find_damaged(entries, owners, limit)
        self._count = len(owners.rstrip(b"\0"))
        self._gaps = _zeros_in(owners, self._count)
        return entries

    @staticmethod
    def _find_damaged(entries: array[int], owners: bytearray, limit: int) -> None:
        """Mark the entries of blocks that several guest blocks claim, that the file ends before, or beyond the map."""
        seen = bytearray(len(owners))
        for number in entries:
            if number < len(owners):
                seen[number] = min(seen[number] + 1, 2) if number < limit else 2
        for at, number in enumerate(entries):
            if number < ZERO and (number >= len(owners) or seen[number] == 2):
                entries[at] = DAMAGED

    def number(self, block: int) -> int:
        """The entry of a guest block: a block of the file, UNALLOCATED or ZERO; EIO for a damaged one."""
        number = self.entries[block]
        if number == DAMAGED:
            raise OSError(errno.EIO, f"the entry of block {block} in the block map is damaged", self._file.name)
        return number

    def allocate(self) -> int:
        """A block of the file that nobody uses, from now on the caller's. Calls must not overlap."""
        if self._gaps:
            return heapq.heappop(self._gaps)
        number = self._count
        if number >= self._header.blocks:  # only when damaged entries hide what is free
            raise OSError(errno.ENOSPC, "all blocks are in use or damaged", self._file.name)
        self._count += 1
        return number

    def release(self, number: int) -> None:
        """Take a block back that allocate() gave and no entry names."""
        heapq.heappush(self._gaps, number)

    def publish(self, block: int, number: int) -> None:
        """Let a guest block be held by a block of the file whose data has been written, or read as ZERO."""
        with self._waiting_lock:
            self._waiting[block] = number
        self.entries[block] = number
        if len(self._waiting) >= _MOST_WAITING:
            self.flush()

    def flush(self) -> None:
        """Return when all writes and all entries from before this call are on stable storage."""
        with self._flushing:  # whoever comes second must not return before the entries the first one took are written
            with self._waiting_lock:
                waiting, self._waiting = self._waiting, {}
                count = self._count
            try:
                if count != self._count_on_disk:
                    self._file.write(BLOCKS_ALLOCATED, count.to_bytes(4, "little"))
                self._file.sync()
                self._count_on_disk = count
                if waiting:
                    self._write(waiting)
                    self._file.sync()
            except OSError:
                with self._waiting_lock:
                    self._waiting = waiting | self._waiting
                raise

    def _write(self, entries: dict[int, int]) -> None:
        """Write entries, those of neighbouring blocks together."""
        for block, row in rows_of(entries, 4, "little"):
            self._file.write(self._header.map_offset + 4 * block, row)


def _zeros_in(owners: bytearray, stop: int) -> list[int]:
    """The blocks below stop that nobody claims, in order."""
    gaps = []
    position = owners.find(0, 0, stop)
    while position >= 0:
        gaps.append(position)
        position = owners.find(0, position + 1, stop)
    return gaps
