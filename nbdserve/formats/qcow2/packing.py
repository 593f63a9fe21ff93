"""Refcount blocks between the disk and memory, for widths of 1 to 64 bits ("Host cluster management").

In memory a block is an array with one item for each refcount, whatever the width: bytes for up to 8 bits. On the disk
the narrow ones share bytes, the least significant bits first. Both ways go through integers as long as a block, where
one shift moves all of its bytes at once.
"""

from __future__ import annotations

from array import array

from nbdserve.formats.qcow2.entries import swapped, table_bytes

_TYPECODES = {1: "B", 2: "B", 4: "B", 8: "B", 16: "H", 32: "I", 64: "Q"}


def empty_block(width: int, entries: int) -> array[int]:
    """A block of refcounts that are all 0."""
    code = _TYPECODES[width]
    return array(code, bytes(entries * array(code).itemsize))


def unpack_block(width: int, content: bytes | bytearray) -> array[int]:
    """The refcounts of a block that was read; `width` in bits, a power of two."""
    if width >= 8:
        return swapped(array(_TYPECODES[width], bytes(content)))
    each = 8 // width
    refcounts = array("B", bytes(len(content) * each))
    whole = int.from_bytes(content, "little")
    lowest = int.from_bytes(bytes([(1 << width) - 1]) * len(content), "little")
    counts = memoryview(refcounts)
    for position in range(each):
        counts[position::each] = (whole >> position * width & lowest).to_bytes(len(content), "little")
    return refcounts


def pack_block(width: int, refcounts: array[int]) -> bytes:
    """The bytes of a block, or of a part of it that fills bytes."""
    if width >= 8:
        return table_bytes(refcounts)
    each = 8 // width
    whole = 0
    for position in range(each):
        whole |= int.from_bytes(refcounts[position::each].tobytes(), "little") << position * width
    return whole.to_bytes(len(refcounts) // each, "little")
