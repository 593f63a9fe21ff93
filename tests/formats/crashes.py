"""Crash an image everywhere: what was flushed must be there, and nothing may be wrong.

All that is written to the host file is recorded. A crash at some moment may have kept any part, sector by sector, of
what was written since the last sync, and keeps everything from before it. From such remains the image is opened again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nbdserve.block import BlockDevice, HostFile
from nbdserve.block.file import ReadBuffer

SECTOR = 512


@dataclass(frozen=True)
class Change:
    """Bytes that were written to the file, `length` zeros when `data` is None; or just a length the file has got."""

    offset: int
    length: int
    data: bytes | None = None


class Recorder(HostFile):
    """A host file that notes every change to it, and None for every sync."""

    def __init__(self, fd: int, name: str, *, writable: bool) -> None:
        super().__init__(fd, name, writable=writable)
        self.log: list[Change | None] = []

    def write(self, offset: int, data: ReadBuffer) -> None:
        self.log.append(Change(offset, len(data), bytes(data)))
        super().write(offset, data)

    def write_all(self, offset: int, pieces: Sequence[ReadBuffer]) -> None:
        data = b"".join(pieces)
        self.log.append(Change(offset, len(data), data))
        super().write_all(offset, pieces)

    def punch_hole(self, offset: int, length: int) -> bool:
        self.log.append(Change(offset, length))
        return super().punch_hole(offset, length)

    def zero_range(self, offset: int, length: int) -> bool:
        return False  # zeros are written instead, which is noted

    def write_zeros(self, offset: int, length: int) -> None:
        self.write(offset, bytes(length))

    def sync(self) -> None:
        super().sync()
        self.log.append(Change(self.size, 0))
        self.log.append(None)


@dataclass
class Remains:
    """A file of which little is not zero: its sectors, by number."""

    sectors: dict[int, bytes] = field(default_factory=dict)
    size: int = 0

    @classmethod
    def of(cls, path: Path) -> Remains:
        return cls.of_content(path.read_bytes())

    @classmethod
    def of_content(cls, content: bytes) -> Remains:
        starts = range(0, len(content), SECTOR)
        sectors = {at // SECTOR: content[at : at + SECTOR] for at in starts if any(content[at : at + SECTOR])}
        return cls(sectors, len(content))

    def copy(self) -> Remains:
        return Remains(dict(self.sectors), self.size)

    def apply(self, change: Change) -> None:
        end = change.offset + change.length
        self.size = max(self.size, end) if change.data is not None or not change.length else self.size
        if change.data is None:
            for number in [number for number in self.sectors if change.offset < (number + 1) * SECTOR]:
                if number * SECTOR < end:
                    start, stop = max(0, change.offset - number * SECTOR), min(SECTOR, end - number * SECTOR)
                    self._put(number, start, bytes(stop - start))
        else:
            for piece in pieces_of(change):
                assert piece.data is not None
                self._put(piece.offset // SECTOR, piece.offset % SECTOR, piece.data)

    def _put(self, number: int, start: int, data: bytes) -> None:
        old = self.sectors.get(number, bytes(SECTOR))
        self.sectors[number] = old[:start] + data + old[start + len(data) :]

    def content(self) -> bytes:
        content = bytearray(self.size)
        for number, data in self.sectors.items():
            content[number * SECTOR : (number + 1) * SECTOR] = data
        return bytes(content[: self.size])

    def write_to(self, path: Path) -> None:
        with path.open("wb") as file:
            for number, data in sorted(self.sectors.items()):
                file.seek(number * SECTOR)
                file.write(data)
            file.truncate(self.size)


def pieces_of(change: Change) -> Iterator[Change]:
    """What a crash may keep or lose of a change: its sectors, or the whole of a hole."""
    if change.data is None:
        yield change
        return
    position = 0
    while position < change.length:
        length = min(SECTOR - (change.offset + position) % SECTOR, change.length - position)
        yield Change(change.offset + position, length, change.data[position : position + length])
        position += length


def remains_of(
    start: Remains, log: list[Change | None], chosen: random.Random, *, samples: int = 4
) -> Iterator[tuple[int, Remains]]:
    """For every moment the file with all that was written, and `samples` files with some of what was not synced."""
    stable = start.copy()
    pending: list[Change] = []
    for moment, entry in enumerate([*log, None]):
        everything = stable.copy()
        for change in pending:
            everything.apply(change)
        yield moment, everything
        for _ in range(samples if pending else 0):
            some = stable.copy()
            share = chosen.random()
            for change in pending:
                for piece in pieces_of(change):
                    if chosen.random() < share:
                        some.apply(piece)
            yield moment, some
        if entry is None:
            stable, pending = everything, []
        else:
            pending.append(entry)


class Witness:
    """Writes to a device, sectors with a number each, and knows which numbers a crash may leave in each of them.

    Args:
        log: of the file or files behind it.
        areas: the sectors that are written and looked at; a write stays inside one of them.
        before: the number in all of them at first; None: those that the device holds.
    """

    def __init__(
        self, device: BlockDevice, log: list[Change | None], areas: Sequence[range], before: int | None = 0
    ) -> None:
        self.device = device
        self.log = log
        self.areas = areas
        self._now = {
            sector: number if before is None else before
            for area in areas
            for sector, number in zip(area, numbers_in(device, area), strict=True)
        }
        self.flushed: list[tuple[int, dict[int, int]]] = [(0, dict(self._now))]
        self.written: list[tuple[int, int, int]] = []  # position in the log when the write began, sector, number

    def write(self, sectors: range, number: int, *, discard: bool = False) -> None:
        """Write sectors; the number 0 zeroes them."""
        offset, length = self._note(sectors, number)
        if number:
            self._put(offset, sector_of(number) * len(sectors), number)
        elif discard:
            self.device.discard(offset, length)
        else:
            self.device.zero(offset, length)

    def _note(self, sectors: range, number: int) -> tuple[int, int]:
        """Note that sectors are about to get a number; their offset and length in bytes."""
        for sector in sectors:
            if sector in self._now:
                self.written.append((len(self.log), sector, number))
                self._now[sector] = number
        return sectors.start * SECTOR, len(sectors) * SECTOR

    def _put(self, offset: int, data: bytes, number: int) -> None:
        """Write to the device; the number tells subclasses in which way."""
        self.device.write(offset, data)

    def flush(self) -> None:
        """Flush the device; from then on what was written must survive."""
        now = dict(self._now)
        self.device.flush()
        self.flushed.append((len(self.log), now))

    def work(self, chosen: random.Random, *, steps: int = 50, blocks: Sequence[range] = ()) -> None:
        """Write here and there, flush now and then, and zero or discard one of `blocks` now and then."""
        for number in range(1, steps):
            area = chosen.choice(self.areas)
            start = chosen.randrange(len(area))
            self.write(area[start : start + chosen.randint(1, 12)], number if number % 7 else 0)
            if blocks and number % 6 == 5:
                self.write(chosen.choice(blocks), 0, discard=number % 4 == 1)
            if chosen.random() < 0.2:
                self.flush()
        self.flush()

    def allowed(self, moment: int) -> dict[int, set[int]]:
        """The numbers each sector may hold after a crash when the log was `moment` entries long."""
        at, content = [entry for entry in self.flushed if entry[0] <= moment][-1]
        numbers = {sector: {number} for sector, number in content.items()}
        for start, sector, number in self.written:
            if at <= start <= moment:
                numbers[sector].add(number)
        return numbers

    def check(self, device: BlockDevice, moment: int) -> None:
        """What a crash left holds only what it may."""
        allowed = self.allowed(moment)
        for area in self.areas:
            for sector, number in zip(area, numbers_in(device, area), strict=True):
                assert number in allowed[sector], f"moment {moment}, sector {sector}: {number}, not {allowed[sector]}"


def sector_of(number: int) -> bytes:
    """A sector that holds a number."""
    return number.to_bytes(4, "big") * (SECTOR // 4)


def numbers_in(device: BlockDevice, sectors: range) -> list[int]:
    """The numbers that sectors hold; every sector must be all of one number."""
    content = device.read(sectors.start * SECTOR, len(sectors) * SECTOR)
    numbers = []
    for start in range(0, len(content), SECTOR):
        sector = content[start : start + SECTOR]
        numbers.append(int.from_bytes(sector[:4], "big"))
        assert sector == sector_of(numbers[-1]), f"sector {sectors.start + start // SECTOR} is torn"
    return numbers


def crash_everywhere(
    image: Path,
    open_recorded: Callable[[Path], tuple[BlockDevice, Recorder]],
    reopen: Callable[[Path, bool], BlockDevice],
    judge: Callable[[Path], None],
    seed: int,
) -> int:
    """Work on a small image, then open what each crash would have left; return how many crashes there were.

    Args:
        open_recorded: opens the image for writing through a Recorder.
        reopen: opens an image again; read-only when told so.
        judge: looks at an image after it was opened for writing, written and closed.
    """
    chosen = random.Random(seed)
    crashed = image.with_name("crashed" + image.suffix)
    start = Remains.of(image)
    device, recorder = open_recorded(image)
    with device:
        witness = Witness(device, recorder.log, [range(device.size // SECTOR)], before=None)
        witness.work(chosen, steps=40)
    crashes = 0
    for moment, content in remains_of(start, recorder.log, chosen, samples=2):
        crashed.unlink(missing_ok=True)  # some file systems wait for the disk when a file is truncated
        content.write_to(crashed)
        with reopen(crashed, crashes % 24 > 0) as device:
            witness.check(device, moment)
            if not device.read_only:  # there may be rubbish behind what is in use
                device.write(0, bytes(device.size - 1) + b"x")
                assert device.read(0, device.size) == bytes(device.size - 1) + b"x"
        if not device.read_only:
            judge(crashed)
        crashes += 1
    return crashes
