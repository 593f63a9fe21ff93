"""Keys stored in stripes, all of which are needed to get them back: destroying any one sector destroys the key
(LUKS1 specification, section 2.4, "Anti-forensic splitting")."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable

STRIPES = 4000  # the number that everybody uses


def split(key: bytes, stripes: int, hash: str) -> bytes:
    """A key as so many stripes, each as long as the key."""
    length = len(key)
    diffuse = _diffuser(length, hash)
    material, mixed = bytearray(), bytes(length)
    for _ in range(stripes - 1):
        stripe = secrets.token_bytes(length)
        material += stripe
        mixed = diffuse(_xor(mixed, stripe))
    return bytes(material) + _xor(mixed, key)


def merge(material: bytes | bytearray, stripes: int, hash: str) -> bytes:
    """The key that was stored in so many stripes."""
    length = len(material) // stripes
    diffuse = _diffuser(length, hash)
    mixed = bytes(length)
    for start in range(0, len(material) - length, length):
        mixed = diffuse(_xor(mixed, material[start : start + length]))
    return _xor(mixed, material[len(material) - length :])


def _diffuser(length: int, hash: str) -> Callable[[bytes], bytes]:
    """What lets the bits of a block depend on each other: it hashes pieces as long as a hash, with their numbers."""
    new = getattr(hashlib, hash)
    size = new().digest_size
    pieces = [
        (number.to_bytes(4, "big"), slice(start, start + size)) for number, start in enumerate(range(0, length, size))
    ]

    def diffuse(block: bytes) -> bytes:
        return b"".join([new(number + block[piece]).digest() for number, piece in pieces])[:length]

    return diffuse


def _xor(one: bytes | bytearray, other: bytes | bytearray) -> bytes:
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).to_bytes(len(one), "big")
