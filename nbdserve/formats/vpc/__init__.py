"""VHD images, which QEMU calls vpc: Virtual PC's and Hyper-V's disks, fixed, dynamic and differencing.

    header        the footer and the dynamic header, checked once
    table         the block allocation table: what its entries may say, and when they reach the disk
    fixed         a disk in one piece
    dynamic       a disk of blocks, as a MappedImage
    differencing  a disk of blocks over a parent, and bitmaps that say which sectors are its own
    parent        how a differencing disk names its parent
    bitmaps, parents  what VHDX does in the same way: bits of sectors, and the search for a parent
    opening       which kind a file is, and where its footer is to be believed
    create        new, empty images

Source: "Virtual Hard Disk Image Format Specification", version 1.0 (Microsoft, 2006). Where the text leaves room, what
QEMU 7.2 does is followed, so that both show the same disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbdserve.block.device import BlockDevice
    from nbdserve.block.file import HostFile
    from nbdserve.formats import OpenOptions

FOOTER_SIZE = 512
COOKIE = b"conectix"
_CHECKSUM = slice(64, 68)


def checksum(header: bytes, field: slice) -> int:
    """The one's complement of the sum of all bytes but those of the checksum field itself ("Hard Disk Footer")."""
    return ~(sum(header) - sum(header[field])) & 0xFFFFFFFF


def is_footer(sector: bytes) -> bool:
    """Whether 512 bytes are a VHD footer: the cookie alone does not count, the checksum must be right as well."""
    if len(sector) != FOOTER_SIZE or not sector.startswith(COOKIE):
        return False
    return int.from_bytes(sector[_CHECKSUM], "big") == checksum(sector, _CHECKSUM)


def open_image(file: HostFile, options: OpenOptions) -> BlockDevice:
    """Open a VHD; the device takes the file over.

    Raises:
        FormatError: it is no VHD, or a damaged one.
        OpenError: its parent cannot be opened, or is not the one it was made for.
        Unsupported: larger tables than can sensibly be held in memory.
    """
    from nbdserve.formats.vpc.opening import open_vhd

    return open_vhd(file, options)
