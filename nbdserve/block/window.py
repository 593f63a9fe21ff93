"""A slice of another device: a partition, or a range the user names by offset and size."""

from __future__ import annotations

from nbdserve.block.device import BlockDevice
from nbdserve.block.extents import Extent, HostOffset
from nbdserve.block.file import HostFile, ReadBuffer, WriteBuffer


class Window(BlockDevice):
    """The bytes [start, start + size) of `whole`, as a disk of their own. Closing it closes the whole."""

    def __init__(self, whole: BlockDevice, start: int, size: int) -> None:
        assert 0 <= start and start + size <= whole.size
        super().__init__(size, read_only=whole.read_only, pins=whole.pins)
        self.whole = whole
        self.start = start
        self.preferred_block = whole.preferred_block
        self.zeroes_fast = whole.zeroes_fast
        self.useful_writers = whole.useful_writers

    def map(self, offset: int, length: int) -> Extent:
        return self.whole.map(self.start + offset, length)

    def map_nowait(self, offset: int, length: int) -> Extent | None:
        return self.whole.map_nowait(self.start + offset, length)

    def locate(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        return self.whole.locate(self.start + offset, length)

    def locate_writable(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        return self.whole.locate_writable(self.start + offset, length)

    def read_computed(self, offset: int, buffer: WriteBuffer) -> None:
        self.whole.read_computed(self.start + offset, buffer)

    def write(self, offset: int, data: ReadBuffer) -> None:
        self.whole.write(self.start + offset, data)

    def write_nowait(self, offset: int, data: ReadBuffer) -> bool:
        return self.whole.write_nowait(self.start + offset, data)

    def zero(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self.whole.zero(self.start + offset, length, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        self.whole.discard(self.start + offset, length)

    def flush(self) -> None:
        self.whole.flush()

    def close(self) -> None:
        self.whole.close()
