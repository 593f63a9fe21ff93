"""A qcow2 image that is being written: what is done with whole clusters, and what outlives the session.

Allocation is in allocating.py; how what was published reaches the disk, and crashes are survived, in writeback.py.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

from nbdserve.block.device import BlockDevice
from nbdserve.block.extents import HostOffset
from nbdserve.block.file import HostFile, ReadBuffer
from nbdserve.formats.qcow2.allocating import AllocatingImage
from nbdserve.formats.qcow2.compression import CompressedClusters, pack_cluster
from nbdserve.formats.qcow2.entries import ALL_SUBCLUSTERS, COMPRESSED, COPIED, ENTRY_SIZE, ZERO
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.mapping import Mapping
from nbdserve.formats.qcow2.space import HostSpace

if TYPE_CHECKING:
    from nbdserve.formats.qcow2.bitmaps import BitmapTracker

Fill: TypeAlias = Callable[[HostFile, HostOffset, int, int], None]
"""Puts bytes in place: the file, where in it, the guest offset of the first one, how many."""


class WritableQcow2Image(AllocatingImage):
    """Adds compressed writing, bitmaps, flushing and closing.

    Args:
        tracker: notes every write for persistent bitmaps; None where none is switched on.
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
        super().__init__(header, space, mapping, compressed, backing, data)
        self._tracker = tracker
        if tracker is not None:
            self._refuse_overwrites()

    def stop_tracking(self) -> None:
        """Vouch for the bitmaps as they are, to change them; the guest's disk must not be written from now on."""
        if self._tracker is not None:
            self._tracker.finish(self._tracker.add_bits(self.allocator))
            self._tracker = None

    # Every write is noted, so none may bypass this class where there is something to note

    def touch(self, offset: int, length: int) -> None:
        """Let bitmaps know of a change."""
        if self._tracker is not None and length:
            with self._allocating:
                self._tracker.touch(offset, length)

    def write(self, offset: int, data: ReadBuffer) -> None:
        self.touch(offset, len(data))
        super().write(offset, data)

    def write_nowait(self, offset: int, data: ReadBuffer) -> bool:
        return self._tracker is None and super().write_nowait(offset, data)

    def zero(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self.touch(offset, length)
        super().zero(offset, length, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        self.touch(offset, length)
        super().discard(offset, length)

    # Whole clusters

    def write_clusters(self, offset: int, length: int, fill: Fill) -> None:
        """Write clusters that nobody else writes to meanwhile. Their place is reserved and published as write() does
        it, but filled without the allocation lock, so that several threads can do that at once.

        Args:
            offset: a multiple of the cluster size; so is length, or the range ends at the end of the disk.
            fill: see Fill.
        """
        self.touch(offset, length)
        end = offset + length
        while offset < end:
            self._flush_if_due()
            with self._allocating:
                place = self.writable_extent(offset, end - offset)
                reservation = None if place is not None else self.reserve(offset, end - offset)
            if reservation is None:
                assert place is not None
                with self.pins.held():
                    fill(place.file, place.host_offset, offset, place.length)
                offset += place.length
                continue
            done = min(reservation.length, end - offset)
            try:
                fill(reservation.file, reservation.host_offset, offset, done)
                if not reservation.zeroed:
                    reservation.file.write_zeros(reservation.host_offset + done, reservation.length - done)
            except BaseException:
                with self._allocating:
                    self.cancel(reservation)
                raise
            with self._allocating:
                self.publish(reservation)
            offset += done

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

    def place_all(self, offset: int = 0) -> Iterator[tuple[int, int]]:
        """Give every cluster from a guest offset on a place, where there is nothing yet and the disk reads as zeros;
        yields the rows of it in the file (offset, bytes)."""
        cluster, stop = -(-offset >> self._cluster_bits), -(-self.size >> self._cluster_bits)
        placed = (COPIED,) if self._geometry.words == 1 else (COPIED, ALL_SUBCLUSTERS)
        while cluster < stop:
            self._flush_if_due()
            with self._allocating:
                table = self._table_for_change(cluster << self._cluster_bits)
                index = cluster & self._index_mask
                first, count, zeroed = self._places.allocate(cluster, min(stop - cluster, self._index_mask + 1 - index))
                if not zeroed:
                    self.data_file.write_zeros(first << self._cluster_bits, count << self._cluster_bits)
                words = array("Q", placed) * count
                for number in range(count):
                    words[number * len(placed)] |= first + number << self._cluster_bits
                low = index * len(placed)
                table[low : low + len(words)] = words
                self._mapping.touch(cluster >> self._index_mask.bit_length(), low, low + len(words))
            yield first << self._cluster_bits, count << self._cluster_bits
            cluster += count

    def clear_zero_flags(self) -> None:
        """Let no L2 entry say zeros by its flag, which version 2 does not know: where nothing lies below, none says the
        same; elsewhere zeros are written."""
        for key in range(len(self._mapping.l1)):
            for index, entry in enumerate(self._mapping.table(key) or ()):
                offset = (key << self._table_shift) + (index << self._cluster_bits)
                if entry & (COMPRESSED | ZERO) != ZERO:
                    continue
                if offset < self.size and not self._is_above_backing(offset):
                    self.write(offset, bytes(min(self._host_cluster, self.size - offset)))
                    continue
                self._flush_if_due()
                with self._allocating:
                    self._table_for_change(offset)[index] = 0
                    self._mapping.touch(key, index, index + 1)
                    self._places.free(entry)

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
                self._places.free(*table[first * words :: words])
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
