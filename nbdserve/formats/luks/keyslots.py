"""Passphrase -> volume key (LUKS1 specification, section 3, "Operations").

What the slots ask for is bounded before anything is derived, all of them together: _MOST_ITERATIONS take some two
minutes, and so does Argon2 with _MOST_ARGON2_WORK; cryptsetup and QEMU choose what takes two seconds. Argon2 gets at
most _MOST_MEMORY, which is what cryptsetup chooses at most.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator

from nbdserve.errors import OpenError, Unsupported
from nbdserve.formats import GetPassphrase
from nbdserve.formats.luks.antiforensic import merge
from nbdserve.formats.luks.ciphers import SectorCipher, demand_library
from nbdserve.formats.luks.header import Area, Argon2, Derivation, Header, KeySlot, Pbkdf2

_MOST_ITERATIONS = 1 << 27
_MOST_MEMORY = 1 << 20  # KiB
_MOST_ARGON2_WORK = 128 << 20  # KiB, times passes
_MOST_LANES = 16
_LEAST_SALT = 8  # bytes; what the libraries take


def unlock(area: Area, header: Header, passphrase: GetPassphrase | None) -> bytes:
    """The volume key.

    Raises:
        OpenError: there is no passphrase, or the wrong one, or what the header asks for is not to be had.
    """
    name = area.file.name
    if passphrase is None:
        raise OpenError(f"{name}: is encrypted; give its passphrase with --passphrase-file FILE")
    demand_library(name)
    _check_costs(area, header)
    if not header.slots:
        raise OpenError(f"{name}: has no passphrase any more (no key slot is in use), so nobody can open it")
    for candidate in _candidates(passphrase()):
        for slot in header.slots:
            key = _try(area, header, slot, candidate)
            if key is not None:
                if header.cipher.is_weak(key):
                    raise area.wrong("has a volume key whose halves are equal, which hides nothing")
                return key
    raise OpenError(f"{name}: the passphrase does not open it; check the file given with --passphrase-file")


def _candidates(passphrase: bytes) -> Iterator[bytes]:
    """The bytes as they are, as QEMU and cryptsetup take them from a file; and what an editor's user has meant."""
    yield passphrase
    if passphrase.endswith(b"\n"):
        yield passphrase[:-1]


def _try(area: Area, header: Header, slot: KeySlot, passphrase: bytes) -> bytes | None:
    """What a slot holds, if the passphrase is its own."""
    cipher = SectorCipher(slot.cipher, _derive(area, slot.derivation, passphrase, slot.slot_key_bytes))
    length = header.key_bytes * slot.stripes
    material = area.read(slot.offset, min(-(-length // 512) * 512, area.size - slot.offset))
    material.extend(bytes(-len(material) % 512))
    cipher.decrypt(0, memoryview(material))
    key = merge(material[:length], slot.stripes, slot.hash)
    digest = _derive(area, header.digest_of, key, len(header.digest))
    return key if hmac.compare_digest(digest, header.digest) else None


def _check_costs(area: Area, header: Header) -> None:
    """Refuse a header whose slots would take too long."""
    iterations = header.digest_of.iterations * max(1, len(header.slots))
    work = 0
    for each in (header.digest_of, *(slot.derivation for slot in header.slots)):
        if isinstance(each, Argon2):
            if not 8 * each.lanes <= each.memory <= _MOST_MEMORY or not 1 <= each.lanes <= _MOST_LANES:
                raise area.unsupported(f"asks for {each.memory} KiB and {each.lanes} threads to derive a key")
            work += each.memory * each.passes
        else:
            iterations += each.iterations
        if len(each.salt) < _LEAST_SALT or (each.passes if isinstance(each, Argon2) else each.iterations) < 1:
            raise area.wrong("derives keys from passphrases in a way that does not exist")
    if iterations > _MOST_ITERATIONS or work > _MOST_ARGON2_WORK:
        raise area.unsupported("asks for more than some minutes of work to derive keys")


def _derive(area: Area, derivation: Derivation, secret: bytes, length: int) -> bytes:
    if isinstance(derivation, Pbkdf2):
        return hashlib.pbkdf2_hmac(derivation.hash, secret, derivation.salt, derivation.iterations, length)
    return _argon2(area, derivation, secret, length)


def _argon2(area: Area, derivation: Argon2, secret: bytes, length: int) -> bytes:
    """Raises Unsupported where the library does not know Argon2, or not this kind."""
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        from cryptography.hazmat.primitives.kdf import argon2

        kind = {"argon2i": "Argon2i", "argon2id": "Argon2id"}[derivation.kind]
        chosen = getattr(argon2, kind)(
            salt=derivation.salt,
            length=length,
            iterations=derivation.passes,
            lanes=derivation.lanes,
            memory_cost=derivation.memory,
        )
    except (ImportError, AttributeError, UnsupportedAlgorithm):
        raise Unsupported(
            f"{area.file.name}: its key is derived by {derivation.kind}, which the library cryptography can since "
            "version 47: pip install -U cryptography"
        ) from None
    key: bytes = chosen.derive(secret)
    return key
