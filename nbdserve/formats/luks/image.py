"""A LUKS image as a disk: what lies behind the header, decrypted."""

from __future__ import annotations

from nbdserve.block.device import BlockDevice
from nbdserve.block.extents import Computed, Extent
from nbdserve.block.file import HostFile, ReadBuffer, WriteBuffer
from nbdserve.formats.luks.file import EncryptedFile


class LuksImage(BlockDevice):
    """The bytes [start, start + size) of an encrypted file.

    Nothing of it is ever a hole: the disk would not read as zeros there, and a hole would tell which parts are unused.
    Therefore discarding does nothing, as with QEMU and, unless it is told otherwise, with cryptsetup.

    Attributes:
        file: the image file.
    """

    def __init__(self, file: HostFile, plain: EncryptedFile, start: int, size: int, *, read_only: bool) -> None:
        super().__init__(size, read_only=read_only)
        self.useful_writers = 3  # encryption keeps the interpreter's lock, so more would only wait for it
        self.file = file
        self._plain = plain
        self._start = start

    def map(self, offset: int, length: int) -> Extent:
        return Computed(length)

    def map_nowait(self, offset: int, length: int) -> Extent | None:
        return Computed(length)

    def read_computed(self, offset: int, buffer: WriteBuffer) -> None:
        self._plain.read_into(self._start + offset, buffer)

    def write(self, offset: int, data: ReadBuffer) -> None:
        if self.read_only:
            raise self._refusal()
        self._plain.write(self._start + offset, data)

    def zero(self, offset: int, length: int, *, unmap: bool = True) -> None:
        if self.read_only:
            raise self._refusal()
        self._plain.write_zeros(self._start + offset, length)

    def discard(self, offset: int, length: int) -> None:
        if self.read_only:
            raise self._refusal()

    def flush(self) -> None:
        if not self.read_only:
            self._plain.sync()

    def close(self) -> None:
        if self.file.fd >= 0:
            try:
                self.flush()
            finally:
                self._plain.close()
