"""A VDI: blocks that follow each other in the file in the order in which they were first written.

The order kept here, so that a crash may leak a block but never shows wrong bytes:

    announce  before the first change after opening, a new modification UUID is brought to the disk, so that a
              differencing image that stands on this one is known to be stale
    reserve   a block that no entry names, mostly at the end of the file, which then grows by a whole block
    write     the block's data goes there; what is not written is a hole
    publish   the entry changes in memory, and on the disk when flush() has synced the data and the header's count of
              blocks (see block_map)

A block is never given back: the format has no way to say so but moving another block into the gap. Zeroing and
discarding punch holes into the host file instead. Only in a differencing image, where an unallocated block shows the
parent, are whole blocks marked as zero.
"""

from __future__ import annotations

import threading
import uuid
from array import array

from nbdserve.block.device import BlockDevice
from nbdserve.block.extents import Data, GuestOffset, HostOffset, Zero
from nbdserve.block.file import HostFile, ReadBuffer
from nbdserve.formats.base import MappedImage, OwnExtent, Reservation, Unallocated
from nbdserve.formats.vdi.block_map import DAMAGED, UNALLOCATED, ZERO, BlockMap
from nbdserve.formats.vdi.header import MODIFICATION_UUID, Header

_AT_ONCE = 256  # entries compared at once
_UNUSED = array("I", [UNALLOCATED]) * _AT_ONCE


class VdiImage(MappedImage):
    """A VDI in `file`, over its parent if it has one; closing the device closes both."""

    def __init__(self, file: HostFile, header: Header, backing: BlockDevice | None, *, read_only: bool) -> None:
        super().__init__(header.size, cluster_size=header.block_size, read_only=read_only, backing=backing)
        self.file = file
        self._data_offset = header.data_offset
        self._map = BlockMap(file, header)
        self._entries = self._map.entries
        self._shift = header.block_size.bit_length() - 1
        self._mask = header.block_size - 1
        self._announced = False
        self._announcing = threading.Lock()
        self.zeroes_fast = not read_only

    # Reading

    def lookup(self, offset: int, length: int) -> OwnExtent:
        block, inside = offset >> self._shift, offset & self._mask
        number = self._map.number(block)
        if number >= ZERO:
            run = self._run(block, number, inside, length)
            return Unallocated(run) if number == UNALLOCATED else Zero(run, allocated=False)
        host = HostOffset(self._data_offset + (number << self._shift) + inside)
        is_data, run = self.file.data_extent(host, min(length, self.cluster_size - inside))
        return Data(run, self.file, host) if is_data else Zero(run, allocated=False)

    def _run(self, first: int, number: int, inside: int, length: int) -> int:
        """How many of the next `length` bytes lie in blocks with the same entry."""
        entries = self._entries
        stop = first + ((inside + length + self._mask) >> self._shift)
        block = first + 1
        while block < stop and entries[block] == number:
            alike = entries[block : block + _AT_ONCE] == _UNUSED  # most of a large new disk is
            block += _AT_ONCE if alike and number == UNALLOCATED else 1
        return min(length, ((min(block, stop) - first) << self._shift) - inside)

    def is_mapped_in_memory(self, offset: int, length: int) -> bool:
        return True

    def locate(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        inside = offset & self._mask
        number = self._entries[offset >> self._shift]
        if number >= DAMAGED or inside + length > self.cluster_size:
            return self._locate_below(offset, length, number)
        return self.file, HostOffset(self._data_offset + (number << self._shift) + inside)

    def _locate_below(self, offset: int, length: int, number: int) -> tuple[HostFile, HostOffset] | None:
        """Where an unallocated block's bytes lie in the parent, for ranges inside one block."""
        if self.backing is None or number != UNALLOCATED or (offset & self._mask) + length > self.cluster_size:
            return None
        return self.backing.locate(offset, length) if offset + length <= self.backing.size else None

    def locate_writable(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        inside = offset & self._mask
        number = self._entries[offset >> self._shift]
        if number >= DAMAGED or inside + length > self.cluster_size or not self._announced:
            return None
        return self.file, HostOffset(self._data_offset + (number << self._shift) + inside)

    # Writing

    def _announce(self) -> None:
        """Let the image have another modification UUID before anything in it changes."""
        if self._announced or self.read_only:
            return
        with self._announcing:
            if not self._announced:
                self.file.write(MODIFICATION_UUID, uuid.uuid4().bytes_le)
                self.file.sync()
                self._announced = True

    def write(self, offset: int, data: ReadBuffer) -> None:
        self._announce()
        super().write(offset, data)

    def zero(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self._announce()
        super().zero(offset, length, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        self._announce()
        super().discard(offset, length)

    def writable_extent(self, offset: int, length: int) -> Data | None:
        number, inside = self._map.number(offset >> self._shift), offset & self._mask
        if number >= ZERO:
            return None
        host = HostOffset(self._data_offset + (number << self._shift) + inside)
        return Data(min(length, self.cluster_size - inside), self.file, host)

    def reserve(self, offset: int, length: int) -> Reservation:
        place = self._data_offset + (self._map.allocate() << self._shift)
        # Zeros are only certain where the file ends, not in the gap that a crash has left.
        zeroed = not self.file.is_device and self.file.size <= place
        reservation = Reservation(
            guest_offset=GuestOffset(offset & ~self._mask),
            length=self.cluster_size,
            file=self.file,
            host_offset=HostOffset(place),
            zeroed=zeroed,
        )
        if zeroed:
            try:
                self.file.write(place + self.cluster_size - 1, b"\0")  # others expect whole blocks in the file
            except BaseException:
                self.cancel(reservation)
                raise
        return reservation

    def _number(self, reservation: Reservation) -> int:
        return (reservation.host_offset - self._data_offset) >> self._shift

    def publish(self, reservation: Reservation) -> None:
        self._map.publish(reservation.guest_offset >> self._shift, self._number(reservation))

    def cancel(self, reservation: Reservation) -> None:
        self._map.release(self._number(reservation))

    # Zeroing

    def _whole_clusters(self, offset: int, length: int) -> tuple[int, int]:
        """Without a parent any range will do: holes need no entry."""
        return (offset, offset + length) if self.backing is None else super()._whole_clusters(offset, length)

    def zero_clusters(self, offset: int, length: int, *, unmap: bool) -> bool:
        clear = self.file.punch_hole if unmap else self.file.zero_range
        end = offset + length
        while offset < end:
            own = self.lookup(offset, end - offset)
            match own:
                case Data() if not clear(own.host_offset, own.length):
                    return False
                case Unallocated() if self.backing is not None:
                    for block in range(offset >> self._shift, ((offset + own.length - 1) >> self._shift) + 1):
                        self._map.publish(block, ZERO)
            offset += own.length
        return True

    # The end

    def flush(self) -> None:
        if not self.read_only:
            self._map.flush()

    def close(self) -> None:
        if self.file.fd >= 0:
            try:
                self.flush()
            finally:
                self.file.close()
                super().close()
