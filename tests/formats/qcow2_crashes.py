"""Crashes of qcow2 images: as of all formats (crashes.py), with the ways to write that only qcow2 has.

Holes count as written bytes here: a crash may keep some of their sectors and lose others.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from nbdserve.block import BlockDevice, HostFile
from nbdserve.formats.qcow2.writable import WritableQcow2Image
from tests.formats import crashes
from tests.formats.crashes import SECTOR, Change, Remains, remains_of, sector_of


class Recorder(crashes.Recorder):
    """Notes holes as the bytes that they are."""

    def punch_hole(self, offset: int, length: int) -> bool:
        self.log.append(Change(offset, length, bytes(length)))
        return HostFile.punch_hole(self, offset, length)

    def sync(self) -> None:
        HostFile.sync(self)
        self.log.append(None)


def remains(start: bytes, log: list[Change | None], chosen: random.Random, samples: int) -> Iterator[tuple[int, bytes]]:
    """What the file may hold after a crash: the moment (a position in the log) and the content."""
    for moment, left in remains_of(Remains.of_content(start), log, chosen, samples=samples):
        yield moment, left.content()


class Witness(crashes.Witness):
    """Looks at the whole device, and writes by the quick way every other time if that is possible."""

    def __init__(self, device: BlockDevice, log: list[Change | None]) -> None:
        super().__init__(device, log, [range(device.size // SECTOR)], before=None)

    def _put(self, offset: int, data: bytes, number: int) -> None:
        if number % 2 or not self.device.write_nowait(offset, data):
            self.device.write(offset, data)

    def pack(self, sector: int, number: int) -> None:
        """Write a number, compressed, to the cluster that holds a sector."""
        image = self.device
        assert isinstance(image, WritableQcow2Image)
        count = image.header.geometry.cluster_size // SECTOR
        first = sector // count * count
        sectors = range(first, min(first + count, image.size // SECTOR))
        offset, _ = self._note(sectors, number)
        image.write_compressed(offset, sector_of(number) * len(sectors))

    def zero(self, sectors: range, *, unmap: bool) -> None:
        """Make sectors zeros."""
        self.device.zero(*self._note(sectors, 0), unmap=unmap)
