"""Streams: the content of an attribute, wherever it lies.

A resident one lies in its MFT record. Another lies in runs of clusters, and is read from the device in the fewest
pieces. Behind its initialized size it reads as zeros, whatever the clusters hold: that keeps old data of other files
from showing. A compressed one is cut into units of (nearly always) 16 clusters; a unit that got smaller fills only its
first clusters and the others are a hole.
"""

from __future__ import annotations

import errno
from functools import lru_cache

from fusemount.filesystems.base import error
from fusemount.filesystems.ntfs.boot import Geometry
from fusemount.filesystems.ntfs.lznt1 import decompress
from fusemount.filesystems.ntfs.records import Attribute, DataFlags
from fusemount.filesystems.ntfs.runs import HOLE, Runs
from nbdserve.block import BlockDevice
from nbdserve.block.file import ReadBuffer

_LARGEST_UNIT = 1 << 20


class Stream:
    """The content of an attribute.

    Attributes:
        size: bytes.
        allocated: bytes it takes up on the volume.
        flags: DataFlags.
    """

    def __init__(self, device: BlockDevice, geometry: Geometry, pieces: list[Attribute]) -> None:
        """Args: pieces: the attribute's records in order of their lowest VCN; the first one holds the sizes."""
        first = pieces[0]
        self._device = device
        self._cluster = geometry.cluster
        self._value = first.value
        self._initialized = min(first.initialized, first.size)
        self._unit = geometry.cluster << first.unit
        self._runs = Runs(geometry.clusters)
        self.size = first.size
        self.allocated = first.stored
        self.flags = first.flags
        if first.value is None:
            for piece in pieces:
                self._runs.append(piece.lowest, piece.mapping)
        self._unpack = lru_cache(4)(self._unpack_unit)

    def extend(self, piece: Attribute) -> None:
        """Add the runs of one more piece."""
        self._runs.append(piece.lowest, piece.mapping)

    def read(self, offset: int, length: int) -> ReadBuffer:
        """The bytes from offset on, fewer than `length` only at the end.

        Raises:
            OSError: EACCES when it is encrypted, EOPNOTSUPP for an unknown compression, EIO when it is damaged.
        """
        length = max(0, min(length, self.size - offset))
        if self._value is not None:
            return self._value[offset : offset + length]
        if self.flags & DataFlags.ENCRYPTED:
            raise error(errno.EACCES)
        if self.flags & DataFlags.COMPRESSED and self._unit > self._cluster:
            return self._read_compressed(offset, length)
        return self._read_plain(offset, length)

    def _read_plain(self, offset: int, length: int) -> bytearray:
        buffer = bytearray(length)
        useful = max(0, min(length, self._initialized - offset))
        if not useful:
            return buffer
        view = memoryview(buffer)[:useful]
        cluster = self._cluster
        vcn, skip = divmod(offset, cluster)
        done = 0
        for place, count in self._runs.find(vcn, -(-(skip + useful) // cluster)):
            part = min(count * cluster - skip, useful - done)
            if place != HOLE:
                self._device.read_into(place * cluster + skip, view[done : done + part])
            done += part
            skip = 0
        return buffer

    def _read_compressed(self, offset: int, length: int) -> ReadBuffer:
        if self.flags & DataFlags.COMPRESSED != 1 or self._unit > _LARGEST_UNIT:
            raise error(errno.EOPNOTSUPP)
        first, skip = divmod(offset, self._unit)
        useful = max(0, min(length, self._initialized - offset))
        count = -(-(skip + useful) // self._unit) if useful else 0
        if count == 1:
            content = self._unpack(first)[skip : skip + useful]
        else:
            content = b"".join(self._unpack(index) for index in range(first, first + count))[skip : skip + useful]
        return content if useful == length else content + bytes(length - useful)

    def _unpack_unit(self, index: int) -> bytes:
        cluster, unit = self._cluster, self._unit
        clusters = unit // cluster
        parts = list(self._runs.find(index * clusters, clusters))
        stored = bytearray()
        whole = True
        for place, count in parts:
            if place == HOLE:
                whole = False
                break
            stored += self._device.read(place * cluster, count * cluster)
        if whole:
            return bytes(stored)
        if not stored:
            return bytes(unit)
        try:
            return bytes(decompress(stored, unit))
        except ValueError:
            raise error(errno.EIO) from None
