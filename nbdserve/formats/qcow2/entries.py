"""The bits of table entries (QEMU, docs/interop/qcow2, "Cluster mapping"), and what cluster sizes make of them.

Tables are kept in memory as array("Q") in the host's byte order. A standard L2 entry is one of

    0                                nothing here: the backing file's bytes, or zeros
    ZERO                             zeros (version 3)
    ZERO | offset [| COPIED]         zeros, with a host cluster set aside
    offset [| COPIED]                a host cluster; COPIED: nobody else uses it, so it may be overwritten in place
    COMPRESSED | size | offset       compressed data that begins at any byte and spans one or more host clusters

An extended entry has a second word: the lower half says which of 32 subclusters are allocated, the upper half which of
them read as zeros; ZERO is not used. In an external data file a cluster's offset is its guest offset, so that 0 is a
place like any other where COPIED is set.
"""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass

from nbdserve.block.file import HostFile

COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1
NOT_COPIED = COPIED - 1

SUBCLUSTERS = 32
ALL_SUBCLUSTERS = (1 << SUBCLUSTERS) - 1

_OFFSETS_BELOW = 1 << 56  # bytes; host offsets in L1 and L2 entries have 56 bits
_SECTOR = 512
ENTRY_SIZE = 8


@dataclass(frozen=True, slots=True)
class Geometry:
    """What follows from the cluster size, the version and the features.

    Attributes:
        cluster_bits: log2 of the cluster size in bytes, 9 to 21.
        cluster_size: bytes.
        words: 64-bit words of an L2 entry: 1, or 2 with subclusters.
        entries: entries of an L2 table, which is one cluster.
        table_shift: guest offset >> table_shift is the number of the L2 table.
        offset_mask: the host offset in standard L2 entries and L1 entries.
        reserved: bits that must be clear in the first word of standard L2 entries.
        has_zero_flag: whether L2 entries can say that a cluster reads as zeros.
        is_external: whether guest clusters lie in a data file, each at its guest offset.
    """

    cluster_bits: int
    cluster_size: int
    words: int
    entries: int
    table_shift: int
    offset_mask: int
    reserved: int
    has_zero_flag: bool
    is_external: bool

    @classmethod
    def of(cls, cluster_bits: int, version: int, *, extended: bool = False, external: bool = False) -> Geometry:
        """The geometry of a checked header."""
        size = 1 << cluster_bits
        words = 2 if extended else 1
        entries = size // (ENTRY_SIZE * words)
        offset_mask = (_OFFSETS_BELOW - 1) & ~(size - 1)
        has_zero_flag = version >= 3
        reserved = (1 << 62) - 1 & ~offset_mask & ~(ZERO if has_zero_flag and not extended else 0)
        shift = cluster_bits + entries.bit_length() - 1
        return cls(cluster_bits, size, words, entries, shift, offset_mask, reserved, has_zero_flag, external)

    @property
    def table_words(self) -> int:
        """64-bit words of an L2 table."""
        return self.entries * self.words

    @property
    def unit(self) -> int:
        """Bytes of the smallest part of the disk that can be allocated: a cluster or a subcluster."""
        return self.cluster_size if self.words == 1 else self.cluster_size // SUBCLUSTERS

    def l1_entries(self, size: int) -> int:
        """How many L1 entries a disk of `size` bytes needs."""
        return -(-size >> self.table_shift)

    def is_placed(self, entry: int) -> bool:
        """Whether an entry that is not compressed names a host cluster."""
        return bool(entry & self.offset_mask or (self.is_external and entry & COPIED))

    def compressed_place(self, entry: int) -> tuple[int, int]:
        """Host offset and length in bytes of the sectors that hold a compressed cluster's data."""
        size_shift = 62 - (self.cluster_bits - 8)
        offset = entry & (1 << size_shift) - 1
        sectors = ((entry & COMPRESSED - 1) >> size_shift) + 1
        return offset, sectors * _SECTOR - offset % _SECTOR

    def compressed_entry(self, offset: int, length: int) -> int:
        """The L2 entry of compressed data; the opposite of compressed_place()."""
        size_shift = 62 - (self.cluster_bits - 8)
        sectors = (offset + length - 1) // _SECTOR - offset // _SECTOR
        assert offset < 1 << min(size_shift, 56)
        return COMPRESSED | sectors << size_shift | offset

    def host_clusters(self, entry: int) -> tuple[int, int]:
        """The first cluster of the image file that an L2 entry refers to, and how many: what refcounts count."""
        if entry & COMPRESSED:
            offset, length = self.compressed_place(entry)
            first = offset >> self.cluster_bits
            return first, (offset + length - 1 >> self.cluster_bits) - first + 1
        offset = entry & self.offset_mask
        return offset >> self.cluster_bits, 1 if offset and not self.is_external else 0


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
