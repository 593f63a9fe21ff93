"""What the headers of both versions say, checked; see luks1.py and luks2.py for how they say it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from nbdserve.block.file import HostFile
from nbdserve.errors import FormatError, Unsupported
from nbdserve.formats.luks.ciphers import CipherSpec

MAGIC = b"LUKS\xba\xbe"
_HASHES = ("sha1", "sha256", "sha512")
_LONGEST = 200  # characters of a message; a header may hold names of any length
_MAXIMUM_MATERIAL = 8 << 20  # bytes of one stored key; 4000 stripes of 64 bytes are usual


@dataclass(frozen=True, slots=True)
class Area:
    """The part of a file that holds a LUKS header with its key slots: all of it, or a place in a qcow2 image."""

    file: HostFile
    start: int
    size: int

    def read(self, offset: int, length: int) -> bytearray:
        """Bytes of the area; the range must lie inside it."""
        assert 0 <= offset and offset + length <= self.size
        return self.file.read(self.start + offset, length)

    def wrong(self, what: str) -> FormatError:
        """The error of a header that cannot be right."""
        return FormatError(f"{self.file.name}: the LUKS header {what[:_LONGEST]}; the image is damaged")

    def unsupported(self, what: str) -> Unsupported:
        """The error of a header that uses what is not handled."""
        return Unsupported(f"{self.file.name}: the LUKS header {what[:_LONGEST]}, which is not handled")

    def cipher(self, text: str) -> CipherSpec:
        """A cipher that the header names."""
        try:
            return CipherSpec.parse(text[:_LONGEST])
        except Unsupported as error:
            raise Unsupported(f"{self.file.name}: {error}") from None

    def hash(self, name: str) -> str:
        """A hash that the header names."""
        if name.lower() not in _HASHES:
            raise self.unsupported(f"uses the hash {name!r}")
        return name.lower()


@dataclass(frozen=True, slots=True)
class Pbkdf2:
    """PBKDF2 (RFC 8018) with HMAC of a hash."""

    hash: str
    salt: bytes
    iterations: int


@dataclass(frozen=True, slots=True)
class Argon2:
    """Argon2 (RFC 9106): kind is argon2i or argon2id; memory in KiB."""

    kind: str
    salt: bytes
    passes: int
    memory: int
    lanes: int


Derivation: TypeAlias = Pbkdf2 | Argon2
"""How a passphrase becomes a key."""


@dataclass(frozen=True, slots=True)
class KeySlot:
    """The volume key, encrypted with what a passphrase is derived to.

    Attributes:
        derivation: makes the key of the slot.
        cipher, slot_key_bytes: with which the stripes are encrypted.
        offset: of the stripes, in bytes of the area.
        hash, stripes: see antiforensic.py.
    """

    derivation: Derivation
    cipher: CipherSpec
    slot_key_bytes: int
    offset: int
    hash: str
    stripes: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header.

    Attributes:
        cipher, key_bytes, sector_size: with which the data is encrypted.
        offset: where the data begins, in bytes of the file.
        size: of the data, in bytes; None: up to the end of the file.
        first_number: of the data's first sector, as the cipher counts them.
        digest, digest_of: by which the volume key is recognised: what it is derived to.
        slots: those in use, in the order in which to try them.
    """

    version: int
    uuid: str
    cipher: CipherSpec
    key_bytes: int
    sector_size: int
    offset: int
    size: int | None
    first_number: int
    digest: bytes
    digest_of: Pbkdf2
    slots: tuple[KeySlot, ...]


def check_slot(area: Area, slot: KeySlot, key_bytes: int) -> None:
    """Refuse a slot whose key cannot lie where it is said to.

    Raises:
        FormatError: that is so.
    """
    length = key_bytes * slot.stripes
    if not slot.cipher.takes(slot.slot_key_bytes):
        raise area.wrong(f"has a key slot for {slot.cipher} with a key of {slot.slot_key_bytes} bytes")
    if not slot.stripes or length > _MAXIMUM_MATERIAL:
        raise area.wrong(f"has a key in {slot.stripes} stripes; {_MAXIMUM_MATERIAL // key_bytes} are the most")
    if slot.offset + length > area.size:
        raise area.wrong(f"has a key slot at {slot.offset}, past the end of what holds it")


def check_key(area: Area, cipher: CipherSpec, key_bytes: int) -> None:
    """Refuse a key of a length that the cipher does not have.

    Raises:
        FormatError: that is so.
    """
    if not cipher.takes(key_bytes):
        raise area.wrong(f"announces {cipher} with a key of {key_bytes} bytes")
