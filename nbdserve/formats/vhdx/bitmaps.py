"""Which sectors of a differencing disk's blocks are its own ([MS-VHDX] 2.4).

The bits of a payload block lie in a row in the sector bitmap block of its chunk; they mean something only while the
block is PARTIAL. They are kept in memory a payload block at a time, at most _MOST_BYTES of them and those that wait to
be written; the image flushes before too many wait (MOST_WAITING bytes).
"""

from __future__ import annotations

import errno
import threading

from nbdserve.block.file import HostFile
from nbdserve.formats.vhdx.layout import Layout
from nbdserve.formats.vhdx.log import ReplayedFile
from nbdserve.formats.vhdx.table import PLACE_MASK, STATE_MASK, BlockTable, State

_MOST_BYTES = 16 << 20
MOST_WAITING = 4 << 20


class SectorBitmaps:
    """The bitmaps of payload blocks, in the bit order of formats.vpc.bits."""

    def __init__(self, file: HostFile | ReplayedFile, layout: Layout, table: BlockTable) -> None:
        self._file = file
        self._table = table
        self.bytes = layout.block_size // layout.sector_size // 8
        self._ratio = layout.chunk_ratio
        self._bitmaps: dict[int, bytearray] = {}
        self._most = max(16, _MOST_BYTES // self.bytes)
        self._dirty: set[int] = set()
        self._in_flight: set[int] = set()
        self._loading = threading.Lock()

    def get(self, block: int) -> bytearray:
        """The bitmap of a PARTIAL block; EIO when there is none."""
        bitmap = self._bitmaps.get(block)
        return self._load(block) if bitmap is None else bitmap

    def in_memory(self, block: int) -> bytearray | None:
        """The bitmap, if it need not be read."""
        return self._bitmaps.get(block)

    def _load(self, block: int) -> bytearray:
        place = self._place(block)
        with self._loading:
            bitmap = self._bitmaps.get(block)
            if bitmap is None:
                bitmap = self._file.read(place, self.bytes)
                self._keep(block, bitmap)
            return bitmap

    def _place(self, block: int) -> int:
        """Where a block's bitmap lies in the file, in bytes."""
        entry = self._table.entry(self._table.index_of_bitmap(block))
        if entry & STATE_MASK != State.FULL:
            raise OSError(errno.EIO, f"block {block} is only partly there, but has no sector bitmap", self._file.name)
        return (entry & PLACE_MASK) + block % self._ratio * self.bytes

    def _keep(self, block: int, bitmap: bytearray) -> None:
        if len(self._bitmaps) >= self._most:
            needed = self._dirty | self._in_flight
            clean = next((each for each in self._bitmaps if each not in needed), None)
            if clean is not None:
                del self._bitmaps[clean]
        self._bitmaps[block] = bitmap

    # Changing; under the image's allocating lock

    def start(self, block: int) -> bytearray:
        """An empty bitmap for a block that becomes PARTIAL; what the file says of it is stale."""
        with self._loading:
            self._bitmaps.pop(block, None)
            self._keep(block, bytearray(self.bytes))
            self._dirty.add(block)
            return self._bitmaps[block]

    def changed(self, block: int) -> None:
        """Note that a bitmap has been changed."""
        with self._loading:
            self._dirty.add(block)

    def forget(self, block: int) -> None:
        """The block is no longer PARTIAL, so its bits mean nothing."""
        with self._loading:
            self._bitmaps.pop(block, None)
            self._dirty.discard(block)

    @property
    def waiting(self) -> int:
        """Bytes that wait to be written."""
        return len(self._dirty) * self.bytes

    def take(self) -> list[tuple[int, bytes]]:
        """Copies of what is to be written now: offsets in the file, and bytes."""
        with self._loading:
            self._in_flight, self._dirty = self._dirty, set()
            return [(self._place(block), bytes(self._bitmaps[block])) for block in sorted(self._in_flight)]

    def settle(self, *, failed: bool) -> None:
        """What take() handed out is on stable storage, or has failed and must be written again."""
        with self._loading:
            if failed:
                self._dirty |= self._in_flight & self._bitmaps.keys()
            self._in_flight = set()
