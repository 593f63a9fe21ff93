"""A qcow2 image that is being written."""

from __future__ import annotations

from array import array

from nbdserve.block.device import BlockDevice
from nbdserve.block.extents import Data, GuestOffset, HostOffset
from nbdserve.block.file import ReadBuffer
from nbdserve.formats.base import Reservation
from nbdserve.formats.qcow2.compression import CompressedClusters
from nbdserve.formats.qcow2.entries import COMPRESSED, COPIED, ZERO
from nbdserve.formats.qcow2.image import Qcow2Image, row_length
from nbdserve.formats.qcow2.mapping import Mapping
from nbdserve.formats.qcow2.refcounts import Refcounts
from nbdserve.formats.qcow2.space import HostSpace
from nbdserve.formats.qcow2.writeback import WriteBack


class WritableQcow2Image(Qcow2Image):
    """Adds allocation, copy-on-write, zeroing and flushing. How crashes are survived is said in writeback.py."""

    def __init__(
        self,
        size: int,
        space: HostSpace,
        mapping: Mapping,
        compressed: CompressedClusters,
        backing: BlockDevice | None,
        refcounts: Refcounts,
    ) -> None:
        super().__init__(size, space, mapping, compressed, backing, read_only=False)
        self.zeroes_fast = self._geometry.has_zero_flag or backing is None
        self._refcounts = refcounts
        self._writeback = WriteBack(space, mapping, refcounts, self.pins, self._allocating)
        # Zeroing goes in pieces that change no more tables than may be kept in memory.
        self._zero_piece = max(1, mapping.capacity // 4) << self._table_shift

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
        if not entry & COPIED or entry & ZERO or not host:
            return None
        inside = offset & self._cluster_mask
        stop = min(len(table), index + (inside + length + self._cluster_mask >> self._cluster_bits))
        count = row_length(table, index, stop, host, self.cluster_size, ignored=0)
        return Data(min(length, count * self.cluster_size - inside), self.file, HostOffset(host + inside))

    # Reserve, write, publish

    def reserve(self, offset: int, length: int) -> Reservation:
        first = offset >> self._cluster_bits
        wanted = (offset + length - 1 >> self._cluster_bits) - first + 1
        table = self._table_for_change(first << self._cluster_bits)
        index = first & self._index_mask
        stop = min(len(table), index + wanted)
        guest = GuestOffset(first << self._cluster_bits)
        if self._is_set_aside(table[index]):
            return self._reuse(guest, table, index, stop)
        count = self._count_without_place(guest, table, index, stop)
        cluster, count = self._refcounts.allocate(count)
        host, size = cluster << self._cluster_bits, count << self._cluster_bits
        zeroed = host >= self._space.fresh_from or self._space.punch(cluster, count)
        return Reservation(guest, size, self.file, HostOffset(host), zeroed)

    def _table_for_change(self, offset: int) -> array[int]:
        return self._mapping.table_for_change(offset >> self._table_shift, self._refcounts, self._writeback.park)

    def _is_set_aside(self, entry: int) -> bool:
        """Whether a cluster reads as zeros but has a host cluster of its own."""
        kind = entry & (COPIED | COMPRESSED | ZERO)
        return kind == COPIED | ZERO and entry & self._geometry.offset_mask != 0

    def _reuse(self, guest: GuestOffset, table: array[int], index: int, stop: int) -> Reservation:
        """The host clusters that are set aside already."""
        self._check(table[index] & ~ZERO, guest)
        end = index + 1
        while end < stop and table[end] == table[end - 1] + self.cluster_size:
            self._check(table[end] & ~ZERO, guest)
            end += 1
        host = HostOffset(table[index] & self._geometry.offset_mask)
        return Reservation(guest, (end - index) * self.cluster_size, self.file, host, zeroed=False)

    def _count_without_place(self, guest: int, table: array[int], index: int, stop: int) -> int:
        """How many clusters in a row can neither be overwritten nor have a host cluster set aside."""
        end = index
        while end < stop:
            entry = table[end]
            if entry and not entry & COMPRESSED:
                if entry & COPIED and entry & self._geometry.offset_mask:
                    break
                self._check(entry, guest)
            end += 1
        return max(1, end - index)

    def publish(self, reservation: Reservation) -> None:
        offset, size = reservation.guest_offset, self.cluster_size
        table = self._table_for_change(offset)
        index = offset >> self._cluster_bits & self._index_mask
        entry = reservation.host_offset | COPIED
        stop = index + (reservation.length >> self._cluster_bits)
        for position in range(index, stop):
            before, table[position] = table[position], entry
            if before and before & ~ZERO != entry:
                self._free(before)
            entry += size
        self._mapping.touch(offset >> self._table_shift, index, stop)

    def cancel(self, reservation: Reservation) -> None:
        offset = reservation.guest_offset
        table = self._table_for_change(offset)
        if table[offset >> self._cluster_bits & self._index_mask] & ~ZERO != reservation.host_offset | COPIED:
            self._writeback.park(
                reservation.host_offset >> self._cluster_bits, reservation.length >> self._cluster_bits
            )

    def _free(self, entry: int) -> None:
        """An L2 entry is gone: what it referred to loses a reference."""
        first, count = self._geometry.host_clusters(entry)
        if count:
            self._writeback.park(first, count)

    def _allocate_and_write(self, offset: int, view: memoryview) -> int:
        self._flush_if_due()
        return super()._allocate_and_write(offset, view)

    def _flush_if_due(self) -> None:
        if self._writeback.is_due:
            self._writeback.flush()

    def write_nowait(self, offset: int, data: ReadBuffer) -> bool:
        if super().write_nowait(offset, data):
            return True
        if not self._allocating.acquire(blocking=False):
            return False
        try:
            if not self._is_fresh(offset, len(data)):
                return False
            self._write_fresh(offset, memoryview(data))
        finally:
            self._allocating.release()
        return True

    def _is_fresh(self, offset: int, length: int) -> bool:
        """Whether the range's clusters read as zeros, have no place, and can get one without a look at the disk."""
        key = offset >> self._table_shift
        clusters = (offset + length - 1 >> self._cluster_bits) - (offset >> self._cluster_bits) + 1
        if offset + length - 1 >> self._table_shift != key or not self._refcounts.is_ready(clusters + 1):
            return False
        if self._writeback.is_due:
            return False
        above_backing = self.backing is None or offset & ~self._cluster_mask >= self.backing.size
        table = self._tables.get(key)
        if table is None:
            return above_backing and not self._mapping.exists(key)
        index = offset >> self._cluster_bits & self._index_mask
        fresh = (0,) * above_backing + (ZERO,) * self._geometry.has_zero_flag
        return all(entry in fresh for entry in table[index : index + clusters])

    def _write_fresh(self, offset: int, view: memoryview) -> None:
        while view:
            reservation = self.reserve(offset, len(view))
            inside = offset - reservation.guest_offset
            piece = view[: reservation.length - inside]
            try:
                self.file.write(reservation.host_offset + inside, piece)
            except BaseException:
                self.cancel(reservation)
                raise
            self.publish(reservation)
            view = view[len(piece) :]
            offset += len(piece)

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
            key = offset >> self._table_shift
            stop = min(end, key + 1 << self._table_shift)
            if not self._zero_in_table(key, offset, stop, unmap):
                return False
            offset = stop
        return True

    def _zero_in_table(self, key: int, offset: int, stop: int, unmap: bool) -> bool:
        has_backing = self.backing is not None and offset < self.backing.size
        if not has_backing and not self._mapping.exists(key):
            return True
        if not self._geometry.has_zero_flag and (has_backing or not unmap):
            return False
        table = self._mapping.table(key)
        first = offset >> self._cluster_bits & self._index_mask
        end = first + (stop - offset + self._cluster_mask >> self._cluster_bits)
        before = table[first:end] if table is not None else array("Q", (0,)) * (end - first)
        after = self._zeroed(before, offset, has_backing, unmap)
        if after != before:
            self._table_for_change(offset)[first:end] = after
            self._mapping.touch(key, first, end)
            for old, new in zip(before, after, strict=True):
                if old != new and not new & self._geometry.offset_mask:
                    self._free(old)
        return True

    def _zeroed(self, entries: array[int], offset: int, has_backing: bool, unmap: bool) -> array[int]:
        """What L2 entries, the first of them that of a guest offset, become when their clusters are zeroed."""
        empty = ZERO if has_backing else 0
        if not any(entries):
            return array("Q", (empty,)) * len(entries)
        after = array("Q", entries)
        for index, entry in enumerate(entries):
            if entry == ZERO or (not entry and not has_backing):
                continue
            if not entry & COMPRESSED:
                self._check(entry, offset + index * self.cluster_size)
            drop = unmap or entry & COMPRESSED or not entry & self._geometry.offset_mask
            after[index] = empty if drop else entry | ZERO
        return after

    # Durability

    def flush(self) -> None:
        self._writeback.flush()

    def close(self) -> None:
        if self.file.fd < 0:
            return
        try:
            self._writeback.finish()
        finally:
            super().close()
