"""The host file as a row of clusters: how far it reaches, and which clusters hold the image's own tables.

The rule this file keeps: *a guest never writes to a table.* In a sound image no guest cluster and no table share a host
cluster. In a damaged or hostile one they might, and then one write of the guest would change the mapping of everything.
So the tables' places are known here; L2 tables that would lead a guest there are refused, and such clusters are neither
handed out nor given up, whatever their refcount says.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

from nbdserve.block.file import HostFile
from nbdserve.errors import FormatError
from nbdserve.formats.qcow2.entries import COPIED, Geometry

_GROWTH = 1 << 20  # bytes; the file grows in multiples of this, which spares a system call for each cluster


def damaged(name: str, what: str) -> OSError:
    """The error of a request that meets a damaged table."""
    return OSError(errno.EIO, f"{what}; the image is damaged, repair it with: qemu-img check -r all", name)


class HostSpace:
    """The host file of an image.

    Attributes:
        file: the file.
        geometry: the image's cluster size.
        end: the file's length in bytes. While the image is being written, whole clusters.
        fresh_from: bytes; clusters from here on have never held anything, or have been punched out since.
        tables: the L2 entries that would let a guest overwrite a table in place, one for each cluster of a table.
    """

    def __init__(self, file: HostFile, geometry: Geometry) -> None:
        self.file = file
        self.geometry = geometry
        self.end = self.fresh_from = file.size
        self.tables: set[int] = set()

    def claim(self, offset: int, length: int, what: str) -> None:
        """Note at opening that `length` bytes at host offset `offset` hold a table.

        Raises:
            FormatError: another table is said to lie there.
        """
        entries = self._entries(offset >> self.geometry.cluster_bits, self._clusters(length))
        if not self.tables.isdisjoint(entries):
            raise FormatError(
                f"{self.file.name}: {what} at {offset} overlaps another table; repair the image with "
                f"`qemu-img check -r all {self.file.name}` or open it read-only (-r)"
            )
        self.tables.update(entries)

    def start_writing(self) -> None:
        """Complete the last cluster of the file; from now on it consists of whole clusters."""
        size = self.geometry.cluster_size
        self.end = self.end // size * size if self.file.is_device else -(-self.end // size) * size
        self.file.grow(self.end)
        self.fresh_from = self.end

    def reach(self, end: int) -> None:
        """Make the file at least `end` bytes long, a multiple of the cluster size."""
        if end <= self.end:
            return
        if self.file.is_device:
            raise OSError(errno.ENOSPC, "the block device is too small for the image to grow", self.file.name)
        step = max(_GROWTH, self.geometry.cluster_size)
        end = -(-end // step) * step
        self.file.grow(end)
        self.end = end

    def punch(self, first: int, count: int) -> bool:
        """Punch free clusters out of the file, to read as zeros; False where that does not work."""
        try:
            return self.file.punch_hole(first << self.geometry.cluster_bits, count << self.geometry.cluster_bits)
        except OSError:  # no reason to fail those who want to write: they can do without
            return False

    def add_table(self, first: int, count: int) -> None:
        """Clusters that were just allocated hold a table."""
        self.tables.update(self._entries(first, count))

    def remove_table(self, first: int, count: int) -> None:
        """Clusters hold a table no more."""
        self.tables.difference_update(self._entries(first, count))

    def holds_table(self, first: int, count: int = 1) -> bool:
        """Whether one of the clusters holds a table."""
        return not self.tables.isdisjoint(self._entries(first, count))

    def _entries(self, first: int, count: int) -> Iterable[int]:
        size = self.geometry.cluster_size
        start = first * size | COPIED
        return range(start, start + count * size, size)

    def _clusters(self, length: int) -> int:
        return -(-length // self.geometry.cluster_size)
