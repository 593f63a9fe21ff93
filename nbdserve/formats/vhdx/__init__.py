"""VHDX images: Hyper-V's disks, fixed, dynamic and differencing, read and write.

    checksum  CRC-32C
    headers   the two headers, of which one is current
    log       updates of metadata that a crash has left behind, and their replay, in memory or for real
    layout    the region table and the metadata, checked once
    table     the block allocation table, in pages
    space     which parts of the file are in use
    image     the mapping, and the order of writes that a crash cannot break
    parent    how a differencing disk names its parent
    opening   all of it put together
    create    new, empty images

The sector bitmaps of differencing disks are VHD's (vpc.bitmaps), and so is the search for a parent (vpc.parents).

Source: [MS-VHDX], "Virtual Hard Disk v2 (VHDX) File Format". Where it leaves room, what QEMU does is followed, so that
both show the same disk. All numbers are little-endian; GUIDs are in Microsoft's mixed order (uuid.UUID.bytes_le).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbdserve.block.device import BlockDevice
    from nbdserve.block.file import HostFile
    from nbdserve.formats import OpenOptions

MIB = 1 << 20
HEADER_SECTION = MIB  # signature, headers and region tables; nothing else may lie there
MAXIMUM_SIZE = 64 << 40  # of a disk ([MS-VHDX] 2.6.2.2)
MAXIMUM_FILE = 2 * MAXIMUM_SIZE  # a full disk with all that belongs to it is far from this
SIGNATURE = b"vhdxfile"


def open_image(file: HostFile, options: OpenOptions) -> BlockDevice:
    """Open a VHDX with its chain of parents; the device takes the file over.

    Raises:
        OpenError: with the reason in one line.
    """
    from nbdserve.formats.vhdx.opening import open_vhdx

    return open_vhdx(file, options)
