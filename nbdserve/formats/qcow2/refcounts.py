"""Refcounts: which host clusters are in use, and the allocator (QEMU, docs/interop/qcow2, "Host cluster management").

Everything here happens in memory, under the image's allocation lock; the image's flush() brings it to the disk, in the
order told in image.py. A new refcount block always describes itself, and a table that grows lies in clusters that new
blocks describe, so no write to an existing block has to come before they are linked.

Reuse. A cluster that was in use before, or that a crash has left behind, is handed out only after a hole was punched
there: then it reads as zeros, and replies still under way keep the old pages (HostFile.punch_hole). Where the host
cannot punch, or clusters are smaller than a page, space is only ever taken from the end.
"""

from __future__ import annotations

import errno
import sys
from array import array
from dataclasses import dataclass, field
from functools import cache

from nbdserve.block.file import HostFile
from nbdserve.formats.qcow2.entries import build_table, parse_table
from nbdserve.formats.qcow2.header import MAXIMUM_REFCOUNT_TABLE_BYTES, REFCOUNT_TABLE_POINTER, Header

_PAGE = 4096
_CACHED_BYTES = 16 << 20
_TYPECODES = "BBBBHIQ"  # by refcount order; counts of less than a byte are unpacked to one each


@dataclass
class RefcountChanges:
    """What a flush has to write, copied at one moment.

    Attributes:
        content: (offset, bytes) of blocks, and of a table in a new place.
        pointers: (offset, bytes) of table entries, or of the header's pointer to the new table; to be written only
            when `content` is on stable storage.
        blocks, entries, moved: what was dirty, to be marked again if the flush fails.
    """

    content: list[tuple[int, bytes]] = field(default_factory=list)
    pointers: list[tuple[int, bytes]] = field(default_factory=list)
    blocks: set[int] = field(default_factory=set)
    entries: set[int] = field(default_factory=set)
    moved: bool = False


