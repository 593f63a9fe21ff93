"""Raw images and host block devices: guest offsets are host offsets, and holes are holes.

A raw image that was recognised only because nothing else fitted (*guessed*) keeps its first and last sectors from
becoming those of another format: otherwise a guest could write a qcow2 header there that names a host file as its
backing file, and the next one to open the image would read that file for it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from nbdserve.block.device import BlockDevice
from nbdserve.block.extents import Data, Extent, HostOffset, Zero
from nbdserve.block.file import HostFile, ReadBuffer

_SECTOR = 512
_WORTH_A_HOLE = 64 << 10  # bytes; shorter reads are served as data without asking the host for holes


class RawImage(BlockDevice):
    """A file or block device as a disk.

    Args:
        looks_like: given the first and the last sector, the name of the format they announce, or None; set for a
            guessed image.
    """

    def __init__(
        self, file: HostFile, *, read_only: bool, looks_like: Callable[[bytes, bytes], str | None] | None = None
    ) -> None:
        super().__init__(file.size, read_only=read_only)
        self.file = file
        self._looks_like = looks_like
        # Writes inside [_free_from, _free_to) need no look at what they do to the first and last sectors.
        self._free_from, self._free_to = (0, self.size) if looks_like is None else (_SECTOR, self.size - _SECTOR)
        self.zeroes_fast = not read_only

    def map(self, offset: int, length: int) -> Extent:
        is_data, run = self.file.data_extent(offset, length)
        return Data(run, self.file, HostOffset(offset)) if is_data else Zero(run, allocated=False)

    def map_nowait(self, offset: int, length: int) -> Extent | None:
        return self.map(offset, length)

    def locate(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        if length >= _WORTH_A_HOLE and not self.file.is_known_data(offset, length):
            return None
        return self.file, HostOffset(offset)

    def locate_writable(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        if self.read_only or offset < self._free_from or offset + length > self._free_to:
            return None
        return self.file, HostOffset(offset)

    def write(self, offset: int, data: ReadBuffer) -> None:
        if self.read_only:
            raise self._refusal()
        if offset < self._free_from or offset + len(data) > self._free_to:
            self._check_ends(offset, data)
        self.file.write(offset, data)

    def _check_ends(self, offset: int, data: ReadBuffer) -> None:
        """Refuse a write after which the image would announce another format."""
        assert self._looks_like is not None
        first = self._sector_after(0, offset, data)
        last = self._sector_after(max(0, self.size - _SECTOR), offset, data)
        announced = self._looks_like(first, last)
        if announced is not None:
            raise OSError(
                errno.EPERM,
                f"would turn this image, whose raw format was guessed, into {announced}; serve it with --format raw",
                self.file.name,
            )

    def _sector_after(self, start: int, offset: int, data: ReadBuffer) -> bytes:
        """The sector at `start` as it would read once data was written at offset."""
        sector = self.read(start, min(_SECTOR, self.size - start))
        low, high = max(start, offset), min(start + len(sector), offset + len(data))
        if low < high:
            sector[low - start : high - start] = memoryview(data)[low - offset : high - offset]
        return bytes(sector)

    def zero(self, offset: int, length: int, *, unmap: bool = True) -> None:
        if self.read_only:
            raise self._refusal()
        if unmap and self.file.punch_hole(offset, length):
            return
        if not self.file.zero_range(offset, length):
            self.file.write_zeros(offset, length)

    def discard(self, offset: int, length: int) -> None:
        if self.read_only:
            raise self._refusal()
        self.file.punch_hole(offset, length)

    def flush(self) -> None:
        if not self.read_only:
            self.file.sync()

    def close(self) -> None:
        if self.file.fd >= 0:
            try:
                self.flush()
            finally:
                self.file.close()
