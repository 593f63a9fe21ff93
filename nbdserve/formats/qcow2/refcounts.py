"""Who uses which host cluster (QEMU, docs/interop/qcow2, "Host cluster management").

The rules this file keeps, so that the order in writeback.py is enough to survive a crash:

- A refcount in memory is never below the number of references on the disk. It is raised when a cluster is allocated or
  shared, and lowered only by release(), which is called once nothing on the disk refers to the cluster and nobody looks
  at it. So a block of refcounts may be written at any time.
- A new block of refcounts lies in the first cluster that it describes, and a table that grows behind the new blocks
  that describe it, so that no block which is on the disk has to change before they are linked.

Which cluster to take is the business of allocation.py. All methods are called under the image's allocation lock.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

from nbdserve.block.tables import TableCache
from nbdserve.formats.qcow2.entries import ENTRY_SIZE, table_bytes
from nbdserve.formats.qcow2.header import MAXIMUM_REFCOUNT_TABLE, REFCOUNT_TABLE_FIELDS
from nbdserve.formats.qcow2.packing import empty_block, pack_block, unpack_block
from nbdserve.formats.qcow2.space import HostSpace, damaged

_CACHE = 8 << 20  # bytes of refcount blocks in memory, besides changed ones

Row = tuple[int, int]
"""Host clusters in a row: the first and how many."""

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
        per_block: refcounts in a block.
        maximum: the highest refcount.
    """

    def __init__(self, space: HostSpace, width: int, table: array[int], table_offset: int) -> None:
        self._space = space
        self._bits = space.geometry.cluster_bits
        self._width = width
        self.per_block = space.geometry.cluster_size * 8 // width
        self.maximum = (1 << width) - 1
        self._table = table
        self._table_offset = table_offset
        self.capacity = max(4, _CACHE // (self.per_block * max(8, width) // 8))
        self._blocks: TableCache[array[int]] = TableCache(self.capacity)
        self._changes = RefcountChanges()
        self._outgrown: list[Row] = []

    # Blocks

    def block(self, index: int) -> array[int] | None:
        """The block with this number; None where there is none, which means refcounts of 0."""
        if index >= len(self._table) or not self._table[index]:
            return None
        return self._blocks.get_or_load(index, self._load)

    def is_at_hand(self, index: int) -> bool:
        """Whether block() needs no look at the disk."""
        return self._blocks.get(index) is not None

    def _load(self, index: int) -> array[int]:
        content = self._space.file.read(self._table[index], self._space.geometry.cluster_size)
        return unpack_block(self._width, content)

    def _changed(self, index: int, low: int, high: int) -> array[int]:
        """A block of which entries low to high are about to be changed."""
        if index not in self._changes.spans:
            self._blocks.pin(index, self._load)
        self._changes.touch(index, low, high)
        return self._blocks.pinned[index]

    def parts(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """A row of clusters as block numbers and entries from, to."""
        end = first + count
        while first < end:
            index, low = divmod(first, self.per_block)
            high = min(self.per_block, low + end - first)
            yield index, low, high
            first += high - low

    def zeros(self, first: int, most: int) -> int:
        """How many clusters in a row from `first` on have a refcount of 0, within its block and `most`."""
        index, low = divmod(first, self.per_block)
        block = self.block(index)
        if block is None:
            return 0
        most = min(most, self.per_block - low)
        if block[low : low + most] == array(block.typecode, bytes(block.itemsize * most)):
            return most
        count = 0
        while count < most and not block[low + count]:
            count += 1
        return count

    def refcount(self, cluster: int) -> int:
        """The refcount of a cluster."""
        index, position = divmod(cluster, self.per_block)
        block = self.block(index)
        return 0 if block is None else block[position]

    # Changing refcounts

    def take(self, first: int, count: int) -> None:
        """Clusters with refcounts of 0, all of one block, are in use from now on."""
        index, low = divmod(first, self.per_block)
        block = self._changed(index, low, low + count)
        block[low : low + count] = array(block.typecode, (1,)) * count

    def share(self, first: int, count: int) -> None:
        """Clusters have one more reference.

        Raises:
            OSError: EOVERFLOW, refcounts of this width cannot hold that; EIO, a cluster was not in use.
        """
        for index, low, high in self.parts(first, count):
            block = self.block(index)
            if block is None or not all(block[low:high]):
                raise damaged(self._space.file.name, f"host cluster {first} is used, but its refcount is 0")
            if max(block[low:high]) >= self.maximum:
                raise OSError(
                    errno.EOVERFLOW,
                    f"a cluster would have more references than its refcount of {self._width} bits can count",
                    self._space.file.name,
                )
            block = self._changed(index, low, high)
            for position in range(low, high):
                block[position] += 1

    def release(self, first: int, count: int) -> list[Row]:
        """Lower the refcounts of clusters by one; return those that are free now, each row within one block."""
        freed: list[Row] = []
        for index, low, high in self.parts(first, count):
            block = self.block(index)
            if block is not None:
                freed += self._release_part(index, block, low, high)
        return freed

    def _release_part(self, index: int, block: array[int], low: int, high: int) -> list[Row]:
        base = index * self.per_block
        ones = array(block.typecode, (1,)) * (high - low)
        if block[low:high] == ones and not self._space.holds_table(base + low, high - low):
            self._changed(index, low, high)[low:high] = array(block.typecode, bytes(block.itemsize * (high - low)))
            return [(base + low, high - low)]
        freed: list[Row] = []
        block = self._changed(index, low, high)
        for position in range(low, high):
            # A table that is shared loses a sharer like any cluster, but only who owns it may give it up.
            if block[position] > 1 or (block[position] and not self._space.holds_table(base + position)):
                block[position] -= 1
                if not block[position]:
                    append_row(freed, base + position, 1)
        return freed

    # New blocks

    def add_block(self, index: int) -> None:
        """Make the block with this number, which there was not; it lies in the first cluster it describes."""
        if index >= len(self._table):
            self._grow_table(index)
            return
        self._make_room(index * self.per_block, 1)
        self._link_block(index, index * self.per_block, used=1)

    def _make_room(self, first: int, count: int) -> None:
        if self._space.holds_table(first, count):
            raise damaged(self._space.file.name, f"host cluster {first} holds a table but has no refcount")
        self._space.reach(first + count << self._bits)

    def _link_block(self, index: int, cluster: int, used: int) -> None:
        """Put an empty block with `used` clusters taken at its beginning into a cluster."""
        block = empty_block(self._width, self.per_block)
        block[:used] = array(block.typecode, (1,)) * used
        self._blocks.pin(index, lambda _: block)
        self._changes.touch(index, 0, self.per_block)
        self._table[index] = cluster << self._bits
        self._changes.entries.add(index)
        self._space.add_table(cluster, 1)

    def add_row(self, index: int, count: int) -> int:
        """Take `count` clusters in a row that no block describes yet, behind the new blocks that describe them.

        Args:
            index: the first block that is to be new.
        """
        while index < len(self._table) and self._table[index]:
            index += 1
        blocks = -(-count // (self.per_block - 1))
        while index + blocks > len(self._table):
            index = self._grow_table(index)
        first = index * self.per_block
        self._make_room(first, blocks + count)
        self._link_blocks(index, blocks, count)
        return first + blocks

    def _link_blocks(self, index: int, blocks: int, count: int) -> None:
        """New blocks, the first things they describe, and `count` clusters in use behind them."""
        for number in range(blocks):
            used = min(self.per_block, blocks + count - number * self.per_block)
            self._link_block(index + number, index * self.per_block + number, used)

    def _grow_table(self, index: int) -> int:
        """Move the table to where the first block that it has no room for belongs, behind that and the blocks it needs.

        All clusters from there on are free, because no block describes them. Returns the block to come next.
        """
        start = index * self.per_block
        blocks, clusters = self._room_for_table(index)
        self._make_room(start, blocks + clusters)
        grown = array("Q", bytes(clusters << self._bits))
        grown[: len(self._table)] = self._table
        old = self._table_offset >> self._bits, (len(self._table) * ENTRY_SIZE) >> self._bits
        self._table, self._table_offset = grown, start + blocks << self._bits
        self._link_blocks(index, blocks, clusters)
        self._space.add_table(start + blocks, clusters)
        self._space.remove_table(*old)
        self._outgrown.append(old)
        self._changes.moved = True
        return index + blocks

    def _room_for_table(self, index: int) -> tuple[int, int]:
        """How many blocks describe a larger table and themselves, and how many clusters that table has."""
        cluster_size = self._space.geometry.cluster_size
        blocks = 1
        while True:
            entries = max(index + blocks + 1, len(self._table) * 3 // 2)
            entries = max(min(entries, MAXIMUM_REFCOUNT_TABLE // ENTRY_SIZE), index + blocks)
            clusters = -(-entries * ENTRY_SIZE // cluster_size)
            if clusters * cluster_size > MAXIMUM_REFCOUNT_TABLE:
                raise OSError(
                    errno.EFBIG, "the refcount table cannot grow further; use larger clusters", self._space.file.name
                )
            needed = -(-(blocks + clusters) // self.per_block)
            if needed <= blocks:
                return blocks, clusters
            blocks = needed

    # Writing back, see writeback.py

    @property
    def changed_blocks(self) -> int:
        """How many blocks differ from the disk."""
        return len(self._changes.spans)

    def take_outgrown(self) -> list[Row]:
        """Clusters of refcount tables to which nothing leads once all changes are on the disk."""
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
        per_byte = max(1, 8 // self._width)
        low, high = low // per_byte * per_byte, -(-high // per_byte) * per_byte
        return self._table[index] + low * self._width // 8, pack_block(
            self._width, self._blocks.pinned[index][low:high]
        )

    def links(self, changes: RefcountChanges) -> list[Write]:
        """What makes the new blocks, or the moved table, known."""
        if changes.moved:
            clusters = len(self._table) * ENTRY_SIZE >> self._bits
            return [(REFCOUNT_TABLE_FIELDS, self._table_offset.to_bytes(8, "big") + clusters.to_bytes(4, "big"))]
        return [
            (self._table_offset + index * ENTRY_SIZE, self._table[index].to_bytes(ENTRY_SIZE, "big"))
            for index in sorted(changes.entries)
        ]


def append_row(rows: list[Row], first: int, count: int) -> None:
    """Add clusters to a list of rows, to the last row where they continue it."""
    if rows and sum(rows[-1]) == first:
        rows[-1] = (rows[-1][0], rows[-1][1] + count)
    else:
        rows.append((first, count))
