"""The master boot record: four entries in the first sector, one of which may hold a chain of logical partitions.

The chain is a linked list on the disk that anyone may have written: it is followed only to sectors not seen before, and
to MAX_LOGICAL of them. All numbers are little-endian counts of 512-byte sectors: the record does not say otherwise, and
images of disks with larger sectors carry a GPT.

Source: UEFI specification 2.10, section 5.2 (the record); for the numbers, what Linux does (block/partitions/msdos.c).
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct

from nbdserve.block.device import BlockDevice
from nbdserve.partitions.table import Partition, PartitionTable, TableKind

SECTOR = 512
MAX_LOGICAL = 256
_EXTENDED = frozenset((0x05, 0x0F, 0x85))
_PROTECTIVE = 0xEE

_SIGNATURE = Struct("<440xI")
_ENTRIES_OFFSET, _ENTRIES = 446, 4
_ENTRY = Struct("<B3xB3xII")  # flag type start count


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a record: sectors `start` to `start + count`, relative to what the record's place makes them."""

    bootable: bool
    type: int
    start: int
    count: int

    @property
    def is_empty(self) -> bool:
        return not (self.type and self.count)

    @property
    def is_extended(self) -> bool:
        return not self.is_empty and self.type in _EXTENDED

    @property
    def is_plain(self) -> bool:
        return not self.is_empty and self.type not in _EXTENDED


@dataclass(frozen=True, slots=True)
class Record:
    """A boot record that holds a table: the disk's signature and its four entries, empty ones too."""

    signature: int
    entries: tuple[Entry, ...]

    @property
    def announces_gpt(self) -> bool:
        return any(not entry.is_empty and entry.type == _PROTECTIVE for entry in self.entries)

    @property
    def is_hybrid(self) -> bool:
        return any(not entry.is_empty and entry.type != _PROTECTIVE for entry in self.entries)


def read_record(device: BlockDevice) -> Record | None:
    """The table in the disk's first sector; None when there is none, as in the boot sector of a file system."""
    if device.size < SECTOR:
        return None
    sector = bytes(device.read(0, SECTOR))
    record = _parse(sector)
    if record is None or all(entry.is_empty for entry in record.entries):
        return None
    if _is_boot_sector(sector) and not _is_plausible(record, device.size // SECTOR):
        return None
    return record


def _parse(sector: bytes) -> Record | None:
    """Take a sector apart; None without the signature, or where boot flags show that no table lies there."""
    if not sector.endswith(b"\x55\xaa"):
        return None
    entries = list(_ENTRY.iter_unpack(sector[_ENTRIES_OFFSET:][: _ENTRIES * _ENTRY.size]))
    if any(flag not in (0x00, 0x80) for flag, _, _, _ in entries):
        return None
    (signature,) = _SIGNATURE.unpack_from(sector)
    return Record(signature, tuple(Entry(flag == 0x80, *rest) for flag, *rest in entries))


def _is_boot_sector(sector: bytes) -> bool:
    """Whether FAT, exFAT or NTFS begins here; those have code or text where a table would be."""
    names = (sector[54:57], sector[82:85], sector[3:11])
    return sector[0] in (0xE9, 0xEB) and any(name in (b"FAT", b"NTFS    ", b"EXFAT   ") for name in names)


def _is_plausible(record: Record, sectors: int) -> bool:
    """Whether the entries lie on the disk, behind the record, without overlap: text is not like that."""
    used = sorted((entry.start, entry.start + entry.count) for entry in record.entries if not entry.is_empty)
    position = 1
    for start, end in used:
        if not position <= start < end <= sectors:
            return False
        position = end
    return True


def read_table(device: BlockDevice, record: Record) -> PartitionTable:
    """All partitions of the disk, given its record."""
    partitions: list[Partition] = []
    remarks: list[str] = []
    for number, entry in enumerate(record.entries, start=1):
        if not entry.is_empty:
            partitions.append(_partition(record, number, entry, 0))
    number = 5
    for extended in record.entries:
        if not extended.is_extended:
            continue
        logical, remark = _read_chain(device, extended)
        for place, entry in logical:
            partitions.append(_partition(record, number, entry, place))
            number += 1
        if remark:
            remarks.append(remark)
    return PartitionTable(TableKind.MBR, SECTOR, device.size, tuple(partitions), tuple(remarks))


def _partition(record: Record, number: int, entry: Entry, base: int) -> Partition:
    return Partition(
        number,
        offset=(base + entry.start) * SECTOR,
        size=entry.count * SECTOR,
        type=entry.type,
        uuid=f"{record.signature:08x}-{number:02x}",
        bootable=entry.bootable,
        is_container=entry.is_extended,
    )


def _read_chain(device: BlockDevice, extended: Entry) -> tuple[list[tuple[int, Entry]], str]:
    """The logical partitions, each with the sector its start counts from, and what ended the chain before its end.

    Each record of the chain describes one partition, relative to itself, and the next record, relative to the
    extended partition.
    """
    found: list[tuple[int, Entry]] = []
    seen: set[int] = set()
    place = extended.start
    while len(seen) < MAX_LOGICAL:
        if place in seen:
            return found, f"the chain of logical partitions comes back to sector {place}; it is followed no further"
        seen.add(place)
        record = _parse(bytes(device.read(place * SECTOR, SECTOR))) if (place + 1) * SECTOR <= device.size else None
        if record is None:
            return found, f"the chain of logical partitions breaks off at sector {place}, where no boot record lies"
        found += [(place, entry) for entry in record.entries[:2] if entry.is_plain]
        link = next((entry for entry in record.entries[:2] if entry.is_extended), None)
        if link is None:
            return found, ""
        place = extended.start + link.start
    return found, f"there are more than {MAX_LOGICAL} logical partitions; the rest is left out"
