"""A qcow2 image, for reading: the present state of the disk or an internal snapshot of it."""

from __future__ import annotations

from array import array

from nbdserve.block.device import BlockDevice
from nbdserve.block.extents import Computed, Data, HostOffset, Zero
from nbdserve.block.file import HostFile, WriteBuffer
from nbdserve.formats.base import MappedImage, OwnExtent, Unallocated
from nbdserve.formats.qcow2.compression import CompressedClusters
from nbdserve.formats.qcow2.entries import COMPRESSED, COPIED, ZERO
from nbdserve.formats.qcow2.mapping import Mapping
from nbdserve.formats.qcow2.space import HostSpace, damaged


class Qcow2Image(MappedImage):
    """Maps guest clusters through L2 tables.

    locate() answers 250,000 times a second: a dictionary, an array, and comparisons with numbers. Everything a damaged
    entry could hold fails one of the comparisons, so that map() is asked, which says what is wrong.
    """

    def __init__(
        self,
        size: int,
        space: HostSpace,
        mapping: Mapping,
        compressed: CompressedClusters,
        backing: BlockDevice | None,
        *,
        read_only: bool = True,
    ) -> None:
        geometry = space.geometry
        super().__init__(size, cluster_size=geometry.cluster_size, read_only=read_only, backing=backing)
        self.preferred_block = max(4096, geometry.cluster_size)
        self.file = space.file
        self._space = space
        self._geometry = geometry
        self._mapping = mapping
        self._tables = mapping.tables
        self._compressed = compressed
        self._table_shift = geometry.table_shift
        self._cluster_bits = geometry.cluster_bits
        self._cluster_mask = geometry.cluster_size - 1
        self._index_mask = geometry.entries - 1

    # The fast path

    def locate(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        return self._place(offset, length, COPIED)

    def locate_writable(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        return None if self.read_only else self._place(offset, length, 0)

    def _place(self, offset: int, length: int, ignored: int) -> tuple[HostFile, HostOffset] | None:
        """Where the range lies if its clusters are plain, in a row, in one table, and COPIED unless ignored."""
        table = self._tables.recent.get(offset >> self._table_shift)
        if table is None:
            table = self._tables.get(offset >> self._table_shift)
            if table is None:
                return None
        index = offset >> self._cluster_bits & self._index_mask
        host = (table[index] | ignored) ^ COPIED
        inside = offset & self._cluster_mask
        if host & self._cluster_mask or not 0 < host <= self._space.end - inside - length:
            return None
        if inside + length > self.cluster_size:
            stop = index + (inside + length + self._cluster_mask >> self._cluster_bits)
            expected = host | COPIED
            for entry in table[index + 1 : stop]:
                expected += self.cluster_size
                if entry | ignored != expected:
                    return None
            if stop > len(table):
                return None
        return self.file, HostOffset(host + inside)

    # The mapping

    def is_mapped_in_memory(self, offset: int, length: int) -> bool:
        return self._mapping.is_in_memory(offset >> self._table_shift)  # no extent reaches into a further table

    def lookup(self, offset: int, length: int) -> OwnExtent:
        key = offset >> self._table_shift
        table = self._mapping.table(key)
        if table is None:
            last = offset + length - 1 >> self._table_shift
            absent = self._mapping.absent_run(key, last + 1)
            return Unallocated(min(length, (key + absent << self._table_shift) - offset))
        return self._own_extent(table, offset, length)

    def _own_extent(self, table: array[int], offset: int, length: int) -> OwnExtent:
        index = offset >> self._cluster_bits & self._index_mask
        inside = offset & self._cluster_mask
        stop = min(len(table), index + (inside + length + self._cluster_mask >> self._cluster_bits))
        entry = table[index]
        if entry & COMPRESSED:
            return Computed(
                min(length, _run_of(table, index, stop, COMPRESSED, COMPRESSED) * self.cluster_size - inside)
            )
        self._check(entry, offset)
        host = entry & self._geometry.offset_mask
        if entry & ZERO:
            count = _run_of(table, index, stop, ~COPIED, entry & ~COPIED) if not host else 1
            return Zero(min(length, count * self.cluster_size - inside), allocated=host != 0)
        if not host:
            count = _run_of(table, index, stop, ~COPIED, 0)
            return Unallocated(min(length, count * self.cluster_size - inside))
        count = row_length(table, index, stop, host, self.cluster_size, COPIED)
        length = min(length, count * self.cluster_size - inside)
        in_file = self._space.end - host - inside
        if in_file <= 0:  # the last cluster need not be written out to its end
            return Zero(length, allocated=True)
        return Data(min(length, in_file), self.file, HostOffset(host + inside))

    def _check(self, entry: int, offset: int) -> None:
        """Refuse a standard L2 entry that cannot be right.

        Raises:
            OSError: EIO.
        """
        host = entry & self._geometry.offset_mask
        if entry & self._geometry.reserved:
            raise damaged(
                self.file.name, f"the L2 entry of guest offset {offset} is {entry:#x}, with reserved bits set"
            )
        if host >= self._space.end and not entry & ZERO:
            raise damaged(self.file.name, f"guest offset {offset} is said to lie at {host}, past the end of the file")

    def decompress(self, offset: int, buffer: WriteBuffer) -> None:
        view = memoryview(buffer)
        while view:
            inside = offset & self._cluster_mask
            piece = view[: self.cluster_size - inside]
            table = self._mapping.table(offset >> self._table_shift)
            entry = table[offset >> self._cluster_bits & self._index_mask] if table is not None else 0
            if entry & COMPRESSED:
                piece[:] = self._compressed.content(entry)[inside : inside + len(piece)]
            else:  # overwritten since it was looked up
                self.read_into(offset, piece)
            view = view[len(piece) :]
            offset += len(piece)

    def close(self) -> None:
        super().close()
        self.file.close()


def _run_of(table: array[int], index: int, stop: int, mask: int, wanted: int) -> int:
    """How many entries in a row, from index to stop, equal `wanted` under a mask; the first one does."""
    end = index + 1
    while end < stop and table[end] & mask == wanted:
        end += 1
    return end - index


def row_length(table: array[int], index: int, stop: int, host: int, cluster_size: int, ignored: int) -> int:
    """How many entries in a row, from index to stop, lead to consecutive host clusters from `host` on, all of them with
    COPIED unless that is ignored; the first one does."""
    end = index + 1
    expected = host | COPIED
    while end < stop:
        expected += cluster_size
        if table[end] | ignored != expected:
            break
        end += 1
    return end - index
