"""Volume descriptors and directory records of ISO 9660 (ECMA-119, sections 8 and 9; Joliet specification).

The rule of this file: a DirectoryRecord lies wholly in its sector. Whether the extent that it names lies on the device
is asked when it is read, so that a damaged record costs its own file only.
"""

from __future__ import annotations

import errno
import itertools
import struct
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntFlag

from fusemount.filesystems.base import error
from nbdserve.block import BlockDevice
from nbdserve.errors import FormatError

SECTOR = 2048
_FIRST_DESCRIPTOR = 16 * SECTOR
_MOST_DESCRIPTORS = 64
_PRIMARY, _SUPPLEMENTARY, _TERMINATOR = 1, 2, 255
_JOLIET = (b"%/@", b"%/C", b"%/E")
_RECORD = struct.Struct("<BB I4x I4x 7s BBB H2x B")


class Flags(IntFlag):
    """Flags of a directory record."""

    HIDDEN = 0x01
    DIRECTORY = 0x02
    ASSOCIATED = 0x04
    MULTI_EXTENT = 0x80


@dataclass(frozen=True, slots=True)
class VolumeDescriptor:
    """One view of the image: the primary one, or that of Joliet.

    Attributes:
        joliet: whether names are UCS-2.
        block: bytes in a logical block.
        size: bytes of the volume.
        root: where the record of the root directory is, in bytes from the start of the image.
    """

    joliet: bool
    block: int
    size: int
    root: int


@dataclass(frozen=True, slots=True)
class DirectoryRecord:
    """One entry of a directory.

    Attributes:
        place: where it is, in bytes from the start of the image.
        length: its own length.
        extent: the first logical block of the content, behind the extended attribute record.
        size: bytes of content.
        interleaved: whether the content lies in pieces with gaps between them.
        system_use: what extensions have added.
    """

    place: int
    length: int
    extent: int
    size: int
    mtime_ns: int
    flags: int
    interleaved: bool
    name: bytes
    system_use: bytes


def find_volumes(device: BlockDevice) -> list[VolumeDescriptor]:
    """The primary volume descriptor, then one of Joliet if there is any.

    Raises:
        FormatError: there is no primary one, or it is damaged.
    """
    found: list[VolumeDescriptor] = []
    for number in range(_MOST_DESCRIPTORS):
        place = _FIRST_DESCRIPTOR + number * SECTOR
        if place + SECTOR > device.size:
            break
        sector = bytes(device.read(place, SECTOR))
        if sector[1:6] != b"CD001" or sector[0] == _TERMINATOR:
            break
        joliet = sector[0] == _SUPPLEMENTARY and sector[88:91] in _JOLIET
        if sector[0] == _PRIMARY or joliet:
            found.append(_parse_descriptor(sector, place, joliet))
    found.sort(key=lambda volume: volume.joliet)
    if not found or found[0].joliet:
        raise FormatError("ISO 9660: the image has no primary volume descriptor; is it complete?")
    return found


def _parse_descriptor(sector: bytes, place: int, joliet: bool) -> VolumeDescriptor:
    blocks, block = struct.unpack_from("<80xI44xH", sector)
    if block not in (512, 1024, 2048):
        raise FormatError(f"ISO 9660: the volume descriptor is damaged (logical blocks of {block} bytes)")
    return VolumeDescriptor(joliet, block, blocks * block, place + 156)


def parse_record(sector: bytes | bytearray, offset: int, place: int) -> DirectoryRecord:
    """The record at an offset of a sector; `place`: where the sector is. Raises EIO when it leaves the sector."""
    length = sector[offset]
    if length < _RECORD.size + 1 or offset + length > len(sector):
        raise error(errno.EIO)
    body = bytes(sector[offset : offset + length])
    _, attributes, extent, size, date, flags, unit, gap, _, name_length = _RECORD.unpack_from(body)
    end = _RECORD.size + name_length
    if end > length:
        raise error(errno.EIO)
    return DirectoryRecord(
        place=place + offset,
        length=length,
        extent=extent + attributes,
        size=size,
        mtime_ns=short_date(date),
        flags=flags,
        interleaved=bool(unit or gap),
        name=body[_RECORD.size : end],
        system_use=body[end + (end & 1) :],
    )


def short_date(date: bytes) -> int:
    """The time in the seven bytes of a record (9.1.5), in nanoseconds since 1970; 0 for one that makes no sense."""
    year, month, day, hour, minute, second, zone = struct.unpack("6Bb", date)
    return _nanoseconds(year + 1900, month, day, hour, minute, second, 0, zone)


def long_date(date: bytes) -> int:
    """The same of the seventeen bytes with digits (8.4.26.1)."""
    cuts = (0, 4, 6, 8, 10, 12, 14, 16)
    try:
        year, month, day, hour, minute, second, hundredths = (
            int(date[start:end]) for start, end in itertools.pairwise(cuts)
        )
    except ValueError:
        return 0
    return _nanoseconds(year, month, day, hour, minute, second, hundredths, struct.unpack("b", date[16:])[0])


def _nanoseconds(
    year: int, month: int, day: int, hour: int, minute: int, second: int, hundredths: int, zone: int
) -> int:
    """Args: zone: quarters of an hour east of Greenwich."""
    try:
        seconds = int(datetime(year, month, day, hour, minute, min(second, 59), tzinfo=UTC).timestamp())
    except ValueError:
        return 0
    return (seconds - zone * 900) * 10**9 + hundredths * 10**7
