"""The host file as a row of clusters: how far it reaches, and which clusters hold the image's own tables.

The rule this file keeps: *a guest never writes to a table.* In a sound image no guest cluster and no table share a host
cluster. In a damaged or hostile one they might, and then one write of the guest would change the mapping of everything.
So the tables' places are known here; L2 tables that would lead a guest there are refused, and such clusters are neither
handed out nor given up, whatever their refcount says.

Memory: 8 bytes for each table that was there when the image was opened, some 100 for each that was made since.
"""

from __future__ import annotations

import errno
from array import array
from bisect import bisect_left
from collections.abc import Iterable

from nbdserve.block.file import HostFile
from nbdserve.errors import FormatError
from nbdserve.formats.qcow2.entries import COPIED, NOT_COPIED, Geometry

_GROWTH = 1 << 20  # bytes; the file grows in multiples of this, which spares a system call for each cluster
_PAGE = 4096


def damaged(name: str, what: str) -> OSError:
    """The error of a request that meets a damaged table."""
    return OSError(errno.EIO, f"{what}; the image is damaged, repair it with: qemu-img check -r all", name)


class HostSpace:
    """The host file of an image.

    Attributes:
        file: the file.
        guest_file: the same, as the guest's data is read and written through it: what decrypts and encrypts, if that
            is encrypted.
        geometry: the image's cluster size.
        end: the file's length in bytes. While the image is being written, whole clusters.
        full_end: where the last cluster ends that the file holds to its end, in bytes.
        fresh_from: bytes; clusters from here on have never held anything.
    """

    def __init__(self, file: HostFile, geometry: Geometry) -> None:
        self.file = self.guest_file = file
        self.geometry = geometry
        self.end = self.fresh_from = file.size
        self.full_end = self.end & ~(geometry.cluster_size - 1)
        self._first_tables = array("Q")  # sorted
        self._new_tables: set[int] = set()
        self._old_tables: set[int] = set()  # of the first ones, those that are tables no more

    def claim(self, places: Iterable[tuple[int, int, str]]) -> None:
        """Note at opening which ranges (host offset, bytes, what it is) hold tables.

        Raises:
            FormatError: two tables share a cluster, or one does not lie inside the file.
        """
        bits, mask = self.geometry.cluster_bits, self.geometry.cluster_size - 1
        claimed = array("Q")
        for offset, length, what in places:
            if offset & mask or offset >= self.end:
                raise self._wrong(f"{what} is said to lie at {offset:#x}, which is not a cluster of the file")
            claimed.extend(range(offset >> bits, (offset + length + mask) >> bits))
        self._first_tables = array("Q", sorted(claimed))
        for before, after in zip(self._first_tables, memoryview(self._first_tables)[1:], strict=False):
            if before == after:
                raise self._wrong(f"two tables claim the cluster at {before << bits:#x}, so that they overlap")

    def _wrong(self, what: str) -> FormatError:
        return FormatError(
            f"{self.file.name}: {what}; repair the image with 'qemu-img check -r all', or open it read-only"
        )

    def start_writing(self) -> None:
        """Complete the last cluster of the file; from now on it consists of whole clusters."""
        size = self.geometry.cluster_size
        self._set_end(self.end // size * size if self.file.is_device else -(-self.end // size) * size)
        self.fresh_from = self.end
        # Pages that wait in a socket must not change, but a hole that is smaller than a page changes one in place.
        self.file.may_be_sent = size >= _PAGE

    def _set_end(self, end: int) -> None:
        if not self.file.is_device and end > self.file.size:
            self.file.resize(end)
        self.end = self.full_end = end

    def reach(self, end: int) -> None:
        """Make the file at least `end` bytes long, a multiple of the cluster size."""
        if end <= self.end:
            return
        if self.file.is_device:
            raise OSError(errno.ENOSPC, "the block device is too small for the image to grow", self.file.name)
        step = max(_GROWTH, self.geometry.cluster_size)
        try:
            self._set_end(-(-end // step) * step)
        except OSError:  # a limit on the size of files, perhaps; it may leave room for what is needed now
            self._set_end(end)

    def trim(self, end: int) -> None:
        """At the very end: cut off what reach() has added beyond what is in use."""
        if not self.file.is_device and self.fresh_from <= end < self.end:
            self.file.resize(end)

    def punch(self, first: int, count: int) -> bool:
        """Punch free clusters out of the file, to read as zeros; False where that does not work."""
        try:
            return self.file.punch_hole(first << self.geometry.cluster_bits, count << self.geometry.cluster_bits)
        except OSError:  # no reason to fail those who want to write: they can do without
            return False

    # Tables

    def add_table(self, first: int, count: int) -> None:
        """Clusters that were just allocated hold a table."""
        self._new_tables.update(range(first, first + count))
        self._old_tables.difference_update(range(first, first + count))

    def remove_table(self, first: int, count: int) -> None:
        """Clusters hold a table no more."""
        self._new_tables.difference_update(range(first, first + count))
        self._old_tables.update(self._first_within(first, first + count))

    def holds_table(self, first: int, count: int = 1) -> bool:
        """Whether one of the clusters holds a table."""
        if not self._new_tables.isdisjoint(range(first, first + count)):
            return True
        return any(each not in self._old_tables for each in self._first_within(first, first + count))

    def leads_to_table(self, entries: Iterable[int]) -> bool:
        """Whether one of these L2 entries would let a guest overwrite a table in place."""
        bits, limit = self.geometry.cluster_bits, self.end
        own = {entry & NOT_COPIED for entry in entries if entry & COPIED}
        hosts = {entry >> bits for entry in own if entry < limit} - {0}  # which means that there is no cluster
        if not hosts:
            return False
        first = self._first_within(min(hosts), max(hosts) + 1)
        return not (hosts.isdisjoint(self._new_tables) and hosts.isdisjoint(set(first) - self._old_tables))

    def _first_within(self, start: int, stop: int) -> array[int]:
        low = bisect_left(self._first_tables, start)
        return self._first_tables[low : bisect_left(self._first_tables, stop, low)]
