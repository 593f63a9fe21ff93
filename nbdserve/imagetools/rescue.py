"""Going on past what cannot be read.

Lists of it are written in the form that ddrescue and its kin understand (GNU ddrescue manual, "Mapfile structure"), so
that those can go on where a conversion left holes.
"""

from __future__ import annotations

import os
import threading

from nbdserve.block import BlockDevice, Computed, Data, Extent, HostFile
from nbdserve.block.file import WriteBuffer
from nbdserve.errors import OpenError
from nbdserve.formats.newfile import new_file

_SECTOR = 512
_MAGIC = b"# Mapfile."


class Salvaged(BlockDevice):
    """Another disk, of which sectors that cannot be read are zeros; it is not closed with this one.

    Attributes:
        unreadable: (offset, bytes) of what could not be read so far, in any order.
    """

    def __init__(self, source: BlockDevice) -> None:
        super().__init__(source.size, read_only=True)
        self.unreadable: list[tuple[int, int]] = []
        self._source = source
        self._lock = threading.Lock()

    def map(self, offset: int, length: int) -> Extent:
        try:
            extent = self._source.map(offset, length)
        except OSError:  # where the bytes lie is not known; reading them will tell
            return Computed(min(_SECTOR, length))
        # Nobody may share or send what lies in the host's file, unreadable as it may be.
        return Computed(extent.length, extent.depth) if isinstance(extent, Data) else extent

    def read_computed(self, offset: int, buffer: WriteBuffer) -> None:
        """Halve a range that cannot be read until what is left are single sectors."""
        view = memoryview(buffer)
        try:
            self._source.read_into(offset, view)
        except OSError:
            if len(view) > _SECTOR:
                half = -(-len(view) // 2 // _SECTOR) * _SECTOR
                self.read_computed(offset, view[:half])
                self.read_computed(offset + half, view[half:])
                return
            view[:] = bytes(len(view))
            with self._lock:
                self.unreadable.append((offset, len(view)))


def demand_map_place(path: str) -> None:
    """Refuse a name under which something other than a map would be lost.

    Raises:
        OpenError: there is such a file.
    """
    if not os.path.lexists(path):
        return
    with HostFile.open(path, writable=False) as file:
        if bytes(file.read(0, len(_MAGIC))) != _MAGIC:
            raise OpenError(f"{path}: exists and is no map of unreadable parts; choose another name for that")


def write_map(path: str, size: int, unreadable: list[tuple[int, int]]) -> None:
    """Write the list; an existing one is replaced (see demand_map_place()).

    Args:
        size: of the source, in bytes.
        unreadable: (offset, bytes) of each part, in any order.
    """
    lines = [
        f"{_MAGIC.decode()} Written by nbdimg",
        "# current_pos  current_status  current_pass",
        f"{size:#010x}  +  1",
    ]
    lines.append("#      pos        size  status")
    position = 0
    for offset, length in _merged(unreadable):
        if offset > position:
            lines.append(f"{position:#010x}  {offset - position:#010x}  +")
        lines.append(f"{offset:#010x}  {length:#010x}  -")
        position = offset + length
    if position < size:
        lines.append(f"{position:#010x}  {size - position:#010x}  +")
    if os.path.lexists(path):
        os.unlink(path)
    with new_file(path) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())


def _merged(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for offset, length in sorted(parts):
        if merged and sum(merged[-1]) == offset:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((offset, length))
    return merged
