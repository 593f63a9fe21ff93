"""A host file whose bytes are encrypted where they lie: whoever reads and writes through it sees plain ones.

The place of a sector in the file decides its number, and so how it is encrypted. That is LUKS' rule, and qcow2's for
the clusters of an encrypted image (docs/interop/qcow2, "Full disk encryption header pointer": the offset in the *host*
file counts).

What may not be torn: a write to a part of a sector has to encrypt the sector, or the blocks of it that it touches,
anew. Nobody may change the rest of them meanwhile, nor read them half old, half new; therefore all writes take a lock,
and a read that met such a write is done again under it. On the disk, only the blocks that change are written (in XTS
mode, 16 bytes each), so that a crash in the middle spoils nothing besides what was being written; with CBC, where a
whole sector changes, that holds as far as the disk writes sectors whole.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from nbdserve.block.file import HostFile, ReadBuffer, WriteBuffer
from nbdserve.formats.luks.ciphers import SECTOR, SectorCipher

_PIECE = 1 << 20  # bytes encrypted at once


class EncryptedFile(HostFile):
    """Another host file, seen through a cipher; closing it closes that.

    Args:
        origin: the offset of a sector in the file, a multiple of the cipher's sector size from all others.
        number: of that sector.
    """

    def __init__(self, file: HostFile, cipher: SectorCipher, *, origin: int = 0, number: int = 0) -> None:
        super().__init__(file.fd, file.name, writable=file.writable)
        self.may_be_sent = False
        self._file = file
        self._cipher = cipher
        self._sector_size = cipher.sector_size
        self._origin = origin % cipher.sector_size
        self._number = number - (origin - self._origin) // SECTOR
        self._writing = threading.Lock()
        self._edits = 0  # how many writes to parts of sectors have begun or ended; odd during one

    def _number_at(self, offset: int) -> int:
        return (offset - self._origin) // SECTOR + self._number

    def _is_whole(self, offset: int, length: int) -> bool:
        return not ((offset - self._origin) % self._sector_size or length % self._sector_size)

    def _around(self, offset: int, length: int) -> tuple[int, int]:
        """The whole sectors that hold a range: offset and length."""
        inside = (offset - self._origin) % self._sector_size
        return offset - inside, -(-(inside + length) // self._sector_size) * self._sector_size

    # Reading

    def read_into(self, offset: int, buffer: WriteBuffer) -> None:
        view = memoryview(buffer)
        if not self._is_whole(offset, len(view)):
            start, length = self._around(offset, len(view))
            content = bytearray(length)
            self.read_into(start, content)
            view[:] = memoryview(content)[offset - start : offset - start + len(view)]
            return
        before = self._edits
        self._file.read_into(offset, view)
        if before & 1 or before != self._edits:
            with self._writing:
                self._file.read_into(offset, view)
        self._cipher.decrypt(self._number_at(offset), view)

    # Writing

    def write(self, offset: int, data: ReadBuffer) -> None:
        view = memoryview(data)
        while view:
            inside = (offset - self._origin) % self._sector_size
            if inside or len(view) < self._sector_size:
                piece = view[: self._sector_size - inside]
                self._edit(offset, piece)
            else:
                piece = view[: min(len(view) & -self._sector_size, _PIECE)]
                content = bytearray(piece)
                self._cipher.encrypt(self._number_at(offset), memoryview(content))
                with self._writing:
                    self._file.write(offset, content)
            view = view[len(piece) :]
            offset += len(piece)

    def _edit(self, offset: int, data: memoryview) -> None:
        """Write a part of one sector."""
        start, length = self._around(offset, len(data))
        first = offset - start
        unit = self._cipher.unit
        low, high = first // unit * unit, -(-(first + len(data)) // unit) * unit
        number = self._number_at(start)
        with self._writing:
            content = self._file.read(start, length)
            view = memoryview(content)
            self._cipher.decrypt(number, view)
            view[first : first + len(data)] = data
            self._cipher.encrypt(number, view)
            self._edits += 1
            try:
                self._file.write(start + low, view[low:high])
            finally:
                self._edits += 1

    def write_all(self, offset: int, pieces: Sequence[ReadBuffer]) -> None:
        self.write(offset, b"".join(pieces))

    def write_zeros(self, offset: int, length: int) -> None:
        while length:
            step = min(length, _PIECE)
            self.write(offset, bytes(step))
            offset += step
            length -= step

    # Holes would be read as what zeros are decrypted to

    def zero_range(self, offset: int, length: int) -> bool:
        return False

    def punch_hole(self, offset: int, length: int) -> bool:
        return False

    def data_extent(self, offset: int, length: int) -> tuple[bool, int]:
        return True, length

    # The file itself

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self.fd = -1
        self._file.close()
