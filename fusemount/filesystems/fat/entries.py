"""The 32 bytes of a directory entry (specification, "FAT Directory Structure"): attributes, times, first cluster, size.

Times are stored without a time zone and taken for UTC. The granularity is 2 seconds for the last change and a day for
the last access.
"""

from __future__ import annotations

import calendar
import time
from enum import IntFlag
from functools import lru_cache
from struct import Struct

_ENTRY = Struct("<11sBBBHHHHHHHI")
DELETED = 0xE5
_SECOND = 10**9
_FIRST_SECOND = calendar.timegm((1980, 1, 1, 0, 0, 0))
_LAST_SECOND = calendar.timegm((2107, 12, 31, 23, 59, 58))


class Attribute(IntFlag):
    """The attribute byte."""

    READ_ONLY = 0x01
    HIDDEN = 0x02
    SYSTEM = 0x04
    LABEL = 0x08
    DIRECTORY = 0x10
    ARCHIVE = 0x20
    LONG_NAME = 0x0F
    LONG_NAME_MASK = 0x3F


# As plain numbers, because an IntFlag takes its time and every entry of a directory is asked.
DIRECTORY = int(Attribute.DIRECTORY)
LABEL = int(Attribute.LABEL)
LONG_NAME, LONG_NAME_MASK = int(Attribute.LONG_NAME), int(Attribute.LONG_NAME_MASK)


class Entry:
    """One name in a directory.

    Attributes:
        name: as it is shown; b"" for an entry that is not.
        slot: which 32 bytes of the directory hold its short entry.
        slots: how many it takes, with those of its long name.
        position: where the short entry lies on the device.
        short: the 11 bytes of the 8.3 name.
        first: the first cluster of the content, 0 for none.
        size: in bytes; 0 for directories.
    """

    __slots__ = (
        "accessed",
        "attributes",
        "case",
        "created",
        "first",
        "modified",
        "name",
        "position",
        "short",
        "size",
        "slot",
        "slots",
        "upper",
    )

    def __init__(self, raw: bytes | memoryview, *, wide: bool) -> None:
        """Take 32 bytes apart; `wide` volumes (FAT32) have the upper half of the first cluster in what else is free."""
        fields = _ENTRY.unpack(raw)
        self.short, self.attributes, self.case = fields[:3]
        self.created = fields[3:6]
        self.accessed = fields[6]
        self.upper = 0 if wide else fields[7]
        self.modified = fields[9], fields[8]
        self.first = fields[10] | (fields[7] << 16 if wide else 0)
        self.size = fields[11]
        self.name = b""
        self.slot = self.slots = self.position = 0

    @classmethod
    def new(cls, attributes: int, first: int, now_ns: int) -> Entry:
        """An entry that has no place and no name yet."""
        entry = cls(bytes(32), wide=True)
        entry.attributes = attributes
        entry.first = first
        entry.modified = packed(now_ns)
        date, moment = entry.modified
        # The time of creation has a count of 10 ms more, which also says odd seconds.
        entry.created = (now_ns // 10_000_000 % 200, moment, date)
        entry.accessed = date
        return entry

    def take_content(self, other: Entry) -> None:
        """Become an entry for what the other one stands for; place and name stay."""
        self.attributes, self.created, self.accessed = other.attributes, other.created, other.accessed
        self.modified, self.first, self.size, self.upper = other.modified, other.first, other.size, other.upper

    def pack(self, *, wide: bool) -> bytes:
        """The 32 bytes."""
        date, moment = self.modified
        upper = self.first >> 16 if wide else self.upper
        return _ENTRY.pack(
            self.short,
            self.attributes,
            self.case,
            *self.created,
            self.accessed,
            upper,
            moment,
            date,
            self.first & 0xFFFF,
            self.size,
        )

    @property
    def is_directory(self) -> bool:
        return bool(self.attributes & DIRECTORY)

    @property
    def is_read_only(self) -> bool:
        return bool(self.attributes & Attribute.READ_ONLY)

    @property
    def mtime_ns(self) -> int:
        """When the content was last changed, in nanoseconds since 1970."""
        return unpacked(*self.modified)

    @property
    def atime_ns(self) -> int:
        """The day of the last access; where none was noted, that of the last change."""
        return unpacked(self.accessed or self.modified[0], 0)


def packed(time_ns: int) -> tuple[int, int]:
    """Date and time of an entry; what lies outside 1980 to 2107 becomes the nearest that can be said."""
    return _packed(min(max(time_ns // _SECOND, _FIRST_SECOND), _LAST_SECOND))


@lru_cache(256)
def _packed(second: int) -> tuple[int, int]:
    year, month, day, hour, minute, seconds = time.gmtime(second)[:6]
    return (year - 1980) << 9 | month << 5 | day, hour << 11 | minute << 5 | seconds >> 1


@lru_cache(4096)
def unpacked(date: int, moment: int) -> int:
    """Nanoseconds since 1970. A month or day of 0, which some write for an unknown date, counts as the first."""
    day = (1980 + (date >> 9), min(max(date >> 5 & 15, 1), 12), max(date & 31, 1))
    return calendar.timegm((*day, moment >> 11, moment >> 5 & 63, (moment & 31) * 2)) * _SECOND
