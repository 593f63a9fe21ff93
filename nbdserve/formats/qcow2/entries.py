"""What the bits of L1 and L2 entries mean (QEMU, docs/interop/qcow2, section "Cluster mapping")."""

from __future__ import annotations

import sys
from array import array

COPIED = 1 << 63  # the cluster's refcount is exactly one: it may be overwritten in place
COMPRESSED = 1 << 62
ZERO = 1  # version 3: reads as zeros, whatever the offset says
OFFSET_MASK = 0x00FFFFFFFFFFFE00
L1_RESERVED = 0x7F000000000001FF
ALL_BITS = (1 << 64) - 1


def parse_table(raw: bytes | bytearray) -> array[int]:
    """A table of big-endian 64-bit entries."""
    table = array("Q")
    table.frombytes(raw)
    if sys.byteorder == "little":
        table.byteswap()
    return table


def build_table(table: array[int]) -> bytes:
    """The table as it lies on disk."""
    if sys.byteorder == "little":
        table = table[:]
        table.byteswap()
    return table.tobytes()


def compressed_place(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Where a compressed cluster's data begins, in bytes, and how many bytes it can have at most."""
    split = 62 - (cluster_bits - 8)
    offset = entry & ((1 << split) - 1)
    sectors = (entry >> split & ((1 << (62 - split)) - 1)) + 1
    return offset, sectors * 512 - (offset & 511)
