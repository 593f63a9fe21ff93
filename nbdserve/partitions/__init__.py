"""Partition tables: what parts a disk is divided into, numbered as Linux numbers them.

    table    what a table says, whichever kind it is, and how one partition is chosen
    mbr      the four entries of the first sector, and the chain of logical partitions
    gpt      GUID partition tables, with their backup

Nothing here opens or changes anything; a partition becomes a disk of its own through block.window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdserve.partitions.table import Partition, PartitionTable, TableKind, find

if TYPE_CHECKING:
    from nbdserve.block.device import BlockDevice

__all__ = ["Partition", "PartitionTable", "TableKind", "find", "read_partitions"]


def read_partitions(device: BlockDevice) -> PartitionTable:
    """The partition table of a disk; one of kind NONE when it has none, like a disk that is one file system.

    As in Linux, a GPT counts only where the first sector announces it with a protective entry: what earlier use of
    the disk has left elsewhere does not. Such an announcement goes before any other entries there (a hybrid MBR).

    Raises:
        FormatError: a GPT is announced, but both of its copies are damaged.
        OSError: the disk cannot be read.
    """
    from nbdserve.partitions import gpt, mbr

    record = mbr.read_record(device)
    if record is None:
        return PartitionTable(TableKind.NONE, mbr.SECTOR, device.size, ())
    if not record.announces_gpt:
        return mbr.read_table(device, record)
    table = gpt.read_table(device)
    if table is not None:
        return table
    if record.is_hybrid:
        return mbr.read_table(device, record)
    raise gpt.both_damaged()
