"""What a disk or partition holds, as blkid tells it: the kind, the label and the UUID, read from superblocks.

Only looking: nothing here opens a file system, and whatever the bytes are, the answer is a Signature or None. Every
number that is read steers at most one more bounded read (see _Disk), which gives zeros outside the disk.

The kinds have the names that blkid and fstab give them. Where blkid sees two file systems in one place (the UDF and
ISO 9660 sides of a DVD), the one that is easier to read is named.

Sources: the superblock probes' documentation in libblkid (util-linux), and for each kind its own: ext4 in the kernel's
Documentation/filesystems/ext4; Microsoft's FAT specification (fatgen103) section 3 and exFAT specification section 3;
ECMA-119 section 8.4; ECMA-167 part 2 section 9; the md(4) and LUKS on-disk formats.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from nbdserve.block.device import BlockDevice

ENCRYPTED = {"crypto_LUKS": "LUKS", "BitLocker": "BitLocker"}
"""Kinds that need a key before anything can be read -> what people call them."""

CONTAINERS = {"LVM2_member": "LVM volumes", "linux_raid_member": "part of a RAID", "zfs_member": "part of a ZFS pool"}
"""Kinds that hold no file system but parts of something larger -> what that is."""


@dataclass(frozen=True, slots=True)
class Signature:
    """What a superblock says.

    Attributes:
        kind: as blkid's TYPE.
        label: as blkid's LABEL; "" when there is none or none is known for this kind.
        uuid: as blkid's UUID, in the spelling of that kind; "" likewise.
    """

    kind: str
    label: str = ""
    uuid: str = ""


def detect(device: BlockDevice) -> Signature | None:
    """The signature of what lies on a device; None when nothing is recognised.

    Raises:
        OSError, NbdserveError: the device cannot be read.
    """
    disk = _Disk(device)
    for probe in _PROBES:
        found = probe(disk)
        if found is not None:
            return found
    return None


class _Disk:
    """Reads that never fail for lying outside: there the disk is all zeros. The start is read once."""

    START = 0x11000  # up to and with the superblock of btrfs

    def __init__(self, device: BlockDevice) -> None:
        self.device = device
        self.size = device.size
        self.start = bytes(device.read(0, min(self.START, device.size))).ljust(self.START, b"\0")

    def read(self, offset: int, length: int) -> bytes:
        assert 0 <= length <= 1 << 20
        if 0 <= offset and offset + length <= self.START:
            return self.start[offset : offset + length]
        if not 0 <= offset < self.size:
            return bytes(length)
        return bytes(self.device.read(offset, min(length, self.size - offset))).ljust(length, b"\0")

    def number(self, offset: int, size: int) -> int:
        """A little-endian number."""
        return int.from_bytes(self.read(offset, size), "little")


def _text(raw: bytes, encoding: str = "utf-8") -> str:
    """A label: up to the first NUL, without the spaces that fill it up."""
    return raw.decode(encoding, "replace").split("\0")[0].rstrip(" ")


def _uuid(raw: bytes) -> str:
    return str(UUID(bytes=raw)) if any(raw) else ""


@dataclass(frozen=True, slots=True)
class _Magic:
    """A kind that is known by a magic number alone; offsets in bytes from the start of the disk."""

    kind: str
    magic: bytes
    at: int
    uuid_at: int | None = None
    label_at: int = 0
    label_length: int = 0
    encoding: str = "utf-8"

    def __call__(self, disk: _Disk) -> Signature | None:
        if disk.read(self.at, len(self.magic)) != self.magic:
            return None
        uuid = "" if self.uuid_at is None else _uuid(disk.read(self.uuid_at, 16))
        return Signature(self.kind, _text(disk.read(self.label_at, self.label_length), self.encoding), uuid)


def _linux_raid(disk: _Disk) -> Signature | None:
    """Version 1 superblocks begin or end the disk; so do those of 0.90, with numbers in the byte order of the host."""
    sectors = disk.size // 512
    for at in (0, 4096, ((sectors - 16) & ~7) * 512):
        version = disk.read(at, 8)
        if version == struct.pack("<II", 0xA92B4EFC, 1) and disk.number(at + 144, 8) * 512 == at:
            return Signature("linux_raid_member", _text(disk.read(at + 32, 32)), _uuid(disk.read(at + 16, 16)))
    at = (disk.size & ~0xFFFF) - 0x10000
    for order in "<>":
        if at >= 0 and disk.read(at, 8) == struct.pack(order + "II", 0xA92B4EFC, 0):
            words = struct.unpack(order + "5I", disk.read(at + 20, 4) + disk.read(at + 52, 12) + bytes(4))
            return Signature("linux_raid_member", "", _uuid(struct.pack(">4I", *words[:4])))
    return None


def _lvm2(disk: _Disk) -> Signature | None:
    """The label lies in one of the first four sectors."""
    for at in range(0, 2048, 512):
        if disk.read(at, 8) == b"LABELONE" and disk.read(at + 24, 8) == b"LVM2 001":
            name = _text(disk.read(at + 32, 32), "ascii")
            ends = (6, 10, 14, 18, 22, 26, 32)
            return Signature("LVM2_member", "", "-".join(name[a:b] for a, b in zip((0, *ends), ends, strict=False)))
    return None


def _luks(disk: _Disk) -> Signature | None:
    if disk.read(0, 6) != b"LUKS\xba\xbe":
        return None
    label = _text(disk.read(24, 48)) if disk.read(6, 2) == b"\0\2" else ""
    return Signature("crypto_LUKS", label, _text(disk.read(168, 40)))


def _bitlocker(disk: _Disk) -> Signature | None:
    to_go = bytes.fromhex("3bd67749292ed84a8399f6a339e3d001")
    if disk.read(3, 8) == b"-FVE-FS-" or (disk.read(3, 8) == b"MSWIN4.1" and disk.read(424, 16) == to_go):
        return Signature("BitLocker")
    return None


def _ext(disk: _Disk) -> Signature | None:
    """The three names stand for sets of features: the oldest that knows all of them is told."""
    if disk.read(1080, 2) != b"\x53\xef":
        return None
    compatible, incompatible, read_only = struct.unpack("<3I", disk.read(1024 + 92, 12))
    has_journal = compatible & 0x4
    if incompatible & 0x8:
        kind = "jbd"  # an external journal
    elif incompatible & ~(0x2 | 0x4 | 0x10) or read_only & ~0x7:
        kind = "ext4"
    else:
        kind = "ext3" if has_journal else "ext2"
    return Signature(kind, _text(disk.read(1024 + 120, 16)), _uuid(disk.read(1024 + 104, 16)))


def _is_power_of_two(number: int) -> bool:
    return number > 0 and not number & (number - 1)


def _vfat(disk: _Disk) -> Signature | None:
    boot = disk.read(0, 512)
    (sector, cluster, reserved, fats, root_entries, sectors, media, length) = struct.unpack_from("<HBHBHHBH", boot, 11)
    total, length_32, root_cluster = struct.unpack_from("<II4xI", boot, 32)
    plausible = (
        sector in (512, 1024, 2048, 4096)
        and _is_power_of_two(cluster)
        and reserved
        and fats
        and (media == 0xF0 or media >= 0xF8)
        and (sectors or total)
    )
    if not plausible or boot[3:11] in (b"NTFS    ", b"EXFAT   ") or boot[510:512] != b"\x55\xaa":
        return None
    if length == 0:
        if not length_32 or boot[0x42] not in (0x28, 0x29):
            return None
        serial, data = boot[0x43:0x47], (reserved + fats * length_32) * sector
        root, size = data + (root_cluster - 2) * cluster * sector, cluster * sector
    else:
        if boot[0x26] not in (0x28, 0x29) and boot[0] not in (0xEB, 0xE9):
            return None
        serial = boot[0x27:0x2B] if boot[0x26] in (0x28, 0x29) else bytes(4)
        root, size = (reserved + fats * length) * sector, root_entries * 32
    number = int.from_bytes(serial, "little")
    uuid = f"{number >> 16:04X}-{number & 0xFFFF:04X}" if number else ""
    return Signature("vfat", _vfat_label(disk.read(root, min(size, 1 << 17))), uuid)


def _vfat_label(directory: bytes) -> str:
    """The entry of the root directory that is the volume's name; what the boot sector says is never kept up to date."""
    for at in range(0, len(directory), 32):
        name, attributes = directory[at : at + 11], directory[at + 11]
        if name[0] == 0:
            break
        if name[0] != 0xE5 and attributes & 0x18 == 0x08 and attributes & 0x3F != 0x0F:
            return "" if name == b"NO NAME    " else _text(name, "cp437")
    return ""


