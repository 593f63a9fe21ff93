"""The checksums of ext4 and its journal: CRC-32C, and the CRC-32 that runs from the highest bit down.

Both as the kernel computes them: the caller gives the value to start from, and nothing is inverted at the end.
CRC-32C comes from libext2fs where that is installed; else it is computed here, some hundred times slower.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache

ALL_ONES = 0xFFFFFFFF
_CASTAGNOLI = 0x82F63B78  # the polynomial, lowest bit first
_compute: Callable[[int, bytes | bytearray], int] | None = None
_REVERSED_BYTES = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def crc32c(data: bytes | bytearray, value: int) -> int:
    """CRC-32C of data, going on from value."""
    global _compute
    if _compute is None:
        _compute = _fastest()
    return _compute(value, data)


def crc32_be(data: bytes, value: int) -> int:
    """The kernel's crc32_be(): as zlib's CRC-32, with every bit order turned round."""
    mirrored = zlib.crc32(data.translate(_REVERSED_BYTES), _reverse(value) ^ ALL_ONES) ^ ALL_ONES
    return _reverse(mirrored)


def _reverse(value: int) -> int:
    return int(f"{value:032b}"[::-1], 2)


def _fastest() -> Callable[[int, bytes | bytearray], int]:
    """Through ctypes: cffi, which writing needs, takes long to load."""
    import ctypes

    from fusemount.filesystems.ext.library import NAME

    try:
        compute = ctypes.CDLL(NAME).ext2fs_crc32c_le
    except (OSError, AttributeError):
        return slow_crc32c
    compute.restype = ctypes.c_uint32
    compute.argtypes = (ctypes.c_uint32, ctypes.c_char_p, ctypes.c_size_t)

    def crc(value: int, data: bytes | bytearray) -> int:
        checksum: int = compute(value, bytes(data), len(data))
        return checksum

    return crc


def slow_crc32c(value: int, data: bytes | bytearray) -> int:
    """CRC-32C without any library."""
    table = _table()
    for byte in data:
        value = table[(value ^ byte) & 0xFF] ^ (value >> 8)
    return value


@cache
def _table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_CASTAGNOLI if value & 1 else 0)
        table.append(value)
    return table
