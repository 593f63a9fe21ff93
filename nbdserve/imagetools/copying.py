"""Copies what one disk shows to another, in large pieces, by several threads.

Whether a piece holds data is asked of the source's map first, then of the bytes themselves, so what is sparse stays
sparse. Pieces begin at multiples of their size, so that no two threads meet in one cluster of the target.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import NamedTuple

from nbdserve.block import BlockDevice, Computed, Extent, Zero
from nbdserve.block.file import ReadBuffer

PIECE = 2 << 20  # bytes read and written at once
_UNIT = 64 << 10  # bytes; smaller holes are not worth a request of their own
_SECTOR = 512
_ZEROS = bytes(PIECE)
_LONGEST_ZEROS = 1 << 30  # bytes zeroed at once, so that a cancelled copy ends soon


class Piece(NamedTuple):
    """A part of the disk; `zero` when the map says that it reads as zeros."""

    offset: int
    length: int
    zero: bool


@dataclass(slots=True)
class Copy:
    """What is to be copied, and how.

    Attributes:
        source, target: the disks; the target is at least as long.
        write: how data gets to the target.
        blank: the target reads as zeros, so zeros need not be written.
        sparse: runs of so many zero bytes, at multiples of as many, are not written as data; 0: all is.
        unit: data is copied in multiples of so many bytes, a power of two.
        only_top: what lies below the source's top image is left to the target's backing file.
        unreadable: if it is a list, parts of the source that cannot be read are zeros, and noted in it.
        workers: threads.
    """

    source: BlockDevice
    target: BlockDevice
    write: Callable[[int, ReadBuffer], None]
    blank: bool = True
    sparse: int = 4096
    unit: int = _UNIT
    only_top: bool = False
    unreadable: list[tuple[int, int]] | None = None
    workers: int = 4
    position: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: bool = False

    def run(self, progress: Callable[[int], None] = lambda done: None) -> None:
        """Copy all.

        Args:
            progress: told ten times a second how many bytes of the source have been dealt with.

        Raises:
            OSError: reading or writing failed.
        """
        pieces = self._pieces()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                running = {pool.submit(self._work, pieces) for _ in range(self.workers)}
                while running:
                    done, running = wait(running, timeout=0.1, return_when=FIRST_EXCEPTION)
                    for each in done:
                        each.result()
                    progress(self.position)
            finally:
                self._stopped = True  # after an error or Ctrl-C the others end with the piece they are at
        progress(self.source.size)

    def _work(self, pieces: Iterator[Piece]) -> None:
        buffer = bytearray(min(PIECE, self.source.size))
        while not self._stopped:
            with self._lock:
                piece = next(pieces, None)
                if piece is None:
                    return
                self.position = piece.offset
            if piece.zero:
                self._write_zeros(piece.offset, piece.length)
            else:
                view = memoryview(buffer)[: piece.length]
                self._read(piece.offset, view)
                self._write(piece.offset, buffer, piece.length)

    # Which pieces

    def _pieces(self) -> Iterator[Piece]:
        """Data, and zeros where they have to be written, in order."""
        start = stop = 0
        for low, high in self._data():
            if low > stop:
                yield from _cut(start, stop, PIECE, zero=False)
                yield from self._gap(stop, low)
                start = low
            stop = high
            whole = stop // PIECE * PIECE
            if whole > start:
                yield from _cut(start, whole, PIECE, zero=False)
                start = whole
        yield from _cut(start, stop, PIECE, zero=False)
        yield from self._gap(stop, self.source.size)

    def _gap(self, start: int, stop: int) -> Iterator[Piece]:
        """Where there is no data in the source."""
        if self.blank or self.only_top:
            return iter(())
        return _cut(start, stop, _LONGEST_ZEROS, zero=True)

    def _data(self) -> Iterator[tuple[int, int]]:
        """(start, end) of what has to be read, in whole units; ranges may touch, but do not overlap."""
        size, unit = self.source.size, self.unit
        offset = told = 0
        for extent in self._extents():
            low, offset = offset, offset + extent.length
            if extent.depth if self.only_top else self.sparse and isinstance(extent, Zero):
                continue
            start, told = max(told, low // unit * unit), max(told, min(size, -(-offset // unit) * unit))
            if start < told:
                yield start, told

    def _extents(self) -> Iterator[Extent]:
        """The source's extents; what the map cannot tell has to be tried."""
        offset, size = 0, self.source.size
        while offset < size:
            try:
                for extent in self.source.extents(offset, size - offset):
                    yield extent
                    offset += extent.length
            except OSError:
                if self.unreadable is None:
                    raise
                yield Computed(min(_SECTOR, size - offset))
                offset += _SECTOR

    # Reading and writing

    def _read(self, offset: int, view: memoryview) -> None:
        try:
            self.source.read_into(offset, view)
        except OSError:
            if self.unreadable is None:
                raise
            self._read_what_can_be(offset, view)

    def _read_what_can_be(self, offset: int, view: memoryview) -> None:
        """Halve a range that cannot be read until what is left are single sectors, which become zeros."""
        assert self.unreadable is not None
        if len(view) <= _SECTOR:
            view[:] = bytes(len(view))
            with self._lock:
                self.unreadable.append((offset, len(view)))
            return
        half = -(-len(view) // 2 // _SECTOR) * _SECTOR
        for start, part in ((offset, view[:half]), (offset + half, view[half:])):
            if part:
                try:
                    self.source.read_into(start, part)
                except OSError:
                    self._read_what_can_be(start, part)

    def _write_zeros(self, offset: int, length: int) -> None:
        if self.only_top or not self.blank:
            self.target.zero(offset, length)

    def _write(self, offset: int, buffer: bytearray, length: int) -> None:
        """Write the first `length` bytes of the buffer, without long runs of zeros."""
        view = memoryview(buffer)[:length]
        if not self.sparse:
            self.write(offset, view)
            return
        start = 0
        for low, high in zero_runs(buffer, length, self.sparse):
            if low > start:
                self.write(offset + start, view[start:low])
            self._write_zeros(offset + low, high - low)
            start = high
        if start < length:
            self.write(offset + start, view[start:])


def _cut(start: int, stop: int, longest: int, *, zero: bool) -> Iterator[Piece]:
    """A range in pieces that end at multiples of `longest`."""
    while start < stop:
        end = min(stop, (start // longest + 1) * longest)
        yield Piece(start, end - start, zero)
        start = end


def zero_runs(buffer: bytearray, length: int, step: int) -> Iterator[tuple[int, int]]:
    """Where zeros lie in a buffer, as (start, end), in multiples of `step` bytes.

    A block can be all zeros only if its first byte is zero: one strided slice finds the few that are worth a look.
    """
    heads, zeros = buffer[:length:step], _ZEROS[:step]
    tail = _ZEROS[: length % step] or zeros

    def is_zero(index: int) -> bool:
        return buffer.startswith(zeros if index < len(heads) - 1 else tail, index * step)

    index = heads.find(0)
    while index >= 0:
        end = index
        while end < len(heads) and is_zero(end):
            end += 1
        if end > index:
            yield index * step, min(end * step, length)
        index = heads.find(0, end + 1)
