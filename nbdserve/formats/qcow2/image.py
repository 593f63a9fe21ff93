"""A qcow2 image, for reading: the present state of the disk or an internal snapshot of it."""

from __future__ import annotations

from array import array
from collections.abc import Callable

from nbdserve.block.device import BlockDevice
from nbdserve.block.extents import Computed, Data, HostOffset, Zero
from nbdserve.block.file import HostFile, WriteBuffer
from nbdserve.formats.base import MappedImage, OwnExtent, Unallocated
from nbdserve.formats.qcow2.compression import CompressedClusters
from nbdserve.formats.qcow2.entries import COMPRESSED, COPIED, NOT_COPIED, ZERO
from nbdserve.formats.qcow2.mapping import Mapping
from nbdserve.formats.qcow2.space import HostSpace, damaged


class Qcow2Image(MappedImage):
    """Maps guest clusters through L2 tables.

    locate() answers 250,000 times a second: a dictionary, an array, and comparisons with numbers. Everything a damaged
    entry could hold fails one of the comparisons, so that map() is asked, which says what is wrong.

    Args:
        size: bytes of the disk to show.
        space: the image file.
        mapping: the tables of the state to show.
        data: the file that guest clusters lie in, and how far it reaches: the image file's, or an external one's.

    Attributes:
        file: the image file.
        data_file: the file that guest clusters lie in.
    """

    def __init__(
        self,
        size: int,
        space: HostSpace,
        mapping: Mapping,
        compressed: CompressedClusters,
        backing: BlockDevice | None,
        data: HostSpace,
        *,
        read_only: bool = True,
    ) -> None:
        geometry = space.geometry
        super().__init__(size, cluster_size=geometry.unit, read_only=read_only, backing=backing)
        self.preferred_block = max(4096, geometry.unit)
        self.file = space.file
        self._data = data
        self.data_file = data.guest_file
        self._geometry = geometry
        self._mapping = mapping
        self._compressed = compressed
        self._recent = mapping.tables.recent.get
        self._recent_writable: Callable[[int], array[int] | None] = self._recent
        self._overwrites = True
        if read_only:
            self._refuse_overwrites()
        self._table_shift = geometry.table_shift
        self._cluster_bits = geometry.cluster_bits
        self._host_cluster = geometry.cluster_size
        self._cluster_mask = geometry.cluster_size - 1
        self._index_mask = geometry.entries - 1
        self._is_external = geometry.is_external

    # The fast path

    def locate(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        table = self._recent(offset >> self._table_shift)
        if table is not None:
            inside = offset & self._cluster_mask
            host = table[offset >> self._cluster_bits & self._index_mask] & NOT_COPIED
            if (
                0 < host < self._data.full_end
                and inside + length <= self._host_cluster
                and not host & self._cluster_mask
                and not self._is_external
            ):
                return self.data_file, host + inside  # type: ignore[return-value]  # HostOffset() costs a call
            if host:
                return self._place(table, offset, length, COPIED)
        return self._locate_slowly(offset, length)

    def _locate_slowly(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        """locate() for what spans clusters, what lies below, and tables not used lately."""
        key = offset >> self._table_shift
        table = self._mapping.tables.get(key)
        if table is None:
            return None if self._mapping.l1[key] else self._locate_below(offset, length)
        entry = table[offset >> self._cluster_bits & self._index_mask]
        return self._place(table, offset, length, COPIED) if entry else self._locate_below(offset, length)

    def _locate_below(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        """Where an unallocated cluster's bytes lie in the backing device, for ranges inside one cluster."""
        backing = self.backing
        if backing is None or (offset & self._cluster_mask) + length > self._host_cluster:
            return None
        return backing.locate(offset, length) if offset + length <= backing.size else None

    def locate_writable(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        table = self._recent_writable(offset >> self._table_shift)
        if table is not None:
            inside = offset & self._cluster_mask
            host = table[offset >> self._cluster_bits & self._index_mask] ^ COPIED
            if (
                0 < host < self._data.full_end
                and inside + length <= self._host_cluster
                and not host & self._cluster_mask
                and not self._is_external
            ):
                return self.data_file, host + inside  # type: ignore[return-value]  # as above
        elif self._overwrites:
            table = self._mapping.tables.get(offset >> self._table_shift)
        return None if table is None else self._place(table, offset, length, 0)

    def _refuse_overwrites(self) -> None:
        """Let nothing be overwritten but through write()."""
        self._overwrites = False
        self._recent_writable = lambda key: None

    def _place(self, table: array[int], offset: int, length: int, ignored: int) -> tuple[HostFile, HostOffset] | None:
        """Where the range lies if its clusters are plain, in a row, in one table, and COPIED unless that is ignored."""
        index = offset >> self._cluster_bits & self._index_mask
        inside = offset & self._cluster_mask
        host = (table[index] | ignored) ^ COPIED
        stop = index + (inside + length + self._cluster_mask >> self._cluster_bits)
        last = host + (stop - index - 1 << self._cluster_bits)
        if host & self._cluster_mask or not 0 < host <= last < self._data.full_end or stop > len(table):
            return None
        if self._is_external and host + inside != offset:
            return None
        if stop - index > 1 and row_length(table, index, stop, host, self._host_cluster, ignored) < stop - index:
            return None
        return self.data_file, HostOffset(host + inside)

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
        size = self._host_cluster
        entry = table[index]
        host = entry & NOT_COPIED
        if 0 < host < self._data.full_end and not host & self._cluster_mask and not self._is_external:
            count = row_length(table, index, stop, host, size, COPIED) if inside + length > size else 1
            return self._data_extent(host + inside, min(length, count * size - inside))
        if entry & COMPRESSED:
            return Computed(min(length, _run_of(table, index, stop, COMPRESSED, COMPRESSED) * size - inside))
        self._check(entry, offset)
        host = entry & self._geometry.offset_mask
        if entry & ZERO:
            count = _run_of(table, index, stop, ~COPIED, entry & ~COPIED) if not host else 1
            return Zero(min(length, count * size - inside), allocated=host != 0)
        if not self._geometry.is_placed(entry):
            return Unallocated(min(length, _run_of(table, index, stop, ~COPIED, 0) * size - inside))
        count = row_length(table, index, stop, host, size, COPIED)
        return self._data_extent(host + inside, min(length, count * size - inside))

    def _data_extent(self, host: int, length: int) -> Data | Zero | Computed:
        """Bytes of the data file; where it has holes (space set aside in advance) that is quicker told than read."""
        in_file = self._data.end - host
        if in_file <= 0:  # the last cluster need not be written out to its end
            return Zero(length, allocated=True)
        is_data, length = self.data_file.data_extent(host, min(length, in_file))
        return Data(length, self.data_file, HostOffset(host)) if is_data else Zero(length, allocated=True)

    def place_of(self, offset: int) -> tuple[HostOffset, bool] | None:
        """Where in the data file the byte at a guest offset has its place, and whether the table says that it reads as
        zeros all the same; None where it has none that holds it verbatim."""
        table = self._mapping.table(offset >> self._table_shift)
        entry = 0 if table is None else table[offset >> self._cluster_bits & self._index_mask]
        if entry & COMPRESSED or not self._geometry.is_placed(entry):
            return None
        host = (entry & self._geometry.offset_mask) + (offset & self._cluster_mask)
        return HostOffset(host), bool(entry & ZERO)

    def _check(self, entry: int, offset: int) -> None:
        """Refuse a standard L2 entry that cannot be right.

        Raises:
            OSError: EIO.
        """
        host = entry & self._geometry.offset_mask
        name, guest = self.file.name, offset & ~self._cluster_mask
        if entry & self._geometry.reserved:
            raise damaged(name, f"the L2 entry of guest offset {offset} is {entry:#x}, with reserved bits set")
        if self._is_external:
            if host != guest and self._geometry.is_placed(entry):
                raise damaged(name, f"guest offset {guest} is said to lie at {host} of the data file, not at {guest}")
        elif host >= self._data.end and not entry & ZERO:
            raise damaged(name, f"guest offset {offset} is said to lie at {host}, past the end of the file")

    def decompress(self, offset: int, buffer: WriteBuffer) -> None:
        view = memoryview(buffer)
        while view:
            inside = offset & self._cluster_mask
            piece = view[: self._host_cluster - inside]
            table = self._mapping.table(offset >> self._table_shift)
            entry = 0
            if table is not None:
                entry = table[(offset >> self._cluster_bits & self._index_mask) * self._geometry.words]
            if entry & COMPRESSED:
                piece[:] = self._compressed.content(entry)[inside : inside + len(piece)]
            else:  # overwritten since it was looked up
                self.read_into(offset, piece)
            view = view[len(piece) :]
            offset += len(piece)

    def close(self) -> None:
        super().close()
        self.data_file.close()
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
