"""Where new guest clusters go: anywhere in the image file, or to their own offset in an external data file.

In a data file nothing is reserved, so nothing has to wait either: a cluster that is given up is punched out at once.
Whatever a crash leaves of the tables then, the guest finds the zeros that it asked for. With data_file_raw that hole is
more than a courtesy: the data file by itself must show what the guest sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from nbdserve.formats.qcow2.allocation import Allocator
from nbdserve.formats.qcow2.entries import Geometry
from nbdserve.formats.qcow2.refcounts import Row, append_row
from nbdserve.formats.qcow2.space import HostSpace


class Places(Protocol):
    """Hands out clusters for the guest's data; under the allocation lock."""

    def allocate(self, guest_cluster: int, wanted: int) -> tuple[int, int, bool]:
        """Up to `wanted` clusters in a row: the first, how many, and whether they read as zeros."""

    def allocate_at_once(self, guest_cluster: int, count: int) -> int | None:
        """The first of `count` clusters in a row that read as zeros, if that needs no look at the disk."""

    def free(self, *entries: int) -> None:
        """First words of L2 entries have lost their meaning."""

    def cancel(self, first: int, count: int) -> None:
        """Clusters that were handed out will not be used."""

    def zero(self, entry: int, inside: int, length: int) -> None:
        """Bytes of a cluster that stays where it is read as zeros from now on."""


class InImage:
    """Clusters of the image file, counted by refcounts.

    Args:
        park: told of what has lost a reference (first, count), see writeback.py.
    """

    def __init__(self, geometry: Geometry, allocator: Allocator, park: Callable[[int, int], None]) -> None:
        self._geometry = geometry
        self._allocator = allocator
        self._park = park

    def allocate(self, guest_cluster: int, wanted: int) -> tuple[int, int, bool]:
        return self._allocator.allocate(wanted)

    def allocate_at_once(self, guest_cluster: int, count: int) -> int | None:
        return self._allocator.allocate_at_once(count)

    def free(self, *entries: int) -> None:
        rows: list[Row] = []
        for entry in entries:
            if entry:
                first, count = self._geometry.host_clusters(entry)
                if count:
                    append_row(rows, first, count)
        for row in rows:
            self._park(*row)

    def cancel(self, first: int, count: int) -> None:
        self._park(first, count)

    def zero(self, entry: int, inside: int, length: int) -> None:
        return  # the tables say so


class InDataFile:
    """Clusters of an external data file.

    Args:
        is_raw: whether the file by itself must show what the guest sees.
    """

    def __init__(self, data: HostSpace, *, is_raw: bool) -> None:
        self._data = data
        self._bits = data.geometry.cluster_bits
        self._is_raw = is_raw

    def allocate(self, guest_cluster: int, wanted: int) -> tuple[int, int, bool]:
        is_data, length = self._data.file.data_extent(guest_cluster << self._bits, wanted << self._bits)
        count = max(1, length >> self._bits)
        return guest_cluster, count, not is_data and length >> self._bits > 0

    def allocate_at_once(self, guest_cluster: int, count: int) -> int | None:
        is_data, length = self._data.file.data_extent(guest_cluster << self._bits, count << self._bits)
        return None if is_data or length < count << self._bits else guest_cluster

    def free(self, *entries: int) -> None:
        rows: list[Row] = []
        for entry in entries:
            if self._data.geometry.is_placed(entry):
                append_row(rows, (entry & self._data.geometry.offset_mask) >> self._bits, 1)
        for first, count in rows:
            offset, length = first << self._bits, count << self._bits
            if not self._data.file.punch_hole(offset, length) and self._is_raw:
                self._data.file.write_zeros(offset, length)

    def cancel(self, first: int, count: int) -> None:
        return  # they are nobody else's

    def zero(self, entry: int, inside: int, length: int) -> None:
        offset = (entry & self._data.geometry.offset_mask) + inside
        if self._is_raw and not self._data.file.zero_range(offset, length):
            self._data.file.write_zeros(offset, length)
