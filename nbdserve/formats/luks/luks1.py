"""The header of version 1 (LUKS1 specification, section 4.1, "The partition header"); all numbers are big-endian."""

from __future__ import annotations

from typing import Any

from construct import Array, Bytes, Const, Int16ub, Int32ub, Struct

from nbdserve.formats.luks.ciphers import SECTOR
from nbdserve.formats.luks.header import MAGIC, Area, Header, KeySlot, Pbkdf2, check_key, check_slot

ENABLED = 0x00AC71F3
DISABLED = 0x0000DEAD
SLOTS = 8
DIGEST = 20  # bytes
SALT = 32  # bytes

HEADER = Struct(
    "magic" / Const(MAGIC),
    "version" / Const(1, Int16ub),
    "cipher_name" / Bytes(32),
    "cipher_mode" / Bytes(32),
    "hash_spec" / Bytes(32),
    "payload_offset" / Int32ub,  # this and the other offsets in sectors
    "key_bytes" / Int32ub,
    "digest" / Bytes(DIGEST),
    "digest_salt" / Bytes(SALT),
    "digest_iterations" / Int32ub,
    "uuid" / Bytes(40),
    "slots"
    / Array(
        SLOTS,
        Struct(
            "active" / Int32ub,
            "iterations" / Int32ub,
            "salt" / Bytes(SALT),
            "material_offset" / Int32ub,
            "stripes" / Int32ub,
        ),
    ),
)


def text(field: bytes) -> str:
    """What a field of text says."""
    return field.split(b"\0")[0].decode("ascii", "backslashreplace")


def parse(area: Area) -> Any:
    """The header's fields, as they are.

    Raises:
        FormatError: the area is too short.
    """
    if area.size < HEADER.sizeof():
        raise area.wrong("is cut short")
    return HEADER.parse(area.read(0, HEADER.sizeof()))


def read_luks1(area: Area) -> Header:
    """Read and check a header.

    Raises:
        FormatError: it is damaged.
        Unsupported: it uses what is not handled.
    """
    found = parse(area)
    cipher = area.cipher(f"{text(found.cipher_name)}-{text(found.cipher_mode)}")
    hash = area.hash(text(found.hash_spec))
    check_key(area, cipher, found.key_bytes)
    slots = []
    for number, each in enumerate(found.slots):
        if each.active == DISABLED:
            continue
        if each.active != ENABLED:
            raise area.wrong(f"says of key slot {number} neither that it is in use nor that it is not")
        derivation = Pbkdf2(hash, each.salt, each.iterations)
        slot = KeySlot(derivation, cipher, found.key_bytes, each.material_offset * SECTOR, hash, each.stripes)
        check_slot(area, slot, found.key_bytes)
        slots.append(slot)
    return Header(
        version=1,
        uuid=text(found.uuid),
        cipher=cipher,
        key_bytes=found.key_bytes,
        sector_size=SECTOR,
        offset=found.payload_offset * SECTOR,
        size=None,
        first_number=0,
        digest=found.digest,
        digest_of=Pbkdf2(hash, found.digest_salt, found.digest_iterations),
        slots=tuple(slots),
    )
