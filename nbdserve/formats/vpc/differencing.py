"""A differencing VHD: a dynamic one whose blocks hold some sectors, and whose parent holds the rest.

The order kept here, so that a crash shows every sector as it was or as it is (VHD specification, "Block Allocation
Table and Data Blocks"); each step is on stable storage before the next begins:

    1   sectors of guest data, written already; the bitmap of a new block says that none of its sectors is there
    2   bitmaps: bits are set for the sectors of step 1
    3   table entries of new blocks (see table)

Bits are one each inside a sector, which disks write whole, and each is harmless without the others. A block is never
given back, and no bit is ever cleared: zeroing punches holes, and writes zeros over what the parent would show.
"""

from __future__ import annotations

import threading

from nbdserve.block.device import BlockDevice
from nbdserve.block.extents import Data, GuestOffset, HostOffset, Zero
from nbdserve.block.file import HostFile, ReadBuffer
from nbdserve.formats.base import MappedImage, OwnExtent, Reservation, Unallocated
from nbdserve.formats.vpc.bitmaps import MOST_WAITING, SectorBitmaps
from nbdserve.formats.vpc.dynamic import DynamicDisk
from nbdserve.formats.vpc.header import SECTOR, Footer, Layout
from nbdserve.formats.vpc.table import DAMAGED, UNALLOCATED


class DifferencingDisk(DynamicDisk):
    """A differencing VHD over its parent; what is copied when a part of it is written is a sector."""

    def __init__(
        self, file: HostFile, footer: Footer, layout: Layout, end: int, parent: BlockDevice, *, read_only: bool
    ) -> None:
        super().__init__(file, footer, layout, end, read_only=read_only)
        self.cluster_size = SECTOR
        self.backing = parent
        self._bitmaps = SectorBitmaps(
            file.read_into, self._bitmap_place, block_size=layout.block_size, sector_size=SECTOR, is_mirrored=True
        )
        self._flushing = threading.Lock()
        self.zeroes_fast = False

    def _bitmap_place(self, block: int) -> int:
        return self._table.place(block) - self._bitmap_size

    # Reading

    def lookup(self, offset: int, length: int) -> OwnExtent:
        block, inside = offset >> self._shift, offset & self._mask
        place = self._table.place(block)
        if place == UNALLOCATED:
            return Unallocated(self._unallocated(block, inside, length))
        is_own, end = self._bitmaps.own(block, inside, min(inside + length, self._block_size))
        if not is_own:
            return Unallocated(end - inside)
        host = HostOffset(place + inside)
        is_data, run = self.file.data_extent(host, end - inside)
        return Data(run, self.file, host) if is_data else Zero(run, allocated=False)

    def is_mapped_in_memory(self, offset: int, length: int) -> bool:
        blocks = range(offset >> self._shift, ((offset + length - 1) >> self._shift) + 1)
        return all(self._places[block] == UNALLOCATED or self._bitmaps.is_in_memory(block) for block in blocks)

    def locate(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        if self._places[offset >> self._shift] != UNALLOCATED:
            return self._locate_own(offset, length)
        parent = self.backing
        if parent is None or (offset & self._mask) + length > self._block_size or offset + length > parent.size:
            return None
        return parent.locate(offset, length)

    def locate_writable(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        return None if self.read_only else self._locate_own(offset, length)

    def _locate_own(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        block, inside = offset >> self._shift, offset & self._mask
        place = self._places[block]
        if place <= DAMAGED or inside + length > self._block_size:
            return None
        if not self._bitmaps.is_own_in_memory(block, inside, inside + length):
            return None
        return self.file, HostOffset(place + inside)

    # Writing

    def write(self, offset: int, data: ReadBuffer) -> None:
        self._bound_waiting()
        super().write(offset, data)

    def zero(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self._bound_waiting()
        super().zero(offset, length, unmap=unmap)

    def _bound_waiting(self) -> None:
        if self._bitmaps.waiting > MOST_WAITING:
            self.flush()

    def writable_extent(self, offset: int, length: int) -> Data | None:
        block, inside = offset >> self._shift, offset & self._mask
        place = self._table.place(block)
        if place == UNALLOCATED:
            return None
        is_own, end = self._bitmaps.own(block, inside, min(inside + length, self._block_size))
        return Data(end - inside, self.file, HostOffset(place + inside)) if is_own else None

    def reserve(self, offset: int, length: int) -> Reservation:
        block, inside = offset >> self._shift, offset & self._mask
        start = inside & -SECTOR
        end = min((inside + length + SECTOR - 1) & -SECTOR, self._block_size)
        place = self._table.place(block)
        zeroed = False
        if place == UNALLOCATED:
            place, zeroed = self._new_block(bytes(self._bitmap_size))
        else:
            _, end = self._bitmaps.own(block, start, end)
        guest = GuestOffset((block << self._shift) + start)
        return Reservation(guest, end - start, self.file, HostOffset(place + start), zeroed)

    def publish(self, reservation: Reservation) -> None:
        block, start = reservation.guest_offset >> self._shift, reservation.guest_offset & self._mask
        is_new = self._places[block] == UNALLOCATED
        if is_new:
            self._bitmaps.clear(block)
        self._bitmaps.add(block, start, start + reservation.length)
        if is_new:
            self._next = reservation.host_offset - start + self._block_size
            self._table.publish(block, reservation.host_offset - start)

    # The end

    def flush(self) -> None:
        if self.read_only:
            return
        with self._flushing:
            with self._allocating:
                bits = self._bitmaps.take()
            failed = True
            try:
                if bits:
                    self.file.sync()
                    for place, content in bits:
                        self.file.write(place, content)
                super().flush()
                failed = False
            finally:
                self._bitmaps.settle(failed=failed)

    def close(self) -> None:
        try:
            super().close()
        finally:
            MappedImage.close(self)
