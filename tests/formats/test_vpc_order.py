"""Crash a dynamic VHD everywhere: what was flushed must be there, and nothing may be wrong.

All that is written to the host file is recorded. A crash at some moment may have kept any part, sector by sector, of
what was written since the last sync, and keeps everything from before it. From such remains the image is opened again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from nbdserve.block import BlockDevice, HostFile
from nbdserve.block.file import ReadBuffer
from nbdserve.formats.vpc.table import BlockTable
from tests.formats import vhd_images as vhd

SECTOR = 512
BLOCK_SIZE = 4096
BLOCKS = 12
SECTORS = BLOCKS * BLOCK_SIZE // SECTOR


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
        self.flushed: list[tuple[int, list[int]]] = [(0, [0] * SECTORS)]
        self.written: list[tuple[int, int, int]] = []  # position in the log when the write began, sector, number
        self._now = [0] * SECTORS

    def write(self, sector: int, count: int, number: int) -> None:
        """Write `count` sectors; the number 0 zeroes them."""
        self.written += [(len(self.log), touched, number) for touched in range(sector, sector + count)]
        self._now[sector : sector + count] = [number] * count
        if number:
            self.device.write(sector * SECTOR, number.to_bytes(4, "big") * (count * SECTOR // 4))
        else:
            self.device.zero(sector * SECTOR, count * SECTOR)

    def flush(self) -> None:
        """Flush the device; from then on what was written must survive."""
        now = list(self._now)
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


def _work(witness: Witness, chosen: random.Random) -> None:
    for number in range(1, 50):
        sector = chosen.randrange(SECTORS)
        witness.write(sector, min(chosen.randint(1, 12), SECTORS - sector), number if number % 7 else 0)
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
        for _ in range(4 if pending else 0):
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


def _crash_everywhere(directory: Path, seed: int) -> int:
    chosen = random.Random(seed)
    image, crashed = directory / "a.vhd", directory / "crashed.vhd"
    start = vhd.dynamic(BLOCKS * BLOCK_SIZE, BLOCK_SIZE)
    image.write_bytes(start)
    with vhd.open_vhd(image, file_type=Recorder) as device:
        log: list[Change | None] = device.file.log  # type: ignore[attr-defined]
        witness = Witness(device, log)
        _work(witness, chosen)
    crashes = 0
    for moment, content in _remains(start, log, chosen):
        crashed.write_bytes(content)
        with vhd.open_vhd(crashed, read_only=crashes % 16 > 0) as device:
            left = device.read(0, device.size)
            for sector, allowed in enumerate(witness.allowed(moment)):
                here = left[sector * SECTOR : (sector + 1) * SECTOR]
                number = int.from_bytes(here[:4], "big")
                assert here == number.to_bytes(4, "big") * (SECTOR // 4)
                assert number in allowed, f"moment {moment}, sector {sector}: {number}, not one of {allowed}"
            if not device.read_only:  # there may be rubbish behind the last block
                device.write(0, bytes(device.size - 1) + b"x")
                assert device.read(0, device.size) == bytes(device.size - 1) + b"x"
        crashes += 1
    return crashes


@pytest.mark.parametrize("seed", range(3))
def test_no_crash_loses_or_invents_bytes(tmp_path: Path, seed: int) -> None:
    assert _crash_everywhere(tmp_path, seed) > 100


def test_entries_before_data_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flush(table: BlockTable) -> None:
        entries, table._waiting = table._waiting, {}
        if entries:
            table._write(entries)
        table._file.sync()

    monkeypatch.setattr(BlockTable, "flush", flush)
    with pytest.raises((AssertionError, OSError)):
        _crash_everywhere(tmp_path, 0)


def test_entries_left_in_memory_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockTable, "flush", lambda table: table._file.sync())
    with pytest.raises(AssertionError):
        _crash_everywhere(tmp_path, 0)
