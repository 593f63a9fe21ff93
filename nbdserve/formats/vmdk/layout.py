"""Where a sparse extent keeps what: a directory of grain tables, whose entries say where the grains lie.

The same for all kinds of sparse extents. The directory is in memory whole; whoever holds a Layout knows that every
table it names lies inside the file.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable
from dataclasses import dataclass

from nbdserve.block.file import HostFile
from nbdserve.errors import FormatError, Unsupported
from nbdserve.formats.vmdk import SECTOR

MAXIMUM_TABLES = 1 << 20  # a directory of 8 MiB in memory
MAXIMUM_GRAIN = 16 << 20

NO_TABLE = 0
BAD_TABLE = 1  # named by the directory, but not inside the file

# What an entry of a grain table may be besides a sector (VDF, "Grain Table").
UNALLOCATED = 0
ZEROED = 1


@dataclass(frozen=True, slots=True)
class Layout:
    """All in bytes, unless it says otherwise.

    Attributes:
        size: guest bytes of the extent, whole sectors.
        grain_size: guest bytes that one entry maps, a power of two.
        slots: entries of a grain table, a power of two.
        entry_size: 4, or 8 where `decode` makes sectors of what is read.
        directory: where each grain table begins, or NO_TABLE, BAD_TABLE.
        directory_offset: where the directory itself lies.
        redundant, redundant_offset: the same for the second set of tables; None where there is none.
        taken: (start, end) of other parts of the file that no guest data may touch, the header first.
        data_offset: no grain is allocated before it.
        descriptor: (start, end) of the text inside the extent; empty where it has none.
        zeroed_grains: an entry of ZEROED stands for zeros.
        compressed, markers: grains are compressed; and each begins with a marker.
        frozen: why the extent cannot be written, in words; None when it can.
        unclean: it was not closed after it was written.
    """

    size: int
    grain_size: int
    slots: int
    directory: array[int]
    directory_offset: int
    redundant: array[int] | None = None
    redundant_offset: int = 0
    taken: tuple[tuple[int, int], ...] = ((0, SECTOR),)
    data_offset: int = 0
    descriptor: tuple[int, int] = (0, 0)
    zeroed_grains: bool = False
    compressed: bool = False
    markers: bool = False
    frozen: str | None = None
    unclean: bool = False
    entry_size: int = 4
    decode: Callable[[array[int]], array[int]] | None = None

    @property
    def table_size(self) -> int:
        """Bytes of a grain table on disk."""
        return self.slots * self.entry_size


def numbers(raw: bytes | bytearray, entry_size: int) -> array[int]:
    """Little-endian numbers of 4 or 8 bytes."""
    result = array("I" if entry_size == 4 else "Q")
    assert result.itemsize == entry_size
    result.frombytes(raw)
    if sys.byteorder == "big":
        result.byteswap()
    return result


def check_geometry(name: str, sectors: int, grain_sectors: int, slots: int) -> int:
    """Check the sizes that a header announces; return how many grain tables they need.

    Raises:
        FormatError, Unsupported: they make no sense, or more than MAXIMUM_TABLES.
    """
    if not sectors or sectors > 1 << 46:
        raise FormatError(f"{name}: a VMDK extent of {sectors} sectors; the header is damaged")
    if not grain_sectors or grain_sectors & (grain_sectors - 1) or not slots or slots & (slots - 1):
        raise FormatError(
            f"{name}: grains of {grain_sectors} sectors, {slots} to a table; both must be powers of two, the header "
            "is damaged"
        )
    if grain_sectors * SECTOR > MAXIMUM_GRAIN:
        raise Unsupported(f"{name}: grains of {grain_sectors * SECTOR} bytes; {MAXIMUM_GRAIN} is the most handled")
    tables = -(-sectors // (grain_sectors * slots))
    if tables > MAXIMUM_TABLES:
        raise Unsupported(
            f"{name}: {tables} grain tables, more than the {MAXIMUM_TABLES} handled here; the header is damaged, or "
            "the grains are too small for such a disk"
        )
    return tables


def read_directory(file: HostFile, offset: int, tables: int, entry_size: int, what: str) -> array[int]:
    """The entries of a directory, as they are.

    Raises:
        FormatError: it does not lie inside the file, or on the header.
    """
    if not SECTOR <= offset <= file.size - tables * entry_size:
        raise FormatError(f"{file.name}: the {what} at {offset} lies outside the file; it is truncated or damaged")
    return numbers(file.read(offset, tables * entry_size), entry_size)


def table_places(sectors: array[int], table_size: int, length: int) -> array[int]:
    """Where tables lie whose sectors a directory names, each checked against the file's length."""
    last = length - table_size
    places = array("Q", bytes(8 * len(sectors)))
    for index, sector in enumerate(sectors):
        if sector:
            place = sector * SECTOR
            places[index] = place if place <= last else BAD_TABLE
    return places
