"""The sparse extents of ESX, for reading: COWD and seSparse.

Sources: VDF, "ESXi Host Sparse Extents", for COWD. For seSparse there is no specification: the layout is the one that
QEMU 7.2 reads (block/vmdk.c), and whatever it refuses is refused here.
"""

from __future__ import annotations

from array import array
from typing import Any

from construct import Array, Bytes, Const, Int32ul, Int64ul, Padding, Struct

from nbdserve.block.file import HostFile
from nbdserve.errors import FormatError, Unsupported
from nbdserve.formats.vmdk import SECTOR
from nbdserve.formats.vmdk.layout import UNALLOCATED, ZEROED, Layout, check_geometry, read_directory, table_places

COWD_MAGIC = b"COWD"
_COWD_SLOTS = 4096
_FROZEN = "sparse extents of ESX can only be read; open it read-only (-r), or convert it"

_COWD = Struct(
    "magic" / Const(COWD_MAGIC),
    "version" / Int32ul,
    "flags" / Int32ul,
    "sectors" / Int32ul,
    "grain_size" / Int32ul,
    "directory_offset" / Int32ul,
    "tables" / Int32ul,
)

_SE_MAGIC = 0xCAFEBABE
_SE_VOLATILE_MAGIC = 0xCAFECAFE
_SE_VERSION = 0x0000000200000001
_SE_GRAIN = 8  # sectors
_SE_TABLE = 64  # sectors
_SE_SLOTS = _SE_TABLE * SECTOR // 8
_SE_BEYOND = 0xFFFFFFFF_FFFFFFFF  # a sector that no file has: what damaged entries become

_SE_SPARSE = Struct(
    "magic" / Int64ul,
    "version" / Int64ul,
    "capacity" / Int64ul,
    "grain_size" / Int64ul,
    "table_size" / Int64ul,
    "flags" / Int64ul,
    "reserved" / Array(4, Int64ul),
    "volatile_offset" / Int64ul,
    Padding(5 * 8),
    "directory_offset" / Int64ul,
    "directory_size" / Int64ul,
    "tables_offset" / Int64ul,
    Padding(5 * 8),
    "grains_offset" / Int64ul,
    Padding(8),
    "pad" / Bytes(304),
)
_SE_VOLATILE = Struct("magic" / Int64ul, Padding(16), "replay_journal" / Int64ul)


def read_cowd(file: HostFile) -> Layout:
    """Read and check a COWD header and its directory.

    Raises:
        FormatError: they are damaged, or do not fit the file.
    """
    raw = bytes(file.read(0, SECTOR))
    if not raw.startswith(COWD_MAGIC):
        raise FormatError(f"{file.name}: not a COWD extent, which the descriptor says it is")
    fields = _COWD.parse(raw)
    if fields.version != 1:
        raise Unsupported(f"{file.name}: COWD version {fields.version} is not handled; 1 is")
    tables = check_geometry(file.name, fields.sectors, fields.grain_size, _COWD_SLOTS)
    if fields.tables < tables:
        raise FormatError(f"{file.name}: {fields.tables} grain tables, but the disk needs {tables}; damaged")
    offset = fields.directory_offset * SECTOR
    directory = read_directory(file, offset, tables, 4, "grain directory")
    return Layout(
        size=fields.sectors * SECTOR,
        grain_size=fields.grain_size * SECTOR,
        slots=_COWD_SLOTS,
        directory=table_places(directory, 4 * _COWD_SLOTS, file.size),
        directory_offset=offset,
        frozen=_FROZEN,
    )


def read_se_sparse(file: HostFile) -> Layout:
    """Read and check an seSparse header and its directory.

    Raises:
        FormatError: they are damaged, or do not fit the file.
        Unsupported: its journal has to be replayed first, or it is of another version.
    """
    fields = _SE_SPARSE.parse(bytes(file.read(0, SECTOR)))
    if fields.magic != _SE_MAGIC:
        raise FormatError(f"{file.name}: not an seSparse extent, which the descriptor says it is")
    if fields.version != _SE_VERSION or fields.flags or any(fields.reserved) or any(fields.pad):
        raise Unsupported(f"{file.name}: seSparse version {fields.version:#x} or its flags are not handled")
    if (fields.grain_size, fields.table_size) != (_SE_GRAIN, _SE_TABLE):
        raise Unsupported(f"{file.name}: seSparse with grains of {fields.grain_size} sectors is not handled")
    _check_clean(file, fields.volatile_offset * SECTOR)
    tables = check_geometry(file.name, fields.capacity, _SE_GRAIN, _SE_SLOTS)
    if fields.directory_size * SECTOR < 8 * tables:
        raise FormatError(f"{file.name}: the grain directory is too small for the disk; the header is damaged")
    directory = read_directory(file, fields.directory_offset * SECTOR, tables, 8, "grain directory")
    return Layout(
        size=fields.capacity * SECTOR,
        grain_size=_SE_GRAIN * SECTOR,
        slots=_SE_SLOTS,
        directory=table_places(
            array("Q", (_table_sector(entry, fields.tables_offset) for entry in directory)),
            8 * _SE_SLOTS,
            file.size,
        ),
        directory_offset=fields.directory_offset * SECTOR,
        zeroed_grains=True,
        frozen=_FROZEN,
        entry_size=8,
        decode=_decoder(fields),
    )


def _check_clean(file: HostFile, offset: int) -> None:
    if offset > file.size - SECTOR:
        raise FormatError(f"{file.name}: the seSparse header leads outside the file; it is truncated or damaged")
    fields = _SE_VOLATILE.parse(bytes(file.read(offset, SECTOR)))
    if fields.magic != _SE_VOLATILE_MAGIC:
        raise FormatError(f"{file.name}: the second seSparse header is damaged")
    if fields.replay_journal:
        raise Unsupported(f"{file.name}: was not closed properly; let ESX replay its journal first")


def _table_sector(entry: int, base: int) -> int:
    """The sector of a grain table: the highest 32 bits of an entry say whether there is one, the others which."""
    if not entry:
        return 0
    sector = base + (entry & 0xFFFFFFFF) * _SE_TABLE
    return sector if entry >> 32 == 0x10000000 and sector <= 0xFFFFFFFF else _SE_BEYOND


def _decoder(fields: Any) -> Any:
    base = fields.grains_offset

    def decode(table: array[int]) -> array[int]:
        return array("Q", (_grain_sector(entry, base) if entry else UNALLOCATED for entry in table))

    return decode


def _grain_sector(entry: int, base: int) -> int:
    """What an entry means: the highest 4 bits are its kind, the number of the grain is written in two parts."""
    match entry >> 60:
        case 1 | 2:  # unmapped by the guest, or zeros
            return ZEROED
        case 3:
            grain = (entry >> 48 & 0xFFF) | (entry & 0xFFFFFFFFFFFF) << 12
            return min(base + grain * _SE_GRAIN, _SE_BEYOND)
        case _:
            return _SE_BEYOND
