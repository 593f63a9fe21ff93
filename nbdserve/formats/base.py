"""MappedImage: reading, writing, zeroing and walking the backing chain, once, above all formats.

A format says where its own clusters lie (lookup) and hands out host space for new ones (reserve, publish). The order
that everything here keeps, so that a crash may leak host space but never shows wrong bytes:

    reserve   the format sets host space aside; nothing points to it yet
    write     data goes there, with the rest of the cluster copied from what the guest saw before
    publish   only now the mapping is changed, and the format brings the change to the disk no earlier than the data

Allocation, zeroing and discarding hold one lock per image (`_allocating`); overwriting what is already mapped takes
none, which is why freed host space must wait for pins (see block.pins) before it is reused.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from nbdserve.block.device import BlockDevice
from nbdserve.block.extents import Computed, Data, Extent, GuestOffset, HostOffset, Zero
from nbdserve.block.file import HostFile, ReadBuffer, WriteBuffer


class Unallocated(NamedTuple):
    """This image says nothing about the next `length` bytes: its backing device does, or they are zeros."""

    length: int


OwnExtent: TypeAlias = Data | Zero | Computed | Unallocated


@dataclass(frozen=True, slots=True)
class Reservation:
    """Host space for whole clusters, not yet visible to anyone.

    Attributes:
        guest_offset: where the first cluster begins in the guest, in bytes.
        length: bytes, a multiple of the cluster size; may reach past the end of the device by part of a cluster.
        file, host_offset: the contiguous place that will hold them.
        zeroed: the place reads as zeros already, so zeros need not be written.
    """

    guest_offset: GuestOffset
    length: int
    file: HostFile
    host_offset: HostOffset
    zeroed: bool


class MappedImage(BlockDevice):
    """An image that maps clusters of `cluster_size` bytes (a power of two), over an optional backing device.

    The backing device may be shorter (the rest reads as zeros) or longer (the rest is not seen) and is closed with
    this image. It is only ever read.
    """

    def __init__(self, size: int, *, cluster_size: int, read_only: bool, backing: BlockDevice | None) -> None:
        super().__init__(size, read_only=read_only)
        self.cluster_size = cluster_size
        self.backing = backing
        self._allocating = threading.RLock()
        self.useful_writers = 3  # more would only wait for that lock, and for the interpreter's

    # What a format provides. The first two may be called at any time, the others only under the lock; a
    # format that is only read does without those.

    @abstractmethod
    def lookup(self, offset: int, length: int) -> OwnExtent:
        """This image's own extent at offset, 1 to length bytes, without its backing device."""

    def decompress(self, offset: int, buffer: WriteBuffer) -> None:
        """Fill the buffer from clusters that lookup() called Computed."""
        raise AssertionError(f"{type(self).__name__} computes nothing")

    def reserve(self, offset: int, length: int) -> Reservation:
        """Set host space aside for the cluster that holds offset and for as many of those after it, up to
        offset + length, as lie in a row in the host and cannot be overwritten in place either."""
        raise self._refusal()

    def publish(self, reservation: Reservation) -> None:
        """Let the guest clusters point to the reservation, whose data has been written."""
        raise self._refusal()

    def cancel(self, reservation: Reservation) -> None:
        """Give a reservation back that will not be published."""
        raise self._refusal()

    def zero_clusters(self, offset: int, length: int, *, unmap: bool) -> bool:
        """Make whole clusters read as zeros through the tables alone; False when the format cannot say so for them.

        offset is a multiple of cluster_size; so is length, or the range ends at the end of the device.
        """
        raise self._refusal()

    def is_mapped_in_memory(self, offset: int, length: int) -> bool:
        """Whether lookup() of the range needs no table that would have to be read from the disk."""
        return False

    # Reading

    def map_nowait(self, offset: int, length: int) -> Extent | None:
        if not self.is_mapped_in_memory(offset, length):
            return None
        extent = self.lookup(offset, length)
        if not isinstance(extent, Unallocated):
            return extent
        if self.backing is None or offset >= self.backing.size:
            return Zero(extent.length, allocated=False)
        below = self.backing.map_nowait(offset, min(extent.length, self.backing.size - offset))
        return below and below._replace(depth=below.depth + 1)

    def map(self, offset: int, length: int) -> Extent:
        extent = self.lookup(offset, length)
        return self._below(offset, extent.length) if isinstance(extent, Unallocated) else extent

    def _below(self, offset: int, length: int) -> Extent:
        backing = self.backing
        if backing is None or offset >= backing.size:
            return Zero(length, allocated=False)
        extent = backing.map(offset, min(length, backing.size - offset))
        return extent._replace(depth=extent.depth + 1)

    def read_computed(self, offset: int, buffer: WriteBuffer) -> None:
        view = memoryview(buffer)
        while view:
            own = self.lookup(offset, len(view))
            piece = view[: own.length]
            match own:
                case Computed():
                    self.decompress(offset, piece)
                case Unallocated() if self.backing is not None:
                    self.backing.read_computed(offset, piece)
                case _:  # changed since map() said Computed: a write got there first
                    self.read_into(offset, piece)
            view = view[own.length :]
            offset += own.length

    # Writing

    def write(self, offset: int, data: ReadBuffer) -> None:
        if self.read_only:
            raise self._refusal()
        view = memoryview(data)
        with self.pins.held():
            while view:
                done = self._overwrite(offset, view) or self._allocate_and_write(offset, view)
                view = view[done:]
                offset += done

    def writable_extent(self, offset: int, length: int) -> Data | None:
        """What may be overwritten in place, from offset on; None when the first byte may not."""
        own = self.lookup(offset, length)
        return own if isinstance(own, Data) else None

    def _overwrite(self, offset: int, view: memoryview) -> int:
        extent = self.writable_extent(offset, len(view))
        if extent is None:
            return 0
        extent.file.write(extent.host_offset, view[: extent.length])
        return extent.length

    def _allocate_and_write(self, offset: int, view: memoryview) -> int:
        with self._allocating:
            if done := self._overwrite(offset, view):  # another thread has allocated it in the meantime
                return done
            reservation = self.reserve(offset, len(view))
            try:
                done = self._fill(reservation, offset, view)
            except BaseException:
                self.cancel(reservation)
                raise
            self.publish(reservation)
            return done

    def _fill(self, reservation: Reservation, offset: int, view: memoryview) -> int:
        """Write the data, and around it what the guest saw there before; return how much of view went in."""
        start, end = reservation.guest_offset, reservation.guest_offset + reservation.length
        piece = view[: end - offset]
        after = offset + len(piece)
        head = self._copied(start, offset, reservation.zeroed)
        tail = self._copied(after, end, reservation.zeroed)
        reservation.file.write_all(reservation.host_offset + offset - start - len(head), [head, piece, tail])
        return len(piece)

    def _copied(self, start: int, end: int, zeroed: bool) -> bytearray | bytes:
        """The guest's present bytes of [start, end), or nothing when they are zeros that need not be written."""
        inside = max(0, min(end, self.size) - start)
        if zeroed and all(isinstance(extent, Zero) for extent in self.extents(start, inside)):
            return b""
        content = self.read(start, inside)
        content.extend(bytes(end - start - inside))
        return content

    def zero(self, offset: int, length: int, *, unmap: bool = True) -> None:
        if self.read_only:
            raise self._refusal()
        start, stop = self._whole_clusters(offset, length)
        if start >= stop:
            self._write_zeros(offset, length)
            return
        self._write_zeros(offset, start - offset)
        with self._allocating:
            done = self.zero_clusters(start, stop - start, unmap=unmap)
        if not done:
            self._write_zeros(start, stop - start)
        self._write_zeros(stop, offset + length - stop)

    def _clear_in_place(self, offset: int, length: int, *, unmap: bool) -> bool:
        """Zero what the range has mapped, where it lies; for zero_clusters() of formats whose holes read as zeros.

        Returns:
            Whether the range reads as zeros now: not where the host cannot, nor where a backing device shows through.
        """
        done = True
        end = offset + length
        while offset < end:
            own = self.lookup(offset, end - offset)
            if isinstance(own, Data):
                clear = own.file.punch_hole if unmap else own.file.zero_range
                done &= clear(own.host_offset, own.length)
            elif isinstance(own, Unallocated):
                done &= self.backing is None
            offset += own.length
        return done

    def discard(self, offset: int, length: int) -> None:
        if self.read_only:
            raise self._refusal()
        start, stop = self._whole_clusters(offset, length)
        if start < stop:
            with self._allocating:
                self.zero_clusters(start, stop - start, unmap=True)

    def _whole_clusters(self, offset: int, length: int) -> tuple[int, int]:
        """The part of the range that covers clusters entirely; the device's end completes its last cluster."""
        mask = self.cluster_size - 1
        end = offset + length
        return (offset + mask) & ~mask, end if end == self.size else end & ~mask

    def _write_zeros(self, offset: int, length: int) -> None:
        """Write zero bytes where the range does not read as zeros already."""
        end = offset + length
        while offset < end:
            extent = self.map(offset, min(end - offset, 1 << 20))
            if not isinstance(extent, Zero):
                self.write(offset, bytes(extent.length))
            offset += extent.length

    def close(self) -> None:
        if self.backing is not None:
            self.backing.close()
