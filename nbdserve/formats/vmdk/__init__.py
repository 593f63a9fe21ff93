"""VMDK, VMware's virtual disks: sparse and flat, in one file or split, read and write; stream-optimized ones read.

    descriptor   the text that says which extents a disk consists of, and which disk it stands on
    layout       where a sparse extent keeps what, checked once, for all kinds of sparse extents
    header       hosted sparse extents (KDMV), also stream-optimized ones
    esx          ESX's sparse extents (COWD, seSparse), to be read
    tables       grain tables: kept in memory within a bound, and when their entries reach the disk
    sparse       a sparse extent as a mapping
    compression  compressed grains
    disk         the extents, one behind the other, as one disk
    opening      puts the parts together
    create       new, empty disks
    stream       writes stream-optimized disks

Source: "Virtual Disk Format 5.0" (VMware technical note, 2011), referred to as VDF; where the text leaves room, what
QEMU 7.2 does is followed, so that both show the same disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbdserve.block.device import BlockDevice
    from nbdserve.block.file import HostFile
    from nbdserve.formats import OpenOptions

SECTOR = 512


def open_image(file: HostFile, options: OpenOptions) -> BlockDevice:
    """Open a VMDK with its extents and the disks it stands on; the device takes the file over.

    Raises:
        OpenError: with the reason in one line.
    """
    from nbdserve.formats.vmdk.opening import open_vmdk

    return open_vmdk(file, options)
