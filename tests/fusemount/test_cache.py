"""The write-back cache is a device like any other, bounds its memory, and loses nothing."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest

from fusemount.cache import LINE, WriteBackCache
from nbdserve.block import BlockDevice, HostFile, MemoryDevice, Window
from nbdserve.block.file import ReadBuffer
from nbdserve.formats.raw import RawImage
from tests.conformance import check_block_device

SIZE = 40 * LINE + 1000


def test_it_is_a_device() -> None:
    def reopen(cache: BlockDevice) -> BlockDevice:
        assert isinstance(cache, WriteBackCache)
        cache.close()
        return WriteBackCache(cache.below, capacity=16 * LINE)

    check_block_device(lambda: WriteBackCache(MemoryDevice(bytearray(SIZE)), capacity=16 * LINE), reopen)


class Counting(Window):
    """Counts writes and flushes, and fails when it is told to."""

    def __init__(self, size: int) -> None:
        super().__init__(MemoryDevice(bytearray(size)), 0, size)
        self.writes = self.flushes = 0
        self.broken = False

    def write(self, offset: int, data: ReadBuffer) -> None:
        if self.broken:
            raise OSError(errno.EIO, "broken")
        self.writes += 1
        super().write(offset, data)

    def flush(self) -> None:
        self.flushes += 1


def test_small_writes_become_few() -> None:
    below = Counting(1 << 20)
    cache = WriteBackCache(below)
    for offset in range(0, 1 << 19, 64):
        cache.write(offset, b"%064d" % offset)
    assert below.writes == 0
    cache.flush()
    assert (below.writes, below.flushes) == (1, 1)
    assert below.read(640, 64) == b"%064d" % 640
    cache.write(640, b"%064d" % 640)
    cache.flush()
    assert below.writes == 1, "what did not change is not written"


def test_memory_is_bounded_and_nothing_is_lost() -> None:
    below = Counting(1 << 22)
    cache = WriteBackCache(below, capacity=20 * LINE)
    model = bytearray(1 << 22)
    chance = random.Random(1)
    for _ in range(2000):
        offset, length = chance.randrange(1 << 22), chance.choice((1, 100, LINE, 3 * LINE, 100_000))
        length = min(length, (1 << 22) - offset)
        data = chance.randbytes(length)
        cache.write(offset, data)
        model[offset : offset + length] = data
        assert len(cache._lines) <= 20 + 8
        offset = chance.randrange(1 << 21)
        assert cache.read(offset, 70_000) == model[offset : offset + 70_000]
    cache.flush()
    assert below.read(0, 1 << 22) == model


def test_what_could_not_be_written_stays() -> None:
    below = Counting(1 << 20)
    cache = WriteBackCache(below)
    cache.write(5, b"precious")
    below.broken = True
    with pytest.raises(OSError, match="broken"):
        cache.flush()
    assert cache.read(5, 8) == b"precious"
    below.broken = False
    cache.flush()
    assert below.read(5, 8) == b"precious"


def test_it_does_not_wait_when_it_must_not(tmp_path: Path) -> None:
    cache = WriteBackCache(MemoryDevice(bytearray(b"x" * (1 << 20))))
    with cache.without_waiting():
        with pytest.raises(BlockingIOError):
            cache.read(0, 10)
        with pytest.raises(BlockingIOError):
            cache.read(0, 100_000)
        cache.write(0, b"y")
    with cache.without_waiting():
        assert cache.read(0, 3) == b"yxx"
        with pytest.raises(BlockingIOError):
            cache.read(1 << 19, 1)
    path = tmp_path / "image"
    path.write_bytes(b"z" * (1 << 20))
    cache = WriteBackCache(RawImage(HostFile.open(path, writable=True), read_only=False))
    with cache.without_waiting():
        assert cache.read(5, 200_000) == b"z" * 200_000, "the page cache holds it"
