"""qcow2, QEMU's copy-on-write format, versions 2 and 3, read and write.

    header       what the first cluster says, checked once
    entries      the bits of L1 and L2 entries
    image        the mapping, and the order of writes that a crash cannot break
    refcounts    which host clusters are in use; the allocator
    compression  compressed clusters
    snapshots    internal snapshots, to be read
    create       new, empty images

The specification is QEMU's docs/interop/qcow2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbdserve.block.device import BlockDevice
    from nbdserve.block.file import HostFile
    from nbdserve.formats import OpenOptions


def open_image(file: HostFile, options: OpenOptions) -> BlockDevice:
    """Open a qcow2 image with its backing chain; the device takes the file over.

    Raises:
        OpenError: with the reason in one line.
    """
    from nbdserve.formats.qcow2.opening import open_qcow2

    return open_qcow2(file, options)
