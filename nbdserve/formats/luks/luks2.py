"""The header of version 2: two copies of a binary header, each with JSON behind it (LUKS2 specification, section 3).

The copy with the higher sequence number counts, if its checksum is right; the other one stands in for it. Nothing is
ever written here: a passphrase is not changed, only data is.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

from construct import Bytes, Const, Int16ub, Int64ub, Struct

from nbdserve.formats.luks.ciphers import SECTOR, CipherSpec
from nbdserve.formats.luks.header import (
    MAGIC,
    Area,
    Argon2,
    Derivation,
    Header,
    KeySlot,
    Pbkdf2,
    check_key,
    check_slot,
)

_SECOND_MAGIC = b"SKUL\xba\xbe"
_HEADER = Struct(
    "magic" / Bytes(6),
    "version" / Const(2, Int16ub),
    "size" / Int64ub,  # of one copy, with its JSON, in bytes
    "sequence" / Int64ub,
    "label" / Bytes(48),
    "checksum_kind" / Bytes(32),
    "salt" / Bytes(64),
    "uuid" / Bytes(40),
    "subsystem" / Bytes(48),
    "offset" / Int64ub,
    "padding" / Bytes(184),
    "checksum" / Bytes(64),
)
_CHECKSUM = slice(_HEADER.sizeof() - 64, _HEADER.sizeof())
_BINARY = 4096  # bytes; JSON begins behind them
_SIZES = tuple(0x4000 << each for each in range(9))  # of one copy, and so where the second one may lie
_MOST_SLOTS = 32
_SECTOR_SIZES = (512, 1024, 2048, 4096)

Item = TypeVar("Item")


def read_luks2(area: Area) -> Header:
    """Read and check a header.

    Raises:
        FormatError: it is damaged, in both copies.
        Unsupported: it uses what is not handled.
    """
    uuid, content = _newest(area)
    try:
        found = json.loads(content)
        if not isinstance(found, dict):
            raise ValueError
        return _Reader(area, found).header(uuid)
    except (ValueError, KeyError, TypeError, RecursionError):  # wherever what is there is not of the kind it should be
        raise area.wrong("holds JSON that says something else than LUKS2 has it say") from None


def _newest(area: Area) -> tuple[str, bytes]:
    """The UUID and the JSON of the copy that counts."""
    first = _copy(area, 0, MAGIC)
    places = _SIZES if first is None else (first[3],)
    second = next((each for each in (_copy(area, place, _SECOND_MAGIC) for place in places) if each is not None), None)
    copies = [each for each in (first, second) if each is not None]
    if not copies:
        raise area.wrong("has no copy whose checksum is right")
    _, uuid, content, _ = max(copies, key=lambda each: each[0])
    return uuid, content


def _copy(area: Area, place: int, magic: bytes) -> tuple[int, str, bytes, int] | None:
    """Sequence number, UUID, JSON and size of one copy; None if there is no sound one."""
    if place + _BINARY > area.size:
        return None
    start = bytes(area.read(place, _BINARY))
    if not start.startswith(magic + b"\0\2"):
        return None
    head = _HEADER.parse(start)
    if head.size not in _SIZES or head.offset != place or place + head.size > area.size:
        return None
    if head.checksum_kind.rstrip(b"\0") != b"sha256":
        raise area.unsupported(f"has a checksum of the kind {head.checksum_kind.rstrip(bytes(1))!r}")
    content = bytes(area.read(place + _BINARY, head.size - _BINARY))
    blank = start[: _CHECKSUM.start] + bytes(64) + start[_CHECKSUM.stop :]
    if hashlib.sha256(blank + content).digest() != head.checksum[:32]:
        return None
    uuid = head.uuid.split(b"\0")[0].decode("ascii", "backslashreplace")
    return head.sequence, uuid, content.split(b"\0")[0], head.size


class _Reader:
    """Takes the JSON apart (LUKS2 specification, section 4, "LUKS2 JSON area"); a value of a wrong kind is a
    ValueError, KeyError or TypeError."""

    def __init__(self, area: Area, found: dict[str, Any]) -> None:
        self.area = area
        self.found = found

    def header(self, uuid: str) -> Header:
        self._check_requirements()
        name, segment = self._segment()
        cipher = self.area.cipher(_of(segment, "encryption", str))
        sector_size = _of(segment, "sector_size", int)
        if sector_size not in _SECTOR_SIZES:
            raise ValueError
        size = None if segment["size"] == "dynamic" else _number(segment, "size")
        slots, digest, digest_of = self._keys(name)
        key_bytes = slots[0][0] if slots else 0
        if any(length != key_bytes for length, _, _ in slots):
            raise self.area.wrong("has key slots for volume keys of several lengths")
        if slots:
            check_key(self.area, cipher, key_bytes)
        return Header(
            version=2,
            uuid=uuid,
            cipher=cipher,
            key_bytes=key_bytes,
            sector_size=sector_size,
            offset=_number(segment, "offset"),
            size=size,
            first_number=_number(segment, "iv_tweak"),
            digest=digest,
            digest_of=digest_of,
            slots=tuple(slot for _, _, slot in sorted(slots, key=lambda each: -each[1])),
        )

    def _check_requirements(self) -> None:
        config = _of(self.found, "config", dict)
        mandatory = _of(config.get("requirements", {}), "mandatory", list, [])
        if any("reencrypt" in str(each) for each in mandatory):
            raise self.area.unsupported("says that reencryption is under way (finish it with cryptsetup)")
        if mandatory:
            raise self.area.unsupported(f"requires {', '.join(map(str, mandatory))}")

    def _segment(self) -> tuple[str, dict[str, Any]]:
        """The name and the description of the one part that holds data."""
        segments = _of(self.found, "segments", dict)
        if len(segments) != 1:
            raise self.area.unsupported(f"describes data in {len(segments)} segments instead of one")
        ((name, segment),) = segments.items()
        kind = _of(segment, "type", str)
        if kind != "crypt":
            raise self.area.unsupported(f"describes data of the kind {kind!r}")
        if "integrity" in segment:
            raise self.area.unsupported("describes data with integrity protection")
        return name, segment

    def _keys(self, segment: str) -> tuple[list[tuple[int, int, KeySlot]], bytes, Pbkdf2]:
        """The slots for a segment, each with the length of its key and its priority; and what the key is known by."""
        digests = [
            each
            for each in _of(self.found, "digests", dict).values()
            if segment in _of(each, "segments", list)
        ]
        if len(digests) != 1 or _of(digests[0], "type", str) != "pbkdf2":
            raise self.area.wrong("does not say how the volume key is recognised")
        (digest,) = digests
        all_slots, names = _of(self.found, "keyslots", dict), _of(digest, "keyslots", list)
        if len(names) > _MOST_SLOTS:
            raise ValueError
        slots = [self._slot(_of(all_slots, name, dict)) for name in names]
        derivation = Pbkdf2(
            self.area.hash(_of(digest, "hash", str)), _bytes(digest, "salt"), _of(digest, "iterations", int)
        )
        return slots, _bytes(digest, "digest"), derivation

    def _slot(self, slot: dict[str, Any]) -> tuple[int, int, KeySlot]:
        kind, place, split = _of(slot, "type", str), _of(slot, "area", dict), _of(slot, "af", dict)
        if kind != "luks2" or place["type"] != "raw" or split["type"] != "luks1":
            raise self.area.unsupported(f"has a key slot of the kind {kind!r}")
        key_bytes = _of(slot, "key_size", int)
        if not 0 < key_bytes <= 64:
            raise ValueError
        cipher: CipherSpec = self.area.cipher(_of(place, "encryption", str))
        found = KeySlot(
            self._derivation(_of(slot, "kdf", dict)),
            cipher,
            _of(place, "key_size", int),
            _number(place, "offset"),
            self.area.hash(_of(split, "hash", str)),
            _of(split, "stripes", int),
        )
        check_slot(self.area, found, key_bytes)
        return key_bytes, _of(slot, "priority", int, 1), found

    def _derivation(self, kdf: dict[str, Any]) -> Derivation:
        kind, salt = _of(kdf, "type", str), _bytes(kdf, "salt")
        if kind == "pbkdf2":
            return Pbkdf2(self.area.hash(_of(kdf, "hash", str)), salt, _of(kdf, "iterations", int))
        if kind not in ("argon2i", "argon2id"):
            raise self.area.unsupported(f"derives a key by {kind!r}")
        return Argon2(kind, salt, _of(kdf, "time", int), _of(kdf, "memory", int), _of(kdf, "cpus", int))


def _of(found: Any, key: str, kind: Callable[..., Item], default: Item | None = None) -> Item:
    """A member of an object, of the kind that it has to be."""
    if not isinstance(found, dict):
        raise TypeError
    value = found[key] if default is None else found.get(key, default)
    if type(value) is not kind or (kind is int and not 0 <= value < 1 << 32):
        raise TypeError
    return value


def _number(found: dict[str, Any], key: str) -> int:
    """A member that is a number of 64 bits, written as text because JSON promises no more than 53."""
    text = _of(found, key, str)
    if not text.isascii() or not text.isdigit() or len(text) > 20 or int(text) >= 1 << 63:
        raise ValueError
    return int(text)


def _bytes(found: dict[str, Any], key: str) -> bytes:
    """A member that is bytes, in base64."""
    try:
        content = base64.b64decode(_of(found, key, str), validate=True)
    except binascii.Error:
        raise ValueError from None
    if not 8 <= len(content) <= 1024:
        raise ValueError
    return content
