"""VDI, VirtualBox's disk images: dynamic, static and differencing, read and write.

    header      the first sector, checked once
    block_map   which block lies where: what its entries may say, and when they reach the disk
    image       the mapping, and the order of writes that a crash cannot break
    parent      finds the image that a differencing one stands on
    opening     puts the parts together
    create      new, empty images

There is no specification. The layout is the one that VirtualBox's author published in "VirtualBox: VDI file format"
(forums.virtualbox.org, topic 8046); where that leaves room, what VirtualBox and QEMU 7.2 do is followed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbdserve.block.device import BlockDevice
    from nbdserve.block.file import HostFile
    from nbdserve.formats import OpenOptions


def open_image(file: HostFile, options: OpenOptions) -> BlockDevice:
    """Open a VDI with the images it stands on; the device takes the file over.

    Raises:
        OpenError: with the reason in one line.
    """
    from nbdserve.formats.vdi.opening import open_vdi

    return open_vdi(file, options)
