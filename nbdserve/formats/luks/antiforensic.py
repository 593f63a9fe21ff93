"""Keys stored in stripes, all of which are needed to get them back: destroying any one sector destroys the key
(LUKS1 specification, section 2.4, "Anti-forensic splitting")."""

from __future__ import annotations

import hashlib
import secrets

STRIPES = 4000  # the number that everybody uses


def split(key: bytes, stripes: int, hash: str) -> bytes:
    """A key as so many stripes, each as long as the key."""
    length = len(key)
    material, mixed = bytearray(), bytes(length)
    for _ in range(stripes - 1):
        stripe = secrets.token_bytes(length)
        material += stripe
        mixed = _diffuse(_xor(mixed, stripe), hash)
    return bytes(material) + _xor(mixed, key)


def merge(material: bytes | bytearray, stripes: int, hash: str) -> bytes:
    """The key that was stored in so many stripes."""
    length = len(material) // stripes
    mixed = bytes(length)
    for start in range(0, len(material) - length, length):
        mixed = _diffuse(_xor(mixed, material[start : start + length]), hash)
    return _xor(mixed, material[len(material) - length :])


def _diffuse(block: bytes, hash: str) -> bytes:
    """Let every bit of a block depend on others: pieces as long as a hash, each hashed together with its number."""
    size = hashlib.new(hash).digest_size
    pieces = (
        hashlib.new(hash, number.to_bytes(4, "big") + block[start : start + size]).digest()
        for number, start in enumerate(range(0, len(block), size))
    )
    return b"".join(pieces)[: len(block)]


def _xor(one: bytes | bytearray, other: bytes | bytearray) -> bytes:
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).to_bytes(len(one), "big")
