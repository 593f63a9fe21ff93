"""The boot sector of a FAT volume: where its parts lie (specification, "Boot Sector and BPB").

Everything is checked here, once, against the device and the limits of the format. Past this point a cluster number in
[2, Geometry.end_cluster) may be turned into an offset without looking again.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import NewType

from nbdserve.block import BlockDevice
from nbdserve.errors import FormatError, Unsupported

Cluster = NewType("Cluster", int)
"""The number of a cluster; the first one of the data area is 2."""

FIRST_CLUSTER = 2
ENTRY_SIZE = 32
BOOT_SIZE = 512

_BPB = Struct("<11xHBHBHHBHHHII")  # bytes 11 to 35, the same in all three
_BPB32 = Struct("<36xIHHIHH")  # bytes 36 to 51, FAT32 alone
_STATE_OFFSET, _STATE_OFFSET_32 = 37, 65
_MIRRORING_OFF, _ACTIVE_TABLE = 0x80, 0x0F
_MOST_CLUSTERS = {12: 0xFF4, 16: 0xFFF4, 32: 0x0FFFFFF6}  # of each type, as Linux draws the lines


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a boot sector says. Offsets and sizes in bytes.

    Attributes:
        bits: 12, 16 or 32.
        table_offsets: where the copies of the allocation table begin that are to be kept equal; the first is read.
        table_size: of one copy.
        root_offset, root_entries: the fixed root directory of FAT12 and FAT16; root_entries is 0 on FAT32.
        root_cluster: where the root directory of a FAT32 volume begins; else 0.
        data_offset: where cluster 2 begins.
        end_cluster: one more than the last cluster's number.
        info_offset: the FSInfo sector of FAT32; else 0.
        state_offset: the byte of the boot sector whose lowest bit says that the volume is in use.
        missing: how many bytes the volume reaches past the end of the device.
    """

    bits: int
    sector_size: int
    cluster_size: int
    table_offsets: tuple[int, ...]
    table_size: int
    root_offset: int
    root_entries: int
    root_cluster: Cluster
    data_offset: int
    end_cluster: int
    info_offset: int
    state_offset: int
    missing: int

    @classmethod
    def read(cls, device: BlockDevice) -> Geometry:
        """Read a device's boot sector.

        Raises:
            FormatError: this is no FAT volume, or its boot sector contradicts itself or the device.
            Unsupported: a version of FAT32 that nobody has defined yet.
        """
        if device.size < BOOT_SIZE:
            raise FormatError(f"FAT volume: {device.size} bytes are too few for a boot sector")
        boot = bytes(device.read(0, BOOT_SIZE))
        fields = _BPB.unpack_from(boot)
        sector, per_cluster, reserved, tables, root_entries, sectors_16, media, table_16 = fields[:8]
        sectors = sectors_16 or fields[11]
        if sector not in (512, 1024, 2048, 4096):
            raise FormatError(f"FAT volume: not one: sectors of {sector} bytes")
        if not per_cluster or per_cluster & (per_cluster - 1):
            raise FormatError(f"FAT volume: not one: clusters of {per_cluster} sectors")
        if not reserved or not tables or (media < 0xF8 and media != 0xF0):
            raise FormatError("FAT volume: not one: the boot sector describes no allocation table")
        if root_entries * ENTRY_SIZE % sector:
            raise FormatError(f"FAT volume: a root directory of {root_entries} entries does not fill whole sectors")
        table_32, flags, version, root_cluster, info_sector, _ = _BPB32.unpack_from(boot)
        is_32 = not table_16
        if is_32 and version:
            raise Unsupported(f"FAT volume: FAT32 version {version >> 8}.{version & 0xFF} is not handled, only 0.0")

        table_size = (table_32 if is_32 else table_16) * sector
        root_offset = reserved * sector + tables * table_size
        data_offset = root_offset + root_entries * ENTRY_SIZE
        clusters = (sectors * sector - data_offset) // (per_cluster * sector)
        bits = 32 if is_32 else 12 if clusters <= _MOST_CLUSTERS[12] else 16
        clusters = min(clusters, table_size * 8 // bits - FIRST_CLUSTER)
        if not 0 < clusters <= _MOST_CLUSTERS[bits]:
            raise FormatError(
                f"FAT volume: {clusters} clusters, which FAT{bits} cannot have; the boot sector is damaged"
            )
        if data_offset >= device.size:
            raise FormatError(f"FAT volume: its files begin at {data_offset}, past the end of its {device.size} bytes")
        if is_32 and not FIRST_CLUSTER <= root_cluster < FIRST_CLUSTER + clusters:
            raise FormatError(f"FAT volume: the root directory begins in cluster {root_cluster}, which does not exist")

        first_table = reserved * sector
        offsets = [first_table + copy * table_size for copy in range(tables)]
        if is_32 and flags & _MIRRORING_OFF:
            active = flags & _ACTIVE_TABLE
            if active >= tables:
                raise FormatError(f"FAT volume: table {active} is to be used, but there are only {tables}")
            offsets = [offsets[active]]
        return cls(
            bits=bits,
            sector_size=sector,
            cluster_size=per_cluster * sector,
            table_offsets=tuple(offsets),
            table_size=table_size,
            root_offset=root_offset,
            root_entries=0 if is_32 else root_entries,
            root_cluster=Cluster(root_cluster if is_32 else 0),
            data_offset=data_offset,
            end_cluster=FIRST_CLUSTER + clusters,
            info_offset=(info_sector or 1) * sector if is_32 and info_sector < reserved else 0,
            state_offset=_STATE_OFFSET_32 if is_32 else _STATE_OFFSET,
            missing=max(0, data_offset + clusters * per_cluster * sector - device.size),
        )

    def offset_of(self, cluster: int) -> int:
        """Where a cluster begins on the device, in bytes."""
        return self.data_offset + (cluster - FIRST_CLUSTER) * self.cluster_size
