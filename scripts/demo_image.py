"""Make a small demo image: qcow2, with a GPT and one FAT16 file system that holds a README.

    python scripts/demo_image.py demo.qcow2

Nothing but this project is needed, so that a first try works on a machine without mkfs or qemu-img.
"""

from __future__ import annotations

import struct
import sys
import uuid
import zlib
from pathlib import Path

from nbdserve.block import BlockDevice
from nbdserve.formats.qcow2.create import create_image
from nbdserve.opening import open_image

SECTOR = 512
DISK_SECTORS = 64 * 2048  # 64 MiB
FIRST, LAST = 2048, DISK_SECTORS - 2049  # the partition, in sectors
BASIC_DATA = uuid.UUID("ebd0a0a2-b9e5-4433-87c0-68b6b72699c7")
NAMESPACE = uuid.UUID("6f0c2d5e-4a87-4b1c-9e0b-0f6f5d4f7a11")

TEXT = """\
This file lives in a FAT file system, in a GPT partition, in a qcow2 image,
and reached you through nbdserve.
"""


def protective_mbr() -> bytes:
    """The MBR that keeps old tools away from a GPT disk (UEFI specification, 5.2.3)."""
    entry = struct.pack("<B3sB3sII", 0, b"\x00\x02\x00", 0xEE, b"\xff\xff\xff", 1, DISK_SECTORS - 1)
    return bytes(446) + entry + bytes(48) + b"\x55\xaa"


def gpt_entries() -> bytes:
    """The partition array (UEFI specification, 5.3.3): one partition and 127 empty places."""
    name = "demo".encode("utf-16-le")
    own = uuid.uuid5(NAMESPACE, "partition")
    entry = struct.pack("<16s16sQQQ72s", BASIC_DATA.bytes_le, own.bytes_le, FIRST, LAST, 0, name)
    return entry.ljust(128 * 128, b"\0")


def gpt_header(own: int, other: int, entries_at: int) -> bytes:
    """The header at sector `own` (UEFI specification, 5.3.2)."""
    disk = uuid.uuid5(NAMESPACE, "disk")

    def packed(crc: int) -> bytes:
        return struct.pack(
            "<8sIIIIQQQQ16sQIII",
            *(b"EFI PART", 0x10000, 92, crc, 0, own, other, 34, DISK_SECTORS - 34, disk.bytes_le),
            *(entries_at, 128, 128, zlib.crc32(gpt_entries())),
        )

    return packed(zlib.crc32(packed(0))).ljust(SECTOR, b"\0")


def fat16() -> dict[int, bytes]:
    """A FAT16 file system with one file, as {byte offset in the partition: content}."""
    sectors = LAST - FIRST + 1
    per_cluster, fat_sectors, root_entries = 4, 128, 512
    boot = struct.pack(
        "<3s8sHBHBHHBHHHIIBBBI11s8s",
        *(b"\xeb\x3c\x90", b"NBDSERVE", SECTOR, per_cluster, 1, 2, root_entries, 0, 0xF8, fat_sectors, 63, 255),
        *(FIRST, sectors, 0x80, 0, 0x29, 0x4E424453, b"NBDSERVE   ", b"FAT16   "),
    )
    root_at = (1 + 2 * fat_sectors) * SECTOR
    data_at = root_at + root_entries * 32
    label = struct.pack("<11sB10xHHHI", b"NBDSERVE   ", 0x08, 0, 0x5A21, 0, 0)
    file = struct.pack("<11sB10xHHHI", b"README  TXT", 0x20, 0, 0x5A21, 2, len(TEXT))
    table = struct.pack("<HHH", 0xFFF8, 0xFFFF, 0xFFFF)
    return {
        0: boot.ljust(510, b"\0") + b"\x55\xaa",
        SECTOR: table,
        (1 + fat_sectors) * SECTOR: table,
        root_at: label + file,
        data_at: TEXT.encode(),
    }


def fill(disk: BlockDevice) -> None:
    """Write the partition table, its backup and the file system."""
    disk.write(0, protective_mbr())
    disk.write(SECTOR, gpt_header(1, DISK_SECTORS - 1, 2) + gpt_entries())
    disk.write((DISK_SECTORS - 33) * SECTOR, gpt_entries() + gpt_header(DISK_SECTORS - 1, 1, DISK_SECTORS - 33))
    for offset, content in fat16().items():
        disk.write(FIRST * SECTOR + offset, content)


def main() -> None:
    """Make the image that the command line names."""
    path = Path(sys.argv[1])
    path.unlink(missing_ok=True)
    create_image(path, DISK_SECTORS * SECTOR)
    with open_image(path, format="qcow2") as disk:
        fill(disk)


if __name__ == "__main__":
    main()
