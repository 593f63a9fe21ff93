"""The VHDX mapping, and the order of writes that a crash cannot break.

Changes of the tables wait in memory until flush() brings them to the disk, in steps, each on stable storage before the
next begins ([MS-VHDX] 2.4 and 2.5.1):

    1   guest data (written already), and the zeros around them in new blocks
    2   only in differencing disks: sector bitmaps, and the table entries of new sector bitmap blocks
    3   the table entries of payload blocks

So no entry and no bit is on the disk before what it speaks of, and a bit counts only once its block's entry says so; a
crash leaks blocks at most. A place is used again only when no entry on the disk names it (after step 3) and nobody
looks at it any more (block.pins).

The log is not used. It lets a change of several sectors happen at once or not at all, and QEMU sends every table entry
through it. Here none of the changes needs that: an entry is 8 bytes and a bitmap's bits are one each, both inside one
sector, which disks write whole; each of them is harmless without the others of its step. What a reader finds is what it
would find after a replay, with an empty log, so an image that we left in a crash can be opened read-only by QEMU.

Headers (2.2.2.1): both GUIDs change before the first change of a session, in one go; until then nothing is written
except through write().

Locks, in the order in which they may be taken: `_flushing` (one flush at a time), `_allocating` (whoever changes the
mapping), those of the table and the bitmaps (what is in memory). No lock but `_flushing` is held during a sync, save
for the first change of the headers.
"""

from __future__ import annotations

import errno
import threading
import uuid
from typing import TYPE_CHECKING

from nbdserve.block.device import BlockDevice
from nbdserve.block.extents import Computed, Data, GuestOffset, HostOffset, Zero
from nbdserve.block.file import HostFile, ReadBuffer, WriteBuffer
from nbdserve.formats.base import MappedImage, OwnExtent, Reservation, Unallocated
from nbdserve.formats.vhdx import MIB, table
from nbdserve.formats.vhdx.headers import Headers
from nbdserve.formats.vhdx.layout import Layout
from nbdserve.formats.vhdx.log import ReplayedFile
from nbdserve.formats.vhdx.space import HostSpace
from nbdserve.formats.vhdx.table import PAGE_BITS, PAGE_MASK, PLACE_MASK, STATE_MASK, BlockTable, State
from nbdserve.formats.vpc import bitmaps
from nbdserve.formats.vpc.bitmaps import SectorBitmaps

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_FULL, _PARTIAL = int(State.FULL), int(State.PARTIAL)  # as plain numbers, for the fast path
_LONGEST_LOOK = 4096  # blocks that is_mapped_in_memory() looks at


