"""Copies what one disk shows to another, in large pieces, by several threads.

Whether a piece holds data is asked of the source's map first, then of the bytes themselves, so what is sparse stays
sparse. Pieces begin at multiples of their size, so that no two threads meet in one cluster of the target.
"""

from __future__ import annotations

import fcntl
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from nbdserve.block import BlockDevice, Data, HostFile, HostOffset, Zero
from nbdserve.block.file import ReadBuffer

PIECE = 1 << 20  # bytes read and written at once; what was read is still in the processor's cache when it is written
_UNIT = 64 << 10  # bytes; smaller holes are not worth a request of their own
_ZEROS = bytes(PIECE)
_LONGEST_ZEROS = 1 << 30  # bytes zeroed at once, so that a cancelled copy ends soon
_FICLONERANGE = 0x4020940D  # include/uapi/linux/fs.h

Fill: TypeAlias = Callable[[HostFile, HostOffset, int, int], None]
"""Puts bytes in place: the file, where in it, the offset of the first one in the disk, how many."""


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
        place: finds places in host files for data, and lets them be filled; None where there are none. Where the host's
            file system can, blocks are shared there instead of copied.
        blank: the target reads as zeros, so zeros need not be written.
        sparse: runs of so many zero bytes, at multiples of as many, are not written as data; 0: all is.
        unit: data is copied in multiples of so many bytes, a power of two.
        only_top: what lies below the source's top image is left to the target's backing file.
        workers: threads.
    """

    source: BlockDevice
    target: BlockDevice
    write: Callable[[int, ReadBuffer], None]
    place: Callable[[int, int, Fill], None] | None = None
    blank: bool = True
    sparse: int = 4096
    unit: int = _UNIT
    only_top: bool = False
    workers: int = 4
    position: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: bool = False
    _failure: BaseException | None = None

    def run(self, progress: Callable[[int], None] = lambda done: None) -> None:
        """Copy all.

        Args:
            progress: told ten times a second how many bytes of the source have been dealt with.

        Raises:
            OSError: reading or writing failed.
        """
        pieces = self._pieces()
        threads = [threading.Thread(target=self._work, args=(pieces,), daemon=True) for _ in range(self.workers)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.1)
                    progress(self.position)
        finally:
            self._stopped = True  # after an error or Ctrl-C the others end with the piece they are at
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        if self._failure is not None:
            raise self._failure
        progress(self.source.size)

    def _work(self, pieces: Iterator[Piece]) -> None:
        """What a thread does; the first failure ends all of them."""
        try:
            self._copy(pieces)
        except BaseException as error:
            self._failure = self._failure or error
            self._stopped = True

    def _copy(self, pieces: Iterator[Piece]) -> None:
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
                if self.place is not None and self._share(piece, self.place):
                    continue
                view = memoryview(buffer)[: piece.length]
                self.source.read_into(piece.offset, view)
                self._write(piece.offset, buffer, piece.length)

    def _share(self, piece: Piece, place: Callable[[int, int, Fill], None]) -> bool:
        """Let source and target share the blocks of a piece that lies verbatim in a host file; False: it has to be
        copied. The first failure ends all attempts."""
        try:
            with self.source.pins.held():
                extent = self.source.map(piece.offset, piece.length)
                if not isinstance(extent, Data) or extent.length < piece.length:
                    return False
                start = extent.host_offset - piece.offset

                def fill(file: HostFile, host_offset: HostOffset, offset: int, length: int) -> None:
                    share_blocks(extent.file, start + offset, file, host_offset, length)

                place(piece.offset, piece.length, fill)
        except OSError:  # whatever it is: if copying meets it as well, it will be told
            self.place = None
            return False
        return True

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
        for extent in self.source.extents(0, size):
            low, offset = offset, offset + extent.length
            if extent.depth if self.only_top else self.sparse and isinstance(extent, Zero):
                continue
            start, told = max(told, low // unit * unit), max(told, min(size, -(-offset // unit) * unit))
            if start < told:
                yield start, told

    # Reading and writing

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


def share_blocks(source: HostFile, source_offset: int, target: HostFile, target_offset: int, length: int) -> None:
    """Let two files share blocks of their file system (ioctl_ficlonerange(2)).

    Raises:
        OSError: that file system, or these offsets, do not allow it.
    """
    request = struct.pack("qQQQ", source.fd, source_offset, length, target_offset)
    fcntl.ioctl(target.fd, _FICLONERANGE, request)


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