class Refcounts:
    """The refcounts of one image that is open for writing.

    Args:
        metadata: clusters that hold tables; never handed out, whatever their refcount says. Shared with the image.

    Attributes:
        end: bytes; everything in use lies before it.
        outgrown: (first cluster, clusters) of former refcount tables, to be freed once they are no longer linked.
        is_warm: something was allocated already, so the next allocation will hardly need the disk.
    """

    def __init__(self, file: HostFile, header: Header, metadata: set[int]) -> None:
        self._file = file
        self._bits = header.cluster_bits
        self._size = header.cluster_size
        self._order = header.refcount_order
        self._per_block = self._size * 8 >> self._order
        self._metadata = metadata
        self._table_offset = header.refcount_table_offset
        raw = file.read(self._table_offset, header.refcount_table_clusters << self._bits)
        self._table = parse_table(raw)
        self._blocks: dict[int, array[int]] = {}
        self._dirty_blocks: set[int] = set()
        self._dirty_entries: set[int] = set()
        self._moved = False
        self._busy: set[int] = set()
        self.end = -(-file.size // self._size) * self._size
        self._zero_from = self.end >> self._bits  # clusters from here on were never written
        self._append_only = self._size < _PAGE
        self._hint = self._zero_from if self._append_only else 0
        self.is_warm = False
        self.outgrown: list[tuple[int, int]] = []

    def block_offsets(self) -> list[int]:
        """Where the refcount blocks lie, in bytes."""
        return [offset for offset in self._table if offset]

    # Allocating

    def allocate(self, wanted: int) -> tuple[int, int]:
        """Take up to `wanted` clusters in a row, which read as zeros: the first one's number, and how many."""
        cluster = self._hint
        while True:
            index, start = divmod(cluster, self._per_block)
            block = self._block(index)
            if block is None:
                self._add_block(index, cluster)
                continue
            try:
                start = block.index(0, start)
            except ValueError:
                cluster = (index + 1) * self._per_block
                continue
            cluster = index * self._per_block + start
            most = min(wanted, self._per_block - start)
            if cluster < self._zero_from:
                most = min(most, self._zero_from - cluster)
            count = 1
            while count < most and not block[start + count]:
                count += 1
            if any(taken in self._metadata for taken in range(cluster, cluster + count)):
                raise self._damaged(f"cluster {cluster} is counted as free, but holds a table")
            if cluster < self._zero_from and not self._make_reusable(cluster, count):
                cluster = self._hint
                continue
            self._take(index, start, count)
            return cluster, count

    def _take(self, index: int, start: int, count: int) -> None:
        block = self._blocks[index]
        block[start : start + count] = array(block.typecode, [1]) * count
        self._dirty_blocks.add(index)
        after = index * self._per_block + start + count
        self._hint = after
        self._zero_from = max(self._zero_from, after)
        self.end = max(self.end, after << self._bits)
        self.is_warm = True

    def _make_reusable(self, cluster: int, count: int) -> bool:
        """Punch a hole where clusters are to be used again; if the host cannot, take space from the end from now on."""
        if not self._append_only and self._file.punch_hole(cluster << self._bits, count << self._bits):
            return True
        self._append_only = True
        self._hint = self._zero_from
        return False

    def _block(self, index: int) -> array[int] | None:
        """The refcount block, read if need be; None where there is none yet."""
        block = self._blocks.get(index)
        if block is None and index < len(self._table) and self._table[index]:
            offset = self._table[index]
            if offset & (self._size - 1) or offset >= self.end:
                raise self._damaged(f"refcount block {index} at {offset} does not lie inside the file")
            self._evict()
            block = self._blocks[index] = self._parse(self._file.read(offset, self._size))
        return block

    def _evict(self) -> None:
        if len(self._blocks) << self._bits < _CACHED_BYTES:
            return
        for index in list(self._blocks):
            if index not in self._dirty_blocks and index not in self._busy:
                del self._blocks[index]
                return

    def _add_block(self, index: int, cluster: int) -> None:
        """Describe clusters that no block describes yet: a new block, in the first of them that may be taken."""
        if index >= len(self._table):
            self._grow_table(index)
            return
        self._blocks[index] = self._empty_block()
        self._table[index] = cluster << self._bits
        self._metadata.add(cluster)
        self._dirty_entries.add(index)
        self._take(index, cluster - index * self._per_block, 1)

    def _grow_table(self, index: int) -> None:
        """Move the table to the end of the file, twice as large, into clusters of new blocks that hold it as well."""
        per_cluster = self._size // 8
        first = index * self._per_block
        blocks = 1
        while True:
            clusters = -(-max(2 * len(self._table), index + blocks + 1) // per_cluster)
            needed = -(-(blocks + clusters) // self._per_block)
            if needed <= blocks:
                break
            blocks = needed
        if clusters << self._bits > MAXIMUM_REFCOUNT_TABLE_BYTES:
            raise OSError(errno.EFBIG, "the image has reached its largest possible size", self._file.name)
        old = (self._table_offset >> self._bits, len(self._table) // per_cluster)
        self._table.extend(array("Q", bytes(8 * (clusters * per_cluster - len(self._table)))))
        for each in range(blocks):
            self._table[index + each] = (first + each) << self._bits
            self._blocks[index + each] = self._empty_block()
        for taken in range(blocks + clusters):
            self._metadata.add(first + taken)
            self._take(index + taken // self._per_block, taken % self._per_block, 1)
        self._table_offset = (first + blocks) << self._bits
        self._moved = True
        self.outgrown.append(old)

    # Freeing

    def decrement(self, cluster: int) -> None:
        """One reference less; at none the cluster may be handed out again."""
        index, start = divmod(cluster, self._per_block)
        block = self._block(index)
        if block is None or not block[start]:
            return  # the image's counts were wrong before: leave it to qemu-img check
        block[start] -= 1
        self._dirty_blocks.add(index)
        if not block[start]:
            self._metadata.discard(cluster)
            if not self._append_only:
                self._hint = min(self._hint, cluster)

    # Writing back

    def changes(self) -> RefcountChanges:
        """Copy what is dirty, and mark it clean."""
        result = RefcountChanges(blocks=self._dirty_blocks, entries=self._dirty_entries, moved=self._moved)
        result.content = [(self._table[index], self._build(self._blocks[index])) for index in sorted(result.blocks)]
        if self._moved:
            content = build_table(self._table)
            result.content.append((self._table_offset, content))
            pointer = self._table_offset.to_bytes(8, "big") + (len(content) >> self._bits).to_bytes(4, "big")
            result.pointers.append((REFCOUNT_TABLE_POINTER, pointer))
        else:
            result.pointers = [
                (self._table_offset + 8 * index, self._table[index].to_bytes(8, "big"))
                for index in sorted(self._dirty_entries)
            ]
        self._busy = result.blocks
        self._dirty_blocks, self._dirty_entries, self._moved = set(), set(), False
        return result

    def settle(self, changes: RefcountChanges, *, failed: bool) -> None:
        """A flush has ended: what it could not write is dirty again."""
        self._busy = set()
        if failed:
            self._dirty_blocks |= changes.blocks
            self._dirty_entries |= changes.entries
            self._moved |= changes.moved

    # Blocks of 1 to 64 bits a refcount

    def _empty_block(self) -> array[int]:
        return array(_TYPECODES[self._order], bytes(self._per_block << max(0, self._order - 3)))

    def _parse(self, raw: bytearray) -> array[int]:
        if self._order < 3:
            return array("B", b"".join(_unpacked(self._order)[byte] for byte in raw))
        block = array(_TYPECODES[self._order])
        block.frombytes(raw)
        if sys.byteorder == "little":
            block.byteswap()
        return block

    def _build(self, block: array[int]) -> bytes:
        if self._order < 3:
            bits, per_byte = 1 << self._order, 8 >> self._order
            return bytes(
                sum(count << bits * place for place, count in enumerate(block[at : at + per_byte]))
                for at in range(0, len(block), per_byte)
            )
        swapped = block[:]
        if sys.byteorder == "little":
            swapped.byteswap()
        return swapped.tobytes()

    def _damaged(self, what: str) -> OSError:
        return OSError(errno.EIO, f"{what}; run qemu-img check -r all on the image", self._file.name)


@cache
def _unpacked(order: int) -> list[bytes]:
    """For every byte the refcounts in it, the lowest bits first."""
    bits, per_byte = 1 << order, 8 >> order
    mask = (1 << bits) - 1
    return [bytes(byte >> bits * place & mask for place in range(per_byte)) for byte in range(256)]
