"""The bits of table entries (qcow2 specification, "Cluster mapping"), and what cluster sizes make of them.

Tables are kept in memory as array("Q") in the host's byte order. An L2 entry is one of

    0                                nothing here: the backing file's bytes, or zeros
    ZERO                             zeros (version 3)
    ZERO | offset [| COPIED]         zeros, with a host cluster set aside
    offset [| COPIED]                a host cluster; COPIED: nobody else uses it, so it may be overwritten in place
    COMPRESSED | size | offset       compressed data that begins at any byte and spans one or two host clusters
"""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass

from nbdserve.block.file import HostFile

COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1

_OFFSETS_BELOW = 1 << 56  # bytes; host offsets in L1 and L2 entries have 56 bits
_SECTOR = 512
ENTRY_SIZE = 8


@dataclass(frozen=True, slots=True)
class Geometry:
    """What follows from the cluster size and the version.

    Attributes:
        cluster_bits: log2 of the cluster size in bytes, 9 to 21.
        cluster_size: bytes.
        entries: entries of an L2 table, which is one cluster.
        table_shift: guest offset >> table_shift is the number of the L2 table.
        offset_mask: the host offset in standard L2 entries and L1 entries.
        reserved: bits that must be clear in standard L2 entries.
        has_zero_flag: whether L2 entries can say ZERO.
    """

    cluster_bits: int
    cluster_size: int
    entries: int
    table_shift: int
    offset_mask: int
    reserved: int
    has_zero_flag: bool

    @classmethod
    def of(cls, cluster_bits: int, version: int) -> Geometry:
        """The geometry of a checked header."""
        size = 1 << cluster_bits
        offset_mask = (_OFFSETS_BELOW - 1) & ~(size - 1)
        has_zero_flag = version >= 3
        reserved = (1 << 62) - 1 & ~offset_mask & ~(ZERO if has_zero_flag else 0)
        entries = size // ENTRY_SIZE
        return cls(cluster_bits, size, entries, 2 * cluster_bits - 3, offset_mask, reserved, has_zero_flag)

    def compressed_place(self, entry: int) -> tuple[int, int]:
        """Host offset and length in bytes of the sectors that hold a compressed cluster's data."""
        size_shift = 62 - (self.cluster_bits - 8)
        offset = entry & (1 << size_shift) - 1
        sectors = ((entry & COMPRESSED - 1) >> size_shift) + 1
        return offset, sectors * _SECTOR - offset % _SECTOR

    def host_clusters(self, entry: int) -> tuple[int, int]:
        """The first host cluster an L2 entry refers to, and how many (0 to 3): what its refcounts are counted for."""
        if entry & COMPRESSED:
            offset, length = self.compressed_place(entry)
            first = offset >> self.cluster_bits
            return first, (offset + length - 1 >> self.cluster_bits) - first + 1
        offset = entry & self.offset_mask
        return offset >> self.cluster_bits, 1 if offset else 0


def read_table(file: HostFile, offset: int, entries: int) -> array[int]:
    """Read a table of 64-bit entries."""
    table = array("Q", bytes(entries * ENTRY_SIZE))
    file.read_into(offset, memoryview(table).cast("B"))
    return swapped(table)


def table_bytes(table: array[int]) -> bytes:
    """A table, or a slice of one, as it lies on the disk; the argument is not changed."""
    return swapped(array(table.typecode, table)).tobytes()


def swapped(table: array[int]) -> array[int]:
    """The table itself, its items turned from big-endian to the host's order or back."""
    if sys.byteorder == "little":
        table.byteswap()
    return table
