"""Images with extended L2 entries that are being written: reserve -> write -> publish, by subclusters.

A write takes only the subclusters it touches; the rest of a new host cluster stays a hole. A host cluster that is
shared or compressed is copied as a whole, because an entry can name only one.
"""

from __future__ import annotations

from array import array

from nbdserve.block.extents import Data, GuestOffset, HostOffset
from nbdserve.block.file import ReadBuffer
from nbdserve.formats.base import Reservation
from nbdserve.formats.qcow2.entries import ALL_SUBCLUSTERS, COMPRESSED, COPIED, SUBCLUSTERS
from nbdserve.formats.qcow2.image import Qcow2Image
from nbdserve.formats.qcow2.subclusters import SubclusterImage, run_length
from nbdserve.formats.qcow2.writable import WritableQcow2Image


class WritableSubclusterImage(SubclusterImage, WritableQcow2Image):
    """Adds writing."""

    def _entry(self, offset: int) -> tuple[int, int]:
        """The two words of a guest offset."""
        table = self._mapping.table(offset >> self._table_shift)
        if table is None:
            return 0, 0
        index = (offset >> self._cluster_bits & self._index_mask) << 1
        return table[index], table[index + 1]

    def _set(self, offset: int, entry: int, bitmap: int) -> None:
        table = self._table_for_change(offset)
        index = (offset >> self._cluster_bits & self._index_mask) << 1
        table[index], table[index + 1] = entry, bitmap
        self._mapping.touch(offset >> self._table_shift, index, index + 2)

    def writable_extent(self, offset: int, length: int) -> Data | None:
        if not self._entry(offset)[0] & COPIED:
            return None
        extent = Qcow2Image.lookup(self, offset, min(length, self._host_cluster - (offset & self._cluster_mask)))
        if isinstance(extent, Data):
            return extent
        # Allocated subclusters that are still a hole in the host are told as zeros, but may be overwritten.
        entry, bitmap = self._entry(offset)
        inside = offset & self._cluster_mask
        subcluster = inside // self.cluster_size
        run = run_length(bitmap & ALL_SUBCLUSTERS, subcluster)
        if entry & COMPRESSED or not run:
            return None
        size = min(length, (subcluster + run) * self.cluster_size - inside)
        return Data(size, self.data_file, HostOffset((entry & self._geometry.offset_mask) + inside))

    def reserve(self, offset: int, length: int) -> Reservation:
        self._table_for_change(offset)
        entry, bitmap = self._entry(offset)
        cluster = GuestOffset(offset & ~self._cluster_mask)
        if entry & COMPRESSED:
            return self._new_place(cluster, self._host_cluster, cluster)
        allocated, _ = self._checked(entry, bitmap, offset)
        start = offset & -self.cluster_size
        inside = start - cluster
        stop = min((offset + length - 1 & -self.cluster_size) + self.cluster_size - cluster, self._host_cluster)
        if self._geometry.is_placed(entry):
            if not entry & COPIED:
                return self._new_place(cluster, self._host_cluster, cluster)
            size = run_length(~allocated & ALL_SUBCLUSTERS, inside // self.cluster_size) * self.cluster_size
            host = HostOffset((entry & self._geometry.offset_mask) + inside)
            return Reservation(GuestOffset(start), min(size, stop - inside), self.data_file, host, zeroed=False)
        return self._new_place(GuestOffset(start), stop - inside, cluster)

    def _new_place(self, start: GuestOffset, size: int, cluster: int) -> Reservation:
        first, _, zeroed = self._places.allocate(cluster >> self._cluster_bits, 1)
        host = HostOffset((first << self._cluster_bits) + start - cluster)
        return Reservation(start, size, self.data_file, host, zeroed)

    def publish(self, reservation: Reservation) -> None:
        offset = reservation.guest_offset
        inside = offset & self._cluster_mask
        first, count = inside // self.cluster_size, reservation.length // self.cluster_size
        written = (1 << count) - 1 << first
        before, bitmap = self._entry(offset)
        entry = reservation.host_offset - inside | COPIED
        if before & COMPRESSED:
            bitmap = 0
        self._set(offset, entry, (bitmap | written) & ~(written << SUBCLUSTERS))
        if before and before | COPIED != entry:
            self._places.free(before)

    def cancel(self, reservation: Reservation) -> None:
        offset = reservation.guest_offset
        place = reservation.host_offset - (offset & self._cluster_mask)
        if self._entry(offset)[0] != place | COPIED:
            self._places.cancel(place >> self._cluster_bits, 1)

    def _write_fresh(self, offset: int, data: ReadBuffer) -> bool:
        """As for standard entries, for a range inside one cluster that has no place and shows zeros."""
        key = offset >> self._table_shift
        table = self._mapping.changed_table(key)
        inside = offset & self._cluster_mask
        if table is None or inside + len(data) > self._host_cluster or not self._is_above_backing(offset - inside):
            return False
        index = (offset >> self._cluster_bits & self._index_mask) << 1
        if table[index]:
            return False
        host = self._write_to_new(offset, data, 1)
        if host is None:
            return False
        first, last = inside // self.cluster_size, (inside + len(data) - 1) // self.cluster_size
        written = (1 << last - first + 1) - 1 << first
        table[index], table[index + 1] = host | COPIED, (table[index + 1] | written) & ~(written << SUBCLUSTERS)
        self._mapping.touch(key, index, index + 2)
        return True

    def _zero_in_table(self, offset: int, stop: int, unmap: bool) -> bool:
        key = offset >> self._table_shift
        if not self._mapping.l1[key] and self._is_above_backing(offset):
            return True
        table = self._mapping.table(key) or array("Q", bytes(self._host_cluster))
        while offset < stop:
            index = (offset >> self._cluster_bits & self._index_mask) << 1
            end = min(stop, (offset & ~self._cluster_mask) + self._host_cluster)
            entry, bitmap = table[index], table[index + 1]
            after = self._zeroed_cluster(entry, bitmap, offset, end, unmap)
            if after is None:
                return False
            if after != (entry, bitmap):
                self._set(offset, *after)
                table = self._mapping.table(key) or table
                if self._geometry.is_placed(after[0]):
                    self._places.zero(entry, offset & self._cluster_mask, end - offset)
                elif entry:
                    self._places.free(entry)
            offset = end
        return True

    def _zeroed_cluster(self, entry: int, bitmap: int, offset: int, end: int, unmap: bool) -> tuple[int, int] | None:
        """What the words of a cluster become when the part from offset to end reads as zeros; None: they cannot say."""
        first = (offset & self._cluster_mask) // self.cluster_size
        last = (end - 1 & self._cluster_mask) // self.cluster_size
        chosen = (1 << last - first + 1) - 1 << first
        if entry & COMPRESSED:
            if chosen != ALL_SUBCLUSTERS:
                return None
            entry = bitmap = 0
        allocated, zeros = self._checked(entry, bitmap, offset)
        if self._is_above_backing(offset & ~self._cluster_mask) and not self._geometry.is_placed(entry):
            return entry, zeros << SUBCLUSTERS
        keeps = not unmap and entry & COPIED
        left = allocated & ~chosen
        zeros |= chosen
        if not left and not keeps:
            entry = 0
            if self._is_above_backing(offset & ~self._cluster_mask):
                zeros = 0
        return entry, zeros << SUBCLUSTERS | left
