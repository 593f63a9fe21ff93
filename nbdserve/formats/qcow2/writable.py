"""A qcow2 image that is being written: reserve -> write -> publish (formats/base.py), in memory.

How what was published reaches the disk, and crashes are survived, is said in writeback.py.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from nbdserve.block.device import BlockDevice
from nbdserve.block.extents import Data, GuestOffset, HostOffset
from nbdserve.block.file import HostFile, ReadBuffer
from nbdserve.formats.base import Reservation
from nbdserve.formats.qcow2.allocation import Allocator
from nbdserve.formats.qcow2.bitmaps import BitmapTracker
from nbdserve.formats.qcow2.compression import CompressedClusters, pack_cluster
from nbdserve.formats.qcow2.entries import ALL_SUBCLUSTERS, COMPRESSED, COPIED, ENTRY_SIZE, ZERO, read_table
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.image import Qcow2Image, row_length
from nbdserve.formats.qcow2.mapping import Mapping
from nbdserve.formats.qcow2.places import InDataFile, InImage, Places
from nbdserve.formats.qcow2.refcounts import Refcounts
from nbdserve.formats.qcow2.space import HostSpace
from nbdserve.formats.qcow2.writeback import WriteBack


class WritableQcow2Image(Qcow2Image):
    """Adds allocation, copy-on-write, zeroing and flushing.

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
        tracker: BitmapTracker | None = None,
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
        self._tracker = tracker
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

    def locate_writable(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        return super().locate_writable(offset, length) if self._tracker is None else None

    def touch(self, offset: int, length: int) -> None:
        """Let bitmaps know of a change."""
        if self._tracker is not None and length:
            with self._allocating:
                self._tracker.touch(offset, length)

    def write(self, offset: int, data: ReadBuffer) -> None:
        self.touch(offset, len(data))
        super().write(offset, data)

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
        if self._tracker is not None or not self._allocating.acquire(blocking=False):
            return False
        try:
            return self._write_fresh(offset, data)
        finally:
            self._allocating.release()

    def _write_fresh(self, offset: int, data: ReadBuffer) -> bool:
        """Reserve, write and publish in one go, if the range's clusters read as zeros, have no place yet, and can get
        one without a look at the disk; False (nothing done) otherwise.

        The first write after a flush to what an L2 table maps is left to write().
        """
        key = offset >> self._table_shift
        index = offset >> self._cluster_bits & self._index_mask
        inside = offset & self._cluster_mask
        count = inside + len(data) + self._cluster_mask >> self._cluster_bits
        table = self._mapping.changed_table(key)
        if table is None or index + count > len(table):
            return False
        fresh = self._fresh_entries if self._is_above_backing(offset - inside) else self._zero_entries
        for entry in table[index : index + count]:
            if entry not in fresh:
                return False
        cluster = self._places.allocate_at_once(offset >> self._cluster_bits, count)
        if cluster is None:
            return False
        host = cluster << self._cluster_bits
        try:
            self.data_file.write(host + inside, data)
        except BaseException:
            self._places.cancel(cluster, count)
            raise
        entry = host | COPIED
        for position in range(index, index + count):
            table[position] = entry
            entry += self._host_cluster
        self._mapping.touch(key, index, index + count)
        return True

    def _is_above_backing(self, offset: int) -> bool:
        """Whether what is not allocated from this offset on reads as zeros."""
        return self.backing is None or offset >= self.backing.size

    def write_compressed(self, offset: int, data: ReadBuffer) -> None:
        """Write whole clusters, compressed where that makes them smaller.

        Args:
            offset: a multiple of the cluster size.
            data: a multiple of the cluster size long, or up to the end of the disk.
        """
        if self.read_only or self._is_external:
            raise self._refusal()
        size, view = self._host_cluster, memoryview(data)
        self.touch(offset, len(data))
        assert not offset & self._cluster_mask
        assert not len(view) & self._cluster_mask or offset + len(view) == self.size
        for start in range(0, len(view), size):
            piece = view[start : start + size]
            packed = pack_cluster(self.header.compression, bytes(piece).ljust(size, b"\0"))
            if len(packed) >= size:
                self.write(offset + start, piece)
            else:
                self._flush_if_due()
                with self._allocating:
                    self._publish_compressed(offset + start, packed)

    def _publish_compressed(self, offset: int, packed: bytes) -> None:
        table = self._table_for_change(offset)
        host = self.allocator.allocate_bytes(len(packed))
        entry = self._geometry.compressed_entry(host, len(packed))
        self._compressed.forget(entry)
        try:
            self.file.write(host, packed)
        except BaseException:
            self._places.free(entry)
            raise
        index = (offset >> self._cluster_bits & self._index_mask) * self._geometry.words
        before, table[index] = table[index], entry
        if self._geometry.words > 1:
            table[index + 1] = 0
        self._mapping.touch(offset >> self._table_shift, index, index + self._geometry.words)
        self._places.free(before)

    def place_all(self) -> Iterator[tuple[int, int]]:
        """Give every cluster of an empty disk a place; yields the rows of it in the file (offset, bytes)."""
        cluster, stop = 0, -(-self.size >> self._cluster_bits)
        placed = (COPIED,) if self._geometry.words == 1 else (COPIED, ALL_SUBCLUSTERS)
        while cluster < stop:
            self._flush_if_due()
            with self._allocating:
                table = self._table_for_change(cluster << self._cluster_bits)
                index = cluster & self._index_mask
                first, count, _ = self._places.allocate(cluster, min(stop - cluster, self._index_mask + 1 - index))
                words = array("Q", placed) * count
                for number in range(count):
                    words[number * len(placed)] |= first + number << self._cluster_bits
                low = index * len(placed)
                table[low : low + len(words)] = words
                self._mapping.touch(cluster >> self._index_mask.bit_length(), low, low + len(words))
            yield first << self._cluster_bits, count << self._cluster_bits
            cluster += count

    # Zeros

    def zero(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self.touch(offset, length)
        for start, size in self._pieces(offset, length):
            self._flush_if_due()
            super().zero(start, size, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        self.touch(offset, length)
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
        after = self._zeroed(before, offset, has_backing, unmap)
        if after != before:
            self._table_for_change(offset)[first:end] = after
            self._mapping.touch(key, first, end)
            for old, new in zip(before, after, strict=True):
                if old != new and self._geometry.is_placed(new):
                    self._places.zero(new, 0, self._host_cluster)
                elif old != new:
                    self._places.free(old)
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
                self._check(entry, offset + index * self._host_cluster)
            drop = unmap or entry & COMPRESSED or not self._geometry.is_placed(entry)
            after[index] = empty if drop else entry | ZERO
        return after

    def give_up_from(self, offset: int) -> None:
        """Forget all clusters from a guest offset on, a multiple of the cluster size: the disk ends before them."""
        words = self._geometry.words
        for key in range(offset >> self._table_shift, len(self._mapping.l1)):
            if not self._mapping.l1[key]:
                continue
            self._flush_if_due()
            with self._allocating:
                table = self._table_for_change(key << self._table_shift)
                first = max(0, offset - (key << self._table_shift)) >> self._cluster_bits
                for entry in table[first * words :: words]:
                    self._places.free(entry)
                table[first * words :] = array("Q", bytes(ENTRY_SIZE * (len(table) - first * words)))
                self._mapping.touch(key, first * words, len(table))
                if not first:
                    self._mapping.drop_table(key, self._park)

    # Durability

    def flush(self) -> None:
        self.writeback.flush()

    def close(self) -> None:
        if self.file.fd < 0:
            return
        try:
            links = [] if self._tracker is None else self._tracker.add_bits(self.allocator)
            self.writeback.finish()
            if self._tracker is not None:
                self._tracker.finish(links)
            if self._is_external and not self.data_file.is_device and self.data_file.size > self.size:
                self.data_file.resize(self.size)  # the last cluster may have been written to its end
        finally:
            super().close()
