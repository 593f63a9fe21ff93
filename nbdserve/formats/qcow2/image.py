"""The qcow2 mapping, and the order of writes that a crash cannot break.

Tables are changed in memory and written back by flush(), at close, and when many are dirty. So that neither a killed
process nor a disk that reorders writes can show a reference to something that is not there, a flush goes in steps, each
on stable storage before the next begins (QEMU, docs/interop/qcow2, "Host cluster management", "Cluster mapping"):

    1   guest data (written already), refcounts of what was allocated, tables that nothing points to yet
    1b  only when refcount blocks were added: the pointers to them
    2   L2 tables that are linked, and the L1 entries that link new ones
    3   in memory: references that step 2 has removed are subtracted from the refcounts, which the next flush writes

So refcounts rise before a reference appears and sink after it has gone: a crash leaks clusters at most. Clusters freed
in step 3 are reused only when nobody looks at them any more (block.pins), with a hole punched first (refcounts).

Locks, in the order in which they may be taken: `_flushing` (one flush at a time), `_allocating` (whoever changes the
mapping), `_loading` (which tables are in memory). No lock but `_flushing` is held during a sync.
"""

from __future__ import annotations

import errno
import threading
from array import array
from dataclasses import dataclass, field

from nbdserve.block.device import BlockDevice
from nbdserve.block.extents import Computed, Data, GuestOffset, HostOffset, Zero
from nbdserve.block.file import HostFile, ReadBuffer, WriteBuffer
from nbdserve.errors import FormatError
from nbdserve.formats.base import MappedImage, OwnExtent, Reservation, Unallocated
from nbdserve.formats.qcow2.compression import ClusterReader
from nbdserve.formats.qcow2.entries import (
    ALL_BITS,
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    OFFSET_MASK,
    ZERO,
    build_table,
    compressed_place,
    parse_table,
)
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.refcounts import RefcountChanges, Refcounts
from nbdserve.formats.qcow2.snapshots import Snapshot

_CACHED_BYTES = 32 << 20  # of L2 tables; at least _FEWEST_TABLES of them
_FEWEST_TABLES = 16


@dataclass
class _Batch:
    """What one flush writes: copies of everything that was dirty at one moment."""

    refcounts: RefcountChanges
    new_tables: list[tuple[int, bytes]] = field(default_factory=list)
    linked_tables: list[tuple[int, bytes]] = field(default_factory=list)
    l1_entries: list[tuple[int, bytes]] = field(default_factory=list)
    dirty: set[int] = field(default_factory=set)
    unlinked: set[int] = field(default_factory=set)
    parked: list[tuple[int, list[int]]] = field(default_factory=list)
    outgrown: list[tuple[int, int]] = field(default_factory=list)


