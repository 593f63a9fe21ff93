"""Inodes as they lie on disk: struct ext4_inode, read into an object and written back out of it.

What it keeps: a record that was not changed packs to the bytes it was read from, save for fields that this file knows.
"""

from __future__ import annotations

import errno
import stat
import struct
from enum import IntEnum
from typing import TYPE_CHECKING

from fusemount.filesystems.base import Attributes, Inode, error

if TYPE_CHECKING:
    from fusemount.filesystems.ext.mapping import Segment

ROOT = Inode(2)
GOOD_OLD_SIZE = 128

_CLASSIC = struct.Struct("<HHIIIIIHHIII60sIIIIHHHHHH")
_EXTRA = struct.Struct("<HHIIIIIII")
_SECOND = 10**9
_FIRST_SECOND, _LAST_SECOND = -(1 << 31), (1 << 34) - (1 << 31) - 1


class Flag(IntEnum):
    """i_flags, one bit each. Not an IntFlag: inodes are looked at too often for that."""

    SYNC = 0x8
    IMMUTABLE = 0x10
    APPEND = 0x20
    NODUMP = 0x40
    NOATIME = 0x80
    ENCRYPT = 0x800
    INDEX = 0x1000
    HUGE_FILE = 0x40000
    EXTENTS = 0x80000
    VERITY = 0x100000
    EA_INODE = 0x200000
    INLINE_DATA = 0x10000000
    CASEFOLD = 0x40000000


