"""The boot sector of exFAT (section 3.1).

The rule of this file: what Geometry says lies inside the device.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from nbdserve.block import BlockDevice
from nbdserve.errors import FormatError

_BOOT = struct.Struct("<3x 8s 53x 8x Q IIII I 4x 2x H BB")
_SECTOR_SHIFTS = range(9, 13)
_LARGEST_CLUSTER_SHIFT = 25
_DIRTY = 2
FIRST_CLUSTER = 2


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes and places in bytes, counts in clusters.

    Attributes:
        fat: where the FAT is.
        heap: where cluster 2, the first one, is.
        root: the first cluster of the root directory.
        dirty: whether it was not cleanly unmounted.
    """

    cluster: int
    clusters: int
    fat: int
    heap: int
    root: int
    dirty: bool


def read_geometry(device: BlockDevice) -> Geometry:
    """What the boot sector says. Raises FormatError when it is damaged."""
    if device.size < 512:
        raise FormatError("exFAT: the partition is too small to hold a boot sector")
    magic, sectors, fat, fat_length, heap, clusters, root, flags, sector_shift, cluster_shift = _BOOT.unpack(
        device.read(0, _BOOT.size)
    )
    if magic != b"EXFAT   ":
        raise FormatError("exFAT: the boot sector does not begin an exFAT volume; is this the right partition?")
    if sector_shift not in _SECTOR_SHIFTS or sector_shift + cluster_shift > _LARGEST_CLUSTER_SHIFT:
        raise _damaged(f"sectors of 2**{sector_shift} and clusters of 2**{cluster_shift} sectors")
    size = sectors << sector_shift
    if size > device.size:
        raise FormatError(f"exFAT: the image was cut off, {size - device.size} of {size} bytes are missing")
    cluster = 1 << sector_shift + cluster_shift
    if (heap << sector_shift) + clusters * cluster > size:
        raise _damaged(f"{clusters} clusters from sector {heap} on, in {sectors} sectors")
    if not 0 < fat < heap or (clusters + FIRST_CLUSTER) * 4 > fat_length << sector_shift:
        raise _damaged(f"a FAT of {fat_length} sectors at sector {fat}")
    if not FIRST_CLUSTER <= root < clusters + FIRST_CLUSTER:
        raise _damaged(f"a root directory at cluster {root}")
    return Geometry(cluster, clusters, fat << sector_shift, heap << sector_shift, root, bool(flags & _DIRTY))


def _damaged(what: str) -> FormatError:
    return FormatError(f"exFAT: the boot sector is damaged ({what}); fsck.exfat may repair it from its copy")