def _exfat(disk: _Disk) -> Signature | None:
    boot = disk.read(0, 512)
    if boot[3:11] != b"EXFAT   ":
        return None
    heap, _count, root, serial = struct.unpack_from("<4I", boot, 88)
    sector_shift, cluster_shift = boot[108], boot[109]
    label = ""
    if sector_shift in range(9, 13) and cluster_shift <= 25 - sector_shift and root >= 2:
        at = (heap << sector_shift) + ((root - 2) << (sector_shift + cluster_shift))
        directory = disk.read(at, min(1 << (sector_shift + cluster_shift), 1 << 16))
        for entry in range(0, len(directory), 32):
            if directory[entry] == 0:
                break
            if directory[entry] == 0x83:
                length = min(directory[entry + 1], 11)
                label = _text(directory[entry + 2 : entry + 2 + 2 * length], "utf-16-le")
                break
    return Signature("exfat", label, f"{serial >> 16:04X}-{serial & 0xFFFF:04X}")


def _ntfs(disk: _Disk) -> Signature | None:
    boot = disk.read(0, 512)
    if boot[3:11] != b"NTFS    ":
        return None
    serial = f"{int.from_bytes(boot[0x48:0x50], 'little'):016X}"
    sector, cluster = int.from_bytes(boot[11:13], "little"), boot[13]
    if cluster > 128:  # a power of two, negated: since Windows 10 clusters may be larger than 64 KiB
        cluster = 1 << min(256 - cluster, 12)
    per_record = int.from_bytes(boot[0x40:0x41], "little", signed=True)
    record = 1 << min(-per_record, 16) if per_record < 0 else per_record * cluster * sector
    if not (_is_power_of_two(sector) and _is_power_of_two(record) and 512 <= record <= 65536):
        return Signature("ntfs", "", serial)
    table = int.from_bytes(boot[0x30:0x38], "little") * cluster * sector
    return Signature("ntfs", _ntfs_label(disk.read(table + 3 * record, record)), serial)


