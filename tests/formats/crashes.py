"""Crash an image everywhere: what was flushed must be there, and nothing may be wrong.

All that is written to the image's file is recorded. A crash at some moment may have kept any part, sector by sector, of
what was written since the last sync, and keeps everything from before it. The image is opened again from such remains.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nbdserve.block import BlockDevice, HostFile
from nbdserve.block.file import ReadBuffer

SECTOR = 512


@dataclass(frozen=True)
class Change:
    """Bytes that were written to the file."""

    offset: int
    data: bytes


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

    def sync(self) -> None:
        super().sync()
        self.log.append(None)


class Witness:
    """Writes to a device, sectors with a number each, and knows which numbers a crash may leave in each of them."""

    def __init__(self, device: BlockDevice, log: list[Change | None]) -> None:
        self.device = device
        self.log = log
        self.now = numbers_of(bytes(device.read(0, device.size)))
        self.flushed: list[tuple[int, list[int]]] = [(0, list(self.now))]
        self.written: list[tuple[int, int, int]] = []  # position in the log when the write began, sector, number

    def write(self, sector: int, count: int, number: int) -> None:
        """Write `count` sectors; the number 0 zeroes them."""
        self.written += [(len(self.log), touched, number) for touched in range(sector, sector + count)]
        self.now[sector : sector + count] = [number] * count
        if number:
            self.device.write(sector * SECTOR, sector_of(number) * count)
        else:
            self.device.zero(sector * SECTOR, count * SECTOR)

    def flush(self) -> None:
        """Flush the device; from then on what was written must survive."""
        now = list(self.now)
        self.device.flush()
        self.flushed.append((len(self.log), now))

    def allowed(self, moment: int) -> list[set[int]]:
        """The numbers each sector may hold after a crash when the log was `moment` entries long."""
        at, content = [entry for entry in self.flushed if entry[0] <= moment][-1]
        numbers = [{number} for number in content]
        for start, sector, number in self.written:
            if at <= start <= moment:
                numbers[sector].add(number)
        return numbers


def sector_of(number: int) -> bytes:
    """A sector that holds a number."""
    return number.to_bytes(4, "big") * (SECTOR // 4)


def numbers_of(content: bytes) -> list[int]:
    """The numbers that sectors hold; every sector must be all of one number."""
    numbers = []
    for start in range(0, len(content), SECTOR):
        sector = content[start : start + SECTOR]
        numbers.append(int.from_bytes(sector[:4], "big"))
        assert sector == sector_of(numbers[-1]), f"sector {start // SECTOR} is torn"
    return numbers


def _work(witness: Witness, chosen: random.Random) -> None:
    sectors = len(witness.now)
    for number in range(1, 40):
        sector = chosen.randrange(sectors)
        witness.write(sector, min(chosen.randint(1, 12), sectors - sector), number if number % 7 else 0)
        if chosen.random() < 0.2:
            witness.flush()
    witness.flush()


def _remains(start: bytes, log: list[Change | None], chosen: random.Random) -> Iterator[tuple[int, bytes]]:
    """For every moment the file with all that was written, and files with some of what was not synced."""
    stable = bytearray(start)
    pending: list[Change] = []
    for moment, entry in enumerate([*log, None]):
        everything = bytearray(stable)
        for change in pending:
            _apply(everything, change)
        yield moment, bytes(everything)
        for _ in range(2 if pending else 0):
            some = bytearray(stable)
            share = chosen.random()
            for change in pending:
                for piece in _sectors(change):
                    if chosen.random() < share:
                        _apply(some, piece)
            yield moment, bytes(some)
        if entry is None:
            stable, pending = everything, []
        else:
            pending.append(entry)


def _apply(content: bytearray, change: Change) -> None:
    content.extend(bytes(max(0, change.offset - len(content))))
    content[change.offset : change.offset + len(change.data)] = change.data


def _sectors(change: Change) -> Iterator[Change]:
    position = 0
    while position < len(change.data):
        length = SECTOR - (change.offset + position) % SECTOR
        yield Change(change.offset + position, change.data[position : position + length])
        position += length


def crash_everywhere(
    image: Path,
    open_recorded: Callable[[Path], tuple[BlockDevice, Recorder]],
    reopen: Callable[[Path, bool], BlockDevice],
    judge: Callable[[Path], None],
    seed: int,
) -> int:
    """Work on an image, then open what each crash would have left; return how many crashes there were.

    Args:
        open_recorded: opens the image for writing through a Recorder.
        reopen: opens an image again; read-only when told so.
        judge: looks at an image after it was opened for writing, written and closed.
    """
    chosen = random.Random(seed)
    crashed = image.with_name("crashed" + image.suffix)
    start = image.read_bytes()
    device, recorder = open_recorded(image)
    with device:
        log = recorder.log
        witness = Witness(device, log)
        _work(witness, chosen)
    crashes = 0
    for moment, content in _remains(start, log, chosen):
        crashed.unlink(missing_ok=True)  # some file systems wait for the disk when a file is truncated
        crashed.write_bytes(content)
        with reopen(crashed, crashes % 24 > 0) as device:
            left = numbers_of(bytes(device.read(0, device.size)))
            for sector, allowed in enumerate(witness.allowed(moment)):
                assert left[sector] in allowed, f"moment {moment}, sector {sector}: {left[sector]}, not in {allowed}"
            if not device.read_only:  # there may be rubbish behind what is in use
                device.write(0, bytes(device.size - 1) + b"x")
                assert device.read(0, device.size) == bytes(device.size - 1) + b"x"
        if not device.read_only:
            judge(crashed)
        crashes += 1
    return crashes
