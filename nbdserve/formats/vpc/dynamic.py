"""A dynamic VHD: blocks, each a bitmap of its sectors followed by its data, and a footer behind the last one.

The order kept here, so that a crash may leak a block but never shows wrong bytes and never costs the image its footer
(VHD specification, "Dynamic Disk Header Format" and "Block Allocation Table and Data Blocks"):

    reserve   a new footer is written one block further on, then the block's bitmap, which may cover the old footer.
              Until the new one is on the disk its copy at offset 0 counts, which nothing ever touches
    write     the block's data goes between bitmap and new footer; what is not written there is a hole
    publish   the table entry changes in memory, and on the disk when flush() has synced the data (see table)

A block is never given back: the format has no way to say so but moving another block into the gap. Zeroing and
discarding punch holes into the host file instead; bitmap and entry stay, and the block reads as zeros.

Bitmaps. In a disk without parent, QEMU reads an allocated block whatever its bitmap says, and so does this file. Other
readers may take a sector whose bit is clear for zeros, so all bits are set before anything is written into a block.
"""

from __future__ import annotations

import errno

from nbdserve.block.extents import Data, GuestOffset, HostOffset, Zero
from nbdserve.block.file import HostFile
from nbdserve.formats.base import MappedImage, OwnExtent, Reservation, Unallocated
from nbdserve.formats.vpc import FOOTER_SIZE
from nbdserve.formats.vpc.header import SECTOR, Footer, Layout
from nbdserve.formats.vpc.table import DAMAGED, UNALLOCATED, BlockTable

_LAST_SECTOR = 0xFFFFFFFE
_PAGE = 4096


class DynamicDisk(MappedImage):
    """A dynamic VHD in `file`; closing the device closes the file.

    Args:
        layout: from the disk's dynamic header.
        end: where the file's last footer begins, in bytes, or the length of the file when it ends without one.

    Attributes:
        footer: what the disk's footer says.
    """

    def __init__(self, file: HostFile, footer: Footer, layout: Layout, end: int, *, read_only: bool) -> None:
        super().__init__(footer.size, cluster_size=layout.block_size, read_only=read_only, backing=None)
        self.file = file
        self.footer = footer
        self._block_size = layout.block_size
        self._bitmap_size = layout.bitmap_size
        self._table = BlockTable(file, layout, end)
        self._places = self._table.data
        self._bitmap_set = bytearray(layout.blocks)
        self._next = -(-end // SECTOR) * SECTOR
        self._shift = layout.block_size.bit_length() - 1
        self._mask = layout.block_size - 1
        self.zeroes_fast = not read_only

    # Reading

    def lookup(self, offset: int, length: int) -> OwnExtent:
        block, inside = offset >> self._shift, offset & self._mask
        place = self._table.place(block)
        if place == UNALLOCATED:
            return Unallocated(self._unallocated(block, inside, length))
        host = HostOffset(place + inside)
        is_data, run = self.file.data_extent(host, min(length, self._block_size - inside))
        return Data(run, self.file, host) if is_data else Zero(run, allocated=False)

    def _unallocated(self, block: int, inside: int, length: int) -> int:
        """How many of the next `length` bytes lie in blocks that have no place."""
        run = self._block_size - inside
        while run < length and self._places[block + 1] == UNALLOCATED:
            block += 1
            run += self._block_size
        return min(run, length)

    def locate(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        inside = offset & self._mask
        place = self._places[offset >> self._shift]
        if place <= DAMAGED or inside + length > self._block_size:
            return None
        return self.file, HostOffset(place + inside)

    def locate_writable(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        return self.locate(offset, length) if self._bitmap_set[offset >> self._shift] else None

    # Writing

    def writable_extent(self, offset: int, length: int) -> Data | None:
        block, inside = offset >> self._shift, offset & self._mask
        place = self._table.place(block)
        if place == UNALLOCATED:
            return None
        if not self._bitmap_set[block]:
            self._set_bitmap(block, place - self._bitmap_size)
        return Data(min(length, self._block_size - inside), self.file, HostOffset(place + inside))

    def _set_bitmap(self, block: int, bitmap: int) -> None:
        """Set all bits of a block that another program has written, if they are not. Two threads may both do it."""
        all_set = b"\xff" * self._bitmap_size
        if self.file.read(bitmap, self._bitmap_size) != all_set:
            self.file.write(bitmap, all_set)
        self._bitmap_set[block] = 1

    def reserve(self, offset: int, length: int) -> Reservation:
        place, zeroed = self._new_block(b"\xff" * self._bitmap_size)
        return Reservation(
            guest_offset=GuestOffset(offset & ~self._mask),
            length=self._block_size,
            file=self.file,
            host_offset=HostOffset(place),
            zeroed=zeroed,
        )

    def _new_block(self, sectors: bytes) -> tuple[int, bool]:
        """Where the data of the next block is to go, behind its bitmap and in front of a footer, which are written;
        and whether that place reads as zeros."""
        place = self._next_place()
        bitmap = place - self._bitmap_size
        if bitmap // SECTOR > _LAST_SECTOR:
            raise OSError(
                errno.EFBIG, "the VHD file has reached 2 TiB, where its table can point no further", self.file.name
            )
        # Zeros are only certain where the file ends, not where a reservation was cancelled.
        zeroed = not self.file.is_device and self.file.size <= bitmap + FOOTER_SIZE
        self.file.write(place + self._block_size, self.footer.content)
        if bitmap > self._next + _PAGE:  # the old footer stays where a damaged entry may take it for a bitmap
            self.file.write(self._next, bytes(FOOTER_SIZE))
        self.file.write(bitmap, sectors)
        return place, zeroed

    def _next_place(self) -> int:
        """Where the data of the next block can go."""
        behind: int | None = self._next
        while behind is not None:
            # Blocks may lie anywhere: data in whole pages spares the host from reading before it can write.
            place = -(-(behind + self._bitmap_size) // _PAGE) * _PAGE
            behind = self._table.behind_claims(place - self._bitmap_size, place + self._block_size)
        return place

    def publish(self, reservation: Reservation) -> None:
        block = reservation.guest_offset >> self._shift
        self._next = reservation.host_offset + self._block_size
        self._bitmap_set[block] = 1
        self._table.publish(block, reservation.host_offset)

    def cancel(self, reservation: Reservation) -> None:
        """Nothing to do: the next reservation takes the same place, and the footer behind it is right already."""

    # Zeroing

    def _whole_clusters(self, offset: int, length: int) -> tuple[int, int]:
        """Any range will do: holes need no table."""
        return offset, offset + length

    def zero_clusters(self, offset: int, length: int, *, unmap: bool) -> bool:
        return self._clear_in_place(offset, length, unmap=unmap)

    # The end

    def flush(self) -> None:
        if not self.read_only:
            self._table.flush()

    def close(self) -> None:
        if self.file.fd >= 0:
            try:
                self.flush()
            finally:
                self.file.close()
