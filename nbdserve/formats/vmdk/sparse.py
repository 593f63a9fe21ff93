"""A sparse extent: grains, found through a directory of grain tables.

The order kept here, so that a crash may leak a grain but never shows wrong bytes (VDF, "Hosted Sparse Extents"):

    reserve   grains behind everything that any entry names; the file grows by whole grains
    write     the data goes there; what is not written is a hole
    publish   the entries change in memory, and on the disk when flush() has synced the data (see tables)

A grain is never given back: zeroing and discarding punch holes into the host file instead. Where an unallocated grain
would show the parent, whole grains are marked as zeroed, if the extent allows such entries, or else filled with zeros.

No write ends up in the header, the descriptor or a table because an entry said so: such entries may be read, but
writing there is EIO.
"""

from __future__ import annotations

import errno
from array import array

from nbdserve.block.device import BlockDevice
from nbdserve.block.extents import Computed, Data, GuestOffset, HostOffset, Zero
from nbdserve.block.file import HostFile, WriteBuffer
from nbdserve.formats.base import MappedImage, OwnExtent, Reservation, Unallocated
from nbdserve.formats.vmdk import SECTOR
from nbdserve.formats.vmdk.compression import GrainReader
from nbdserve.formats.vmdk.layout import UNALLOCATED, ZEROED, Layout
from nbdserve.formats.vmdk.tables import LAST_SECTOR, GrainTables


