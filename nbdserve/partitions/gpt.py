"""GUID partition tables: a header in the second sector, its entries, and a backup of both at the end of the disk.

A header counts when its signature and CRC are right, it says of itself where it lies, its numbers stay below the caps
and the entries it points to are on the disk with the right CRC. The first that counts is believed: the one at the
start, the backup that one names, the one in the last sector. 512 and 4096 bytes are tried as the size of a sector,
which an image does not tell otherwise; what either finds at the start goes before any backup, which may be from an
earlier table.

Source: UEFI specification 2.10, section 5.3.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple
from uuid import UUID

from nbdserve.block.device import BlockDevice
from nbdserve.errors import FormatError
from nbdserve.partitions.table import Partition, PartitionTable, TableKind

SECTOR_SIZES = (512, 4096)
MAX_ENTRIES_SIZE = 1 << 20
_SIGNATURE = b"EFI PART"
_LEGACY_BOOTABLE = 1 << 2
_CRC = slice(16, 20)

# signature, header_size crc own_sector other_sector entries_sector entry_count entry_size entries_crc
_HEADER = Struct("<8s4xII4xQQ32xQIII")
_ENTRY = Struct("<16s16sQQQ72s")  # type uuid first last attributes name


class Header(NamedTuple):
    """The checked header of one of the two copies; offsets and sizes in bytes, sectors as numbers."""

    sector_size: int
    other_sector: int
    entries_offset: int
    entry_size: int
    entry_count: int
    entries_crc: int


def read_table(device: BlockDevice) -> PartitionTable | None:
    """The table of a disk whose first sector announces one; None when neither copy is good."""
    for sector, header in _headers(device):
        entries = _entries(device, header)
        if entries is not None:
            partitions = tuple(_partitions(header, entries))
            remark = () if sector == 1 else (f"the GPT at the start is damaged; its backup in sector {sector} is used",)
            return PartitionTable(TableKind.GPT, header.sector_size, device.size, partitions, remark)
    return None


def both_damaged() -> FormatError:
    """What to say when read_table() found nothing."""
    return FormatError("the disk's GPT and its backup are both damaged; repair the table, for example with gdisk")


def _headers(device: BlockDevice) -> Iterator[tuple[int, Header]]:
    """The good headers in the places where they may be, with their sectors."""
    backups: list[tuple[int, int]] = []
    for sector_size in SECTOR_SIZES:
        primary = _header(device, sector_size, 1)
        if primary is not None:
            yield 1, primary
            backups.append((sector_size, primary.other_sector))
    backups += [(sector_size, device.size // sector_size - 1) for sector_size in SECTOR_SIZES]
    for sector_size, sector in backups:
        header = _header(device, sector_size, sector)
        if header is not None:
            yield sector, header


def _header(device: BlockDevice, sector_size: int, sector: int) -> Header | None:
    if sector < 1 or (sector + 1) * sector_size > device.size:
        return None
    raw = bytes(device.read(sector * sector_size, sector_size))
    if not raw.startswith(_SIGNATURE):
        return None
    fields = _HEADER.unpack_from(raw)
    _, header_size, crc, own_sector, other_sector, entries_sector, entry_count, entry_size, entries_crc = fields
    if not _HEADER.size <= header_size <= sector_size or own_sector != sector:
        return None
    if zlib.crc32(raw[: _CRC.start] + bytes(4) + raw[_CRC.stop : header_size]) != crc:
        return None
    multiple, rest = divmod(entry_size, _ENTRY.size)
    if rest or multiple < 1 or multiple & (multiple - 1):
        return None
    length = entry_count * entry_size
    offset = entries_sector * sector_size
    if length > MAX_ENTRIES_SIZE or offset + length > device.size:
        return None
    return Header(sector_size, other_sector, offset, entry_size, entry_count, entries_crc)


def _entries(device: BlockDevice, header: Header) -> bytes | None:
    raw = bytes(device.read(header.entries_offset, header.entry_count * header.entry_size))
    return raw if zlib.crc32(raw) == header.entries_crc else None


def _partitions(header: Header, entries: bytes) -> Iterator[Partition]:
    """The entries in use; an unused one keeps its number."""
    for index in range(header.entry_count):
        type, uuid, first, last, attributes, name = _ENTRY.unpack_from(entries, index * header.entry_size)
        if not any(type):
            continue
        yield Partition(
            index + 1,
            offset=first * header.sector_size,
            size=max(0, last + 1 - first) * header.sector_size,
            type=UUID(bytes_le=type),
            uuid=str(UUID(bytes_le=uuid)),
            label=name.decode("utf-16-le", errors="replace").partition("\0")[0],
            bootable=bool(attributes & _LEGACY_BOOTABLE),
        )
