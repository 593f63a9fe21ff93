"""Names of files: long ones in UTF-16, short ones of 8 and 3 characters (specification, "Long Directory Entries").

Outside, names are UTF-8. What a long entry holds that UTF-8 cannot say (half a surrogate pair) is passed through in the
way of UTF-8, so that each name is shown differently and can be looked up; new names of that kind are refused.

A long name that must not be shown (a slash in it) gives way to the file's short name.
"""

from __future__ import annotations

import errno
from functools import lru_cache

from fusemount.filesystems.base import LONGEST_UTF16_NAME, error

CODE_PAGE = "cp850"
"""Which characters the bytes of short names are; the volume does not say. It is the choice of mtools and fsck.vfat."""

LOWER_BASE, LOWER_EXTENSION = 0x08, 0x10
"""How Windows NT notes that a name fits the 8.3 form but for its case; kept in byte 12 of the entry."""

_MOST_UNITS = 255  # of UTF-16
_REFUSED = frozenset('*?<>|":/\\' + "".join(map(chr, range(32))))
_SHORT = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$%&'()-@^_`{}~")
_UNITS_PER_SLOT = 13


def is_presentable(name: bytes) -> bool:
    """Whether a name may be shown to a caller at all."""
    return 0 < len(name) <= LONGEST_UTF16_NAME and b"/" not in name and b"\0" not in name and name not in (b".", b"..")


def text_of(name: bytes) -> str | None:
    """The characters of a name that is looked for; None when no file can have it. Dots at its end do not count."""
    try:
        return name.decode("utf-8", "surrogatepass").rstrip(".")
    except UnicodeDecodeError:
        return None


def new_text(name: bytes) -> str:
    """The characters of a name that a file is to be given. Raises EINVAL, ENAMETOOLONG."""
    try:
        text = name.decode().rstrip(".")  # as Windows and Linux do it
    except UnicodeDecodeError:
        raise error(errno.EINVAL) from None
    if len(name) > LONGEST_UTF16_NAME or len(text.encode("utf-16-le")) > 2 * _MOST_UNITS:
        raise error(errno.ENAMETOOLONG)
    if not text or text.endswith(" ") or not _REFUSED.isdisjoint(text):
        raise error(errno.EINVAL)
    return text


def fold(text: str) -> str:
    """Equal for names that mean the same file."""
    return text.upper() if text.isascii() else "".join(map(_upper, text))


@lru_cache(4096)
def _upper(character: str) -> str:
    """One upper-case character; what would become two, or ASCII (dotless i), stays as it is, like on Windows."""
    upper = character.upper()
    return upper if len(upper) == 1 and upper.isascii() == character.isascii() else character


# Long names


def long_name(units: bytes) -> bytes | None:
    """The name in the slots of a long entry, all 13 units of each, in order; None when it must not be shown."""
    text = units.decode("utf-16-le", "surrogatepass").partition("\0")[0]
    name = text.encode("utf-8", "surrogatepass")
    return name if is_presentable(name) else None


def long_slots(text: str, short: bytes) -> bytes:
    """The long entry of a name, as it lies before the short one: 32 bytes for each 13 units, the last part first."""
    units = text.encode("utf-16-le")
    count = -(-len(units) // (2 * _UNITS_PER_SLOT))
    if len(units) < count * 2 * _UNITS_PER_SLOT:
        units = (units + b"\0\0").ljust(count * 2 * _UNITS_PER_SLOT, b"\xff")
    check = checksum(short)
    slots = []
    for number in range(count, 0, -1):
        part = units[(number - 1) * 26 : number * 26]
        order = number | 0x40 if number == count else number
        slots.append(bytes((order,)) + part[:10] + bytes((0x0F, 0, check)) + part[10:22] + b"\0\0" + part[22:])
    return b"".join(slots)


def checksum(short: bytes) -> int:
    """What ties a long entry to its short one ("Organization and Association ...")."""
    total = 0
    for byte in short:
        total = ((total >> 1 | total << 7) & 0xFF) + byte & 0xFF
    return total


# Short names


def short_text(short: bytes, case: int) -> str:
    """The characters of a short name; `case` is byte 12 of the entry."""
    if short[0] == 0x05:  # stands for E5, which would mean deleted
        short = b"\xe5" + short[1:]
    base = short[:8].decode(CODE_PAGE).rstrip(" ")
    extension = short[8:].decode(CODE_PAGE).rstrip(" ")
    base = base.lower() if case & LOWER_BASE else base
    extension = extension.lower() if case & LOWER_EXTENSION else extension
    return f"{base}.{extension}" if extension else base


def exact_short(text: str) -> tuple[bytes, int] | None:
    """The short name and its case byte that say a name by themselves, without a long entry; None when none can."""
    short = _short_form(text)
    base, _, extension = text.partition(".")
    if short is None or (base != base.lower() and base != base.upper()):
        return None
    if extension != extension.lower() and extension != extension.upper():
        return None
    lower_base = LOWER_BASE if base != base.upper() else 0
    return short, lower_base | (LOWER_EXTENSION if extension != extension.upper() else 0)


@lru_cache(256)
def _short_form(text: str) -> bytes | None:
    """The name in upper case in 11 bytes, if that loses nothing but the case."""
    base, dot, extension = text.partition(".")
    if not text.isascii() or not 1 <= len(base) <= 8 or len(extension) > 3 or (dot and not extension):
        return None
    upper = (base + extension).upper().encode()
    if not _SHORT.issuperset(upper):
        return None
    return base.upper().encode().ljust(8) + extension.upper().encode().ljust(3)


def alias(text: str, taken: set[bytes], tails: dict[bytes, int]) -> bytes:
    """A short name to stand beside a long one: 11 bytes that are not in `taken` ("Short and Long Names").

    Args:
        tails: for each stem the last number that was tried, so that the thousandth file does not try a thousand.
    """
    short = _short_form(text)
    if short is not None and short not in taken:
        return short
    base, _, extension = text.lstrip(".").rpartition(".")
    if not base:
        base, extension = extension, ""
    stem, suffix = _replaced(base)[:6] or b"_", _replaced(extension)[:3].ljust(3)
    key = stem + b"." + suffix
    number = tails.get(key, 0)
    while True:
        number += 1
        tail = b"~%d" % number
        short = (stem[: 8 - len(tail)] + tail).ljust(8) + suffix
        if short not in taken:
            tails[key] = number
            return short


def _replaced(text: str) -> bytes:
    """Upper case, without blanks and dots, an underscore for what short names cannot hold."""
    bytes_ = text.replace(" ", "").replace(".", "").upper().encode("ascii", "replace")
    return bytes(byte if byte in _SHORT else ord("_") for byte in bytes_)
