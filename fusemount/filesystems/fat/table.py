"""The allocation table: for each cluster the one that follows it in its file (specification, "FAT Data Structure").

The table is kept in pages, loaded when needed. Changes are made in memory and written by flush(): the sectors that
changed, to every copy of the table, the first copy first, because that is the one fsck.vfat believes. Callers flush at
the end of each operation, so nothing is ever evicted that the device does not know.

The upper four bits of a FAT32 entry belong to nobody and are kept as they are.
"""

from __future__ import annotations

import errno
import sys
from array import array
from collections import OrderedDict

from fusemount.filesystems.base import error
from fusemount.filesystems.fat.boot import FIRST_CLUSTER, Geometry
from nbdserve.block import BlockDevice

Run = tuple[int, int]
"""Clusters that lie one behind the other: the first and how many."""

FREE = 0
_SHIFT = {12: 12, 16: 14, 32: 14}  # entries in a page, as a power of two; a FAT12 table is one page
_MOST_PAGES = 256
_VALUE_MASK = 0x0FFFFFFF


class Table:
    """The allocation table of a volume.

    Attributes:
        end_of_chain: what the entry of a file's last cluster holds when we write it.
        hint: where to look for free clusters first.
    """

    def __init__(self, device: BlockDevice, geometry: Geometry) -> None:
        self._device = device
        self._geometry = geometry
        self._bits = geometry.bits
        self._shift = _SHIFT[geometry.bits]
        self._mask = (1 << self._shift) - 1
        self._end = geometry.end_cluster
        self._pages: OrderedDict[int, array[int]] = OrderedDict()
        self._reserved_bits: dict[int, array[int]] = {}
        self._dirty: set[int] = set()  # sectors of the table
        self._free = array("i", [-1]) * ((self._end >> self._shift) + 1)  # free clusters in each page, -1: not known
        self.end_of_chain = (1 << min(self._bits, 28)) - 1
        self._first_end = self.end_of_chain - 7
        self.hint = FIRST_CLUSTER

    # Looking

    def is_end(self, value: int) -> bool:
        """Whether an entry marks a file's last cluster."""
        return value >= self._first_end

    def is_cluster(self, value: int) -> bool:
        """Whether an entry names a cluster that exists."""
        return FIRST_CLUSTER <= value < self._end

    def __getitem__(self, cluster: int) -> int:
        return self._page(cluster >> self._shift)[cluster & self._mask]

    def run_from(self, cluster: int) -> tuple[int, int]:
        """How many clusters follow each other from this one on (within its page), and what the last one's entry is."""
        page = self._page(cluster >> self._shift)
        index = start = cluster & self._mask
        last = len(page) - 1
        expected = cluster + 1
        while index < last and page[index] == expected:
            index += 1
            expected += 1
        return index - start + 1, page[index]

    def free(self) -> int:
        """How many clusters are free."""
        for number, count in enumerate(self._free):
            if count < 0:
                self._page(number)
        return sum(self._free)

    def find_free(self, count: int, near: int) -> list[Run]:
        """Free clusters, from `near` on if that is one, else from the hint on. Takes nothing yet. Raises ENOSPC."""
        start = near if self.is_cluster(near) and self[near] == FREE else self.hint
        start = start if self.is_cluster(start) else FIRST_CLUSTER
        runs: list[Run] = []
        for low, high in ((start, self._end), (FIRST_CLUSTER, start)):
            while count and (run := self._next_free(low, high, count)):
                runs.append(run)
                count -= run[1]
                low = run[0] + run[1]
        if count:
            raise error(errno.ENOSPC)
        return runs

    def _next_free(self, low: int, high: int, most: int) -> Run | None:
        """The first free run in [low, high), cut at `most` clusters and at the end of a page."""
        while low < high:
            number, index = low >> self._shift, low & self._mask
            stop = min(high - (number << self._shift), 1 << self._shift)
            if self._free[number] != 0:
                page = self._page(number)
                try:
                    first = index = page.index(FREE, index, stop)
                except ValueError:
                    pass
                else:
                    stop = min(stop, first + most)
                    while index < stop and page[index] == FREE:
                        index += 1
                    return (number << self._shift) + first, index - first
            low = (number + 1) << self._shift
        return None

    # Changing

    def __setitem__(self, cluster: int, value: int) -> None:
        page = self._page(cluster >> self._shift)
        self._set(cluster, page, array(page.typecode, [value]))

    def link(self, runs: list[Run]) -> None:
        """Make a chain of these runs, in order, that ends with the last."""
        followers = [first for first, _ in runs[1:]] + [self.end_of_chain]
        for (first, count), follower in zip(runs, followers, strict=True):
            self._fill(first, count, follower, chained=True)
        if runs:
            self.hint = runs[-1][0] + runs[-1][1]

    def release(self, runs: list[Run]) -> None:
        """Make clusters free."""
        for first, count in runs:
            self._fill(first, count, FREE, chained=False)

    def _fill(self, first: int, count: int, last: int, *, chained: bool) -> None:
        """Set the entries of a run: each to the next cluster or all to FREE, the last one to `last`."""
        end = first + count
        while first < end:
            page = self._page(first >> self._shift)
            size = min(end - first, (1 << self._shift) - (first & self._mask))
            if chained:
                piece = array(page.typecode, range(first + 1, first + 1 + size))
            else:
                piece = array(page.typecode, [FREE]) * size
            if first + size == end:
                piece[-1] = last
            self._set(first, page, piece)
            first += size

    def _set(self, cluster: int, page: array[int], values: array[int]) -> None:
        number, index = cluster >> self._shift, cluster & self._mask
        if cluster >= FIRST_CLUSTER:
            self._free[number] += values.count(FREE) - page[index : index + len(values)].count(FREE)
        page[index : index + len(values)] = values
        sector_bits = self._geometry.sector_size * 8
        first, last = cluster * self._bits, (cluster + len(values)) * self._bits - 1
        self._dirty.update(range(first // sector_bits, last // sector_bits + 1))

    def flush(self) -> None:
        """Write what changed to the device."""
        if not self._dirty:
            return
        sector = self._geometry.sector_size
        pieces: list[tuple[int, bytearray]] = []  # adjoining sectors are one
        for number in sorted(self._dirty):
            content = self._encoded(number)
            if pieces and pieces[-1][0] + len(pieces[-1][1]) == number * sector:
                pieces[-1][1].extend(content)
            else:
                pieces.append((number * sector, bytearray(content)))
        for table in self._geometry.table_offsets:
            for offset, piece in pieces:
                self._device.write(table + offset, piece)
        self._dirty.clear()

    # Pages

    def _page(self, number: int) -> array[int]:
        page = self._pages.get(number)
        if page is None:
            page = self._load(number)
        return page

    def _load(self, number: int) -> array[int]:
        page_size = (self._bits << self._shift) // 8
        offset = number * page_size
        size = min(page_size, self._geometry.table_size - offset)
        raw = self._device.read(self._geometry.table_offsets[0] + offset, size)
        page = _decoded_12(raw) if self._bits == 12 else _decoded(raw, "H" if self._bits == 16 else "I")
        if self._bits == 32 and max(page) > _VALUE_MASK:
            self._reserved_bits[number] = array("I", [value & ~_VALUE_MASK for value in page])
            page = array("I", [value & _VALUE_MASK for value in page])
        if self._free[number] < 0:
            first = number << self._shift
            usable = page[max(0, FIRST_CLUSTER - first) : max(0, self._end - first)]
            self._free[number] = usable.count(FREE)
        if len(self._pages) >= _MOST_PAGES and not self._dirty:
            oldest, _ = self._pages.popitem(last=False)
            self._reserved_bits.pop(oldest, None)
        self._pages[number] = page
        return page

    def _encoded(self, sector: int) -> bytes:
        """A sector of the table, as it has to be on the device."""
        size = self._geometry.sector_size
        if self._bits == 12:
            # Two entries lie in three bytes, so the sector's bytes begin within a pair.
            first = sector * size // 3 * 2
            stop = -(-(sector + 1) * size // 3) * 2
            inside = sector * size - first // 2 * 3
            return _encoded_12(self._page(0)[first:stop])[inside : inside + size]
        per_sector = size * 8 // self._bits
        number, start = sector * per_sector >> self._shift, sector * per_sector & self._mask
        values = self._page(number)[start : start + per_sector]
        if number in self._reserved_bits:
            upper = self._reserved_bits[number][start : start + per_sector]
            values = array("I", [value | kept for value, kept in zip(values, upper, strict=True)])
        if sys.byteorder == "big":
            values.byteswap()
        return values.tobytes()


def _decoded(raw: bytearray, typecode: str) -> array[int]:
    values = array(typecode)
    values.frombytes(raw)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def _decoded_12(raw: bytearray) -> array[int]:
    """Two entries lie in three bytes: abc, def -> bc fa de. A last incomplete pair is filled up with zeros."""
    raw += bytes(-len(raw) % 3)
    values = array("H")
    for low, middle, high in zip(raw[::3], raw[1::3], raw[2::3], strict=True):
        values.append(low | (middle & 0x0F) << 8)
        values.append(middle >> 4 | high << 4)
    return values


def _encoded_12(values: array[int]) -> bytes:
    raw = bytearray()
    for even, odd in zip(values[::2], values[1::2], strict=True):
        raw += bytes((even & 0xFF, even >> 8 | (odd & 0x0F) << 4, odd >> 4))
    return bytes(raw)