class VhdxImage(MappedImage):
    """A VHDX in `file`; closing the device closes the file.

    What is copied when a part of it is written, the cluster, is a block, which is zeros around what was written; in a
    differencing disk it is a sector, because a block need not be there as a whole.

    Args:
        replayed: the file as it reads after its log was replayed in memory, when it has to be (only if read_only).

    Attributes:
        data_write_guid: changes whenever guest bytes were changed; by it a differencing disk knows its parent.
    """

    def __init__(
        self,
        file: HostFile,
        headers: Headers,
        layout: Layout,
        backing: BlockDevice | None,
        *,
        read_only: bool,
        replayed: ReplayedFile | None = None,
    ) -> None:
        has_parent = layout.parent_locator is not None
        cluster_size = layout.sector_size if has_parent else layout.block_size
        super().__init__(layout.size, cluster_size=cluster_size, read_only=read_only, backing=backing)
        assert read_only or replayed is None
        source = replayed or file
        self.file = file
        self._headers = headers
        self._layout = layout
        self._has_parent = has_parent
        self._replayed = replayed
        self._shift = layout.block_size.bit_length() - 1
        self._mask = layout.block_size - 1
        self._table = BlockTable(source, layout)
        self._pages, self._ratio_bits = self._table.pages, self._table.ratio_bits
        self._bitmaps = SectorBitmaps(
            source.read_into,
            self._bitmap_place,
            block_size=layout.block_size,
            sector_size=layout.sector_size,
            is_mirrored=False,
        )
        self._space = None if read_only else HostSpace(file, layout.regions, self._table.scan())
        self._stamped = False
        self._flushing = threading.Lock()
        self._parked: list[tuple[int, int, int]] = []  # pin mark, place, length
        self.zeroes_fast = not read_only

    @property
    def data_write_guid(self) -> uuid.UUID:
        return self._headers.current.data_write_guid

    # Reading

    def lookup(self, offset: int, length: int) -> OwnExtent:
        block, inside = offset >> self._shift, offset & self._mask
        entry = self._table.entry(self._table.index_of_block(block))
        match entry & STATE_MASK:
            case State.FULL:
                return self._data((entry & PLACE_MASK) + inside, min(length, self._layout.block_size - inside))
            case State.PARTIAL:
                return self._partial(block, (entry & PLACE_MASK) + inside, inside, length)
            case State.NOT_PRESENT:
                return Unallocated(self._same_state(block, inside, length))
            case _:
                return Zero(self._same_state(block, inside, length), allocated=False)

    def _same_state(self, block: int, inside: int, length: int) -> int:
        """How many of the next `length` bytes lie in blocks of the same state."""
        wanted = (inside + length + self._mask) >> self._shift
        return min(length, (self._table.run(block, wanted) << self._shift) - inside)

    def _partial(self, block: int, place: int, inside: int, length: int) -> OwnExtent:
        is_own, end = self._bitmaps.own(block, inside, min(inside + length, self._layout.block_size))
        return self._data(place, end - inside) if is_own else Unallocated(end - inside)

    def _bitmap_place(self, block: int) -> int:
        """Where the bits of a PARTIAL block lie in the file, in bytes; EIO when there are none."""
        entry = self._table.entry(self._table.index_of_bitmap(block))
        if entry & STATE_MASK != State.FULL:
            raise OSError(errno.EIO, f"block {block} is only partly there, but has no sector bitmap", self.file.name)
        ratio = self._layout.chunk_ratio
        return (entry & PLACE_MASK) + block % ratio * (MIB // ratio)

    def _data(self, host: int, length: int) -> Data | Zero | Computed:
        if self._replayed is not None:
            is_changed, end = self._replayed.next_update(host, host + length)
            length = end - host
            if is_changed or host >= self.file.size:
                return Computed(length)
            length = min(length, self.file.size - host)
        is_data, run = self.file.data_extent(host, length)
        return Data(run, self.file, HostOffset(host)) if is_data else Zero(run, allocated=False)

    def decompress(self, offset: int, buffer: WriteBuffer) -> None:
        assert self._replayed is not None  # and so nothing ever changes
        entry = self._table.entry(self._table.index_of_block(offset >> self._shift))
        self._replayed.read_into((entry & PLACE_MASK) + (offset & self._mask), buffer)

    def is_mapped_in_memory(self, offset: int, length: int) -> bool:
        first, last = offset >> self._shift, (offset + length - 1) >> self._shift
        if last - first > _LONGEST_LOOK:
            return False
        for block in range(first, last + 1):
            entry = self._table.entry_in_memory(self._table.index_of_block(block))
            if entry is None or entry == State.DAMAGED:
                return False
            if entry & STATE_MASK == State.PARTIAL and not self._bitmaps.is_in_memory(block):
                return False
        return True

    def locate(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        block, inside = offset >> self._shift, offset & self._mask
        index = block + (block >> self._ratio_bits)
        page = self._pages.get(index >> PAGE_BITS)
        if page is None or inside + length > self._layout.block_size or self._replayed is not None:
            return None
        entry = page[index & PAGE_MASK]
        state = entry & STATE_MASK
        if state == _FULL:
            return self.file, HostOffset((entry & PLACE_MASK) + inside)
        if state == _PARTIAL and self._bitmaps.is_own_in_memory(block, inside, inside + length):
            return self.file, HostOffset((entry & PLACE_MASK) + inside)
        below = self.backing if state == State.NOT_PRESENT else None
        return below.locate(offset, length) if below is not None and offset + length <= below.size else None

    def locate_writable(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        block, inside = offset >> self._shift, offset & self._mask
        index = block + (block >> self._ratio_bits)
        page = self._pages.get(index >> PAGE_BITS)
        if page is None or inside + length > self._layout.block_size or not self._stamped:
            return None
        entry = page[index & PAGE_MASK]
        state = entry & STATE_MASK
        if state != _FULL and not (
            state == _PARTIAL and self._bitmaps.is_own_in_memory(block, inside, inside + length)
        ):
            return None
        return self.file, HostOffset((entry & PLACE_MASK) + inside)

    # Writing

    def write(self, offset: int, data: ReadBuffer) -> None:
        self._before_change()
        super().write(offset, data)

    def zero(self, offset: int, length: int, *, unmap: bool = True) -> None:
        for start, size in self._portions(offset, length):
            self._before_change()
            super().zero(start, size, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        for start, size in self._portions(offset, length):
            self._before_change()
            super().discard(start, size)

    def _portions(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The range in pieces that change a bounded number of entries each."""
        step = table.MOST_WAITING << self._shift
        end = offset + length
        while offset < end:
            stop = min(end, (offset // step + 1) * step)
            yield offset, stop - offset
            offset = stop

    def _before_change(self) -> None:
        """Change the headers before anything else is changed, and keep what waits in memory within its bounds."""
        if self.read_only:
            raise self._refusal()
        if not self._stamped:
            with self._allocating:
                if not self._stamped:
                    self._headers.update(file_write_guid=uuid.uuid4(), data_write_guid=uuid.uuid4())
                    self._stamped = True
        if self._table.waiting > table.MOST_WAITING or self._bitmaps.waiting > bitmaps.MOST_WAITING:
            self.flush()

    def writable_extent(self, offset: int, length: int) -> Data | None:
        block, inside = offset >> self._shift, offset & self._mask
        entry = self._table.entry(self._table.index_of_block(block))
        end = min(inside + length, self._layout.block_size)
        is_own = entry & STATE_MASK == State.FULL
        if entry & STATE_MASK == State.PARTIAL:
            is_own, end = self._bitmaps.own(block, inside, end)
        return Data(end - inside, self.file, HostOffset((entry & PLACE_MASK) + inside)) if is_own else None

    def reserve(self, offset: int, length: int) -> Reservation:
        block, inside = offset >> self._shift, offset & self._mask
        entry = self._table.entry(self._table.index_of_block(block))
        state = entry & STATE_MASK
        assert state != State.FULL
        if not self._has_parent:
            place = self._allocate(self._layout.block_size)
            return self._reservation(block, 0, self._layout.block_size, place, zeroed=True)
        start = inside & ~(self.cluster_size - 1)
        end = min((inside + length + self.cluster_size - 1) & ~(self.cluster_size - 1), self._bytes_in(block))
        if state == State.PARTIAL:
            _, end = self._bitmaps.own(block, start, end)
            return self._reservation(block, start, end - start, entry & PLACE_MASK, zeroed=False)
        if state == State.NOT_PRESENT and end - start < self._bytes_in(block):
            self._ensure_bitmap(block)
        return self._reservation(block, start, end - start, self._allocate(self._layout.block_size), zeroed=True)

    def _bytes_in(self, block: int) -> int:
        """The guest bytes of a block; the last one may be cut off."""
        return min(self._layout.block_size, self.size - (block << self._shift))

    def _reservation(self, block: int, start: int, length: int, place: int, *, zeroed: bool) -> Reservation:
        guest = GuestOffset((block << self._shift) + start)
        return Reservation(guest, length, self.file, HostOffset(place + start), zeroed)

    def _allocate(self, length: int) -> int:
        assert self._space is not None
        place = self._space.allocate(length)
        self._table.file_end = max(self._table.file_end, place + length)
        return place

    def _ensure_bitmap(self, block: int) -> None:
        """See to it that the chunk of a block has a sector bitmap block."""
        index = self._table.index_of_bitmap(block)
        if self._table.entry(index) & STATE_MASK != State.FULL:
            self._table.set(index, self._allocate(MIB) | State.FULL)

    def publish(self, reservation: Reservation) -> None:
        block, inside = reservation.guest_offset >> self._shift, reservation.guest_offset & self._mask
        index = self._table.index_of_block(block)
        state = self._table.entry(index) & STATE_MASK
        place = reservation.host_offset - inside
        whole = self._bytes_in(block)
        new = place | State.FULL
        if self._has_parent and state in (State.NOT_PRESENT, State.PARTIAL) and reservation.length < whole:
            if state == State.NOT_PRESENT:
                self._bitmaps.clear(block)
            self._bitmaps.add(block, inside, inside + reservation.length)
            if self._bitmaps.own(block, 0, whole) != (True, whole):
                new = place | State.PARTIAL
        self._table.set(index, new)

    def cancel(self, reservation: Reservation) -> None:
        if reservation.zeroed:  # else it is a part of a block that is there
            assert self._space is not None
            place = reservation.host_offset - (reservation.guest_offset & self._mask)
            self._space.release(place, self._layout.block_size)

    # Zeroing

    def _whole_clusters(self, offset: int, length: int) -> tuple[int, int]:
        """Any range will do: holes need no table."""
        return offset, offset + length

    def zero_clusters(self, offset: int, length: int, *, unmap: bool) -> bool:
        done = True
        end = offset + length
        while offset < end:
            block, inside = offset >> self._shift, offset & self._mask
            piece = min(self._bytes_in(block) - inside, end - offset)
            if unmap and piece == self._bytes_in(block) and not self._layout.is_fixed:
                piece = self._zero_blocks(block, end)
            else:
                done &= self._clear_in_place(offset, piece, unmap=unmap)
            offset += piece
        return done

    def _zero_blocks(self, block: int, end: int) -> int:
        """Let whole blocks be zeros: this one, or those in a row that need nothing done; return how many bytes."""
        index = self._table.index_of_block(block)
        entry = self._table.entry(index)
        state = entry & STATE_MASK
        if state == State.NOT_PRESENT and self._has_parent:
            self._table.set(index, State.ZERO)
        elif state >= State.FULL:
            self._table.set(index, State.ZERO)
            self._bitmaps.forget(block)
            self._parked.append((self.pins.mark(), entry & PLACE_MASK, self._layout.block_size))
        else:
            run = self._table.run(block, (end - (block << self._shift)) >> self._shift or 1)
            return min(run << self._shift, end - (block << self._shift))
        return self._bytes_in(block)

    # Writing back

    def flush(self) -> None:
        if self.read_only:
            return
        with self._flushing:
            with self._allocating:
                bits = self._bitmaps.take()
                bitmap_blocks, payload = self._table.take()
                parked, self._parked = self._parked, []
            failed = True
            try:
                self._write_back(bits, bitmap_blocks, payload)
                failed = False
            finally:
                with self._allocating:
                    self._table.settle(failed=failed)
                    self._bitmaps.settle(failed=failed)
                    self._parked = parked + self._parked if failed else self._release(parked) + self._parked

    def _write_back(
        self, bits: Sequence[tuple[int, bytes]], bitmap_blocks: dict[int, int], payload: dict[int, int]
    ) -> None:
        self.file.sync()  # guest data
        if bits or bitmap_blocks:
            for place, content in bits:
                self.file.write(place, content)
            self._table.write(bitmap_blocks)
            self.file.sync()
        if payload:
            self._table.write(payload)
            self.file.sync()

    def _release(self, parked: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        """Give back places that no entry on the disk names any more; return those that are still looked at."""
        assert self._space is not None
        kept = []
        for mark, place, length in parked:
            if self.pins.is_past(mark):
                self._space.release(place, length)
            else:
                kept.append((mark, place, length))
        return kept

    def close(self) -> None:
        if self.file.fd < 0:
            return
        try:
            self.flush()
        finally:
            self.file.close()
            super().close()
