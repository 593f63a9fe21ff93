"""A disk in memory: the simplest device there is, and the model that tests hold others against."""

from __future__ import annotations

from nbdserve.block.device import BlockDevice
from nbdserve.block.extents import Computed, Extent
from nbdserve.block.file import ReadBuffer, WriteBuffer


class MemoryDevice(BlockDevice):
    """A disk whose bytes are `content`, a bytearray that stays the caller's to look at."""

    def __init__(self, content: bytearray, *, read_only: bool = False) -> None:
        super().__init__(len(content), read_only=read_only)
        self.content = content
        self.zeroes_fast = True

    def map(self, offset: int, length: int) -> Extent:
        return Computed(length)

    def read_computed(self, offset: int, buffer: WriteBuffer) -> None:
        buffer[:] = self.content[offset : offset + len(buffer)]

    def write(self, offset: int, data: ReadBuffer) -> None:
        if self.read_only:
            raise self._refusal()
        self.content[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self.write(offset, bytes(length))

    def discard(self, offset: int, length: int) -> None:
        self.zero(offset, length)
