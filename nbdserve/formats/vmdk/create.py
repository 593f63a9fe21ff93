"""New, empty VMDK disks: sparse and flat, in one file or split.

Every file appears under its name only when it is complete, the one with the descriptor last: nothing is found under
the disk's own name before all of it is there.
"""

from __future__ import annotations

import errno
import os
import secrets
import struct
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum

from nbdserve.errors import OpenError
from nbdserve.formats.newfile import new_file
from nbdserve.formats.vmdk import SECTOR
from nbdserve.formats.vmdk.descriptor import NO_PARENT, build_descriptor
from nbdserve.formats.vmdk.header import HEADER, LINE_ENDS, MAGIC, NEWLINE_TEST, REDUNDANT, ZEROED_GRAINS
from nbdserve.formats.vmdk.layout import MAXIMUM_GRAIN, MAXIMUM_TABLES

DESCRIPTOR_SECTORS = 20
SLOTS = 512
TABLE_SECTORS = SLOTS * 4 // SECTOR
_SPLIT = 0x80000000  # bytes of each file of a split disk, as QEMU splits
_MAXIMUM_SPARSE = 0xFFFF0000 * SECTOR  # 2 TiB less what keeps every grain's sector a number of 32 bits


class Subformat(StrEnum):
    """How a disk is laid out in files; the descriptor's createType."""

    MONOLITHIC_SPARSE = "monolithicSparse"
    MONOLITHIC_FLAT = "monolithicFlat"
    SPLIT_SPARSE = "twoGbMaxExtentSparse"
    SPLIT_FLAT = "twoGbMaxExtentFlat"

    @property
    def is_flat(self) -> bool:
        """Whether guest bytes lie in the files as they are."""
        return self in (Subformat.MONOLITHIC_FLAT, Subformat.SPLIT_FLAT)

    @property
    def is_split(self) -> bool:
        """Whether the disk is spread over files of 2 GiB."""
        return self in (Subformat.SPLIT_SPARSE, Subformat.SPLIT_FLAT)


def new_cid() -> int:
    """A content ID that has no meaning of its own."""
    return secrets.randbelow(NO_PARENT - 1)


def create_image(
    path: str | os.PathLike[str],
    size: int,
    *,
    subformat: Subformat = Subformat.MONOLITHIC_SPARSE,
    grain_size: int = 65536,
    zeroed_grains: bool = False,
    parent: tuple[int, str] | None = None,
    adapter_type: str = "ide",
    hardware_version: int = 4,
) -> None:
    """Create a disk of `size` bytes, rounded up to whole sectors, that reads as zeros or as its parent.

    Existing files are never overwritten.

    Args:
        grain_size: bytes, a power of two from 4096.
        zeroed_grains: allow grains to be marked as zeroed, which older programs do not understand.
        parent: (CID, name as the disk is to find it) of the disk to stand on; not for flat ones.

    Raises:
        OpenError: the size does not suit such a disk, or a name cannot be written into the descriptor.
        FileExistsError: there is such a file.
    """
    name = os.fspath(path)
    size = -(-size // SECTOR) * SECTOR
    assert 4096 <= grain_size <= MAXIMUM_GRAIN and not grain_size & (grain_size - 1)
    assert not (subformat.is_flat and (parent or zeroed_grains))
    part = min(size, _SPLIT) if subformat.is_split else size
    if not size:
        raise OpenError(f"{name}: a VMDK disk needs at least one sector; give a size")
    if not subformat.is_flat and part > min(_MAXIMUM_SPARSE, MAXIMUM_TABLES * SLOTS * grain_size):
        raise OpenError(f"{name}: {size} bytes are too many for one sparse VMDK extent; split it, or make it flat")
    if os.path.lexists(name):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)

    def describe(extents: list[tuple[int, str, str]]) -> bytes:
        return build_descriptor(
            *(subformat, new_cid(), extents, size),
            parent=parent,
            adapter_type=adapter_type,
            hardware_version=hardware_version,
        )

    def create_extent(extent: str, length: int, text: bytes = b"") -> None:
        if subformat.is_flat:
            with new_file(extent) as file:
                file.truncate(length)
        else:
            _create_sparse(extent, length, grain_size, zeroed_grains, text)

    if subformat == Subformat.MONOLITHIC_SPARSE:
        create_extent(name, size, describe([(size, "SPARSE", os.path.basename(name))]))
        return
    lengths = [min(part, size - start) for start in range(0, size, part)]
    extents = [(length, _extent_name(name, subformat, number)) for number, length in enumerate(lengths, 1)]
    kind = "FLAT 0" if subformat.is_flat else "SPARSE"
    text = describe([(length, kind, os.path.basename(extent)) for length, extent in extents])
    _create_all(name, extents, text, create_extent)


def _create_all(
    name: str, extents: list[tuple[int, str]], text: bytes, create_extent: Callable[[str, int], None]
) -> None:
    """The extents, then the descriptor; or nothing."""
    made: list[str] = []
    try:
        for length, extent in extents:
            create_extent(extent, length)
            made.append(extent)
        with new_file(name) as file:
            file.write(text)
    except BaseException:
        for extent in made:
            with suppress(OSError):
                os.unlink(extent)
        raise


def _extent_name(name: str, subformat: Subformat, number: int) -> str:
    """The name of an extent's file, as VMware and QEMU choose it."""
    stem, suffix = os.path.splitext(name)
    match subformat:
        case Subformat.MONOLITHIC_FLAT:
            return f"{stem}-flat{suffix}"
        case Subformat.SPLIT_FLAT:
            return f"{stem}-f{number:03}{suffix}"
        case _:
            return f"{stem}-s{number:03}{suffix}"


def _create_sparse(name: str, size: int, grain_size: int, zeroed_grains: bool, text: bytes) -> None:
    """One sparse extent: header, descriptor, both directories with their tables, all entries unallocated."""
    tables = -(-size // (grain_size * SLOTS))
    directory_sectors = -(-tables * 4 // SECTOR)
    descriptor_sectors = DESCRIPTOR_SECTORS if text else 0
    if len(text) > DESCRIPTOR_SECTORS * SECTOR:
        raise OpenError(f"{name}: the descriptor has {len(text)} bytes; choose shorter names")
    redundant = 1 + descriptor_sectors
    directory = redundant + directory_sectors + tables * TABLE_SECTORS
    grain_sectors = grain_size // SECTOR
    end = directory + directory_sectors + tables * TABLE_SECTORS
    overhead = -(-end // grain_sectors) * grain_sectors
    header = HEADER.build(
        {
            "version": 2 if zeroed_grains else 1,
            "flags": NEWLINE_TEST | REDUNDANT | (ZEROED_GRAINS if zeroed_grains else 0),
            "capacity": size // SECTOR,
            "grain_size": grain_sectors,
            "descriptor_offset": 1 if text else 0,
            "descriptor_size": descriptor_sectors,
            "slots": SLOTS,
            "redundant_offset": redundant,
            "directory_offset": directory,
            "overhead": overhead,
            "unclean": 0,
            "line_ends": LINE_ENDS,
            "compression": 0,
            "magic": MAGIC,
        }
    )
    with new_file(name) as file:
        file.truncate(overhead * SECTOR)
        file.write(header + text)
        for start in (redundant, directory):
            first = start + directory_sectors
            file.seek(start * SECTOR)
            file.write(struct.pack(f"<{tables}I", *range(first, first + tables * TABLE_SECTORS, TABLE_SECTORS)))
