"""Crashes, simulated: what a host file may hold when the machine stops at some moment, and what the guest may find.

All that is written to the host file is recorded. A crash may have kept any part, sector by sector, of what was written
since the last sync, in any order, and keeps everything from before it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nbdserve.block import BlockDevice, HostFile
from nbdserve.block.file import ReadBuffer
from nbdserve.formats.qcow2.writable import WritableQcow2Image

SECTOR = 512


@dataclass(frozen=True)
class Change:
    """Bytes that were written to the file."""

    offset: int
    data: bytes

    def apply(self, content: bytearray) -> None:
        """Make the change."""
        content.extend(bytes(max(0, self.offset - len(content))))
        content[self.offset : self.offset + len(self.data)] = self.data

    def sectors(self) -> Iterator[Change]:
        """The change in pieces that a disk writes entirely or not at all."""
        position = 0
        while position < len(self.data):
            length = SECTOR - (self.offset + position) % SECTOR
            yield Change(self.offset + position, self.data[position : position + length])
            position += length


class Recorder(HostFile):
    """A host file that notes every change to it, and None for every sync."""

    def __init__(self, fd: int, name: str, *, writable: bool) -> None:
        super().__init__(fd, name, writable=writable)
        self.log: list[Change | None] = []

    def write(self, offset: int, data: ReadBuffer) -> None:
        self.log.append(Change(offset, bytes(data)))
        super().write(offset, data)

    def write_all(self, offset: int, pieces: Sequence[ReadBuffer]) -> None:
        self.log.append(Change(offset, b"".join(pieces)))
        super().write_all(offset, pieces)

    def punch_hole(self, offset: int, length: int) -> bool:
        self.log.append(Change(offset, bytes(length)))
        return super().punch_hole(offset, length)

    def zero_range(self, offset: int, length: int) -> bool:
        return False  # zeros are written instead, which is noted

    def write_zeros(self, offset: int, length: int) -> None:
        self.write(offset, bytes(length))

    def sync(self) -> None:
        super().sync()
        self.log.append(None)


def remains(start: bytes, log: list[Change | None], chosen: random.Random, samples: int) -> Iterator[tuple[int, bytes]]:
    """What the file may hold after a crash: the moment (a position in the log) and the content.

    For every moment the file with all that was written, and `samples` times with some of what was not synced.
    """
    stable = bytearray(start)
    pending: list[Change] = []
    for moment, entry in enumerate([*log, None]):
        everything = bytearray(stable)
        for change in pending:
            change.apply(everything)
        yield moment, bytes(everything)
        for _ in range(samples if pending else 0):
            some = bytearray(stable)
            share = chosen.random()
            for change in pending:
                for piece in change.sectors():
                    if chosen.random() < share:
                        piece.apply(some)
            yield moment, bytes(some)
        if entry is None:
            stable, pending = everything, []
        else:
            pending.append(entry)


class Witness:
    """Writes to a device, sectors with a number each, and knows which numbers a crash may leave in each of them."""

    def __init__(self, device: BlockDevice, log: list[Change | None]) -> None:
        self.device = device
        self.log = log
        self._now = numbers_in(device)
        self.flushed = [(0, list(self._now))]
        self.written: list[tuple[int, int, int]] = []  # position in the log when the write began, sector, number

    def _note(self, sector: int, count: int, number: int) -> tuple[int, int]:
        self.written += [(len(self.log), touched, number) for touched in range(sector, sector + count)]
        self._now[sector : sector + count] = [number] * count
        return sector * SECTOR, count * SECTOR

    def write(self, sector: int, count: int, number: int) -> None:
        """Write a number to `count` sectors, by the quick way where that is possible."""
        offset, length = self._note(sector, count, number)
        data = number.to_bytes(4, "big") * (length // 4)
        if number % 2 or not self.device.write_nowait(offset, data):
            self.device.write(offset, data)

    def pack(self, sector: int, number: int) -> None:
        """Write a number, compressed, to the cluster that holds a sector."""
        image = self.device
        assert isinstance(image, WritableQcow2Image)
        count = image.header.geometry.cluster_size // SECTOR
        sector = sector // count * count
        offset, length = self._note(sector, min(count, len(self._now) - sector), number)
        image.write_compressed(offset, number.to_bytes(4, "big") * (length // 4))

    def zero(self, sector: int, count: int, *, unmap: bool) -> None:
        """Make `count` sectors zeros."""
        self.device.zero(*self._note(sector, count, 0), unmap=unmap)

    def flush(self) -> None:
        """Flush the device; from then on what was written must survive."""
        now = list(self._now)
        self.device.flush()
        self.flushed.append((len(self.log), now))

    def check(self, moment: int, left: BlockDevice) -> None:
        """What a crash at a moment has left is what it may leave."""
        for sector, (number, allowed) in enumerate(zip(numbers_in(left), self._allowed(moment), strict=True)):
            assert number in allowed, f"moment {moment}, sector {sector}: {number}, not one of {allowed}"

    def _allowed(self, moment: int) -> list[set[int]]:
        at, content = [entry for entry in self.flushed if entry[0] <= moment][-1]
        numbers = [{number} for number in content]
        for start, sector, number in self.written:
            if at <= start <= moment:
                numbers[sector].add(number)
        return numbers


def numbers_in(device: BlockDevice) -> list[int]:
    """The number in each sector; a sector that holds different ones is torn."""
    content = device.read(0, device.size)
    numbers = []
    for start in range(0, device.size, SECTOR):
        number = content[start : start + 4]
        assert content[start : start + SECTOR] == number * (SECTOR // 4), f"sector {start // SECTOR} is torn"
        numbers.append(int.from_bytes(number, "big"))
    return numbers