def _ntfs_label(record: bytes) -> str:
    """The attribute $VOLUME_NAME (0x60), which is always resident, of the file $Volume."""
    if record[:4] != b"FILE":
        return ""
    at = int.from_bytes(record[20:22], "little")
    while at + 24 <= len(record):
        kind, length = struct.unpack_from("<II", record, at)
        if kind == 0x60 and record[at + 8] == 0:
            size, start = struct.unpack_from("<IH", record, at + 16)
            return _text(record[at + start : at + start + min(size, 256)], "utf-16-le")
        if kind > 0x60 or length < 24:
            break
        at += length
    return ""


def _iso9660(disk: _Disk) -> Signature | None:
    if disk.read(32769, 5) != b"CD001":
        return None
    volume = disk.read(32768, 2048)
    for date in (volume[830:846], volume[813:829]):  # the modification, else the creation
        if date.isdigit() and date.strip(b"0"):
            text = date.decode("ascii")
            parts = (text[:4], *(text[i : i + 2] for i in range(4, 16, 2)))
            return Signature("iso9660", _text(volume[40:72]), "-".join(parts))
    return Signature("iso9660", _text(volume[40:72]))


def _udf(disk: _Disk) -> Signature | None:
    """The volume recognition sequence: structures of 2 KiB from 32 KiB on, of which one names the version of NSR."""
    if disk.read(32769, 5) not in (b"BEA01", b"CD001", b"NSR02", b"NSR03"):
        return None
    for at in range(32768, 32768 + 64 * 2048, 2048):
        name = disk.read(at + 1, 5)
        if name in (b"NSR02", b"NSR03"):
            return Signature("udf", _udf_label(disk))
        if name not in (b"BEA01", b"CD001", b"BOOT2", b"CDW02"):
            break
    return None


