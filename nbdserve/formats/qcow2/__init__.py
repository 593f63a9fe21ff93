"""QEMU's copy-on-write format, versions 2 and 3 (docs/interop/qcow2.rst in QEMU's source tree).

header        what the first cluster says, checked
entries       the bits of table entries
snapshots     the directory of internal snapshots
space         the host file's clusters: how far they reach, which hold tables
packing       refcount blocks as they lie on the disk, for every width
refcounts     who uses which host cluster; allocation
mapping       L1 and L2 tables
writeback     the order in which tables reach the disk
compression   compressed clusters
image         the disk, for reading
writable      the disk, for writing
opening       a file -> an image
create        new images
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbdserve.block.device import BlockDevice
    from nbdserve.block.file import HostFile
    from nbdserve.formats import OpenOptions


def open_image(file: HostFile, options: OpenOptions) -> BlockDevice:
    """Open a qcow2 image; the device owns the file and closes it.

    Raises:
        FormatError: the image is damaged, or dirty and to be written.
        Unsupported: it uses a feature that is not handled; the message names it.
        OpenError: it has no such snapshot, or its backing file cannot be opened.
    """
    from nbdserve.formats.qcow2.opening import open_qcow2

    return open_qcow2(file, options)
