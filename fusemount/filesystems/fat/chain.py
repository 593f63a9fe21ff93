"""The clusters of one file, in order, learned from the allocation table as far as somebody asked.

A chain that runs in a circle, or leads to a cluster that is free, bad or does not exist, is EIO where it does so; what
lies before can be read.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Iterator

from fusemount.filesystems.base import error
from fusemount.filesystems.fat.table import Run, Table

_CIRCLE = 1  # leads nowhere


class Chain:
    """The chain that begins with cluster `first`; 0 for a file without any."""

    __slots__ = ("_clusters", "_lap", "_length", "_next", "_starts", "_steps", "_table", "_tortoise")

    def __init__(self, table: Table, first: int) -> None:
        self._table = table
        self._starts: list[int] = []  # which cluster of the file each run begins with
        self._clusters: list[int] = []  # and where that lies
        self._length = 0
        self._next = first or table.end_of_chain
        # Brent's way to notice a circle: a tortoise waits while the hare makes ever longer laps.
        self._tortoise, self._steps, self._lap = first, 0, 1

    @property
    def first(self) -> int:
        """The first cluster; 0 for none. Some of the chain must have been learned, or it is empty."""
        return self._clusters[0] if self._clusters else 0

    @property
    def last(self) -> int:
        """The last cluster of a chain that has been learned as a whole; 0 for none."""
        return self._clusters[-1] + self._length - self._starts[-1] - 1 if self._clusters else 0

    def learn(self, count: int | None = None) -> int:
        """Learn the chain up to `count` clusters (None: all). Returns how many are known now. Raises EIO."""
        table = self._table
        while (count is None or self._length < count) and not table.is_end(self._next):
            if not table.is_cluster(self._next):
                raise error(errno.EIO)
            size, following = table.run_from(self._next)
            if following == self._tortoise:
                following = _CIRCLE
            self._steps += 1
            if self._steps == self._lap:
                self._tortoise, self._steps, self._lap = following, 0, self._lap * 2
            self._append(self._next, size)
            self._next = following
        return self._length

    def _append(self, first: int, count: int) -> None:
        if not self._clusters or self.last + 1 != first:
            self._starts.append(self._length)
            self._clusters.append(first)
        self._length += count

    def extend(self, runs: list[Run]) -> None:
        """Add clusters at the end, which has been reached."""
        for first, count in runs:
            self._append(first, count)
        self._next = self._table.end_of_chain

    def cut(self, count: int) -> list[Run]:
        """Keep the first `count` clusters of a chain that has been learned as a whole; returns the others."""
        cut_off = list(self.runs(count, self._length - count)) if count < self._length else []
        while self._starts and self._starts[-1] >= count:
            self._starts.pop()
            self._clusters.pop()
        self._length = min(self._length, count)
        return cut_off

    def runs(self, index: int, count: int) -> Iterator[Run]:
        """Where `count` clusters of the file lie, from its cluster `index` on. Raises EIO if there are fewer."""
        if self.learn(index + count) < index + count:
            raise error(errno.EIO)
        place = bisect_right(self._starts, index) - 1
        while count:
            end = self._starts[place + 1] if place + 1 < len(self._starts) else self._length
            size = min(count, end - index)
            yield self._clusters[place] + index - self._starts[place], size
            index += size
            count -= size
            place += 1
