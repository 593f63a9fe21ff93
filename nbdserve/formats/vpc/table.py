"""The block allocation table of a dynamic VHD: one entry a block, the sector where the block's bitmap begins.

Two invariants are kept here (VHD specification, "Block Allocation Table and Data Blocks"):

- No write ends up in the headers, the table, the footer or another block because an entry said so. Entries that point
  there, past the end of the file, or to space that another entry claims as well are taken for damaged when the table is
  read: every access to such a block is EIO. Their bytes on disk stay as they are, and what they claim past the end is
  never given to another block (see behind_claims).
- An entry reaches the disk no earlier than the block it names. New entries wait in memory until flush(): it notes which
  ones wait, brings everything written so far to stable storage, writes just those, and syncs again.
"""

from __future__ import annotations

import errno
import sys
import threading
from array import array
from bisect import bisect_left

from nbdserve.block.file import HostFile
from nbdserve.formats.entries import rows_of
from nbdserve.formats.vpc.header import SECTOR, Layout

_UNUSED = 0xFFFFFFFF

UNALLOCATED = 0
DAMAGED = 1


class BlockTable:
    """The table in memory.

    Attributes:
        data: for each block where its data begins in the file, in bytes; or UNALLOCATED, or DAMAGED.
    """

    def __init__(self, file: HostFile, layout: Layout, end: int) -> None:
        """Read the table; `end` is where the footer begins, or the file's length without one."""
        self._file = file
        self._layout = layout
        self._waiting: dict[int, int] = {}
        self._waiting_lock = threading.Lock()
        self._flushing = threading.Lock()
        self._claims: list[tuple[int, int]] = []  # what damaged entries name past the end, in order and without overlap
        self.data = self._read(end)

    def _read(self, end: int) -> array[int]:
        raw = self._file.read(self._layout.table_offset, 4 * self._layout.blocks)
        sectors = array("I")
        assert sectors.itemsize == 4
        sectors.frombytes(raw)
        if sys.byteorder == "little":
            sectors.byteswap()
        data = array("Q", bytes(8 * len(sectors)))
        stride = self._layout.bitmap_size + self._layout.block_size
        # Sector and block in one number each: a full table has millions of entries, and they are to be sorted.
        entries = sorted(sector << 32 | block for block, sector in enumerate(sectors) if sector != _UNUSED)
        free_from, last = 0, 0
        for entry in entries:
            start, block = (entry >> 32) * SECTOR, entry & 0xFFFFFFFF
            if self._is_outside(start, start + stride, end):
                data[block] = DAMAGED
                if start + stride > end:
                    self._claim(start, start + stride)
                continue
            if start < free_from:
                data[last] = data[block] = DAMAGED
            else:
                data[block] = start + self._layout.bitmap_size
            free_from, last = start + stride, block
        return data

    def _is_outside(self, start: int, stop: int, end: int) -> bool:
        """Whether a block there would reach past the end or touch metadata."""
        return stop > end or any(start < taken_end and taken < stop for taken, taken_end in self._layout.metadata)

    def _claim(self, start: int, stop: int) -> None:
        """Note what a damaged entry claims; calls come in the order of `start`."""
        if self._claims and start <= self._claims[-1][1]:
            start, _ = self._claims.pop()
        self._claims.append((start, stop))

    def behind_claims(self, start: int, stop: int) -> int | None:
        """Where the claim past the end of the file that reaches into [start, stop) ends; None when there is none.

        Were a new block to lie there, two entries would claim one place when the image is opened again.
        """
        at = bisect_left(self._claims, (stop, 0))
        return self._claims[at - 1][1] if at and self._claims[at - 1][1] > start else None

    def place(self, block: int) -> int:
        """Where a block's data begins in the file, in bytes, or UNALLOCATED; EIO for a damaged entry."""
        place = self.data[block]
        if place == DAMAGED:
            raise OSError(errno.EIO, f"the entry of block {block} in the block table is damaged", self._file.name)
        return place

    def publish(self, block: int, place: int) -> None:
        """Let a block whose data has been written begin at place."""
        with self._waiting_lock:
            self._waiting[block] = (place - self._layout.bitmap_size) // SECTOR
        self.data[block] = place

    def flush(self) -> None:
        """Return when all writes and all entries from before this call are on stable storage."""
        with self._flushing:  # whoever comes second must not return before the entries the first one took are written
            with self._waiting_lock:
                entries, self._waiting = self._waiting, {}
            try:
                self._file.sync()
                if entries:
                    self._write(entries)
                    self._file.sync()
            except OSError:
                with self._waiting_lock:
                    self._waiting = entries | self._waiting
                raise

    def _write(self, entries: dict[int, int]) -> None:
        """Write entries, those of neighbouring blocks together."""
        for block, row in rows_of(entries, 4, "big"):
            self._file.write(self._layout.table_offset + 4 * block, row)
