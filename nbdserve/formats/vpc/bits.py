"""Sector bitmaps: one bit for every sector of a block, set when the sector is in this file rather than in the parent.

Bit i of byte n stands for sector 8 * n + i, as VHDX has it. VHD counts from the highest bit down: mirrored() turns its
bytes round.
"""

from __future__ import annotations

_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def mirrored(bitmap: bytes | bytearray) -> bytearray:
    """The bitmap with the bits of every byte in reverse order."""
    return bytearray(bitmap.translate(_MIRRORED))


def run_of_bits(bitmap: bytes | bytearray, first: int, end: int) -> tuple[bool, int]:
    """Whether bit `first` is set, and how many bits from there on, up to `end`, are the same."""
    word = int.from_bytes(bitmap[first >> 3 : (end + 7) >> 3], "little") >> (first & 7)
    is_set = bool(word & 1)
    other = ~word if is_set else word
    run = (other & -other).bit_length() - 1 if other else end - first
    return is_set, min(run, end - first)


def set_bits(bitmap: bytearray, first: int, end: int) -> None:
    """Set the bits from `first` up to, not including, `end`."""
    span = slice(first >> 3, (end + 7) >> 3)
    word = int.from_bytes(bitmap[span], "little") | ((1 << (end - first)) - 1) << (first & 7)
    bitmap[span] = word.to_bytes(span.stop - span.start, "little")
