"""CRC-32C, the checksum of all VHDX structures ([MS-VHDX] 2.2.2; Castagnoli, reflected, polynomial 0x1EDC6F41).

A message is a polynomial over GF(2), and its checksum a remainder. Looking every byte up in a table is slow in Python,
so the first half of the message is multiplied by the remainder of the power of x that it stands before, and added to
the second half, until a few bytes are left: some sixteen shifts of one long integer each time. The first bit of the
message is its highest power and the lowest bit of the integer, so all polynomials are mirrored.
"""

from __future__ import annotations

from functools import lru_cache

_POLYNOMIAL = 0x82F63B78  # mirrored: bit 31 - i is the coefficient of x^i; x^32 is left out
_ONES = 0xFFFFFFFF


def crc32c(data: bytes | bytearray | memoryview) -> int:
    """The checksum of data."""
    bits = 8 * len(data) + 32
    message = int.from_bytes(data, "little") ^ _ONES  # the initial value; 32 zero bits follow the message
    while bits > 128:
        head = (bits - 32) // 2
        rest = bits - head
        product = _multiply(message & ((1 << head) - 1), _power(rest))
        # The product has head + 31 bits, of which the last is the lowest power, as is the last of the rest.
        message = (message >> head) ^ (product << (rest - head - 31))
        bits = rest
    return _reduce(message, bits - 32) ^ _ONES


def checksum_of(structure: bytes | bytearray, field: int) -> int:
    """The checksum of a structure whose 4 bytes at `field`, the checksum itself, count as zeros."""
    blank = bytearray(structure)
    blank[field : field + 4] = bytes(4)
    return crc32c(blank)


def is_intact(structure: bytes | bytearray, field: int) -> bool:
    """Whether the checksum at `field`, little-endian, is right."""
    return int.from_bytes(structure[field : field + 4], "little") == checksum_of(structure, field)


def _multiply(left: int, right: int) -> int:
    """The product of two mirrored polynomials, mirrored; `right` is the shorter one."""
    product = 0
    while right:
        shift = right.bit_length() - 1
        product ^= left << shift
        right ^= 1 << shift
    return product


@lru_cache(maxsize=1024)
def _power(exponent: int) -> int:
    """x to the exponent, modulo the polynomial, mirrored into 32 bits. The lengths of structures are few."""
    if exponent < 32:
        return 1 << (31 - exponent)
    half = _power(exponent // 2)
    return _reduce(_multiply(half, half), 31 + exponent % 2)


def _reduce(polynomial: int, steps: int) -> int:
    """The remainder of a mirrored polynomial of 32 + steps bits; each step takes its highest power away."""
    for _ in range(steps):
        polynomial = polynomial >> 1 ^ (_POLYNOMIAL if polynomial & 1 else 0)
    return polynomial
