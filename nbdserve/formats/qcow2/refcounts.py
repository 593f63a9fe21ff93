"""Who uses which host cluster, and the allocation of clusters ("Host cluster management").

The rules this file keeps, so that the order in writeback.py is enough to survive a crash:

- A refcount in memory is never below the number of references on the disk. It is raised when a cluster is allocated,
  and lowered only by release(), which is called once nothing on the disk refers to the cluster and nobody looks at it.
  So a block of refcounts may be written at any time.
- A cluster with a refcount of 0 may be handed out at once: what was released in this session has been punched out.
- No cluster below `next_free` is free.

All methods are called under the image's allocation lock.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

from nbdserve.block.tables import TableCache
from nbdserve.formats.qcow2.entries import ENTRY_SIZE, table_bytes
from nbdserve.formats.qcow2.packing import empty_block, pack_block, unpack_block
from nbdserve.formats.qcow2.space import HostSpace, damaged

MAXIMUM_TABLE = 8 << 20  # bytes, as in QEMU
_CACHE = 8 << 20  # bytes of refcount blocks in memory, besides changed ones
_HEADER_FIELD = 48  # where the header says where the refcount table lies and how many clusters it has

Write = tuple[int, bytes]
"""A host offset and what belongs there."""


@dataclass(slots=True)
class RefcountChanges:
    """What has changed since the last time: block numbers with the entries concerned, and table entries."""

    spans: dict[int, tuple[int, int]] = field(default_factory=dict)
    entries: set[int] = field(default_factory=set)
    moved: bool = False

    def add(self, other: RefcountChanges) -> None:
        """Take up what another set says."""
        for index, (low, high) in other.spans.items():
            self.touch(index, low, high)
        self.entries |= other.entries
        self.moved |= other.moved

    def touch(self, index: int, low: int, high: int) -> None:
        """Entries low to high of a block have changed."""
        before = self.spans.get(index)
        self.spans[index] = (low, high) if before is None else (min(low, before[0]), max(high, before[1]))


class Refcounts:
    """The refcounts of an image that is being written.

    Args:
        width: bits of a refcount, a power of two up to 64.
        table, table_offset: the refcount table, its entries checked, and where it lies in bytes.

    Attributes:
        capacity: how many blocks are kept in memory, besides changed ones.
        next_free: no cluster before this one is free.
    """

    def __init__(self, space: HostSpace, width: int, table: array[int], table_offset: int) -> None:
        self._space = space
        self._bits = space.geometry.cluster_bits
        self._width = width
        self._per_block = space.geometry.cluster_size * 8 // width
        self._table = table
        self._table_offset = table_offset
        self.capacity = max(8, _CACHE >> self._bits)
        self._blocks: TableCache[array[int]] = TableCache(self.capacity)
        self._changes = RefcountChanges()
        self.next_free = 0
        self._outgrown: list[tuple[int, int]] = []

    # Allocation

    def allocate(self, wanted: int) -> tuple[int, int]:
        """Take the first free clusters in a row, `wanted` at most; return the first and how many."""
        while True:
            index, position = divmod(self.next_free, self._per_block)
            block = self._block(index)
            if block is None:
                self._add_block(index)
                continue
            try:
                position = block.index(0, position)
            except ValueError:
                self.next_free = (index + 1) * self._per_block
                continue
            return self._take(index, block, position, wanted)

    def _take(self, index: int, block: array[int], position: int, wanted: int) -> tuple[int, int]:
        stop = position + 1
        limit = min(position + wanted, self._per_block)
        while stop < limit and not block[stop]:
            stop += 1
        first, count = index * self._per_block + position, stop - position
        self._make_room(first, count)
        block[position:stop] = array(block.typecode, (1,)) * count
        self._touch(index, position, stop)
        self.next_free = first + count
        return first, count

    def _make_room(self, first: int, count: int) -> None:
        if first << self._bits < self._space.fresh_from and self._space.holds_table(first, count):
            raise damaged(self._space.file.name, f"host cluster {first} holds a table but has no refcount")
        self._space.reach(first + count << self._bits)

    def is_ready(self, wanted: int) -> bool:
        """Whether allocate() can hand out this many clusters in a row without a look at the disk, never used before."""
        index, position = divmod(self.next_free, self._per_block)
        if self.next_free << self._bits < self._space.fresh_from or position + wanted > self._per_block:
            return False
        return self._blocks.get(index) is not None

    @property
    def changed_blocks(self) -> int:
        """How many blocks differ from the disk."""
        return len(self._changes.spans)

    # Release

    def release(self, first: int, count: int) -> list[tuple[int, int]]:
        """Lower the refcounts of clusters by one; return those that are free now, as rows (first, count).

        They may be handed out from now on, unless hold() follows.
        """
        freed: list[tuple[int, int]] = []
        for index, low, high in self._parts(first, count):
            block = self._block(index)
            if block is not None:
                self._release_part(index, block, low, high, freed)
        return freed

    def _release_part(self, index: int, block: array[int], low: int, high: int, freed: list[tuple[int, int]]) -> None:
        base = index * self._per_block
        if block[low:high] == array(block.typecode, (1,)) * (high - low) and not self._space.holds_table(
            base + low, high - low
        ):
            block[low:high] = array(block.typecode, (0,)) * (high - low)
            _append_row(freed, base + low, high - low)
        else:
            for position in range(low, high):
                if block[position] and not self._space.holds_table(base + position):
                    block[position] -= 1
                    if not block[position]:
                        _append_row(freed, base + position, 1)
        self._touch(index, low, high)
        if freed:
            self.next_free = min(self.next_free, freed[0][0])

    def hold(self, first: int, count: int) -> None:
        """Take back what release() has freed; next_free may stay too low."""
        for index, low, high in self._parts(first, count):
            block = self._block(index)
            assert block is not None
            block[low:high] = array(block.typecode, (1,)) * (high - low)

    def _parts(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """A row of clusters as block numbers and entries."""
        end = first + count
        while first < end:
            index, low = divmod(first, self._per_block)
            high = min(self._per_block, low + end - first)
            yield index, low, high
            first += high - low

    # Blocks

    def _block(self, index: int) -> array[int] | None:
        """The block with this number; None where there is none, which means refcounts of 0."""
        if index >= len(self._table) or not self._table[index]:
            return None
        return self._blocks.get_or_load(index, self._load)

    def _load(self, index: int) -> array[int]:
        content = self._space.file.read(self._table[index], self._space.geometry.cluster_size)
        return unpack_block(self._width, content)

    def _touch(self, index: int, low: int, high: int) -> None:
        if index not in self._changes.spans:
            self._blocks.pin(index, self._load)
        self._changes.touch(index, low, high)

    def _add_block(self, index: int) -> None:
        """Make a block whose refcounts were all 0; it lies in the first cluster it describes."""
        if index >= len(self._table):
            self._grow_table(index)
            return
        self._make_room(index * self._per_block, 1)
        self._link_block(index, index * self._per_block, used=1)

    def _link_block(self, index: int, cluster: int, used: int) -> None:
        """Put an empty block with `used` clusters taken at its beginning into a cluster."""
        block = empty_block(self._width, self._per_block)
        block[:used] = array(block.typecode, (1,)) * used
        self._blocks.pin(index, lambda _: block)
        self._changes.touch(index, 0, self._per_block)
        self._table[index] = cluster << self._bits
        self._changes.entries.add(index)
        self._space.add_table(cluster, 1)

    def _grow_table(self, index: int) -> None:
        """Move the table to where the first block that it has no room for belongs, behind that and the blocks it needs.

        All clusters from there on are free, because no block describes them.
        """
        start = index * self._per_block
        blocks, clusters = self._room_for_table(index)
        self._make_room(start, blocks + clusters)
        grown = array("Q", bytes(clusters << self._bits))
        grown[: len(self._table)] = self._table
        old = self._table_offset >> self._bits, (len(self._table) * ENTRY_SIZE) >> self._bits
        self._table, self._table_offset = grown, start + blocks << self._bits
        for number in range(blocks):
            used = min(self._per_block, blocks + clusters - number * self._per_block)
            self._link_block(index + number, start + number, used)
        self._space.add_table(start + blocks, clusters)
        self._space.remove_table(*old)
        self._outgrown.append(old)
        self._changes.moved = True

    def _room_for_table(self, index: int) -> tuple[int, int]:
        """How many blocks describe a larger table and themselves, and how many clusters that table has."""
        cluster_size = self._space.geometry.cluster_size
        blocks = 1
        while True:
            entries = max(index + blocks + 1, len(self._table) * 3 // 2)
            entries = max(min(entries, MAXIMUM_TABLE // ENTRY_SIZE), index + blocks)
            clusters = -(-entries * ENTRY_SIZE // cluster_size)
            if clusters * cluster_size > MAXIMUM_TABLE:
                raise OSError(
                    errno.EFBIG, "the refcount table cannot grow further; use larger clusters", self._space.file.name
                )
            needed = -(-(blocks + clusters) // self._per_block)
            if needed <= blocks:
                return blocks, clusters
            blocks = needed

    # Writing back, see writeback.py

    def take_outgrown(self) -> list[tuple[int, int]]:
        """Clusters (first, count) of refcount tables to which nothing leads once all changes are on the disk."""
        outgrown, self._outgrown = self._outgrown, []
        return outgrown

    def take_changes(self) -> RefcountChanges:
        """What has changed since the last call; from now on the caller's to write, or to give back."""
        changes, self._changes = self._changes, RefcountChanges()
        return changes

    def give_back(self, changes: RefcountChanges) -> None:
        """Changes did not reach the disk."""
        self._changes.add(changes)

    def settle(self, changes: RefcountChanges) -> None:
        """Changes are on the disk: their blocks need no longer be kept."""
        for index in changes.spans.keys() - self._changes.spans.keys():
            self._blocks.unpin(index)

    def contents(self, changes: RefcountChanges) -> list[Write]:
        """The blocks to write, and the table if it has moved: nothing on the disk points to what is new of these."""
        writes = [self._block_content(index, *span) for index, span in changes.spans.items()]
        if changes.moved:
            writes.append((self._table_offset, table_bytes(self._table)))
        return writes

    def _block_content(self, index: int, low: int, high: int) -> Write:
        block = self._blocks.get(index)
        assert block is not None
        if self._width < 8:
            low, high = 0, self._per_block
        return self._table[index] + low * self._width // 8, pack_block(self._width, block[low:high])

    def links(self, changes: RefcountChanges) -> list[Write]:
        """What makes the new blocks, or the moved table, known."""
        if changes.moved:
            clusters = len(self._table) * ENTRY_SIZE >> self._bits
            return [(_HEADER_FIELD, self._table_offset.to_bytes(8, "big") + clusters.to_bytes(4, "big"))]
        return [
            (self._table_offset + index * ENTRY_SIZE, self._table[index].to_bytes(ENTRY_SIZE, "big"))
            for index in sorted(changes.entries)
        ]


def _append_row(rows: list[tuple[int, int]], first: int, count: int) -> None:
    """Add clusters to a list of rows, to the last row where they continue it."""
    if rows and sum(rows[-1]) == first:
        rows[-1] = (rows[-1][0], rows[-1][1] + count)
    else:
        rows.append((first, count))
