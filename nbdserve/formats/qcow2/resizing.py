"""Another length for the disk of an image.

Growing: a longer L1 table goes to a new place, and one write inside one sector of the header leads to it; what is new
on the disk is made to read as zeros, and a second such write lets the new length count. Shrinking: the header comes
first, then what lies behind the new end is given up. A crash leaves the old or the new length, and in between nothing
but a leak.

Nobody else may use the image meanwhile.
"""

from __future__ import annotations

from array import array
from dataclasses import replace

from nbdserve.errors import OpenError
from nbdserve.formats.qcow2.entries import ENTRY_SIZE, table_bytes
from nbdserve.formats.qcow2.header import DISK_FIELDS, MAXIMUM_L1, Autoclear
from nbdserve.formats.qcow2.writable import WritableQcow2Image

_SECTOR = 512


def resize(image: WritableQcow2Image, size: int) -> None:
    """Let the disk be `size` bytes long, rounded up to whole sectors; what is behind that is lost.

    Raises:
        OpenError: the image cannot have that length; the message says why.
        OSError: from the host.
    """
    size = -(-size // _SECTOR) * _SECTOR
    name, header = image.file.name, image.header
    if header.snapshots and header.version < 3:
        raise OpenError(f"{name}: a version 2 image with snapshots cannot be resized; delete them first")
    if header.bitmaps is not None and header.autoclear & Autoclear.BITMAPS:
        raise OpenError(f"{name}: has persistent bitmaps of this length; remove them with 'qemu-img bitmap --remove'")
    if header.geometry.l1_entries(size) * ENTRY_SIZE > MAXIMUM_L1:
        raise OpenError(f"{name}: clusters of {header.geometry.cluster_size} bytes are too small for {size} bytes")
    image.flush()
    if size > image.size:
        _grow(image, size)
    elif size < image.size:
        _shrink(image, size)
    image.flush()
    image.flush()


def _grow(image: WritableQcow2Image, size: int) -> None:
    old, geometry = image.size, image.header.geometry
    if geometry.is_external and not image.data_file.is_device:
        image.data_file.resize(max(size, image.data_file.size))
    entries = geometry.l1_entries(size)
    if entries > len(image.mapping.l1):
        _move_l1(image, entries)
    # What an old last cluster, or a longer backing file, has there was never to be seen.
    below = 0 if image.backing is None else image.backing.size
    shown = min(size, max(below, -(-old // geometry.cluster_size) * geometry.cluster_size))
    image.size = size
    try:
        if shown > old:
            image.zero(old, shown - old)
        image.flush()
        write_disk_fields(image, size)
    except BaseException:
        image.size = old
        raise


def _move_l1(image: WritableQcow2Image, entries: int) -> None:
    """Let the L1 table have more entries, in a new place."""
    mapping, bits = image.mapping, image.header.geometry.cluster_bits
    old, old_length = mapping.l1_offset >> bits, len(mapping.l1) * ENTRY_SIZE
    l1 = mapping.l1 + array("Q", bytes(ENTRY_SIZE * (entries - len(mapping.l1))))
    clusters = -(-entries * ENTRY_SIZE >> bits)
    first = image.allocator.allocate_row(clusters)
    image.space.add_table(first, clusters)
    image.file.write(first << bits, table_bytes(l1))
    image.flush()
    mapping.replace_l1(l1, first << bits)
    write_disk_fields(image, image.size)
    if old_length:
        image.space.remove_table(old, -(-old_length >> bits))
        image.writeback.park(old, -(-old_length >> bits))


def write_disk_fields(image: WritableQcow2Image, size: int) -> None:
    """Let the header lead to the L1 table in use, and say how long the disk is, with one write inside a sector."""
    l1, l1_offset, header = image.mapping.l1, image.mapping.l1_offset, image.header
    fields = ((size, 8), (header.encryption, 4), (len(l1), 4), (l1_offset, 8))
    image.file.sync()
    image.file.write(DISK_FIELDS, b"".join(number.to_bytes(width, "big") for number, width in fields))
    image.file.sync()
    image.header = replace(header, size=size, l1_offset=l1_offset, l1_entries=len(l1))


def _shrink(image: WritableQcow2Image, size: int) -> None:
    write_disk_fields(image, size)
    geometry = image.header.geometry
    whole = -(-size // geometry.cluster_size) * geometry.cluster_size
    if size < min(whole, image.size):
        image.zero(size, min(whole, image.size) - size)
    image.give_up_from(whole)
    image.size = size
    if geometry.is_external and not image.data_file.is_device:
        image.flush()
        image.data_file.resize(size)
