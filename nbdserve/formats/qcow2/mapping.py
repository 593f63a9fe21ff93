"""L1 and L2 tables: which entry belongs to a guest cluster, and which tables have been changed in memory.

The rule this file keeps: *what is shared is copied.* An L2 table whose L1 entry lacks COPIED belongs to an internal
snapshot too; before the first change it gets a place of its own, and the snapshot keeps the old one.

Memory: the L1 table (32 MiB at most), _CACHE bytes of L2 tables, and the changed ones, of which there are at most a
quarter as many before they are written back.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from nbdserve.block.tables import TableCache
from nbdserve.formats.qcow2.allocation import Allocator
from nbdserve.formats.qcow2.entries import COPIED, ENTRY_SIZE, read_table, table_bytes
from nbdserve.formats.qcow2.refcounts import Write
from nbdserve.formats.qcow2.space import HostSpace, damaged

_CACHE = 32 << 20  # bytes of L2 tables in memory, besides changed ones

Free = Callable[[int, int], None]
"""Told of host clusters (first, count) that the tables refer to no more."""


@dataclass(slots=True)
class MappingChanges:
    """What has changed since the last time: L2 tables with the words concerned, and L1 entries."""

    spans: dict[int, tuple[int, int]] = field(default_factory=dict)
    l1: set[int] = field(default_factory=set)

    def add(self, other: MappingChanges) -> None:
        """Take up what another set says."""
        for key, (low, high) in other.spans.items():
            self.touch(key, low, high)
        self.l1 |= other.l1

    def touch(self, key: int, low: int, high: int) -> None:
        """Words low to high of a table have changed."""
        before = self.spans.get(key)
        self.spans[key] = (low, high) if before is None else (min(low, before[0]), max(high, before[1]))


class Mapping:
    """The tables of one L1 table.

    Attributes:
        tables: the L2 tables in memory, by L1 index.
        l1: the L1 table.
        l1_offset: where it lies, in bytes.
    """

    def __init__(self, space: HostSpace, l1: array[int], l1_offset: int, *, writable: bool) -> None:
        self._space = space
        self._words = space.geometry.table_words
        self.l1 = l1
        self.l1_offset = l1_offset
        self._writable = writable
        self._l1_reserved = (1 << 63) - 1 & ~space.geometry.offset_mask
        self.capacity = max(8, _CACHE // space.geometry.cluster_size)
        self.tables: TableCache[array[int]] = TableCache(self.capacity)
        self._changes = MappingChanges()

    # Reading

    def table(self, key: int) -> array[int] | None:
        """The L2 table with this number, from the disk if need be; None where there is none.

        Raises:
            OSError: EIO, its L1 entry is damaged or, when writing, the table itself.
        """
        return self.tables.get_or_load(key, self._load) if self.l1[key] else None

    def is_in_memory(self, key: int) -> bool:
        """Whether table() needs no look at the disk."""
        return not self.l1[key] or self.tables.get(key) is not None

    def absent_run(self, key: int, limit: int) -> int:
        """How many L2 tables in a row, from this one up to `limit`, do not exist."""
        stop = key
        while stop < limit and not self.l1[stop]:
            stop += 1
        return stop - key

    def _load(self, key: int) -> array[int]:
        entry = self.l1[key]
        if not entry:
            return array("Q", bytes(self._words * ENTRY_SIZE))
        return self.read(entry, f"L1 entry {key}")

    def read(self, entry: int, what: str) -> array[int]:
        """Read the L2 table that an L1 entry leads to.

        Raises:
            OSError: EIO, the entry or, when writing, the table is damaged.
        """
        geometry = self._space.geometry
        offset = entry & geometry.offset_mask
        if entry & self._l1_reserved or not 0 < offset < self._space.end:
            raise damaged(self._space.file.name, f"{what} is {entry:#x}, which leads nowhere")
        table = read_table(self._space.file, offset, self._words)
        if self._writable and not geometry.is_external and self._space.leads_to_table(table[:: geometry.words]):
            raise damaged(self._space.file.name, f"the L2 table at {offset} lets the guest write to tables")
        return table

    # Changing; under the image's allocation lock

    def table_for_change(self, key: int, allocator: Allocator, free: Free) -> array[int]:
        """The L2 table with this number, in a place of its own, ready for touch(); made if there is none."""
        if key not in self._changes.spans:
            self.tables.pin(key, self._load)
            self._changes.spans[key] = (self._words, 0)
        if not self.l1[key] & COPIED:
            self._move_table(key, allocator, free)
        return self.tables.pinned[key]

    def changed_table(self, key: int) -> array[int] | None:
        """The L2 table with this number, if it is ready for touch() because it differs from the disk already."""
        return self.tables.pinned[key] if key in self._changes.spans and self.l1[key] & COPIED else None

    def _move_table(self, key: int, allocator: Allocator, free: Free) -> None:
        cluster, _, _ = allocator.allocate(1)
        self._space.add_table(cluster, 1)
        bits = self._space.geometry.cluster_bits
        old = self.l1[key] & self._space.geometry.offset_mask
        self.l1[key] = cluster << bits | COPIED
        self._changes.l1.add(key)
        self._changes.touch(key, 0, self._words)
        if old:
            free(old >> bits, 1)

    def touch(self, key: int, low: int, high: int) -> None:
        """Words low to high of a table from table_for_change() have been changed."""
        self._changes.touch(key, low, high)

    def drop_table(self, key: int, free: Free) -> None:
        """An L2 table whose entries are all 0 is needed no more."""
        entry, self.l1[key] = self.l1[key], 0
        self._changes.spans.pop(key, None)
        self._changes.l1.add(key)
        self.tables.forget(key)
        if entry & COPIED:
            self._space.remove_table((entry & self._space.geometry.offset_mask) >> self._space.geometry.cluster_bits, 1)
        free((entry & self._space.geometry.offset_mask) >> self._space.geometry.cluster_bits, 1)

    def replace_l1(self, l1: array[int], offset: int) -> None:
        """Another L1 table, which is on the disk already, is the one in use; nothing may be changed in memory."""
        assert not self._changes.spans and not self._changes.l1
        for key in range(min(len(l1), len(self.l1))):
            if l1[key] != self.l1[key]:
                self.tables.forget(key)
        self.l1, self.l1_offset = l1, offset

    @property
    def changed_tables(self) -> int:
        """How many L2 tables differ from the disk."""
        return len(self._changes.spans)

    # Writing back, see writeback.py

    def take_changes(self) -> MappingChanges:
        """What has changed since the last call; from now on the caller's to write, or to give back."""
        changes, self._changes = self._changes, MappingChanges()
        return changes

    def give_back(self, changes: MappingChanges) -> None:
        """Changes did not reach the disk."""
        for key in [key for key in changes.spans if not self.l1[key]]:  # dropped since
            del changes.spans[key]
        self._changes.add(changes)

    def settle(self, changes: MappingChanges) -> None:
        """Changes are on the disk: their tables need no longer be kept."""
        for key in changes.spans.keys() - self._changes.spans.keys():
            self.tables.unpin(key)

    def contents(self, changes: MappingChanges) -> list[Write]:
        """The tables to write that nothing on the disk leads to yet."""
        return [self._table_content(key, *span) for key, span in changes.spans.items() if key in changes.l1]

    def links(self, changes: MappingChanges) -> list[Write]:
        """The other tables to write, and L1 entries: what leads to new tables and to the guest's data."""
        writes = [
            self._table_content(key, low, high)
            for key, (low, high) in changes.spans.items()
            if key not in changes.l1 and low < high
        ]
        writes += [
            (self.l1_offset + key * ENTRY_SIZE, self.l1[key].to_bytes(ENTRY_SIZE, "big")) for key in sorted(changes.l1)
        ]
        return writes

    def _table_content(self, key: int, low: int, high: int) -> Write:
        offset = self.l1[key] & self._space.geometry.offset_mask
        return offset + low * ENTRY_SIZE, table_bytes(self.tables.pinned[key][low:high])
