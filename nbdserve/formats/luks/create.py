"""New LUKS images, of version 1 and as QEMU makes them by default: AES-256 in XTS mode, SHA-256, one passphrase.

Where the eight key slots lie is QEMU's layout too (crypto/block-luks.c): behind the first 4 KiB, each rounded up to
4 KiB, with the data after the last one.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
import uuid

from nbdserve.errors import OpenError
from nbdserve.formats import GetPassphrase
from nbdserve.formats.luks.antiforensic import STRIPES, split
from nbdserve.formats.luks.ciphers import SECTOR, CipherSpec, SectorCipher, demand_library
from nbdserve.formats.luks.luks1 import DIGEST, DISABLED, ENABLED, HEADER, SALT, SLOTS
from nbdserve.formats.newfile import new_file

_SPEC = CipherSpec("xts", "plain64")
_HASH = "sha256"
_KEY_BYTES = 64
_ALIGNMENT = 4096
_FEWEST_ITERATIONS = 1000  # RFC 8018, section 4.2
_MOST_ITERATIONS = 1 << 25  # fewer than keyslots.py refuses
_LONG_ENOUGH = 0.05  # seconds that tell how quick this machine is

_SLOT_SIZE = -(-_KEY_BYTES * STRIPES // _ALIGNMENT) * _ALIGNMENT
HEADER_SIZE = _ALIGNMENT + SLOTS * _SLOT_SIZE
"""Bytes of a header with its key slots."""


def create_image(
    path: str | os.PathLike[str], size: int, passphrase: GetPassphrase | None, *, milliseconds: int = 2000
) -> None:
    """Create an image that the passphrase opens. What its disk reads as is random. An existing file is never
    overwritten.

    Args:
        size: length of the disk in bytes, rounded up to whole sectors.
        milliseconds: how long it is to take, on this machine, to try a passphrase.

    Raises:
        OpenError: there is no usable passphrase, or a library is missing.
        FileExistsError: there is such a file.
        OSError: from the host.
    """
    content = build_header(passphrase, milliseconds=milliseconds)
    with new_file(path) as file:
        file.write(content)
        file.truncate(HEADER_SIZE + -(-size // SECTOR) * SECTOR)


def build_header(passphrase: GetPassphrase | None, *, milliseconds: int = 2000) -> bytes:
    """A header with a new key in its first slot; arguments and errors are those of create_image()."""
    secret = _checked(passphrase)
    demand_library("the new image")
    key, slot_salt, digest_salt = (secrets.token_bytes(length) for length in (_KEY_BYTES, SALT, SALT))
    iterations = _calibrated(milliseconds, _KEY_BYTES)
    slot_key = hashlib.pbkdf2_hmac(_HASH, secret, slot_salt, iterations, _KEY_BYTES)
    material = bytearray(split(key, STRIPES, _HASH))
    SectorCipher(_SPEC, slot_key).encrypt(0, memoryview(material))
    digest_iterations = max(_FEWEST_ITERATIONS, iterations // 8)
    slots = [
        {
            "active": DISABLED,
            "iterations": 0,
            "salt": bytes(SALT),
            "material_offset": (_ALIGNMENT + number * _SLOT_SIZE) // SECTOR,
            "stripes": STRIPES,
        }
        for number in range(SLOTS)
    ]
    slots[0] |= {"active": ENABLED, "iterations": iterations, "salt": slot_salt}
    header: bytes = HEADER.build(
        {
            "cipher_name": b"aes".ljust(32, b"\0"),
            "cipher_mode": f"{_SPEC.mode}-{_SPEC.iv}".encode().ljust(32, b"\0"),
            "hash_spec": _HASH.encode().ljust(32, b"\0"),
            "payload_offset": HEADER_SIZE // SECTOR,
            "key_bytes": _KEY_BYTES,
            "digest": hashlib.pbkdf2_hmac(_HASH, key, digest_salt, digest_iterations, DIGEST),
            "digest_salt": digest_salt,
            "digest_iterations": digest_iterations,
            "uuid": str(uuid.uuid4()).encode().ljust(40, b"\0"),
            "slots": slots,
        }
    )
    return (header.ljust(_ALIGNMENT, b"\0") + material).ljust(HEADER_SIZE, b"\0")


def _checked(passphrase: GetPassphrase | None) -> bytes:
    if passphrase is None:
        raise OpenError("an encrypted image needs a passphrase; give it with --passphrase-file FILE")
    secret = passphrase()
    if secret.endswith(b"\n"):
        raise OpenError(
            "--passphrase-file: ends with a newline, which QEMU would take for a part of the passphrase and others "
            "would not; leave it out (printf writes none)"
        )
    return secret


def _calibrated(milliseconds: int, length: int) -> int:
    """How many iterations take so long on this machine."""
    count = 1 << 14
    while True:
        start = time.thread_time()
        hashlib.pbkdf2_hmac(_HASH, b"passphrase", bytes(SALT), count, length)
        seconds = time.thread_time() - start
        if seconds >= _LONG_ENOUGH:
            break
        count *= 2
    wanted = int(count * milliseconds / 1000 / seconds)
    return min(max(wanted, _FEWEST_ITERATIONS), _MOST_ITERATIONS)