class Qcow2Image(MappedImage):
    """A qcow2 image, or one of its internal snapshots.

    Args:
        size: bytes of the disk to show.
        l1: offset and entries of the L1 table to show.
    """

    def __init__(
        self,
        file: HostFile,
        header: Header,
        size: int,
        l1: tuple[int, int],
        backing: BlockDevice | None,
        *,
        read_only: bool,
    ) -> None:
        super().__init__(size, cluster_size=header.cluster_size, read_only=read_only, backing=backing)
        self.file = file
        self._header = header
        self._bits = header.cluster_bits
        self._mask = header.cluster_size - 1
        self._slot_bits = header.cluster_bits - 3
        self._slots = 1 << self._slot_bits
        self._has_zero_flag = header.version >= 3
        self._plain = COPIED | (OFFSET_MASK & ~self._mask)
        self._odd = ALL_BITS & ~self._plain  # bits that a cluster lying verbatim in the file does not have
        self._l1_offset = l1[0]
        self._l1 = parse_table(file.read(l1[0], 8 * l1[1]))
        self._l2: dict[int, array[int]] = {}
        self._most_tables = max(_FEWEST_TABLES, _CACHED_BYTES >> self._bits)
        self._dirty: set[int] = set()
        self._unlinked: set[int] = set()
        self._busy: set[int] = set()
        self._parked: list[tuple[int, list[int]]] = []
        self._metadata: set[int] = set()
        self._loading = threading.RLock()
        self._flushing = threading.Lock()
        self._compressed = ClusterReader(file, header.cluster_bits, header.compression)
        self._end = -(-file.size // self.cluster_size) * self.cluster_size
        self._refcounts = None if read_only else Refcounts(file, header, self._metadata)
        self.preferred_block = self.cluster_size
        self.zeroes_fast = not read_only and (self._has_zero_flag or backing is None)

    def protect(self, ranges: list[tuple[int, int]], snapshots: list[Snapshot]) -> None:
        """Note which clusters hold tables, so that no damaged entry can make guest data overwrite them.

        Args:
            ranges: (start, end) of parts of the file, in bytes, besides the tables that this image uses itself.
            snapshots: their tables are protected too.

        Raises:
            FormatError: two tables claim one cluster, so that changing one would break the other.
        """
        header, refcounts = self._header, self._writer()
        table_bytes = header.refcount_table_clusters << self._bits
        covered = [
            (0, self.cluster_size),
            (header.l1_offset, header.l1_offset + 8 * header.l1_entries),
            (header.refcount_table_offset, header.refcount_table_offset + table_bytes),
            *ranges,
        ]
        tables: list[int] = []
        for snapshot in snapshots:
            length = 8 * min(snapshot.l1_entries, header.l1_entries + 1024)
            if snapshot.l1_offset + length <= self._end:
                covered.append((snapshot.l1_offset, snapshot.l1_offset + length))
                tables += [entry & OFFSET_MASK for entry in parse_table(self.file.read(snapshot.l1_offset, length))]
        for start, end in covered:
            self._metadata.update(range(start >> self._bits, -(-end >> self._bits)))
        for offset in (*refcounts.block_offsets(), *(entry & OFFSET_MASK for entry in self._l1 if entry & OFFSET_MASK)):
            if offset >> self._bits in self._metadata:
                raise FormatError(
                    f"{self.file.name}: two tables claim the cluster at {offset}; the image is damaged, repair it with "
                    "'qemu-img check -r all', or open it read-only"
                )
            self._metadata.add(offset >> self._bits)
        # Snapshots share tables with the present state; that is no damage.
        self._metadata.update(offset >> self._bits for offset in tables if offset)

    def _writer(self) -> Refcounts:
        assert self._refcounts is not None, "open for reading only"
        return self._refcounts

    def _damaged(self, what: str) -> OSError:
        return OSError(errno.EIO, f"{what}; check the image with qemu-img check", self.file.name)

    # Tables

    def _table(self, index: int) -> array[int] | None:
        """The L2 table behind an L1 entry, read if need be; None where there is none."""
        table = self._l2.get(index)
        if table is not None or not self._l1[index]:
            return table
        with self._loading:
            table = self._l2.get(index)
            if table is None:
                table = self._load(index)
            return table

    def _load(self, index: int) -> array[int]:
        entry = self._l1[index]
        offset = entry & OFFSET_MASK
        if entry & L1_RESERVED or offset & self._mask or not 0 < offset < self._end:
            raise self._damaged(f"L1 entry {index} is damaged")
        table = parse_table(self.file.read(offset, self.cluster_size))
        if len(self._l2) >= self._most_tables:
            clean = next((each for each in self._l2 if each not in self._dirty and each not in self._busy), None)
            if clean is not None:
                del self._l2[clean]
        self._l2[index] = table
        return table

    def _writable_table(self, index: int) -> array[int]:
        """The L2 table, present, ours alone and marked dirty, so that it stays in memory. Under `_allocating`."""
        with self._loading:
            table = self._table(index)
            if table is not None and self._l1[index] & COPIED:
                self._dirty.add(index)
                return table
        cluster, _ = self._writer().allocate(1)
        self._end = self._writer().end
        if table is not None:  # shared with a snapshot, which keeps the old one
            self._park([(self._l1[index] & OFFSET_MASK) >> self._bits])
        with self._loading:
            table = array("Q", bytes(self.cluster_size)) if table is None else table[:]
            self._metadata.add(cluster)
            self._dirty.add(index)
            self._unlinked.add(index)
            self._l2[index] = table
            self._l1[index] = cluster << self._bits | COPIED
        return table

    # Reading

    def lookup(self, offset: int, length: int) -> OwnExtent:
        cluster = offset >> self._bits
        table = self._table(cluster >> self._slot_bits)
        if table is None:
            return Unallocated(self._absent(cluster >> self._slot_bits, offset, length))
        slot = cluster & (self._slots - 1)
        inside = offset & self._mask
        last = min(self._slots, slot + ((inside + length + self._mask) >> self._bits))
        run, extent = self._run(table, slot, last)
        size = min(length, (run << self._bits) - inside)
        if extent is not None:
            # Space set aside in advance may be a hole in the host file, which is quicker told than read.
            is_data, size = self.file.data_extent(extent + inside, size)
            return Data(size, self.file, HostOffset(extent + inside)) if is_data else Zero(size, allocated=True)
        entry = table[slot]
        if entry & COMPRESSED:
            return Computed(size)
        return Zero(size, allocated=bool(entry & OFFSET_MASK)) if entry & ZERO else Unallocated(size)

    def _run(self, table: array[int], slot: int, last: int) -> tuple[int, int | None]:
        """How many entries from slot on say the same, and where their data lies if it lies verbatim in the file."""
        entry = table[slot]
        end = slot + 1
        if not entry & self._odd:
            host = entry & OFFSET_MASK
            if not host:
                while end < last and not table[end] & ~COPIED:
                    end += 1
                return end - slot, None
            if host >= self._end:
                raise self._damaged(f"a cluster at {host} lies past the end of the file")
            expected = host + self.cluster_size
            while end < last and table[end] & ~COPIED == expected and expected < self._end:
                end += 1
                expected += self.cluster_size
            return end - slot, host
        if entry & COMPRESSED:
            while end < last and table[end] & COMPRESSED:
                end += 1
            return end - slot, None
        self._check_zero(entry)
        allocated = bool(entry & OFFSET_MASK)
        while end < last and table[end] & (self._odd | ZERO) == ZERO and bool(table[end] & OFFSET_MASK) == allocated:
            end += 1
        return end - slot, None

    def _check_zero(self, entry: int) -> None:
        """Of the entries with odd bits that are not compressed, only those with the zero flag alone are valid."""
        if not self._has_zero_flag or entry & self._odd != ZERO:
            raise self._damaged(f"L2 entry {entry:#018x} has reserved bits set")

    def _absent(self, index: int, offset: int, length: int) -> int:
        """How many of the next `length` bytes have no L2 table."""
        coverage = self._bits + self._slot_bits
        index += 1
        while index << coverage < offset + length and not self._l1[index]:
            index += 1
        return min(length, (index << coverage) - offset)

    def is_mapped_in_memory(self, offset: int, length: int) -> bool:
        coverage = self._bits + self._slot_bits
        for index in range(offset >> coverage, ((offset + length - 1) >> coverage) + 1):
            if index not in self._l2 and self._l1[index]:
                return False
        return True

    def locate(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        cluster = offset >> self._bits
        table = self._l2.get(cluster >> self._slot_bits)
        if table is None:
            return None if self._l1[cluster >> self._slot_bits] else self._locate_below(offset, length)
        slot = cluster & (self._slots - 1)
        entry = table[slot]
        host = entry & OFFSET_MASK
        if entry & self._odd or host >= self._end:
            return None
        inside = offset & self._mask
        if not host:
            return self._locate_below(offset, length)
        if inside + length > self.cluster_size and not self._is_contiguous(table, slot, inside + length, 0):
            return None
        return self.file, HostOffset(host + inside)

    def _locate_below(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        """Where an unallocated cluster's bytes lie in the backing device, for ranges inside one cluster."""
        backing = self.backing
        if backing is None or (offset & self._mask) + length > self.cluster_size or offset + length > backing.size:
            return None
        return backing.locate(offset, length)

    def locate_writable(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        cluster = offset >> self._bits
        table = self._l2.get(cluster >> self._slot_bits)
        if table is None or self.read_only:
            return None
        slot = cluster & (self._slots - 1)
        entry = table[slot]
        host = entry & OFFSET_MASK
        if entry & self._odd or not entry & COPIED or not self._is_data(host):
            return None
        inside = offset & self._mask
        if inside + length > self.cluster_size and not self._is_contiguous(table, slot, inside + length, COPIED):
            return None
        return self.file, HostOffset(host + inside)

    def _is_data(self, host: int) -> bool:
        """Whether guest data may be written to this cluster."""
        return 0 < host < self._end and host >> self._bits not in self._metadata

    def _is_contiguous(self, table: array[int], slot: int, length: int, needed: int) -> bool:
        """Whether the clusters of `length` bytes from slot on lie in a row, with the needed flags."""
        last = slot + ((length + self._mask) >> self._bits)
        if last > self._slots:
            return False
        expected = table[slot] & ~COPIED
        for entry in table[slot + 1 : last]:
            expected += self.cluster_size
            if entry & ~COPIED != expected or entry & needed != needed or expected >= self._end:
                return False
            if needed and expected >> self._bits in self._metadata:
                return False
        return True

    def decompress(self, offset: int, buffer: WriteBuffer) -> None:
        view = memoryview(buffer)
        while view:
            cluster, inside = offset >> self._bits, offset & self._mask
            piece = view[: self.cluster_size - inside]
            table = self._table(cluster >> self._slot_bits)
            entry = 0 if table is None else table[cluster & (self._slots - 1)]
            if entry & COMPRESSED:
                piece[:] = self._compressed.read(entry)[inside : inside + len(piece)]
            else:  # overwritten since it was looked up
                self.read_into(offset, piece)
            view = view[len(piece) :]
            offset += len(piece)

    # Writing

    def write(self, offset: int, data: ReadBuffer) -> None:
        self._bound_dirt()
        super().write(offset, data)

    def write_nowait(self, offset: int, data: ReadBuffer) -> bool:
        if super().write_nowait(offset, data):
            return True
        if self.read_only or not self._allocating.acquire(blocking=False):
            return False
        try:
            if not self._allocates_at_once(offset, len(data)):
                return False
            super().write(offset, data)
            return True
        finally:
            self._allocating.release()

    def _allocates_at_once(self, offset: int, length: int) -> bool:
        """Whether allocating needs neither a table from the disk nor bytes from below."""
        start, end = offset & ~self._mask, min((offset + length + self._mask) & ~self._mask, self.size)
        return (
            self._writer().is_warm
            and len(self._dirty) < self._most_tables // 2
            and self.is_mapped_in_memory(start, end - start)
            and self._is_zero_at_once(start, offset)
            and self._is_zero_at_once(offset + length, end)
        )

    def _is_zero_at_once(self, start: int, end: int) -> bool:
        while start < end:
            extent = self.map_nowait(start, end - start)
            if not isinstance(extent, Zero):
                return False
            start += extent.length
        return True

    def writable_extent(self, offset: int, length: int) -> Data | None:
        cluster = offset >> self._bits
        table = self._table(cluster >> self._slot_bits)
        if table is None:
            return None
        slot, inside = cluster & (self._slots - 1), offset & self._mask
        entry = table[slot]
        host = entry & OFFSET_MASK
        if entry & self._odd or not entry & COPIED or not host:
            return None
        if not self._is_data(host):
            raise self._damaged(f"a guest cluster lies at {host}, which is a table or past the end of the file")
        run = 1
        while run << self._bits < inside + length and slot + run < self._slots:
            expected = host + (run << self._bits)
            if table[slot + run] != expected | COPIED or not self._is_data(expected):
                break
            run += 1
        return Data(min(length, (run << self._bits) - inside), self.file, HostOffset(host + inside))

    def _needs_space(self, entry: int) -> bool:
        """Whether writing to this cluster takes a new one; a zero cluster may have one set aside already."""
        if entry & COMPRESSED or not entry & OFFSET_MASK:
            return True
        return not entry & COPIED

    def reserve(self, offset: int, length: int) -> Reservation:
        cluster, inside = offset >> self._bits, offset & self._mask
        table = self._writable_table(cluster >> self._slot_bits)
        slot = cluster & (self._slots - 1)
        most = min((inside + length + self._mask) >> self._bits, self._slots - slot)
        count = 0
        while count < most and self._needs_space(table[slot + count]):
            if table[slot + count] & self._odd and not table[slot + count] & COMPRESSED:
                self._check_zero(table[slot + count])
            count += 1
        start = GuestOffset(offset & ~self._mask)
        if not count:  # a zero cluster with space set aside: what lies there is not known
            self._check_zero(table[slot])
            host = table[slot] & OFFSET_MASK
            if not self._is_data(host):
                raise self._damaged(f"a guest cluster lies at {host}, which is a table or past the end of the file")
            return Reservation(start, self.cluster_size, self.file, HostOffset(host), zeroed=False)
        first, count = self._writer().allocate(count)
        self._end = self._writer().end
        return Reservation(start, count << self._bits, self.file, HostOffset(first << self._bits), zeroed=True)

    def publish(self, reservation: Reservation) -> None:
        cluster = reservation.guest_offset >> self._bits
        table = self._writable_table(cluster >> self._slot_bits)
        slot = cluster & (self._slots - 1)
        freed: list[int] = []
        for step in range(reservation.length >> self._bits):
            host = reservation.host_offset + (step << self._bits)
            old = table[slot + step]
            if old and old & OFFSET_MASK != host:
                freed += self._referenced(old)
            table[slot + step] = host | COPIED
        self._park(freed)

    def cancel(self, reservation: Reservation) -> None:
        if reservation.zeroed:  # else it belongs to a zero cluster, which keeps it
            first = reservation.host_offset >> self._bits
            self._park(list(range(first, first + (reservation.length >> self._bits))))

    def _referenced(self, entry: int) -> list[int]:
        """The host clusters that an L2 entry refers to; never tables, which a damaged entry must not free."""
        offset, length = entry & OFFSET_MASK, 1
        if entry & COMPRESSED:
            offset, length = compressed_place(entry, self._bits)
        elif not offset:
            return []
        clusters = range(offset >> self._bits, ((offset + length - 1) >> self._bits) + 1)
        return [cluster for cluster in clusters if cluster not in self._metadata]

    def _park(self, clusters: list[int]) -> None:
        """Set references aside that are to be subtracted when the tables on disk no longer hold them."""
        if clusters:
            self._parked.append((self.pins.mark(), clusters))

    # Zeroing

    def zero(self, offset: int, length: int, *, unmap: bool = True) -> None:
        for start, size in self._portions(offset, length):
            self._bound_dirt()
            super().zero(start, size, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        for start, size in self._portions(offset, length):
            self._bound_dirt()
            super().discard(start, size)

    def _portions(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The range in pieces that touch a bounded number of tables each."""
        step = self._most_tables // 4 << (self._bits + self._slot_bits)
        end = offset + length
        pieces = []
        while offset < end:
            stop = min(end, (offset // step + 1) * step)
            pieces.append((offset, stop - offset))
            offset = stop
        return pieces

    def zero_clusters(self, offset: int, length: int, *, unmap: bool) -> bool:
        below = 0 if self.backing is None else self.backing.size
        if not self._has_zero_flag and (offset < below or not unmap):
            return False
        cluster, stop = offset >> self._bits, -(-(offset + length) >> self._bits)
        while cluster < stop:
            index = cluster >> self._slot_bits
            last = min(stop, (index + 1) << self._slot_bits)
            if self._table(index) is not None or cluster << self._bits < below:
                self._zero_slots(index, cluster, last, below, unmap)
            cluster = last
        return True

    def _zero_slots(self, index: int, cluster: int, stop: int, below: int, unmap: bool) -> None:
        table = self._writable_table(index)
        freed: list[int] = []
        for each in range(cluster, stop):
            slot = each & (self._slots - 1)
            old = table[slot]
            new = ZERO if each << self._bits < below else 0
            if not unmap and old & COPIED and not old & COMPRESSED and old & OFFSET_MASK:
                new = old & self._plain | ZERO
            elif old:
                freed += self._referenced(old)
            table[slot] = new
        self._park(freed)

    # Writing back

    def _bound_dirt(self) -> None:
        """Flush when half of the tables in memory are dirty, so that their number stays within its bound."""
        if len(self._dirty) >= self._most_tables // 2:
            self.flush()

    def flush(self) -> None:
        if self.read_only:
            return
        with self._flushing:
            with self._allocating:
                batch = self._take_batch()
            failed = True
            try:
                self._write_batch(batch)
                failed = False
            finally:
                with self._allocating:
                    self._settle(batch, failed=failed)

    def _take_batch(self) -> _Batch:
        refcounts = self._writer()
        batch = _Batch(refcounts.changes(), dirty=self._dirty, unlinked=self._unlinked, parked=self._parked)
        for index in sorted(self._dirty):
            entry = self._l1[index]
            content = (entry & OFFSET_MASK, build_table(self._l2[index]))
            if index in self._unlinked:
                batch.new_tables.append(content)
                batch.l1_entries.append((self._l1_offset + 8 * index, entry.to_bytes(8, "big")))
            else:
                batch.linked_tables.append(content)
        batch.outgrown, refcounts.outgrown = refcounts.outgrown, []
        with self._loading:
            self._busy = self._dirty
            self._dirty, self._unlinked, self._parked = set(), set(), []
        return batch

    def _write_batch(self, batch: _Batch) -> None:
        steps = (
            [*batch.refcounts.content, *batch.new_tables],
            batch.refcounts.pointers,
            [*batch.linked_tables, *batch.l1_entries],
        )
        self._write_step(steps[0])
        self.file.sync()  # guest data as well
        for step in steps[1:]:
            if step:
                self._write_step(step)
                self.file.sync()

    def _write_step(self, pieces: list[tuple[int, bytes]]) -> None:
        for offset, content in pieces:
            self.file.write(offset, content)

    def _settle(self, batch: _Batch, *, failed: bool) -> None:
        """After a flush: mark dirty again what was not written, or subtract the references that have gone."""
        refcounts = self._writer()
        refcounts.settle(batch.refcounts, failed=failed)
        with self._loading:
            self._busy = set()
            if failed:
                self._dirty |= batch.dirty
                self._unlinked |= batch.unlinked
        if failed:
            self._parked = batch.parked + self._parked
            refcounts.outgrown = batch.outgrown + refcounts.outgrown
            return
        for mark, clusters in batch.parked:
            if self.pins.is_past(mark):
                for cluster in clusters:
                    refcounts.decrement(cluster)
            else:
                self._parked.append((mark, clusters))
        for first, count in batch.outgrown:
            for cluster in range(first, first + count):
                refcounts.decrement(cluster)

    def close(self) -> None:
        if self.file.fd < 0:
            return
        try:
            if not self.read_only:
                self.flush()  # after which nothing on disk refers to what was freed
                self.flush()  # and its refcounts sink
        finally:
            self.file.close()
            super().close()
