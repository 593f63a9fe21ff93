"""Rock Ridge: what a directory record says beyond ISO 9660, in the terms of POSIX.

The System Use Sharing Protocol (SUSP 1.12) puts entries behind a record, each with two letters, its length and a
version; they go on elsewhere where a CE entry says so. Rock Ridge (RRIP 1.12) defines what most of them mean.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fusemount.filesystems.base import error
from fusemount.filesystems.iso9660.records import long_date, short_date

ReadBlock = Callable[[int, int, int], bytes]
"""(logical block, offset in it, length) -> bytes."""

_MOST_CONTINUATIONS = 32
_LONGEST_TARGET = 4096
_CONTINUES = 1
_CURRENT, _PARENT, _ROOT = 2, 4, 8  # flags of a component of a symbolic link
_LONG_FORM = 0x80


@dataclass(slots=True)
class RockRidge:
    """What the entries of one record say; None for what they do not.

    Attributes:
        mtime_ns, atime_ns, ctime_ns: nanoseconds since 1970.
        child: the logical block of a directory that was moved away, because it lay too deep.
        moved: whether this is such a directory, in the place that it was moved to.
        zisofs: log2 of the block size and the real size, for a file that is compressed.
        strange: whether the content is stored in a way not known here.
    """

    name: bytes | None = None
    target: bytes | None = None
    mode: int | None = None
    links: int = 1
    uid: int = 0
    gid: int = 0
    device: int = 0
    mtime_ns: int | None = None
    atime_ns: int | None = None
    ctime_ns: int | None = None
    child: int | None = None
    moved: bool = False
    zisofs: tuple[int, int] | None = None
    strange: bool = False


def bytes_to_skip(system_use: bytes) -> int | None:
    """From the first record of the root directory: how many bytes other systems have in front of the entries.

    None: there is no SP entry, so no Rock Ridge.
    """
    for start in (0, 15):  # behind 15 bytes of CD-ROM XA, in some images
        if system_use[start : start + 6] == b"SP\x07\x01\xbe\xef":
            return start + system_use[start + 6] if len(system_use) > start + 6 else None
    return None


def parse(system_use: bytes, read_block: ReadBlock) -> RockRidge:
    """Read all entries. Raises EIO when they are damaged."""
    result = RockRidge()
    link = _Link()
    for signature, body in _entries(system_use, read_block):
        try:
            _apply(result, link, signature, body)
        except (struct.error, IndexError):
            raise error(errno.EIO) from None
    result.target = link.target
    return result


def _entries(area: bytes, read_block: ReadBlock) -> Iterator[tuple[bytes, bytes]]:
    """The entries, with those of continuation areas, as signature and content."""
    for _ in range(_MOST_CONTINUATIONS):
        following = None
        offset = 0
        while offset + 4 <= len(area):
            signature, length = area[offset : offset + 2], area[offset + 2]
            if length < 4 or offset + length > len(area):
                break  # padding
            body = area[offset + 4 : offset + length]
            if signature == b"ST":
                break
            if signature == b"CE" and len(body) >= 24:
                following = struct.unpack_from("<I4xI4xI", body)
            else:
                yield signature, body
            offset += length
        if following is None:
            return
        area = read_block(*following)


def _apply(result: RockRidge, link: _Link, signature: bytes, body: bytes) -> None:
    match signature:
        case b"PX":
            result.mode, result.links, result.uid, result.gid = struct.unpack_from("<I4xI4xI4xI", body)
        case b"PN":
            high, low = struct.unpack_from("<I4xI", body)
            # Some write the number of the device into the low half, others its major part into the high one.
            result.device = os.makedev(high, low) if high else low
        case b"NM":
            if not body[0] & (_CURRENT | _PARENT):
                result.name = (result.name or b"") + body[1:]
        case b"SL":
            link.add(body[1:])
        case b"TF":
            _times(result, body)
        case b"CL":
            result.child = struct.unpack_from("<I", body)[0]
        case b"RE":
            result.moved = True
        case b"ZF":
            algorithm, _, log2, size = struct.unpack_from("<2sBBI", body)
            result.zisofs, result.strange = (log2, size), algorithm != b"pz"
        case b"SF":
            result.strange = True


def _times(result: RockRidge, body: bytes) -> None:
    size, parse_date = (17, long_date) if body[0] & _LONG_FORM else (7, short_date)
    offset = 1
    for bit, field in enumerate(("", "mtime_ns", "atime_ns", "ctime_ns")):
        if body[0] >> bit & 1:
            date = body[offset : offset + size]
            if len(date) < size:
                raise error(errno.EIO)
            if field:
                setattr(result, field, parse_date(date))
            offset += size


class _Link:
    """Puts the target of a symbolic link together from the components of its SL entries."""

    def __init__(self) -> None:
        self.target: bytes | None = None
        self._separator = b""

    def add(self, components: bytes) -> None:
        target = self.target or b""
        offset = 0
        while offset + 2 <= len(components):
            flags, length = components[offset], components[offset + 1]
            text = components[offset + 2 : offset + 2 + length]
            if len(text) < length:
                raise error(errno.EIO)
            if flags & _ROOT:
                target += self._separator + b"/"  # inside a target it stands for a doubled slash
                self._separator = b""
            else:
                text = b"." if flags & _CURRENT else b".." if flags & _PARENT else text
                target += self._separator + text
                self._separator = b"" if flags & _CONTINUES else b"/"
            offset += 2 + length
        if len(target) > _LONGEST_TARGET:
            raise error(errno.EIO)
        self.target = target
