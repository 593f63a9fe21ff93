"""What partitions an image has, as partitions and identify tell it; sizes in bytes, numbers of sectors as in the table.

File systems are recognised by fusemount's table of signatures, which is why this stands in the command's room.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any
from uuid import UUID

if TYPE_CHECKING:
    from fusemount.volumes import Volume, Warn
    from nbdserve.block import BlockDevice

Json = dict[str, Any]

# The most usual types, by the names that fdisk has for them.
_MBR_TYPES = {
    0x01: "FAT12",
    0x04: "FAT16 <32M",
    0x05: "Extended",
    0x06: "FAT16",
    0x07: "HPFS/NTFS/exFAT",
    0x0B: "W95 FAT32",
    0x0C: "W95 FAT32 (LBA)",
    0x0E: "W95 FAT16 (LBA)",
    0x0F: "W95 Ext'd (LBA)",
    0x27: "Hidden NTFS WinRE",
    0x82: "Linux swap",
    0x83: "Linux",
    0x85: "Linux extended",
    0x8E: "Linux LVM",
    0xA5: "FreeBSD",
    0xEE: "GPT",
    0xEF: "EFI (FAT-12/16/32)",
    0xFD: "Linux raid autodetect",
}
_GPT_TYPES = {
    "c12a7328-f81f-11d2-ba4b-00a0c93ec93b": "EFI System",
    "21686148-6449-6e6f-744e-656564454649": "BIOS boot",
    "e3c9e316-0b5c-4db8-817d-f92df00215ae": "Microsoft reserved",
    "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7": "Microsoft basic data",
    "de94bba4-06d1-4d40-a16a-bfd50179d6ac": "Windows recovery environment",
    "0fc63daf-8483-4772-8e79-3d69d8477de4": "Linux filesystem",
    "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f": "Linux swap",
    "e6d6d379-f507-44c2-a23c-238f2a3df928": "Linux LVM",
    "a19d880f-05fc-4d3b-a006-743f0f84911e": "Linux RAID",
    "bc13c2ff-59e6-4262-a352-b275fd6f7172": "Linux extended boot",
    "4f68bce3-e8cd-4db1-96e7-fbcaf984b709": "Linux root (x86-64)",
    "44479540-f297-41b2-9af7-d131d5f0458a": "Linux root (x86)",
    "b921b045-1df0-41c3-af44-4c6f280d3fae": "Linux root (ARM-64)",
    "933ac7e1-2eb4-4f13-b844-0e14e2aef915": "Linux home",
    "48465300-0000-11aa-aa11-00306543ecac": "Apple HFS/HFS+",
    "7c3457ef-0000-11aa-aa11-00306543ecac": "Apple APFS",
}


def describe_partitions(image: str, format: str, device: BlockDevice, warn: Warn) -> Json:
    """The partition table, with how to reach each partition; for a disk without one, the disk itself.

    Raises:
        OpenError: the table is damaged beyond use.
    """
    from fusemount.volumes import read_volumes

    table, volumes = read_volumes(device, warn)
    by_number = {each.partition.number: each for each in volumes if each.partition is not None}
    sector = table.sector_size
    partitions = []
    for part in table.partitions:
        size = max(0, part.size)
        partitions.append(
            {
                "number": part.number,
                "start": part.offset // sector,
                "end": (part.offset + size) // sector - 1,
                "sectors": size // sector,
                "offset": part.offset,
                "size": size,
                "type": f"0x{part.type:02x}" if isinstance(part.type, int) else str(part.type),
                "type-name": _type_name(part.type),
                "label": part.label,
                "uuid": part.uuid,
                "bootable": part.bootable,
                "filesystem": _filesystem(by_number.get(part.number)),
                "commands": {} if part.is_container else _commands(image, format, part.number, part.offset, size),
            }
        )
    found: Json = {
        "image": image,
        "format": format,
        "virtual-size": device.size,
        "partition-table": table.kind.value,
        "sector-size": sector,
        "partitions": partitions,
    }
    if not table.partitions and volumes:
        found["filesystem"] = _filesystem(volumes[0])
        found["commands"] = _commands(image, format, None, 0, device.size)
    return found


def _type_name(type: int | UUID) -> str:
    return _MBR_TYPES.get(type, "") if isinstance(type, int) else _GPT_TYPES.get(str(type), "")


def _filesystem(volume: Volume | None) -> Json | None:
    if volume is None or volume.signature is None:
        return None
    return {"type": volume.signature.kind, "label": volume.signature.label, "uuid": volume.signature.uuid}


def _commands(image: str, format: str, number: int | None, offset: int, size: int) -> Json:
    """The lines that reach a partition; loop devices show the bytes of a file, which only raw images have as they are.

    The end is given as well: without it a loop device would reach on to the end of the disk.
    """
    name = shlex.quote(image)
    chosen = "" if number is None else f" --partition {number}"
    commands = {}
    if format == "raw":
        commands["mount"] = f"mount -o loop,offset={offset},sizelimit={size} {name} /mnt"
        commands["losetup"] = f"losetup --find --show --offset {offset} --sizelimit {size} {name}"
    commands["nbdserve"] = f"nbdserve{chosen} {name}"
    commands["fusemount"] = f"fusemount{chosen} {name} mnt"
    return commands
