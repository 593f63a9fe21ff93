"""Internal snapshots: make, apply and delete them (QEMU, docs/interop/qcow2, "Snapshots").

A snapshot is a copy of the L1 table; everything it leads to has one more reference. The order kept here, each step on
stable storage before the next:

    1   the image is marked as dirty (version 3): whoever opens it after a crash makes the refcounts anew (repair.py)
    2   references that are to come are counted, and new tables written to new places
    3   one write inside one sector of the header lets the new state be the one that counts
    4   references that are gone are subtracted, and COPIED says again whose refcount is 1
    5   the mark is taken away

So guest, snapshots and their contents are at every moment those of before or of after. Version 2 has no mark; there a
crash leaves refcounts that are too high, or COPIED where it does not belong, never the opposite of either.

Nobody else may use the image meanwhile: these functions are for image tools, not for a disk that is being served.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from nbdserve.errors import OpenError
from nbdserve.formats.qcow2.entries import COMPRESSED, COPIED, ENTRY_SIZE, NOT_COPIED, read_table, table_bytes
from nbdserve.formats.qcow2.header import (
    INCOMPATIBLE_FIELD,
    MAXIMUM_SNAPSHOTS,
    SNAPSHOT_FIELDS,
    Autoclear,
    Incompatible,
)
from nbdserve.formats.qcow2.repair import table_rows
from nbdserve.formats.qcow2.resizing import write_disk_fields
from nbdserve.formats.qcow2.snapshot_table import Snapshot, build_snapshots, find_snapshot, read_snapshots
from nbdserve.formats.qcow2.writable import WritableQcow2Image


def list_snapshots(image: WritableQcow2Image) -> list[Snapshot]:
    """The snapshots of an image, the oldest first."""
    return read_snapshots(image.file, image.header)[0]


def create_snapshot(image: WritableQcow2Image, name: str) -> Snapshot:
    """Keep the present state of the disk under a name.

    Raises:
        OpenError: the image cannot have (more) snapshots.
        OSError: from the host, or a refcount cannot count one more reference.
    """
    file, snapshots = image.file, list_snapshots(image)
    if image.header.geometry.is_external:
        raise OpenError(f"{file.name}: images with an external data file cannot have internal snapshots")
    if image.refcounts.maximum < 2:
        raise OpenError(f"{file.name}: refcounts of one bit leave no room for snapshots; convert the image first")
    if len(snapshots) >= MAXIMUM_SNAPSHOTS:
        raise OpenError(f"{file.name}: has {len(snapshots)} snapshots, which are the most; delete some first")
    with _dirty(image):
        _share(image, image.mapping.l1)
        l1 = _without_copied(image)
        l1_offset = write_row(image, table_bytes(l1))
        now = time.time_ns()
        snapshot = Snapshot(
            id=str(1 + max((int(each.id) for each in snapshots if each.id.isdecimal()), default=0)),
            name=name,
            l1_offset=l1_offset,
            l1_entries=len(l1),
            size=image.size,
            seconds=now // 10**9 & 0xFFFFFFFF,
            nanoseconds=now % 10**9,
        )
        _publish_table(image, [*snapshots, snapshot])
    return snapshot


def apply_snapshot(image: WritableQcow2Image, wanted: str) -> None:
    """Let the disk be as it was when a snapshot (by ID or name) was made; what it holds now is given up.

    Raises:
        OpenError: there is no such snapshot.
        OSError: from the host.
    """
    file = image.file
    snapshot = find_snapshot(file, image.header, list_snapshots(image), wanted)
    if snapshot.size != image.size and image.header.autoclear & Autoclear.BITMAPS:
        raise OpenError(f"{file.name}: has persistent bitmaps of another length than the snapshot; remove them first")
    with _dirty(image):
        kept = read_table(file, snapshot.l1_offset, snapshot.l1_entries)
        _share(image, kept)
        l1 = array("Q", (entry & NOT_COPIED for entry in kept))
        l1_offset = write_row(image, table_bytes(l1))
        old, old_offset = image.mapping.l1, image.mapping.l1_offset
        image.mapping.replace_l1(l1, l1_offset)
        write_disk_fields(image, snapshot.size)
        image.touch(0, image.size)
        image.size = snapshot.size
        _drop(image, old)
        free_tables(image, old_offset, len(old) * ENTRY_SIZE)


def delete_snapshot(image: WritableQcow2Image, wanted: str) -> None:
    """Forget a snapshot (by ID or name); space that nobody else uses is free again.

    Raises:
        OpenError: there is no such snapshot.
        OSError: from the host.
    """
    snapshots = list_snapshots(image)
    snapshot = find_snapshot(image.file, image.header, snapshots, wanted)
    with _dirty(image):
        l1 = read_table(image.file, snapshot.l1_offset, snapshot.l1_entries)
        _publish_table(image, [each for each in snapshots if each is not snapshot])
        _drop(image, l1)
        free_tables(image, snapshot.l1_offset, len(l1) * ENTRY_SIZE)


@contextmanager
def _dirty(image: WritableQcow2Image) -> Iterator[None]:
    """Steps 1, 4 and 5: what is done inside may be interrupted by a crash."""
    image.flush()
    image.flush()  # the first one frees, the second one brings that to the disk
    can_mark = image.header.version >= 3
    marked = image.header.incompatible | Incompatible.DIRTY
    if can_mark:
        _write_header(image, INCOMPATIBLE_FIELD, marked.to_bytes(8, "big"))
    yield
    image.flush()
    image.flush()
    _restore_copied(image)
    if can_mark:
        _write_header(image, INCOMPATIBLE_FIELD, image.header.incompatible.to_bytes(8, "big"))


def _write_header(image: WritableQcow2Image, offset: int, fields: bytes) -> None:
    image.file.sync()
    image.file.write(offset, fields)
    image.file.sync()


def write_row(image: WritableQcow2Image, content: bytes) -> int:
    """Write a table to a new place, which is counted and on stable storage afterwards; returns its offset."""
    size = image.header.geometry.cluster_size
    clusters = -(-len(content) // size)
    if not clusters:
        return 0
    first = image.allocator.allocate_row(clusters)
    image.space.add_table(first, clusters)
    image.file.write(first * size, content)
    image.flush()
    return first * size


def _publish_table(image: WritableQcow2Image, snapshots: list[Snapshot]) -> None:
    """Let the header lead to a new directory of snapshots."""
    _, old_length = read_snapshots(image.file, image.header)
    old_offset = image.header.snapshots_offset
    offset = write_row(image, build_snapshots(snapshots))
    image.flush()
    _write_header(image, SNAPSHOT_FIELDS, len(snapshots).to_bytes(4, "big") + offset.to_bytes(8, "big"))
    image.header = replace(image.header, snapshots=len(snapshots), snapshots_offset=offset)
    free_tables(image, old_offset, old_length)


def free_tables(image: WritableQcow2Image, offset: int, length: int) -> None:
    bits = image.header.geometry.cluster_bits
    if length:
        first, count = offset >> bits, -(-length >> bits)
        image.space.remove_table(first, count)
        image.writeback.park(first, count)


def _tables(image: WritableQcow2Image, l1: array[int]) -> Iterator[tuple[int, array[int]]]:
    """The L2 tables of an L1 table, by the number of their cluster."""
    geometry = image.header.geometry
    for key, entry in enumerate(l1):
        if entry & geometry.offset_mask:
            table = image.mapping.read(entry, f"L1 entry {key}")
            yield (entry & geometry.offset_mask) >> geometry.cluster_bits, table


def _share(image: WritableQcow2Image, l1: array[int]) -> None:
    """Count one more reference to everything that an L1 table leads to."""
    image.allocator.mark()
    for cluster, table in _tables(image, l1):
        image.refcounts.share(cluster, 1)
        for row in table_rows(image.header, table):
            image.refcounts.share(*row)
        if image.writeback.is_due:
            image.flush()
    image.flush()


def _drop(image: WritableQcow2Image, l1: array[int]) -> None:
    """Subtract one reference from everything that an L1 table leads to, which nothing on the disk leads to any more."""
    for cluster, table in _tables(image, l1):
        for row in table_rows(image.header, table):
            image.writeback.park(*row)
        if image.refcounts.refcount(cluster) == 1:
            image.space.remove_table(cluster, 1)
        image.writeback.park(cluster, 1)
        if image.writeback.is_due:
            image.flush()


def _without_copied(image: WritableQcow2Image) -> array[int]:
    """Take COPIED from everything in use, for all of it is shared now; returns the L1 table."""
    _rewrite(image, lambda entry: entry if entry & COMPRESSED else entry & NOT_COPIED)
    return array("Q", image.mapping.l1)


def _restore_copied(image: WritableQcow2Image) -> None:
    """Let COPIED say of everything in use whether its refcount is 1."""
    geometry, refcount = image.header.geometry, image.refcounts.refcount

    def flagged(entry: int) -> int:
        host = entry & geometry.offset_mask
        if not host or entry & COMPRESSED:
            return entry
        return entry | COPIED if refcount(host >> geometry.cluster_bits) == 1 else entry & NOT_COPIED

    _rewrite(image, flagged)
    for entry in image.mapping.l1:
        if entry & COPIED:
            image.space.add_table((entry & geometry.offset_mask) >> geometry.cluster_bits, 1)


def _rewrite(image: WritableQcow2Image, flagged: Callable[[int], int]) -> None:
    """Change flags of L1 and L2 entries where they lie; nothing else may be waiting to be written."""
    mapping, file, geometry = image.mapping, image.file, image.header.geometry
    for key, entry in enumerate(mapping.l1):
        table = mapping.table(key)
        if table is not None:
            words = array("Q", map(flagged, table[:: geometry.words]))
            if words != table[:: geometry.words]:
                table[:: geometry.words] = words
                file.write(entry & geometry.offset_mask, table_bytes(table))
    file.sync()
    mapping.l1[:] = array("Q", map(flagged, mapping.l1))
    file.write(mapping.l1_offset, table_bytes(mapping.l1))
    file.sync()
