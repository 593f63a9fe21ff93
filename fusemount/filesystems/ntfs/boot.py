"""The boot sector of an NTFS volume: sizes and where the MFT lies.

The rule of this file: what Geometry says has been checked against the device, so that the rest may multiply and shift
with it. The layout is that of the BIOS parameter block of NTFS ("NTFS On-Disk Format", $Boot).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from nbdserve.block import BlockDevice
from nbdserve.errors import FormatError

_BOOT = struct.Struct("<3x 8s H B 26x Q Q Q b 3x b")
_LARGEST_CLUSTER = 2 << 20
_LARGEST_RECORD = 64 << 10
BLOCK = 512
"""Bytes between two update sequence numbers, whatever the sector size."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes in bytes, places in clusters (LCN: counted from the start of the volume).

    Attributes:
        clusters: how many clusters the volume has.
        mft, mirror: the first cluster of $MFT and of $MFTMirr.
        record: the size of an MFT record.
        index: the size of an index block.
    """

    sector: int
    cluster: int
    clusters: int
    mft: int
    mirror: int
    record: int
    index: int


def read_geometry(device: BlockDevice) -> Geometry:
    """What the boot sector says.

    Raises:
        FormatError: it is not that of an NTFS volume, or its figures do not fit each other or the device.
    """
    if device.size < BLOCK:
        raise FormatError("NTFS: the partition is too small to hold a boot sector")
    magic, sector, factor, sectors, mft, mirror, record, index = _BOOT.unpack(device.read(0, _BOOT.size))
    if magic != b"NTFS    ":
        raise FormatError("NTFS: the boot sector does not begin an NTFS volume; is this the right partition?")
    cluster = sector * factor if factor <= 128 else sector << min(256 - factor, 32)
    if not (_is_power(sector, 256, 4096) and _is_power(cluster, sector, _LARGEST_CLUSTER)):
        raise _damaged(f"sectors of {sector} and clusters of {cluster} bytes")
    if not 0 < sectors * sector <= device.size:
        raise _damaged(f"a volume of {sectors * sector} bytes in a partition of {device.size}")
    geometry = Geometry(
        sector=sector,
        cluster=cluster,
        clusters=sectors * sector // cluster,
        mft=mft,
        mirror=mirror,
        record=_size(record, cluster),
        index=_size(index, cluster),
    )
    if not _is_power(geometry.record, BLOCK, _LARGEST_RECORD) or not _is_power(geometry.index, BLOCK, _LARGEST_RECORD):
        raise _damaged(f"records of {geometry.record} and index blocks of {geometry.index} bytes")
    if not (0 < mft < geometry.clusters and 0 < mirror < geometry.clusters):
        raise _damaged(f"an MFT at cluster {mft} of {geometry.clusters}")
    return geometry


def _size(value: int, cluster: int) -> int:
    """A count of clusters, or when negative the logarithm of a size in bytes."""
    return value * cluster if value > 0 else 1 << min(-value, 32)


def _is_power(value: int, least: int, most: int) -> bool:
    return least <= value <= most and value & (value - 1) == 0


def _damaged(what: str) -> FormatError:
    return FormatError(f"NTFS: the boot sector is damaged ({what}); Windows' chkdsk may repair it from its copy")
