"""A bounded cache of mapping tables, which readers consult without a lock.

Two generations stand in for the least-recently-used order: a hit in the recent one costs a dictionary lookup and
changes nothing; a hit in the older one moves the table up. When the recent generation is full, it becomes the older one
and what nobody has asked for since the last time is dropped.

The rule this file keeps: *one table, one object.* A table that has been changed, or is about to be, is pinned; a
pinned table is never dropped, so nobody can load the stale version of it from the disk. Loading a key excludes loading
the same key again, so what one thread has read late cannot replace what another has changed since.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Table = TypeVar("Table")

_LOADERS = 16  # tables with different numbers modulo this may be loaded at the same time


class TableCache(Generic[Table]):
    """Tables by number.

    Args:
        capacity: how many tables to keep, besides pinned ones.

    Attributes:
        recent: the recent generation, for hot paths to look into (and nothing else); always the same dictionary.
        pinned: the pinned tables, to be looked at only by whoever pins and unpins.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.recent: dict[int, Table] = {}
        self.pinned: dict[int, Table] = {}
        self._older: dict[int, Table] = {}
        self._lock = threading.Lock()
        self._loading = tuple(threading.Lock() for _ in range(_LOADERS))

    def get(self, key: int) -> Table | None:
        """The table if it is in memory; never blocks on a disk."""
        table = self.recent.get(key)
        return self._look_again(key) if table is None else table

    def get_or_load(self, key: int, load: Callable[[int], Table]) -> Table:
        """The table, read with load() if it is not in memory; what load() raises is passed on."""
        table = self.get(key)
        if table is not None:
            return table
        with self._loading[key % _LOADERS]:
            table = self._look_again(key)  # somebody may have loaded it in the meantime
            if table is None:
                table = load(key)
                with self._lock:
                    self._remember(key, table)
        return table

    def _look_again(self, key: int) -> Table | None:
        with self._lock:
            for generation in (self.recent, self._older, self.pinned):
                table = generation.get(key)
                if table is not None:
                    self._remember(key, table)
                    return table
        return None

    def pin(self, key: int, load: Callable[[int], Table]) -> Table:
        """Like get_or_load(), and keep the table in memory from now on."""
        with self._loading[key % _LOADERS]:
            table = self._look_again(key)
            if table is None:
                table = load(key)
            with self._lock:
                self.pinned[key] = table
                self._remember(key, table)
        return table

    def unpin(self, key: int) -> None:
        """The table equals what is on the disk again, and may be dropped."""
        with self._lock:
            self.pinned.pop(key, None)

    def forget(self, key: int) -> None:
        """There is no such table any more."""
        with self._lock:
            for generation in (self.recent, self._older, self.pinned):
                generation.pop(key, None)

    def _remember(self, key: int, table: Table) -> None:
        if len(self.recent) >= max(1, self.capacity // 2) and key not in self.recent:
            self._older = self.recent.copy()
            self.recent.clear()
        self.recent[key] = table
        self._older.pop(key, None)