class SparseExtent(MappedImage):
    """A sparse extent in `file`, over the part of the parent disk that lies below it; closing it closes both."""

    def __init__(self, file: HostFile, layout: Layout, backing: BlockDevice | None, *, read_only: bool) -> None:
        super().__init__(layout.size, cluster_size=layout.grain_size, read_only=read_only, backing=backing)
        assert read_only or layout.frozen is None
        self.file = file
        self._layout = layout
        self._tables = GrainTables(file, layout, read_only=read_only)
        self._loaded = self._tables.loaded
        self._shift = layout.grain_size.bit_length() - 1
        self._mask = layout.grain_size - 1
        self._slot_bits = layout.slots.bit_length() - 1
        self._slots = layout.slots
        self._lowest = ZEROED + 1 if layout.zeroed_grains else ZEROED  # entries from here on are sectors
        self._end = file.size
        self._compressed = GrainReader(file, layout.grain_size, markers=layout.markers) if layout.compressed else None
        self.preferred_block = min(max(4096, layout.grain_size), 1 << 20)
        self.zeroes_fast = not read_only and (backing is None or layout.zeroed_grains)

    # Reading

    def lookup(self, offset: int, length: int) -> OwnExtent:
        grain, inside = offset >> self._shift, offset & self._mask
        index, slot = grain >> self._slot_bits, grain & (self._slots - 1)
        table = self._tables.table(index)
        if table is None:
            return Unallocated(self._absent(index, offset, length))
        sector = table[slot]
        last = min(self._slots, slot + ((inside + length + self._mask) >> self._shift))
        if sector < self._lowest:
            run = min(length, (self._same(table, slot, last) << self._shift) - inside)
            return Unallocated(run) if sector == UNALLOCATED else Zero(run, allocated=False)
        if self._compressed is not None:
            run = slot + 1
            while run < last and table[run] >= self._lowest:
                run += 1
            return Computed(min(length, ((run - slot) << self._shift) - inside))
        host, run = self._contiguous(table, slot, last)
        is_data, run = self.file.data_extent(host + inside, min(length, run - inside))
        return Data(run, self.file, HostOffset(host + inside)) if is_data else Zero(run, allocated=False)

    @staticmethod
    def _same(table: array[int], slot: int, last: int) -> int:
        """How many entries from slot on are equal."""
        entry = table[slot]
        if table[slot:last].count(entry) == last - slot:  # all of them, as in most of a new disk
            return last - slot
        end = slot + 1
        while end < last and table[end] == entry:
            end += 1
        return end - slot

    def _contiguous(self, table: array[int], slot: int, last: int) -> tuple[int, int]:
        """Where a grain lies in the file, and how many bytes from there belong to it and to those that follow it."""
        host = table[slot] * SECTOR
        if host >= self._end:
            raise self._damaged(f"the grain at {host} lies past the end of the file")
        step = self.cluster_size // SECTOR
        end, expected = slot + 1, table[slot] + step
        while end < last and table[end] == expected and expected * SECTOR < self._end:
            end += 1
            expected += step
        return host, (end - slot) << self._shift

    def _absent(self, index: int, offset: int, length: int) -> int:
        """How many of the next `length` bytes have no grain table."""
        coverage = self._shift + self._slot_bits
        index += 1
        while index << coverage < offset + length and self._tables.is_absent(index):
            index += 1
        return min(length, (index << coverage) - offset)

    def _damaged(self, what: str) -> OSError:
        return OSError(errno.EIO, f"{what}; check the image with qemu-img check", self.file.name)

    def is_mapped_in_memory(self, offset: int, length: int) -> bool:
        coverage = self._shift + self._slot_bits
        tables = self._tables
        return all(
            index in tables.loaded or tables.is_absent(index)
            for index in range(offset >> coverage, ((offset + length - 1) >> coverage) + 1)
        )

    def locate(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        grain, inside = offset >> self._shift, offset & self._mask
        table = self._loaded.get(grain >> self._slot_bits)
        if inside + length > self.cluster_size or self._compressed is not None:
            return None
        if table is None:
            is_absent = self._tables.is_absent(grain >> self._slot_bits)
            return self._locate_below(offset, length) if is_absent else None
        sector = table[grain & (self._slots - 1)]
        host = sector * SECTOR + inside
        if sector < self._lowest:
            return self._locate_below(offset, length) if sector == UNALLOCATED else None
        return (self.file, HostOffset(host)) if host + length <= self._end else None

    def _locate_below(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        """Where an unallocated grain's bytes lie in the parent."""
        backing = self.backing
        return None if backing is None or offset + length > backing.size else backing.locate(offset, length)

    def locate_writable(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        grain, inside = offset >> self._shift, offset & self._mask
        table = self._loaded.get(grain >> self._slot_bits)
        if table is None or self.read_only or inside + length > self.cluster_size:
            return None
        sector = table[grain & (self._slots - 1)]
        host = sector * SECTOR
        if sector < self._lowest or host + inside + length > self._end:
            return None
        if self._tables.is_guarded(host, host + self.cluster_size):
            return None
        return self.file, HostOffset(host + inside)

    def decompress(self, offset: int, buffer: WriteBuffer) -> None:
        assert self._compressed is not None
        view = memoryview(buffer)
        while view:
            grain, inside = offset >> self._shift, offset & self._mask
            table = self._tables.table(grain >> self._slot_bits)
            assert table is not None
            needed = min(self.cluster_size, self.size - (grain << self._shift))
            content = self._compressed.read(table[grain & (self._slots - 1)], needed)
            piece = view[: needed - inside]
            piece[:] = content[inside : inside + len(piece)]
            view = view[len(piece) :]
            offset += len(piece)

    # Writing

    def writable_extent(self, offset: int, length: int) -> Data | None:
        grain, inside = offset >> self._shift, offset & self._mask
        table = self._tables.table(grain >> self._slot_bits)
        slot = grain & (self._slots - 1)
        if table is None or table[slot] < self._lowest:
            return None
        last = min(self._slots, slot + ((inside + length + self._mask) >> self._shift))
        host, run = self._contiguous(table, slot, last)
        self._refuse_guarded(host, run)
        return Data(min(length, run - inside), self.file, HostOffset(host + inside))

    def _refuse_guarded(self, host: int, length: int) -> None:
        """EIO where guest data would overwrite a header or table."""
        if self._tables.is_guarded(host, host + length):
            raise self._damaged(f"the grain at {host} lies on the header or a table")

    def reserve(self, offset: int, length: int) -> Reservation:
        grain, inside = offset >> self._shift, offset & self._mask
        index, slot = grain >> self._slot_bits, grain & (self._slots - 1)
        self._tables.mark()
        table = self._tables.table(index)
        if table is None:
            self._tables.add(index)
            table = self._tables.table(index)
            assert table is not None
        last = min(self._slots, slot + ((inside + length + self._mask) >> self._shift))
        count = 1
        while slot + count < last and table[slot + count] < self._lowest:
            count += 1
        place = -(-self._tables.end // self.cluster_size) * self.cluster_size
        size = count << self._shift
        if (place + size) // SECTOR > LAST_SECTOR:
            raise OSError(
                errno.EFBIG, "the VMDK extent has reached 2 TiB, where it can point no further", self.file.name
            )
        # Zeros are only certain where the file ends, not where a reservation was cancelled.
        zeroed = not self.file.is_device and self.file.size <= place
        if zeroed:
            self.file.write(place + size - 1, b"\0")  # others expect whole grains in the file
        return Reservation(
            guest_offset=GuestOffset(grain << self._shift),
            length=size,
            file=self.file,
            host_offset=HostOffset(place),
            zeroed=zeroed,
        )

    def publish(self, reservation: Reservation) -> None:
        grain = reservation.guest_offset >> self._shift
        step = self.cluster_size // SECTOR
        first = reservation.host_offset // SECTOR
        count = reservation.length >> self._shift
        self._tables.end = self._end = reservation.host_offset + reservation.length
        entries = [first + each * step for each in range(count)]
        self._tables.publish(grain >> self._slot_bits, grain & (self._slots - 1), entries)

    def cancel(self, reservation: Reservation) -> None:
        """Nothing to do: the next reservation takes the same place."""

    # Zeroing

    def _whole_clusters(self, offset: int, length: int) -> tuple[int, int]:
        """Without a parent any range will do: holes need no entry."""
        return (offset, offset + length) if self.backing is None else super()._whole_clusters(offset, length)

    def zero_clusters(self, offset: int, length: int, *, unmap: bool) -> bool:
        clear = self.file.punch_hole if unmap else self.file.zero_range
        end = offset + length
        done = True
        while offset < end:
            own = self.lookup(offset, end - offset)
            match own:
                case Data():
                    self._refuse_guarded(own.host_offset, own.length)
                    done = clear(own.host_offset, own.length) and done
                case Unallocated() if self.backing is not None:
                    done = self._mark_zeroed(offset, own.length) and done
            offset += own.length
        return done

    def _mark_zeroed(self, offset: int, length: int) -> bool:
        """Let whole unallocated grains read as zeros; False when the extent has no entry that says so."""
        if not self._layout.zeroed_grains:
            return False
        self._tables.mark()
        grain, stop = offset >> self._shift, (offset + length + self._mask) >> self._shift
        while grain < stop:
            index, slot = grain >> self._slot_bits, grain & (self._slots - 1)
            count = min(self._slots - slot, stop - grain)
            if self._tables.table(index) is None:
                self._tables.add(index)
            self._tables.publish(index, slot, [ZEROED] * count)
            grain += count
        return True

    # The end

    def flush(self) -> None:
        if not self.read_only:
            self._tables.flush()

    def close(self) -> None:
        if self.file.fd >= 0:
            try:
                if not self.read_only:
                    self._tables.close()
            finally:
                self.file.close()
                super().close()