class Record:
    """One inode. Times are nanoseconds since 1970, sectors are i_blocks as it is stored.

    Attributes:
        raw: the bytes it was read from, kept for what has no attribute here.
        crtime_ns: set for a new inode; None leaves the time of creation as it is in raw.
        block: i_block, 60 bytes: the root of the map of its blocks, or its content.
        map: what mapping has found out about its blocks so far.
    """

    __slots__ = (
        "atime_ns", "attribute_block", "block", "crtime_ns", "ctime_ns", "dtime", "extra_size", "flags", "generation",
        "gid", "links", "map", "mode", "mtime_ns", "number", "raw", "sectors", "size", "uid",
    )  # fmt: skip

    mode: int
    uid: int
    gid: int
    size: int
    links: int
    sectors: int
    flags: int
    block: bytes
    generation: int
    attribute_block: int
    dtime: int
    extra_size: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    crtime_ns: int | None
    raw: bytes
    map: list[Segment]

    def __init__(self, number: Inode, raw: bytes | bytearray) -> None:
        self.number = number
        self.unpack(raw)

    def unpack(self, raw: bytes | bytearray) -> None:
        """Take over the bytes of an inode. Raises EIO when they cannot be right."""
        self.raw = bytes(raw)
        (
            self.mode, uid, size, atime, ctime, mtime, self.dtime, gid, self.links, sectors, self.flags, _,
            self.block, self.generation, acl, size_high, _, sectors_high, acl_high, uid_high, gid_high, _, _,
        ) = _CLASSIC.unpack_from(raw)  # fmt: skip
        self.uid = uid | uid_high << 16
        self.gid = gid | gid_high << 16
        self.size = size | size_high << 32
        if self.size >> 63:
            raise error(errno.EIO)
        self.sectors = sectors | sectors_high << 32
        self.attribute_block = acl | acl_high << 32
        self.map = []
        self.extra_size = 0
        self.crtime_ns = None
        ctime_extra = mtime_extra = atime_extra = 0
        if len(raw) > GOOD_OLD_SIZE:
            extra, _, ctime_extra, mtime_extra, atime_extra, _, _, _, _ = _EXTRA.unpack_from(raw, 128)
            if extra > len(raw) - GOOD_OLD_SIZE or extra & 3:
                raise error(errno.EIO)
            self.extra_size = extra
            if extra < 16:
                ctime_extra = ctime_extra if extra >= 8 else 0
                mtime_extra = mtime_extra if extra >= 12 else 0
                atime_extra = 0
        self.ctime_ns = _nanoseconds(ctime, ctime_extra)
        self.mtime_ns = _nanoseconds(mtime, mtime_extra)
        self.atime_ns = _nanoseconds(atime, atime_extra)

    def pack(self) -> bytearray:
        """The inode as it belongs on disk, save for its checksum."""
        raw = bytearray(self.raw)
        extra = self.extra_size
        ctime, ctime_extra = _seconds(self.ctime_ns, extra >= 8)
        mtime, mtime_extra = _seconds(self.mtime_ns, extra >= 12)
        atime, atime_extra = _seconds(self.atime_ns, extra >= 16)
        old = _CLASSIC.unpack_from(raw)
        _CLASSIC.pack_into(
            raw, 0,
            self.mode, self.uid & 0xFFFF, self.size & 0xFFFFFFFF, atime, ctime, mtime, self.dtime, self.gid & 0xFFFF,
            self.links, self.sectors & 0xFFFFFFFF, self.flags, old[11], self.block, self.generation,
            self.attribute_block & 0xFFFFFFFF, self.size >> 32, old[16], self.sectors >> 32, self.attribute_block >> 32,
            self.uid >> 16, self.gid >> 16, old[21], old[22],
        )  # fmt: skip
        if len(raw) > GOOD_OLD_SIZE:
            fields = list(_EXTRA.unpack_from(raw, 128))
            fields[0] = extra
            for index, value in enumerate((ctime_extra, mtime_extra, atime_extra), 2):
                if extra >= 4 * index:
                    fields[index] = value
            if extra >= 24 and self.crtime_ns is not None:
                fields[5], fields[6] = _seconds(self.crtime_ns, True)
            # What lies behind extra_size belongs to the extended attributes.
            raw[128 : 128 + min(extra, _EXTRA.size)] = _EXTRA.pack(*fields)[: min(extra, _EXTRA.size)]
            raw[128:130] = struct.pack("<H", extra)
        return raw

    @property
    def is_directory(self) -> bool:
        return self.mode & 0o170000 == stat.S_IFDIR

    @property
    def is_regular(self) -> bool:
        return self.mode & 0o170000 == stat.S_IFREG

    @property
    def has_inline_data(self) -> bool:
        return bool(self.flags & Flag.INLINE_DATA)

    def sectors_of_data(self, cluster_size: int) -> int:
        """i_blocks without the share of the block of extended attributes."""
        return self.sectors - (cluster_size // 512 if self.attribute_block else 0)

    @property
    def device(self) -> int:
        """The number of a device node, as os.makedev packs it; kept in i_block in the old form or the new."""
        if self.mode & 0o170000 not in (stat.S_IFCHR, stat.S_IFBLK):
            return 0
        old, new = struct.unpack_from("<II", self.block)
        return int(old & 0xFFFF or new)

    def attributes(self, block_size: int) -> Attributes:
        """What stat(2) tells. As with the kernel, content in the inode counts, lest it be taken for a hole."""
        sectors = self.sectors
        if self.flags & (Flag.HUGE_FILE | Flag.INLINE_DATA):
            if self.flags & Flag.HUGE_FILE:
                sectors *= block_size // 512
            elif self.is_regular:
                sectors += (self.size + 511) // 512
        return Attributes(
            self.number, self.mode, self.links, self.uid, self.gid, self.size, sectors,
            self.atime_ns, self.mtime_ns, self.ctime_ns, self.device,
        )  # fmt: skip


def device_block(device: int) -> bytes:
    """i_block of a device node: the old 16-bit form where it fits, as the kernel does."""
    major, minor = device >> 8 & 0xFFF, device & 0xFF | device >> 12 & 0xFFF00
    if major < 256 and minor < 256:
        return struct.pack("<I56x", major << 8 | minor)
    return struct.pack("<II52x", 0, device)


def clamp_time(nanoseconds: int, extra_size: int) -> int:
    """The nearest time that an inode can hold; small inodes hold no fractions of seconds."""
    if extra_size < 16:
        return max(_FIRST_SECOND, min(nanoseconds // _SECOND, (1 << 31) - 1)) * _SECOND
    return max(_FIRST_SECOND * _SECOND, min(nanoseconds, (_LAST_SECOND + 1) * _SECOND - 1))


def _nanoseconds(seconds: int, extra: int) -> int:
    """The lower 32 bits of seconds are signed; extra holds two more bits of them, then 30 bits of nanoseconds."""
    signed = seconds - ((seconds & 0x80000000) << 1)
    return (signed + ((extra & 3) << 32)) * _SECOND + (extra >> 2)


def _seconds(nanoseconds: int, with_extra: bool) -> tuple[int, int]:
    seconds, rest = divmod(nanoseconds, _SECOND)
    seconds = max(_FIRST_SECOND, min(seconds, _LAST_SECOND if with_extra else (1 << 31) - 1))
    low = seconds & 0xFFFFFFFF
    signed = low - ((low & 0x80000000) << 1)
    return low, (seconds - signed) >> 32 & 3 | rest << 2
