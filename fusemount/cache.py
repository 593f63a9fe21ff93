"""A write-back cache in front of a block device, for engines that make very many small requests.

What it keeps: memory is bounded by `capacity`; nothing that was written is lost before flush() has brought it to the
device below, and a line that could not be written stays dirty. A read never shows older bytes than the last write,
whichever way it goes: small requests live in lines of LINE bytes, large ones go straight to the device and are made to
agree with the lines.

What is written may reach the device in another order. An engine that counts on an order, because a process may be
killed between two writes, either asks for its own (in_order) or tells what has to come first (early).

A read while `nowait` is set never waits for the disk: it is answered from the lines or the host's page cache, or raises
BlockingIOError with nothing changed.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from nbdserve.block.device import BlockDevice
from nbdserve.block.extents import Computed, Extent
from nbdserve.block.file import ReadBuffer, WriteBuffer

LINE = 4096
"""Bytes that are cached together."""

_READ_AHEAD = 8  # lines; a miss brings what is missing up to the next multiple of this
_LARGE = 64 << 10  # bytes; from here on a request is no metadata, and would push the metadata out
_LONGEST_WRITE = 1 << 20

Early = Callable[[Sequence[int]], Sequence[tuple[int, int]]]
"""Given the numbers of the dirty lines: the ranges (offset, length) in them that are to be written first, in order."""


class WriteBackCache(BlockDevice):
    """The device `below`, with its small requests answered from memory.

    Attributes:
        nowait: whether reads raise BlockingIOError rather than wait for the disk; see without_waiting().
        failed: whether the device below has ever refused a write, so that a change may have been left half done.
        early: what write_back() writes before all else.

    Args:
        in_order: hand on every write at once; only reads are saved then.
    """

    def __init__(self, below: BlockDevice, *, capacity: int = 32 << 20, in_order: bool = False) -> None:
        super().__init__(below.size, read_only=below.read_only, pins=below.pins)
        self.below = below
        self.nowait = False
        self.failed = False
        self.early: Early | None = None
        self._in_order = in_order
        self._most_lines = max(capacity // LINE, 2 * _READ_AHEAD)
        self._lines: OrderedDict[int, bytearray] = OrderedDict()
        self._dirty: set[int] = set()
        self._lock = threading.RLock()

    @contextmanager
    def without_waiting(self) -> Iterator[None]:
        """Reads inside the with-block raise BlockingIOError where they would wait for the disk."""
        self.nowait = True
        try:
            yield
        finally:
            self.nowait = False

    def map(self, offset: int, length: int) -> Extent:
        return Computed(length)

    def read_computed(self, offset: int, buffer: WriteBuffer) -> None:
        self.read_into(offset, buffer)

    def read(self, offset: int, length: int) -> bytearray:
        index, start = divmod(offset, LINE)
        with self._lock:
            line = self._lines.get(index)
            if line is not None and start + length <= len(line):
                self._lines.move_to_end(index)
                return line[start : start + length]
        return super().read(offset, length)

    def read_into(self, offset: int, buffer: WriteBuffer) -> None:
        view = memoryview(buffer)
        with self._lock:
            if len(view) >= _LARGE:
                self._fetch(offset, view, self.nowait)
                self._overlay(offset, view)
                return
            while view:
                index, start = divmod(offset, LINE)
                line = self._line(index, self.nowait)
                count = min(len(line) - start, len(view))
                view[:count] = memoryview(line)[start : start + count]
                view = view[count:]
                offset += count

    def write(self, offset: int, data: ReadBuffer) -> None:
        view = memoryview(data)
        with self._lock:
            if self.read_only:
                raise self._refusal()
            if len(view) >= _LARGE:
                head = -offset % LINE
                whole = (len(view) - head) // LINE * LINE
                self._write_around(offset + head, view[head : head + whole])
                self._patch(offset, view[:head])
                self._patch(offset + head + whole, view[head + whole :])
            else:
                self._patch(offset, view)
            if self._in_order or len(self._dirty) > self._most_lines // 2:
                self.write_back()

    def write_nowait(self, offset: int, data: ReadBuffer) -> bool:
        return False

    def zero(self, offset: int, length: int, *, unmap: bool = True) -> None:
        zeros = memoryview(bytes(min(length, _LONGEST_WRITE)))
        while length:
            count = min(length, len(zeros))
            self.write(offset, zeros[:count])
            offset += count
            length -= count

    def discard(self, offset: int, length: int) -> None:
        with self._lock:
            self.write_back()
            for index in range(offset // LINE, -(-(offset + length) // LINE)):
                self._lines.pop(index, None)
            self.below.discard(offset, length)

    def write_back(self) -> None:
        """Hand all dirty lines to the device below, neighbours in one request; does not flush it."""
        with self._lock:
            if self.early is not None:
                for offset, length in self.early(sorted(self._dirty)):
                    self._write_part(offset, length)
            run: list[int] = []
            for index in sorted(self._dirty):
                if run and (index != run[-1] + 1 or len(run) * LINE >= _LONGEST_WRITE):
                    self._write_run(run)
                    run = []
                run.append(index)
            self._write_run(run)

    def flush(self) -> None:
        with self._lock:
            self.write_back()
            self.below.flush()

    def close(self) -> None:
        """Flush. The device below stays open."""
        self.flush()

    def _line(self, index: int, nowait: bool) -> bytearray:
        line = self._lines.get(index)
        if line is not None:
            self._lines.move_to_end(index)
            return line
        last = min(index | (_READ_AHEAD - 1), (self.size - 1) // LINE)
        end = index + 1
        while end <= last and end not in self._lines:
            end += 1
        start = index * LINE
        content = memoryview(bytearray(min(end * LINE, self.size) - start))
        self._fetch(start, content, nowait)
        self._make_room(end - index)
        for position in range(index, end):
            self._lines[position] = bytearray(content[(position - index) * LINE : (position - index + 1) * LINE])
        return self._lines[index]

    def _fetch(self, offset: int, view: memoryview, nowait: bool) -> None:
        if not nowait:
            self.below.read_into(offset, view)
            return
        if not self.below.read_at_hand(offset, view):
            raise BlockingIOError

    def _overlay(self, offset: int, view: memoryview) -> None:
        """Put what is dirty over bytes that came from the device."""
        first, end = offset // LINE, -(-(offset + len(view)) // LINE)
        touched = self._dirty if len(self._dirty) < end - first else range(first, end)
        for index in [index for index in touched if first <= index < end and index in self._dirty]:
            start = max(offset, index * LINE)
            stop = min(offset + len(view), index * LINE + len(self._lines[index]))
            view[start - offset : stop - offset] = self._lines[index][start - index * LINE : stop - index * LINE]

    def _patch(self, offset: int, view: memoryview) -> None:
        while view:
            index, start = divmod(offset, LINE)
            length = min(LINE, self.size - index * LINE)
            count = min(length - start, len(view))
            if count == length and index not in self._lines:
                self._make_room(1)
                self._lines[index] = bytearray(view[:count])
                self._dirty.add(index)
            else:
                line = self._line(index, nowait=False)
                if line[start : start + count] != view[:count]:
                    line[start : start + count] = view[:count]
                    self._dirty.add(index)
            view = view[count:]
            offset += count

    def _write_around(self, offset: int, view: memoryview) -> None:
        self._write_below(offset, view)
        for index in range(offset // LINE, (offset + len(view)) // LINE):
            self._lines.pop(index, None)
            self._dirty.discard(index)

    def _write_run(self, run: list[int]) -> None:
        if run:
            self._write_below(run[0] * LINE, b"".join([self._lines[index] for index in run]))
            self._dirty.difference_update(run)

    def _write_part(self, offset: int, length: int) -> None:
        """Write a range that lies in dirty lines; those that it covers are clean then."""
        first, end = offset // LINE, -(-(offset + length) // LINE)
        content = b"".join([self._lines[index] for index in range(first, end)])
        start = offset - first * LINE
        self._write_below(offset, content[start : start + length])
        whole = range(-(-offset // LINE), (offset + length) // LINE)
        self._dirty.difference_update(whole)

    def _write_below(self, offset: int, data: ReadBuffer) -> None:
        try:
            self.below.write(offset, data)
        except OSError:
            self.failed = True
            raise

    def _make_room(self, count: int) -> None:
        """Drop the lines that were not used for longest until `count` more fit."""
        while self._lines and len(self._lines) + count > self._most_lines:
            index = next(iter(self._lines))
            if index in self._dirty:
                self.write_back()
            del self._lines[index]
