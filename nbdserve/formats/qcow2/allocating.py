"""Allocation in a qcow2 image: reserve -> write -> publish (formats/base.py), and zeroing, in memory.

How what was published reaches the disk, and crashes are survived, is said in writeback.py.
"""

from __future__ import annotations

from array import array

from nbdserve.block.device import BlockDevice
from nbdserve.block.extents import Data, GuestOffset, HostOffset
from nbdserve.block.file import ReadBuffer
from nbdserve.formats.base import Reservation
from nbdserve.formats.qcow2.allocation import Allocator
from nbdserve.formats.qcow2.compression import CompressedClusters
from nbdserve.formats.qcow2.entries import COMPRESSED, COPIED, ENTRY_SIZE, NOT_COPIED, ZERO, read_table
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.image import Qcow2Image, row_length
from nbdserve.formats.qcow2.mapping import Mapping
from nbdserve.formats.qcow2.places import InDataFile, InImage, Places
from nbdserve.formats.qcow2.refcounts import Refcounts
from nbdserve.formats.qcow2.space import HostSpace
from nbdserve.formats.qcow2.writeback import WriteBack


class AllocatingImage(Qcow2Image):
    """Adds allocation, copy-on-write and zeroing.

    Attributes:
        header: as it was read; snapshots.py and resizing.py replace it when they have changed it on the disk.
        space, mapping, refcounts, allocator, writeback: the parts, for those two.
    """

    def __init__(
        self,
        header: Header,
        space: HostSpace,
        mapping: Mapping,
        compressed: CompressedClusters,
        backing: BlockDevice | None,
        data: HostSpace,
    ) -> None:
        super().__init__(header.size, space, mapping, compressed, backing, data, read_only=False)
        self.header = header
        self.space = space
        self.mapping = mapping
        length = header.refcount_table_clusters << header.geometry.cluster_bits
        table = read_table(self.file, header.refcount_table_offset, length // ENTRY_SIZE)
        self.refcounts = Refcounts(space, header.refcount_width, table, header.refcount_table_offset)
        self.allocator = Allocator(space, self.refcounts)
        external = data.file if data is not space else None
        self.writeback = WriteBack(
            space, mapping, self.refcounts, self.allocator, self.pins, self._allocating, external
        )
        self._park = self.writeback.park
        self._places: Places = (
            InImage(self._geometry, self.allocator, self._park)
            if external is None
            else InDataFile(data, is_raw=header.has_raw_data_file)
        )
        # Every entry says zeros through the tables alone, but for what lies below an old image.
        self.zeroes_fast = (self._geometry.has_zero_flag or backing is None) and external is None
        # L2 entries that read as zeros and need a place: always, and where there is no backing file below.
        self._zero_entries = (ZERO,) if self._geometry.has_zero_flag else ()
        self._fresh_entries = (0, *self._zero_entries)
        # Zeroing goes in pieces that change no more tables than may be kept in memory.
        self._zero_piece = max(1, mapping.capacity // 16) << self._table_shift

    # Overwriting in place

    def writable_extent(self, offset: int, length: int) -> Data | None:
        table = self._mapping.table(offset >> self._table_shift)
        if table is None:
            return None
        index = offset >> self._cluster_bits & self._index_mask
        entry = table[index]
        if entry & COMPRESSED:
            return None
        self._check(entry, offset)
        host = entry & self._geometry.offset_mask
        if not entry & COPIED or entry & ZERO or not self._geometry.is_placed(entry):
            return None
        inside = offset & self._cluster_mask
        stop = min(len(table), index + (inside + length + self._cluster_mask >> self._cluster_bits))
        count = row_length(table, index, stop, host, self._host_cluster, ignored=0)
        return Data(min(length, count * self._host_cluster - inside), self.data_file, HostOffset(host + inside))

    # Reserve, write, publish

    def reserve(self, offset: int, length: int) -> Reservation:
        first = offset >> self._cluster_bits
        wanted = (offset + length - 1 >> self._cluster_bits) - first + 1
        table = self._table_for_change(offset)
        index = first & self._index_mask
        stop = min(len(table), index + wanted)
        guest = GuestOffset(first << self._cluster_bits)
        if self._is_set_aside(table[index]):
            return self._reuse(guest, table, index, stop)
        count = self._count_without_place(guest, table, index, stop)
        cluster, count, zeroed = self._places.allocate(first, count)
        host, size = HostOffset(cluster << self._cluster_bits), count << self._cluster_bits
        return Reservation(guest, size, self.data_file, host, zeroed)

    def _table_for_change(self, offset: int) -> array[int]:
        return self._mapping.table_for_change(offset >> self._table_shift, self.allocator, self._park)

    def _is_set_aside(self, entry: int) -> bool:
        """Whether a cluster reads as zeros but has a host cluster of its own."""
        return entry & (COPIED | COMPRESSED | ZERO) == COPIED | ZERO and self._geometry.is_placed(entry)

    def _reuse(self, guest: GuestOffset, table: array[int], index: int, stop: int) -> Reservation:
        """The host clusters that are set aside already."""
        end = index
        while end < stop and table[end] == table[index] + (end - index) * self._host_cluster:
            self._check(table[end] & ~ZERO, guest + (end - index) * self._host_cluster)
            end += 1
        host = HostOffset(table[index] & self._geometry.offset_mask)
        return Reservation(guest, (end - index) * self._host_cluster, self.data_file, host, zeroed=False)

    def _count_without_place(self, guest: int, table: array[int], index: int, stop: int) -> int:
        """How many clusters in a row can neither be overwritten nor have a host cluster set aside."""
        end = index
        while end < stop:
            entry = table[end]
            if entry and not entry & COMPRESSED:
                if entry & COPIED and self._geometry.is_placed(entry):
                    break
                self._check(entry, guest + (end - index) * self._host_cluster)
            end += 1
        return max(1, end - index)

    def publish(self, reservation: Reservation) -> None:
        offset, size = reservation.guest_offset, self._host_cluster
        table = self._table_for_change(offset)
        index = offset >> self._cluster_bits & self._index_mask
        entry = reservation.host_offset | COPIED
        stop = index + (reservation.length >> self._cluster_bits)
        for position in range(index, stop):
            before, table[position] = table[position], entry
            if before and (before | COPIED) & ~ZERO != entry:
                self._places.free(before)
            entry += size
        self._mapping.touch(offset >> self._table_shift, index, stop)

    def cancel(self, reservation: Reservation) -> None:
        offset = reservation.guest_offset
        table = self._table_for_change(offset)
        if table[offset >> self._cluster_bits & self._index_mask] & ~ZERO != reservation.host_offset | COPIED:
            self._places.cancel(reservation.host_offset >> self._cluster_bits, reservation.length >> self._cluster_bits)

    def _allocate_and_write(self, offset: int, view: memoryview) -> int:
        self._flush_if_due()
        return super()._allocate_and_write(offset, view)

    def _flush_if_due(self) -> None:
        if self.writeback.is_due:
            self.writeback.flush()

    def write_nowait(self, offset: int, data: ReadBuffer) -> bool:
        if super().write_nowait(offset, data):
            return True
        if not self._allocating.acquire(blocking=False):
            return False
        try:
            return self._write_fresh(offset, data)
        finally:
            self._allocating.release()

    def _write_fresh(self, offset: int, data: ReadBuffer) -> bool:
        """Reserve, write and publish in one go, if the clusters have no place yet, can get one without a look at the
        disk, and so can what the guest saw around the range be told; False (nothing done) otherwise.

        The first write after a flush to what an L2 table maps is left to write().
        """
        key = offset >> self._table_shift
        index = offset >> self._cluster_bits & self._index_mask
        start = offset & ~self._cluster_mask
        end = offset + len(data)
        count = end - start + self._cluster_mask >> self._cluster_bits
        table = self._mapping.changed_table(key)
        if table is None or index + count > len(table):
            return False
        for entry in table[index : index + count]:
            if entry not in self._fresh_entries:
                return False
        head = self._around(table[index], start, offset)
        tail = self._around(table[index + count - 1], end, start + (count << self._cluster_bits))
        if head is None or tail is None:
            return False
        host = self._write_to_new(offset, data, count, head, tail)
        if host is None:
            return False
        entry = host | COPIED
        for position in range(index, index + count):
            table[position] = entry
            entry += self._host_cluster
        self._mapping.touch(key, index, index + count)
        return True

    def _around(self, entry: int, start: int, end: int) -> bytes | bytearray | None:
        """What the guest sees in [start, end), a part of a fresh cluster; nothing if it reads as zeros, None if telling
        takes a look at the disk."""
        if start == end or self._is_above_backing(start) or entry in self._zero_entries:
            return b""
        assert self.backing is not None
        content = bytearray(end - start)
        return content if self.backing.read_at_hand(start, memoryview(content)[: self.backing.size - start]) else None

    def _write_to_new(
        self, offset: int, data: ReadBuffer, count: int, head: ReadBuffer = b"", tail: ReadBuffer = b""
    ) -> int | None:
        """Write the range's bytes, with what goes before and behind, to new clusters; where the first one begins in
        the file, or None if there is none at hand."""
        cluster = self._places.allocate_at_once(offset >> self._cluster_bits, count)
        if cluster is None:
            return None
        host = cluster << self._cluster_bits
        inside = offset & self._cluster_mask
        try:
            if head or tail:
                self.data_file.write_all(host + inside - len(head), (head, data, tail))
            else:
                self.data_file.write(host + inside, data)
        except BaseException:
            self._places.cancel(cluster, count)
            raise
        return host

    def _is_above_backing(self, offset: int) -> bool:
        """Whether what is not allocated from this offset on reads as zeros."""
        return self.backing is None or offset >= self.backing.size

    # Zeros

    def zero(self, offset: int, length: int, *, unmap: bool = True) -> None:
        for start, size in self._pieces(offset, length):
            self._flush_if_due()
            super().zero(start, size, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        for start, size in self._pieces(offset, length):
            self._flush_if_due()
            super().discard(start, size)

    def _pieces(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The range, cut where a piece ends and another begins."""
        end = offset + length
        starts = [offset, *range((offset // self._zero_piece + 1) * self._zero_piece, end, self._zero_piece)]
        return [(start, stop - start) for start, stop in zip(starts, [*starts[1:], end], strict=True)]

    def zero_clusters(self, offset: int, length: int, *, unmap: bool) -> bool:
        end = offset + length
        while offset < end:
            stop = min(end, (offset >> self._table_shift) + 1 << self._table_shift)
            if not self._zero_in_table(offset, stop, unmap):
                return False
            offset = stop
        return True

    def _zero_in_table(self, offset: int, stop: int, unmap: bool) -> bool:
        """Let what one L2 table maps, from offset to stop, read as zeros; False when the tables cannot say so."""
        key = offset >> self._table_shift
        has_backing = not self._is_above_backing(offset)
        if not has_backing and not self._mapping.l1[key]:
            return True
        if not self._geometry.has_zero_flag and (has_backing or not unmap):
            return False
        table = self._mapping.table(key)
        first = offset >> self._cluster_bits & self._index_mask
        end = first + (stop - offset + self._cluster_mask >> self._cluster_bits)
        before = table[first:end] if table is not None else array("Q", (0,)) * (end - first)
        if unmap and self._is_row(before):
            self._table_for_change(offset)[first:end] = array("Q", (ZERO if has_backing else 0,)) * (end - first)
            self._mapping.touch(key, first, end)
            self._places.cancel((before[0] & NOT_COPIED) >> self._cluster_bits, end - first)
            return True
        after = self._zeroed(before, offset, has_backing, unmap)
        if after != before:
            self._table_for_change(offset)[first:end] = after
            self._mapping.touch(key, first, end)
            placed = self._geometry.is_placed
            changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
            self._places.free(*(old for old, new in changed if not placed(new)))
            for _, new in changed:
                if placed(new):
                    self._places.zero(new, 0, self._host_cluster)
        return True

    def _is_row(self, entries: array[int]) -> bool:
        """Whether entries lead to host clusters in a row that nobody else uses: the usual case, found out quickly."""
        first, size = entries[0], self._host_cluster
        stop = first + len(entries) * size
        return (
            first & (COPIED | COMPRESSED) == COPIED
            and self._is_plain(first)
            and stop - size & NOT_COPIED < self._data.full_end
            and entries == array("Q", range(first, stop, size))
        )

    def _is_plain(self, entry: int) -> bool:
        """Whether an entry is certainly sound, at one look."""
        host = entry & NOT_COPIED
        return bool(entry & COMPRESSED) or (
            not host & self._cluster_mask and 0 < host < self._data.full_end and not self._is_external
        )

    def _zeroed(self, entries: array[int], offset: int, has_backing: bool, unmap: bool) -> array[int]:
        """What L2 entries, the first of them that of a guest offset, become when their clusters are zeroed."""
        empty = ZERO if has_backing else 0
        if not any(entries):
            return array("Q", (empty,)) * len(entries)
        after = array("Q", entries)
        for index, entry in enumerate(entries):
            if entry == ZERO or (not entry and not has_backing):
                continue
            if not self._is_plain(entry):
                self._check(entry, offset + index * self._host_cluster)
            drop = unmap or entry & COMPRESSED or not self._geometry.is_placed(entry)
            after[index] = empty if drop else entry | ZERO
        return after
