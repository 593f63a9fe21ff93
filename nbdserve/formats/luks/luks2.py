"""The header of version 2: two copies of a binary header, each with JSON behind it (LUKS2 specification, section 3).

The copy with the higher sequence number counts, if its checksum is right; the other one stands in for it. Nothing is
ever written here: a passphrase is not changed, only data is.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from typing import Any

from construct import Bytes, Const, Int16ub, Int64ub, Struct

from nbdserve.formats.luks.ciphers import CipherSpec
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
_NORMAL_PRIORITY = 1
_SECTOR_SIZES = (512, 1024, 2048, 4096)


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
        cipher = self.area.cipher(_text(segment, "encryption"))
        sector_size = _count(segment, "sector_size")
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
        config = _object(self.found, "config")
        requirements = _object(config, "requirements") if "requirements" in config else {}
        mandatory = _list(requirements, "mandatory") if "mandatory" in requirements else []
        if any("reencrypt" in str(each) for each in mandatory):
            raise self.area.unsupported("says that reencryption is under way (finish it with cryptsetup)")
        if mandatory:
            raise self.area.unsupported(f"requires {', '.join(map(str, mandatory))}")

    def _segment(self) -> tuple[str, dict[str, Any]]:
        """The name and the description of the one part that holds data."""
        segments = _object(self.found, "segments")
        if len(segments) != 1:
            raise self.area.unsupported(f"describes data in {len(segments)} segments instead of one")
        ((name, segment),) = segments.items()
        kind = _text(segment, "type")
        if kind != "crypt":
            raise self.area.unsupported(f"describes data of the kind {kind!r}")
        if "integrity" in segment:
            raise self.area.unsupported("describes data with integrity protection")
        return name, segment

    def _keys(self, segment: str) -> tuple[list[tuple[int, int, KeySlot]], bytes, Pbkdf2]:
        """The slots for a segment, each with the length of its key and its priority; and what the key is known by."""
        digests = [each for each in _object(self.found, "digests").values() if segment in _list(each, "segments")]
        if len(digests) != 1 or _text(digests[0], "type") != "pbkdf2":
            raise self.area.wrong("does not say how the volume key is recognised")
        (digest,) = digests
        all_slots, names = _object(self.found, "keyslots"), _list(digest, "keyslots")
        if len(names) > _MOST_SLOTS:
            raise ValueError
        slots = [self._slot(_object(all_slots, name)) for name in names]
        derivation = Pbkdf2(self.area.hash(_text(digest, "hash")), _bytes(digest, "salt"), _count(digest, "iterations"))
        return slots, _bytes(digest, "digest"), derivation

    def _slot(self, slot: dict[str, Any]) -> tuple[int, int, KeySlot]:
        kind, place, split = _text(slot, "type"), _object(slot, "area"), _object(slot, "af")
        if kind != "luks2" or place["type"] != "raw" or split["type"] != "luks1":
            raise self.area.unsupported(f"has a key slot of the kind {kind!r}")
        key_bytes = _count(slot, "key_size")
        if not 0 < key_bytes <= 64:
            raise ValueError
        cipher: CipherSpec = self.area.cipher(_text(place, "encryption"))
        found = KeySlot(
            self._derivation(_object(slot, "kdf")),
            cipher,
            _count(place, "key_size"),
            _number(place, "offset"),
            self.area.hash(_text(split, "hash")),
            _count(split, "stripes"),
        )
        check_slot(self.area, found, key_bytes)
        return key_bytes, _count(slot, "priority") if "priority" in slot else _NORMAL_PRIORITY, found

    def _derivation(self, kdf: dict[str, Any]) -> Derivation:
        kind, salt = _text(kdf, "type"), _bytes(kdf, "salt")
        if kind == "pbkdf2":
            return Pbkdf2(self.area.hash(_text(kdf, "hash")), salt, _count(kdf, "iterations"))
        if kind not in ("argon2i", "argon2id"):
            raise self.area.unsupported(f"derives a key by {kind!r}")
        return Argon2(kind, salt, _count(kdf, "time"), _count(kdf, "memory"), _count(kdf, "cpus"))


def _of(found: Any, key: str, kind: type) -> Any:
    """A member of an object, which is of this kind exactly (a truth value is no number)."""
    value = found[key]
    if type(value) is not kind:
        raise TypeError
    return value


def _object(found: Any, key: str) -> dict[str, Any]:
    value: dict[str, Any] = _of(found, key, dict)
    return value


def _list(found: Any, key: str) -> list[Any]:
    value: list[Any] = _of(found, key, list)
    return value


def _text(found: Any, key: str) -> str:
    value: str = _of(found, key, str)
    return value


def _count(found: Any, key: str) -> int:
    """A member that is a number of at most 32 bits."""
    value: int = _of(found, key, int)
    if not 0 <= value < 1 << 32:
        raise ValueError
    return value


def _number(found: dict[str, Any], key: str) -> int:
    """A member that is a number of 64 bits, written as text because JSON promises no more than 53."""
    text = _text(found, key)
    if not text.isascii() or not text.isdigit() or len(text) > 20 or int(text) >= 1 << 63:
        raise ValueError
    return int(text)


def _bytes(found: dict[str, Any], key: str) -> bytes:
    """A member that is bytes, in base64."""
    try:
        content = base64.b64decode(_text(found, key), validate=True)
    except binascii.Error:
        raise ValueError from None
    if not 8 <= len(content) <= 1024:
        raise ValueError
    return content
