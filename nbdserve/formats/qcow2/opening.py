"""A file -> an image: the header, the tables it leads to, the backing file, and whether writing is safe."""

from __future__ import annotations

from array import array

from nbdserve.block.device import BlockDevice
from nbdserve.block.file import HostFile
from nbdserve.errors import FormatError
from nbdserve.formats import OpenOptions
from nbdserve.formats.qcow2.compression import CompressedClusters, inflater
from nbdserve.formats.qcow2.entries import COPIED, ENTRY_SIZE, read_table
from nbdserve.formats.qcow2.header import AUTOCLEAR_OFFSET, Header, Incompatible
from nbdserve.formats.qcow2.image import Qcow2Image
from nbdserve.formats.qcow2.mapping import Mapping
from nbdserve.formats.qcow2.refcounts import Refcounts
from nbdserve.formats.qcow2.snapshots import find_snapshot, read_snapshots
from nbdserve.formats.qcow2.space import HostSpace
from nbdserve.formats.qcow2.writable import WritableQcow2Image


def open_qcow2(file: HostFile, options: OpenOptions) -> BlockDevice:
    """See nbdserve.formats.qcow2.open_image()."""
    header = Header.read(file)
    compressed = CompressedClusters(file, header.geometry, inflater(header.compression, file.name))
    space = HostSpace(file, header.geometry)
    if options.snapshot is not None or options.read_only:
        size, l1_offset, l1_entries = header.size, header.l1_offset, header.l1_entries
        if options.snapshot is not None:
            snapshot = find_snapshot(file, header, options.snapshot)
            size, l1_offset, l1_entries = snapshot.size, snapshot.l1_offset, snapshot.l1_entries
        mapping = Mapping(space, read_table(file, l1_offset, l1_entries), l1_offset, writable=False)
        return Qcow2Image(size, space, mapping, compressed, _backing(header, options))

    _refuse_damaged(file.name, header)
    l1 = read_table(file, header.l1_offset, header.l1_entries)
    table_size = header.refcount_table_clusters << header.geometry.cluster_bits
    refcount_table = read_table(file, header.refcount_table_offset, table_size // ENTRY_SIZE)
    _claim_tables(space, header, l1, refcount_table)
    backing = _backing(header, options)
    try:
        if header.autoclear:
            file.write(AUTOCLEAR_OFFSET, bytes(8))
            file.sync()
        space.start_writing()
    except BaseException:
        if backing is not None:
            backing.close()
        raise
    mapping = Mapping(space, l1, header.l1_offset, writable=True)
    refcounts = Refcounts(space, header.refcount_width, refcount_table, header.refcount_table_offset)
    return WritableQcow2Image(header.size, space, mapping, compressed, backing, refcounts)


def _backing(header: Header, options: OpenOptions) -> BlockDevice | None:
    if header.backing_name is None:
        return None
    return options.open_reference(header.backing_name, header.backing_format)


def _refuse_damaged(name: str, header: Header) -> None:
    """Refuse to write where refcounts cannot be trusted."""
    for flag, what in (
        (Incompatible.CORRUPT, "the image is marked as corrupt"),
        (Incompatible.DIRTY, "the image was not closed properly by its last writer (dirty bit)"),
    ):
        if header.incompatible & flag:
            raise FormatError(
                f"{name}: {what}; repair it with `qemu-img check -r all {name}` or open it read-only (-r)"
            )


def _claim_tables(space: HostSpace, header: Header, l1: array[int], refcount_table: array[int]) -> None:
    """Note where all tables lie; refuse an image in which they overlap or lie outside the file."""
    cluster_size = header.geometry.cluster_size
    space.claim(0, cluster_size, "the header")
    space.claim(header.l1_offset, header.l1_entries * ENTRY_SIZE, "the L1 table")
    space.claim(header.refcount_table_offset, len(refcount_table) * ENTRY_SIZE, "the refcount table")
    snapshots, directory_size = read_snapshots(space.file, header)
    space.claim(header.snapshots_offset, directory_size, "the snapshot table")
    for snapshot in snapshots:
        space.claim(snapshot.l1_offset, snapshot.l1_entries * ENTRY_SIZE, "a snapshot's L1 table")
    for entry in refcount_table:
        if entry:
            _claim_cluster(space, entry, "a refcount block")
    for entry in l1:
        if entry:
            _claim_cluster(space, entry & ~COPIED, "an L2 table")


def _claim_cluster(space: HostSpace, offset: int, what: str) -> None:
    if offset & space.geometry.cluster_size - 1 or offset >= space.end:
        raise FormatError(
            f"{space.file.name}: {what} is said to lie at {offset:#x}, which is not a cluster of the file; repair the "
            f"image with `qemu-img check -r all {space.file.name}` or open it read-only (-r)"
        )
    space.claim(offset, space.geometry.cluster_size, what)
