"""qcow2, QEMU's copy-on-write format, versions 2 and 3, read and write.

    header, extensions    what the first cluster says, checked
    entries               the bits of table entries
    space                 the host file's clusters: how far they reach, which hold tables
    refcounts, packing    who uses which host cluster
    allocation, places    which free cluster to take; where the guest's go: the image or a data file
    mapping               L1 and L2 tables
    writeback             the order in which tables reach the disk, which a crash cannot break
    compression           compressed clusters
    image                 the disk, for reading
    allocating, writable  the disk, for writing
    subclusters           the same for extended L2 entries; writable_subclusters
    encrypted             the same for images encrypted with LUKS
    opening               a file -> an image
    checking              a full check, for image tools
    repair                refcounts made anew for a dirty image
    bitmaps               persistent bitmaps, kept right; bitmap_editing: for image tools
    snapshot_table        the directory of internal snapshots
    snapshots, resizing   for image tools: make, apply and delete snapshots; another length
    relinking             likewise: another backing file
    create, preallocation new images

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
