"""What a partition table says, and the choice of one partition from it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from uuid import UUID

from nbdserve.errors import FormatError, OpenError


class TableKind(StrEnum):
    """How a disk is divided."""

    NONE = "none"
    MBR = "mbr"
    GPT = "gpt"


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition, as its table describes it; find() checks that it lies inside the disk.

    Attributes:
        number: from 1; the logical partitions of an MBR from 5.
        offset, size: bytes.
        type: the type byte of an MBR entry, or the type GUID of a GPT entry.
        uuid: as Linux knows it (PARTUUID), in lower case.
        label: the name of a GPT entry.
        bootable: the boot flag, or GPT's "legacy BIOS bootable".
        is_container: an extended partition, which holds the logical ones and no data of its own.
    """

    number: int
    offset: int
    size: int
    type: int | UUID
    uuid: str
    label: str = ""
    bootable: bool = False
    is_container: bool = False


@dataclass(frozen=True, slots=True)
class PartitionTable:
    """A disk's partitions.

    Attributes:
        kind: of the table.
        sector_size: the unit the table counts in, bytes.
        disk_size: the length of the disk, bytes.
        partitions: in the order of their numbers, which may have gaps.
        remarks: one line for each thing that is wrong with the table but leaves it usable.
    """

    kind: TableKind
    sector_size: int
    disk_size: int
    partitions: tuple[Partition, ...]
    remarks: tuple[str, ...] = ()


def find(table: PartitionTable, selector: int | str) -> Partition:
    """The partition with this number, UUID or label.

    Raises:
        OpenError: there is none, or more than one, or it is an extended partition.
        FormatError: it does not lie inside the disk.
    """
    if table.kind is TableKind.NONE:
        raise OpenError("this disk has no partition table; serve it as a whole")
    partition = _only(_matching(table, str(selector)), table, selector)
    if partition.is_container:
        raise OpenError(
            f"partition {partition.number} is an extended partition, which only holds others; "
            "choose one of those, from 5"
        )
    end = partition.offset + partition.size
    if partition.size <= 0 or end > table.disk_size:
        raise FormatError(
            f"partition {partition.number} covers the bytes from {partition.offset} to {end}, but the disk has "
            f"{table.disk_size}; the image is truncated or the table damaged"
        )
    return partition


def _matching(table: PartitionTable, selector: str) -> list[Partition]:
    """By number, else by UUID, else by label: what looks like a number never is a label."""
    if selector.isascii() and selector.isdecimal():
        return [part for part in table.partitions if str(part.number) == selector]
    by_uuid = [part for part in table.partitions if part.uuid == selector.lower()]
    return by_uuid or [part for part in table.partitions if selector and part.label == selector]


def _only(found: list[Partition], table: PartitionTable, selector: int | str) -> Partition:
    if len(found) == 1:
        return found[0]
    if found:
        numbers = ", ".join(str(part.number) for part in found)
        raise OpenError(f"more than one partition matches {selector!r}; choose by number: {numbers}")
    numbers = ", ".join(str(part.number) for part in table.partitions if not part.is_container)
    raise OpenError(f"no partition {selector!r} on this disk; it has: {numbers or 'none'}")
