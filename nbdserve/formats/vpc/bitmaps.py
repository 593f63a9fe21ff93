"""Sector bitmaps: one bit for every sector of a block, set when the sector is in this file rather than in the parent.

In memory, bit i of byte n stands for sector 8 * n + i, as VHDX has it on the disk; VHD counts from the highest bit
down, so its bytes are mirrored on their way. They are kept a block at a time, at most _MOST_BYTES of them and those
that wait to be written; the image flushes before too many wait (MOST_WAITING bytes).
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from nbdserve.block.file import WriteBuffer

_MOST_BYTES = 16 << 20
MOST_WAITING = 4 << 20
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def run_of_bits(bitmap: bytes | bytearray, first: int, end: int) -> tuple[bool, int]:
    """Whether bit `first` is set, and how many bits from there on, up to `end`, are the same."""
    word = int.from_bytes(bitmap[first >> 3 : (end + 7) >> 3], "little") >> (first & 7)
    is_set = bool(word & 1)
    other = ~word if is_set else word
    run = (other & -other).bit_length() - 1 if other else end - first
    return is_set, min(run, end - first)


def set_bits(bitmap: bytearray, first: int, end: int) -> None:
    """Set the bits from `first` up to, not including, `end`."""
    span = slice(first >> 3, (end + 7) >> 3)
    word = int.from_bytes(bitmap[span], "little") | ((1 << (end - first)) - 1) << (first & 7)
    bitmap[span] = word.to_bytes(span.stop - span.start, "little")


def mirrored(bitmap: bytes | bytearray) -> bytearray:
    """The bitmap with the bits of every byte in reverse order."""
    return bytearray(bitmap.translate(_MIRRORED))


class SectorBitmaps:
    """The bitmaps of an image's blocks.

    Args:
        read_into: reads from the image's file.
        place: where a block's bitmap lies in the file, in bytes.
        block_size, sector_size: in bytes.
        is_mirrored: the disk has the bits of every byte the other way round.
    """

    def __init__(
        self,
        read_into: Callable[[int, WriteBuffer], None],
        place: Callable[[int], int],
        *,
        block_size: int,
        sector_size: int,
        is_mirrored: bool,
    ) -> None:
        self._read_into = read_into
        self._place = place
        self._sector_bits = sector_size.bit_length() - 1
        self._bytes = block_size // sector_size // 8
        self._is_mirrored = is_mirrored
        self._bitmaps: dict[int, bytearray] = {}
        self._most = max(16, _MOST_BYTES // self._bytes)
        self._dirty: set[int] = set()
        self._in_flight: set[int] = set()
        self._loading = threading.Lock()

    def own(self, block: int, start: int, end: int) -> tuple[bool, int]:
        """Whether the byte `start` of a block lies in a sector that is its own, and up to which byte that holds.

        `end`, where to stop looking, need not be the end of a sector.
        """
        return self._own(self._load(block), start, end)

    def is_own_in_memory(self, block: int, start: int, end: int) -> bool:
        """Whether the bitmap is in memory, and all these bytes are known to be the block's own."""
        bitmap = self._bitmaps.get(block)
        return bitmap is not None and self._own(bitmap, start, end) == (True, end)

    def is_in_memory(self, block: int) -> bool:
        """Whether own() need not read the disk."""
        return block in self._bitmaps

    def _own(self, bitmap: bytearray, start: int, end: int) -> tuple[bool, int]:
        bits = self._sector_bits
        is_set, run = run_of_bits(bitmap, start >> bits, (end + (1 << bits) - 1) >> bits)
        return is_set, min(end, ((start >> bits) + run) << bits)

    def _load(self, block: int) -> bytearray:
        bitmap = self._bitmaps.get(block)
        if bitmap is not None:
            return bitmap
        place = self._place(block)
        with self._loading:
            bitmap = self._bitmaps.get(block)
            if bitmap is None:
                bitmap = bytearray(self._bytes)
                self._read_into(place, bitmap)
                bitmap = mirrored(bitmap) if self._is_mirrored else bitmap
                self._keep(block, bitmap)
            return bitmap

    def _keep(self, block: int, bitmap: bytearray) -> None:
        if len(self._bitmaps) >= self._most:
            needed = self._dirty | self._in_flight
            clean = next((each for each in self._bitmaps if each not in needed), None)
            if clean is not None:
                del self._bitmaps[clean]
        self._bitmaps[block] = bitmap

    # Changing; under the image's allocating lock

    def clear(self, block: int) -> None:
        """Let none of a block's sectors be its own, whatever the disk says."""
        with self._loading:
            self._bitmaps.pop(block, None)
            self._keep(block, bytearray(self._bytes))
            self._dirty.add(block)

    def add(self, block: int, start: int, end: int) -> None:
        """Let the bytes from start to end, whole sectors, be the block's own."""
        bitmap = self._load(block)
        with self._loading:
            self._bitmaps[block] = bitmap  # it may just have made room for another
            set_bits(bitmap, start >> self._sector_bits, end >> self._sector_bits)
            self._dirty.add(block)

    def forget(self, block: int) -> None:
        """The block's bits mean nothing any more."""
        with self._loading:
            self._bitmaps.pop(block, None)
            self._dirty.discard(block)

    @property
    def waiting(self) -> int:
        """Bytes that wait to be written."""
        return len(self._dirty) * self._bytes

    def take(self) -> list[tuple[int, bytes]]:
        """Copies of what is to be written now: offsets in the file, and bytes."""
        with self._loading:
            self._in_flight, self._dirty = self._dirty, set()
            return [(self._place(block), self._on_disk(block)) for block in sorted(self._in_flight)]

    def _on_disk(self, block: int) -> bytes:
        bitmap = self._bitmaps[block]
        return bytes(mirrored(bitmap) if self._is_mirrored else bitmap)

    def settle(self, *, failed: bool) -> None:
        """What take() handed out is on stable storage, or has failed and must be written again."""
        with self._loading:
            if failed:
                self._dirty |= self._in_flight & self._bitmaps.keys()
            self._in_flight = set()
