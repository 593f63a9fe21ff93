"""Images with extended L2 entries, for reading: clusters of 32 subclusters (QEMU, docs/interop/qcow2, "Extended L2
Entries").

To the rest of the house the subcluster is the cluster: the smallest part that is allocated, zeroed and copied. Only
here is it known that 32 of them share one place in the host.
"""

from __future__ import annotations

from array import array

from nbdserve.block.extents import Computed, HostOffset, Zero
from nbdserve.block.file import HostFile
from nbdserve.formats.base import OwnExtent, Unallocated
from nbdserve.formats.qcow2.entries import ALL_SUBCLUSTERS, COMPRESSED, COPIED, NOT_COPIED, SUBCLUSTERS
from nbdserve.formats.qcow2.image import Qcow2Image
from nbdserve.formats.qcow2.space import damaged

_COMPRESSED, _DATA, _ZERO, _NOTHING = range(4)


def run_length(bits: int, position: int) -> int:
    """How many bits from a position on are set in a row, of a word as wide as a cluster has subclusters."""
    clear = ~(bits >> position)
    return min(SUBCLUSTERS - position, (clear & -clear).bit_length() - 1)


class SubclusterImage(Qcow2Image):
    """Maps subclusters."""

    def locate(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        table = self._recent(offset >> self._table_shift)
        if table is None:
            return self._locate_slowly(offset, length)
        inside = offset & self._cluster_mask
        index = (offset >> self._cluster_bits & self._index_mask) << 1
        host = table[index] & NOT_COPIED
        if host & self._cluster_mask or not 0 < host < self._data.full_end:
            return None if host else self._locate_below(offset, length)
        if inside + length > self._host_cluster or not self._is_allocated(table[index + 1], inside, length):
            return None
        if self._is_external and host + inside != offset:
            return None
        return self.data_file, HostOffset(host + inside)

    def _locate_slowly(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        key = offset >> self._table_shift
        if self._mapping.tables.get(key) is not None:  # which makes it a recent one
            return self.locate(offset, length)
        return None if self._mapping.l1[key] else self._locate_below(offset, length)

    def _locate_below(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        """Nothing here is known about the cluster but, perhaps, that some of it reads as zeros."""
        key = offset >> self._table_shift
        table = self._mapping.tables.get(key)
        if table is not None and table[((offset >> self._cluster_bits & self._index_mask) << 1) + 1]:
            return None
        return super()._locate_below(offset, length)

    def locate_writable(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        if not self._overwrites:
            return None
        table = self._mapping.tables.get(offset >> self._table_shift)
        if table is None:
            return None
        index = (offset >> self._cluster_bits & self._index_mask) << 1
        return self.locate(offset, length) if table[index] & COPIED and table[index] & NOT_COPIED else None

    def place_of(self, offset: int) -> tuple[HostOffset, bool] | None:
        table = self._mapping.table(offset >> self._table_shift)
        if table is None:
            return None
        kind, host, _ = self._run(table, offset)
        return (HostOffset(host), kind == _ZERO) if kind == _DATA or (kind == _ZERO and host) else None

    def _is_allocated(self, bitmap: int, inside: int, length: int) -> bool:
        """Whether the subclusters of a range inside one cluster all have their data in it."""
        if bitmap == ALL_SUBCLUSTERS:
            return True
        if bitmap & bitmap >> SUBCLUSTERS:  # allocated and zeros at once: damaged
            return False
        first = inside // self.cluster_size
        wanted = (1 << (inside + length - 1) // self.cluster_size - first + 1) - 1 << first
        return bitmap & wanted == wanted

    def _own_extent(self, table: array[int], offset: int, length: int) -> OwnExtent:
        kind, host, run = self._run(table, offset)
        while run < length:
            index = (offset + run >> self._cluster_bits & self._index_mask) << 1
            if (offset + run) & self._cluster_mask or not index:  # something else follows, or another table
                break
            next_kind, next_host, next_run = self._run(table, offset + run)
            if next_kind != kind or (kind == _DATA and next_host != host + run):
                break
            if kind == _ZERO and bool(next_host) != bool(host):
                break
            run += next_run
        length = min(length, run)
        match kind:
            case 0:
                return Computed(length)
            case 1:
                return self._data_extent(host, length)
            case 2:
                return Zero(length, allocated=bool(host))
            case _:
                return Unallocated(length)

    def _run(self, table: array[int], offset: int) -> tuple[int, int, int]:
        """What lies at a guest offset: its kind, the place in the host, and how many bytes of the cluster are alike."""
        index = (offset >> self._cluster_bits & self._index_mask) << 1
        entry, bitmap = table[index], table[index + 1]
        inside = offset & self._cluster_mask
        if entry & COMPRESSED:
            return _COMPRESSED, 0, self._host_cluster - inside
        allocated, zeros = self._checked(entry, bitmap, offset)
        host = entry & self._geometry.offset_mask
        subcluster = inside // self.cluster_size
        kind, bits = _NOTHING, ~(allocated | zeros) & ALL_SUBCLUSTERS
        if allocated >> subcluster & 1:
            kind, bits = _DATA, allocated
        elif zeros >> subcluster & 1:
            kind, bits = _ZERO, zeros
        run = (subcluster + run_length(bits, subcluster)) * self.cluster_size - inside
        return kind, host + inside if host or kind == _DATA else 0, run

    def _checked(self, entry: int, bitmap: int, offset: int) -> tuple[int, int]:
        """Which subclusters are allocated, and which read as zeros.

        Raises:
            OSError: EIO, an entry that is not compressed contradicts itself.
        """
        self._check(entry, offset)
        allocated, zeros = bitmap & ALL_SUBCLUSTERS, bitmap >> SUBCLUSTERS
        if allocated & zeros or (allocated and not self._geometry.is_placed(entry)):
            raise damaged(
                self.file.name, f"the L2 entry of guest offset {offset} is {entry:#x} with subclusters {bitmap:#x}"
            )
        return allocated, zeros