def _udf_label(disk: _Disk) -> str:
    """The identifier in the logical volume descriptor (tag 6), found by way of the anchor (tag 2)."""
    for block in (2048, 512, 4096):
        if disk.number(256 * block, 2) != 2:
            continue
        length, first = struct.unpack("<II", disk.read(256 * block + 16, 8))
        for number in range(first, first + min(length // block, 64)):
            tag = disk.number(number * block, 2)
            if tag == 6:
                field = disk.read(number * block + 84, 128)
                used = field[1 : max(1, min(field[127], 127))]
                return _text(used, "utf-16-be" if field[0] == 16 else "latin-1")
            if tag in (0, 8):
                break
    return ""


def _swap(disk: _Disk) -> Signature | None:
    """The magic number ends the first page, whose size is that of the machine that wrote it."""
    for page in (4096, 8192, 16384, 32768, 65536):
        magic = disk.read(page - 10, 10)
        if magic == b"SWAPSPACE2":
            return Signature("swap", _text(disk.read(1024 + 28, 16)), _uuid(disk.read(1024 + 12, 16)))
        if magic == b"SWAP-SPACE":
            return Signature("swap")
        if magic.startswith((b"S1SUSPEND", b"S2SUSPEND", b"ULSUSPEND", b"LINHIB0001")):
            return Signature("swsuspend", _text(disk.read(1024 + 28, 16)), _uuid(disk.read(1024 + 12, 16)))
    return None


def _zfs(disk: _Disk) -> Signature | None:
    """Uberblocks fill the second half of the first label, one a KiB or rarer."""
    ring = disk.read(128 << 10, 128 << 10)
    magics = (struct.pack("<Q", 0x00BAB10C), struct.pack(">Q", 0x00BAB10C))
    found = sum(ring[at : at + 8] in magics for at in range(0, len(ring), 1024))
    return Signature("zfs_member") if found >= 4 else None


_PROBES: tuple[Callable[[_Disk], Signature | None], ...] = (
    _linux_raid,
    _bitlocker,
    _luks,
    _lvm2,
    _vfat,
    _exfat,
    _ntfs,
    _swap,
    _Magic("xfs", b"XFSB", 0, 32, 108, 12),
    _ext,
    _Magic("reiserfs", b"ReIsErFs", 0x10034),
    _Magic("reiserfs", b"ReIsEr2Fs", 0x10034, 0x10054, 0x10064, 16),
    _Magic("reiserfs", b"ReIsEr3Fs", 0x10034, 0x10054, 0x10064, 16),
    _Magic("jfs", b"JFS1", 0x8000, 0x8088, 0x8098, 16),
    _iso9660,
    _udf,
    _Magic("btrfs", b"_BHRfS_M", 0x10040, 0x10020, 0x1012B, 256),
    _Magic("squashfs", b"hsqs", 0),
    _Magic("f2fs", b"\x10\x20\xf5\xf2", 1024, 1024 + 108, 1024 + 124, 1024, "utf-16-le"),
    _Magic("erofs", b"\xe2\xe1\xf5\xe0", 1024, 1024 + 48, 1024 + 64, 16),
    _Magic("nilfs2", b"\x34\x34", 1024 + 6, 1024 + 0x98, 1024 + 0xA8, 80),
    _Magic("hfsplus", b"H+\0\4", 1024),
    _Magic("hfsplus", b"HX\0\5", 1024),
    _Magic("hfs", b"BD", 1024),
    _Magic("apfs", b"NXSB", 32, 72),
    _Magic("ufs", b"\x54\x19\x01\x00", 0x2000 + 1372),
    _Magic("ufs", b"\x19\x01\x54\x19", 0x10000 + 1372),
    _Magic("cramfs", b"\x45\x3d\xcd\x28", 0, None, 48, 16),
    _Magic("romfs", b"-rom1fs-", 0, None, 16, 16),
    _Magic("bcache", bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81"), 4096 + 24, 4096 + 40),
    _Magic("ReFS", b"\0\0\0ReFS\0", 0),
    _Magic("VMFS_volume_member", b"\x0d\xd0\x01\xc0", 1 << 20),
    _zfs,
)
"""In the order in which blkid asks: what wraps a file system goes before it."""
