"""The block allocation table: where every payload block and every sector bitmap block lies ([MS-VHDX] 2.5).

The table may be as long as 512 MiB (64 TiB in blocks of 1 MiB), so it is read in pages of 64 KiB, of which at most
_MOST_PAGES (16 MiB) are in memory. Entries that were changed wait in a dictionary until image.flush() writes them; the
image flushes before too many wait (MOST_WAITING, about 10 MiB).

No write ends up outside a block because an entry said so: entries that point into the header section, a region or past
the end of the file are taken for damaged when their page is read, and every access to such a block is EIO. Their bytes
on disk stay as they are, because only entries that were changed here are written.
"""

from __future__ import annotations

import errno
import sys
import threading
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from enum import IntEnum

from nbdserve.block.file import HostFile
from nbdserve.formats.entries import rows_of
from nbdserve.formats.vhdx import MIB
from nbdserve.formats.vhdx.layout import Layout, table_entries
from nbdserve.formats.vhdx.log import ReplayedFile

STATE_MASK = 7
PLACE_MASK = ~(MIB - 1) & (1 << 64) - 1
_MIB_BITS = 20
MOST_WAITING = 1 << 16
PAGE_BITS = 13
PAGE_MASK = (1 << PAGE_BITS) - 1
_PAGE_BYTES = 8 << PAGE_BITS
_MOST_PAGES = 256


class State(IntEnum):
    """The state of a block, the lowest bits of its entry (2.5.1.1). Sector bitmap blocks are NOT_PRESENT or FULL."""

    NOT_PRESENT = 0
    UNDEFINED = 1
    ZERO = 2
    UNMAPPED = 3
    DAMAGED = 4  # reserved by the format; used here, in memory, for entries that say what cannot be
    UNMAPPED_BEFORE_1_0 = 5
    FULL = 6
    PARTIAL = 7


_FULL = int(State.FULL)


