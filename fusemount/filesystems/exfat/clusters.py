"""Chains of clusters: where a file's content lies (sections 4 and 7.6).

A file either lies in one piece and the FAT says nothing of it, or the FAT names for each cluster the next one.
"""

from __future__ import annotations

import errno
from array import array
from bisect import bisect_right
from functools import lru_cache

from fusemount.filesystems.base import error
from fusemount.filesystems.exfat.boot import FIRST_CLUSTER, Geometry
from nbdserve.block import BlockDevice

_CHUNK = 1 << 16
_END = 0xFFFFFFFF


class Chain:
    """Clusters in order, as runs of neighbours: runs[i] = (index of the first one in the chain, its place in bytes)."""

    def __init__(self, starts: list[int], places: list[int], count: int) -> None:
        self.starts = starts
        self.places = places
        self.count = count


class Clusters:
    """The clusters of a volume."""

    def __init__(self, device: BlockDevice, geometry: Geometry) -> None:
        self._device = device
        self._geometry = geometry
        self._fat = lru_cache(64)(self._read_fat)

    def contiguous(self, first: int, count: int) -> Chain:
        """The chain of a file that lies in one piece. Raises EIO when it leaves the volume."""
        self._check(first)
        self._check(first + count - 1)
        return Chain([0], [self._place(first)], count)

    def follow(self, first: int, most: int | None = None) -> Chain:
        """The chain that the FAT says, at most `most` clusters of it. Raises EIO when it is damaged."""
        starts: list[int] = []
        places: list[int] = []
        cluster, previous, count = first, 0, 0
        while cluster != _END and count != most:
            self._check(cluster)
            if count >= self._geometry.clusters:
                raise error(errno.EIO)  # it runs in circles
            if cluster != previous + 1 or not starts:
                starts.append(count)
                places.append(self._place(cluster))
            previous = cluster
            count += 1
            chunk, index = divmod(cluster, _CHUNK // 4)
            cluster = self._fat(chunk)[index]
        return Chain(starts, places, count)

    def read(self, chain: Chain, offset: int, length: int) -> bytearray:
        """Bytes of a chain. Raises EIO behind its end."""
        cluster = self._geometry.cluster
        if offset + length > chain.count * cluster:
            raise error(errno.EIO)
        buffer = bytearray(length)
        view = memoryview(buffer)
        index = bisect_right(chain.starts, offset // cluster) - 1
        done = 0
        while done < length:
            start = chain.starts[index] * cluster
            end = (chain.starts[index + 1] if index + 1 < len(chain.starts) else chain.count) * cluster
            part = min(end - offset - done, length - done)
            self._device.read_into(chain.places[index] + offset + done - start, view[done : done + part])
            done += part
            index += 1
        return buffer

    def place(self, chain: Chain, index: int) -> int:
        """Where a cluster of a chain is, in bytes from the start of the device."""
        run = bisect_right(chain.starts, index) - 1
        return chain.places[run] + (index - chain.starts[run]) * self._geometry.cluster

    def _read_fat(self, chunk: int) -> array[int]:
        start = self._geometry.fat + chunk * _CHUNK
        entries = array("I")
        entries.frombytes(self._device.read(start, min(_CHUNK, self._geometry.heap - start)))
        return entries

    def _place(self, cluster: int) -> int:
        return self._geometry.heap + (cluster - FIRST_CLUSTER) * self._geometry.cluster

    def _check(self, cluster: int) -> None:
        if not FIRST_CLUSTER <= cluster < self._geometry.clusters + FIRST_CLUSTER:
            raise error(errno.EIO)
