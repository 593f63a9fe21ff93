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
        recent: the recent generation, for hot paths to look into (and nothing else); it is replaced now and then.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.recent: dict[int, Table] = {}
        self._older: dict[int, Table] = {}
        self._pinned: set[int] = set()
        self._lock = threading.Lock()
        self._loading = tuple(threading.Lock() for _ in range(_LOADERS))

    def get(self, key: int) -> Table | None:
        """The table if it is in memory; never blocks on a disk."""
        table = self.recent.get(key)
        return self._look_again(key) if table is None and key in self._older else table

    def get_or_load(self, key: int, load: Callable[[int], Table]) -> Table:
        """The table, read with load() if it is not in memory; what load() raises is passed on."""
        table = self.get(key)
        if table is not None:
            return table
        with self._loading[key % _LOADERS]:
            table = self._look_again(key)  # somebody may have loaded it, or get() looked while the generations changed
            if table is None:
                table = load(key)
                with self._lock:
                    self._remember(key, table)
        return table

    def _look_again(self, key: int) -> Table | None:
        """get() with the lock held, so that no table is overlooked."""
        with self._lock:
            table = self.recent.get(key)
            if table is None:
                table = self._older.get(key)
                if table is not None:
                    self._remember(key, table)
            return table

    def pin(self, key: int, load: Callable[[int], Table]) -> Table:
        """Like get_or_load(), and keep the table in memory from now on."""
        with self._lock:
            was_pinned = key in self._pinned
            self._pinned.add(key)
        try:
            return self.get_or_load(key, load)
        except BaseException:
            if not was_pinned:
                self.unpin(key)
            raise

    def unpin(self, key: int) -> None:
        """The table equals what is on the disk again, and may be dropped."""
        with self._lock:
            self._pinned.discard(key)

    def _remember(self, key: int, table: Table) -> None:
        if len(self.recent) >= max(1, self.capacity // 2) and key not in self.recent:
            kept = {old: self._older[old] for old in self._pinned if old in self._older}
            self._older, self.recent = self.recent, kept
        self.recent[key] = table
        self._older.pop(key, None)