class BlockTable:
    """The entries, by their index in the table.

    Attributes:
        file_end: where the file ends, in bytes; kept right by whoever makes it longer.
        pages: those in memory, for those who must not wait to look at.
    """

    def __init__(self, file: HostFile | ReplayedFile, layout: Layout) -> None:
        self._file = file
        self._layout = layout
        self._ratio = layout.chunk_ratio
        self.ratio_bits = self._ratio.bit_length() - 1
        self._has_parent = layout.parent_locator is not None
        self.entries = table_entries(layout.blocks, self._ratio, has_parent=self._has_parent)
        self._starts = [start for start, _ in layout.regions]
        self.file_end = file.size
        self.pages: dict[int, array[int]] = {}
        self._loading = threading.Lock()
        self._waiting: dict[int, int] = {}
        self._in_flight: dict[int, int] = {}

    # Reading

    def index_of_block(self, block: int) -> int:
        """Where a payload block's entry is."""
        return block + (block >> self.ratio_bits)

    def index_of_bitmap(self, block: int) -> int:
        """Where the entry of the sector bitmap block is that belongs to a payload block."""
        return ((block >> self.ratio_bits) + 1) * (self._ratio + 1) - 1

    def entry(self, index: int) -> int:
        """An entry: a place in the file and a State; EIO when it is damaged."""
        page = self.pages.get(index >> PAGE_BITS)
        if page is None:
            page = self._load(index >> PAGE_BITS)
        entry = page[index & PAGE_MASK]
        if entry == State.DAMAGED:
            raise OSError(errno.EIO, f"entry {index} of the block allocation table is damaged", self._file.name)
        return entry

    def entry_in_memory(self, index: int) -> int | None:
        """An entry as it stands in memory, DAMAGED or not; None when its page would have to be read."""
        page = self.pages.get(index >> PAGE_BITS)
        return None if page is None else page[index & PAGE_MASK]

    def run(self, block: int, most: int) -> int:
        """How many blocks from this one on, `most` at most, are in the same state; only as far as one page tells."""
        state = self.entry(self.index_of_block(block)) & STATE_MASK
        last = min(block + most, self._layout.blocks)
        number = self.index_of_block(block) >> PAGE_BITS
        page = self.pages.get(number) or self._load(number)
        end = block + 1
        while end < last:
            index = self.index_of_block(end)
            if index >> PAGE_BITS != number or page[index & PAGE_MASK] & STATE_MASK != state:
                break
            end += 1
        return end - block

    def _load(self, number: int) -> array[int]:
        with self._loading:
            page = self.pages.get(number)
            if page is not None:
                return page
            page = self._read(number)
            # Changes that are on their way to the disk may or may not have been read.
            for changes in (self._in_flight, self._waiting):
                for index, entry in changes.items():
                    if index >> PAGE_BITS == number:
                        page[index & PAGE_MASK] = entry
            if len(self.pages) >= _MOST_PAGES:
                del self.pages[next(iter(self.pages))]
            self.pages[number] = page
            return page

    def _raw(self, number: int) -> tuple[array[int], bool]:
        """A page from the disk, and whether there is anything in it."""
        count = min(self.entries - (number << PAGE_BITS), 1 << PAGE_BITS)
        raw = self._file.read(self._layout.table_offset + number * _PAGE_BYTES, 8 * count)
        page = array("Q", bytes(_PAGE_BYTES))
        memoryview(page).cast("B")[: len(raw)] = raw
        if sys.byteorder == "big":
            page.byteswap()
        return page, bool(raw.strip(b"\0"))

    def _read(self, number: int) -> array[int]:
        """A page from the disk, with what is wrong in it marked."""
        page, is_used = self._raw(number)
        if is_used:
            first = number << PAGE_BITS
            for slot, entry in enumerate(page):
                if entry:
                    page[slot] = self._checked(first + slot, entry)
        return page

    def _checked(self, index: int, entry: int) -> int:
        state, start = entry & STATE_MASK, entry & PLACE_MASK
        is_bitmap = index % (self._ratio + 1) == self._ratio
        if is_bitmap:
            if state not in (State.NOT_PRESENT, State.FULL) or (state == State.FULL and not self._has_parent):
                return State.DAMAGED
            length = MIB
        else:
            if state == State.DAMAGED or (state == State.PARTIAL and not self._has_parent):
                return State.DAMAGED
            block = index - index // (self._ratio + 1)
            if block >= self._layout.blocks:
                return State.NOT_PRESENT
            length = min(self._layout.block_size, self._layout.size - block * self._layout.block_size)
        if state < State.FULL:
            return state  # the place of a block that is not there says nothing
        if start + length > self.file_end or self._touches_region(start, start + length):
            return State.DAMAGED
        return start | state

    def _touches_region(self, start: int, end: int) -> bool:
        before = bisect_left(self._starts, end)
        return before > 0 and self._layout.regions[before - 1][1] > start

    def scan(self) -> Iterator[tuple[int, list[int]]]:
        """The places that entries name, right or wrong: bytes of a block, and where such blocks begin, in MiB.

        The whole table is read from the disk, without keeping its pages, so that each entry costs next to nothing.
        """
        assert isinstance(self._file, HostFile)
        for number in range(-(-self.entries >> PAGE_BITS)):
            first = number << PAGE_BITS
            is_data, run = self._file.data_extent(self._layout.table_offset + 8 * first, _PAGE_BYTES)
            if not is_data and run == _PAGE_BYTES:
                continue
            page, _ = self._raw(number)
            bitmaps = slice((self._ratio - first) % (self._ratio + 1), None, self._ratio + 1)
            yield MIB, [entry >> _MIB_BITS for entry in page[bitmaps] if entry & STATE_MASK == _FULL]
            del page[bitmaps]
            yield self._layout.block_size, [entry >> _MIB_BITS for entry in page if entry & STATE_MASK >= _FULL]

    # Changing; under the image's allocating lock

    def set(self, index: int, entry: int) -> None:
        """Change an entry in memory; take() collects what is to be written."""
        page = self._load(index >> PAGE_BITS)
        with self._loading:
            self._waiting[index] = entry
            page = self.pages.get(index >> PAGE_BITS, page)
            page[index & PAGE_MASK] = entry

    @property
    def waiting(self) -> int:
        """How many changed entries wait to be written."""
        return len(self._waiting)

    def take(self) -> tuple[dict[int, int], dict[int, int]]:
        """The entries to write now, those of sector bitmap blocks apart from those of payload blocks."""
        with self._loading:
            self._in_flight, self._waiting = self._waiting, {}
            bitmaps = {
                index: entry for index, entry in self._in_flight.items() if index % (self._ratio + 1) == self._ratio
            }
            payload = {index: entry for index, entry in self._in_flight.items() if index not in bitmaps}
        return bitmaps, payload

    def settle(self, *, failed: bool) -> None:
        """What take() handed out is on stable storage, or has failed and must be written again."""
        with self._loading:
            if failed:
                self._waiting = self._in_flight | self._waiting
            self._in_flight = {}

    def write(self, entries: dict[int, int]) -> None:
        """Write entries, neighbours together."""
        assert isinstance(self._file, HostFile)
        for index, row in rows_of(entries, 8, "little"):
            self._file.write(self._layout.table_offset + 8 * index, row)
