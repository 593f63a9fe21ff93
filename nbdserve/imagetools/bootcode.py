"""What starts a computer from a disk: the program in a boot sector, known by the texts and marks that it carries.

Sources: the boot sectors themselves, as GRUB 2 (boot.img), SYSLINUX (mbr.bin, gptmbr.bin, ldlinux.bin), LILO, Windows
and mkfs.fat write them; El Torito 1.0, section 2.0, for CDs.
"""

from __future__ import annotations

from nbdserve.block import BlockDevice

_CODE = 440  # bytes of code in a master boot record
_SECTOR = 512

# The first that fits counts; all texts of a line have to be there.
_MARKS: tuple[tuple[str, tuple[bytes, ...]], ...] = (
    ("GRUB", (b"GRUB \0Geom\0", b"Hard Disk\0Read\0")),
    ("isolinux (isohybrid)", (b"isolinux.bin missing or corrupt",)),
    ("syslinux", (b"Operating system load error.",)),
    ("syslinux (GPT)", (b"Missing OS\r\n",)),
    ("syslinux", (b"SYSLINUX",)),
    ("extlinux", (b"EXTLINUX",)),
    ("LILO", (b"LILO",)),
    ("Windows (bootmgr)", (b"BOOTMGR",)),
    ("Windows (ntldr)", (b"NTLDR",)),
    ("Windows", (b"Invalid partition table", b"Missing operating system", b"TCPA")),
    ("DOS or Windows", (b"Invalid partition table", b"Missing operating system")),
    ("FreeBSD boot0", (b"Drive ", b"Default: ")),
    ("none (a text that the disk cannot be started from)", (b"not a bootable disk",)),
)


def master_boot_code(device: BlockDevice) -> str:
    """What the code in a disk's first sector is; "" when there is none."""
    return _name(bytes(device.read(0, min(_CODE, device.size))))


def partition_boot_code(device: BlockDevice) -> str:
    """The same for the first sector of a partition; "" when nothing is recognised there."""
    sector = bytes(device.read(0, min(_SECTOR, device.size)))
    return next((name for name, texts in _MARKS if all(text in sector for text in texts)), "")


def starts_as_cd(device: BlockDevice) -> bool:
    """Whether a boot record as on CDs (El Torito) is there, in sector 17 of 2048 bytes."""
    return device.size >= 18 * 2048 and device.read(17 * 2048, 39)[7:] == b"EL TORITO SPECIFICATION".ljust(32, b"\0")


def _name(code: bytes) -> str:
    known = next((name for name, texts in _MARKS if all(text in code for text in texts)), "")
    return known or ("unknown" if any(code) else "")
