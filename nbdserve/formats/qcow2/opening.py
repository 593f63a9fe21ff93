"""A file -> an image: the header, the tables it leads to, the files it names, and whether writing is safe."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from nbdserve.block.device import BlockDevice
from nbdserve.block.file import HostFile
from nbdserve.errors import FormatError, Unsupported
from nbdserve.formats import OpenOptions
from nbdserve.formats.qcow2.compression import CompressedClusters, inflater
from nbdserve.formats.qcow2.entries import ENTRY_SIZE, read_table
from nbdserve.formats.qcow2.header import AUTOCLEAR_FIELD, Autoclear, Encryption, Header, Incompatible
from nbdserve.formats.qcow2.image import Qcow2Image
from nbdserve.formats.qcow2.mapping import Mapping
from nbdserve.formats.qcow2.snapshot_table import find_snapshot, read_snapshots
from nbdserve.formats.qcow2.space import HostSpace

if TYPE_CHECKING:
    from nbdserve.formats.luks.ciphers import SectorCipher
    from nbdserve.formats.qcow2.bitmaps import Bitmap, BitmapTracker
    from nbdserve.formats.qcow2.writable import WritableQcow2Image


def open_qcow2(file: HostFile, options: OpenOptions) -> Qcow2Image:
    """See nbdserve.formats.qcow2.open_image()."""
    header = Header.read(file)
    if header.encryption == Encryption.AES:
        raise Unsupported(
            f"{file.name}: is encrypted in qcow2's old way (AES), which is not handled; copy it with 'qemu-img convert'"
        )
    if options.read_only or options.snapshot is not None:
        return _open_to_read(file, header, options)
    if header.incompatible & Incompatible.CORRUPT:
        raise FormatError(
            f"{file.name}: the image is marked as corrupt; repair it with 'qemu-img check -r all', or open it read-only"
        )
    if header.incompatible & Incompatible.DIRTY:
        from nbdserve.formats.qcow2.repair import rebuild_refcounts

        header = rebuild_refcounts(file, header)
    return _open_to_write(file, header, options)


def _open_to_read(file: HostFile, header: Header, options: OpenOptions) -> Qcow2Image:
    if header.incompatible & Incompatible.CORRUPT:
        options.warn(f"{file.name}: the image is marked as corrupt, so what is read from it may be wrong")
    size, l1_offset, l1_entries = header.size, header.l1_offset, header.l1_entries
    if options.snapshot is not None:
        snapshot = find_snapshot(file, header, read_snapshots(file, header)[0], options.snapshot)
        size, l1_offset, l1_entries = snapshot.size, snapshot.l1_offset, snapshot.l1_entries
    cipher = _cipher(file, header, options)
    space = HostSpace(file, header.geometry)
    mapping = Mapping(space, read_table(file, l1_offset, l1_entries), l1_offset, writable=False)
    kind = _reading_kind(header)
    with ExitStack() as opened:
        data, backing = _open_others(file, header, options, space, opened)
        data.guest_file = _decrypted(data.file, cipher)
        image = kind(size, space, mapping, _compressed(file, header), backing, data)
        opened.pop_all()
    return image


def _open_to_write(file: HostFile, header: Header, options: OpenOptions) -> Qcow2Image:
    cipher = _cipher(file, header, options)
    space = HostSpace(file, header.geometry)
    l1 = read_table(file, header.l1_offset, header.l1_entries)
    tracker, bitmaps = _bitmaps(file, header)
    space.claim(_tables(file, header, l1, bitmaps))
    mapping = Mapping(space, l1, header.l1_offset, writable=True)
    kind = _writing_kind(header)
    with ExitStack() as opened:
        data, backing = _open_others(file, header, options, space, opened)
        data.guest_file = _decrypted(data.file, cipher)
        kept = header.autoclear & (Autoclear.RAW_DATA if header.geometry.is_external else 0)
        if bitmaps:
            kept |= Autoclear.BITMAPS
        if header.autoclear != kept:
            file.write(AUTOCLEAR_FIELD, kept.to_bytes(8, "big"))
            file.sync()
        if tracker is not None:
            tracker.start()
        space.start_writing()
        image = kind(replace(header, autoclear=kept), space, mapping, _compressed(file, header), backing, data, tracker)
        opened.pop_all()
    return image


def _reading_kind(header: Header) -> type[Qcow2Image]:
    if header.encryption == Encryption.NONE:
        return Qcow2Image if header.geometry.words == 1 else _subcluster_image()
    from nbdserve.formats.qcow2.encrypted import EncryptedImage, EncryptedSubclusterImage

    return EncryptedImage if header.geometry.words == 1 else EncryptedSubclusterImage


def _writing_kind(header: Header) -> type[WritableQcow2Image]:
    if header.encryption == Encryption.NONE:
        return _writable_image() if header.geometry.words == 1 else _writable_subcluster_image()
    from nbdserve.formats.qcow2.encrypted import WritableEncryptedImage, WritableEncryptedSubclusterImage

    return WritableEncryptedImage if header.geometry.words == 1 else WritableEncryptedSubclusterImage


def _cipher(file: HostFile, header: Header, options: OpenOptions) -> SectorCipher | None:
    """What guest clusters are encrypted with."""
    if header.encryption_place is None:
        return None
    from nbdserve.formats.luks.header import Area
    from nbdserve.formats.luks.opening import open_cipher

    return open_cipher(Area(file, *header.encryption_place), options.passphrase)


def _decrypted(file: HostFile, cipher: SectorCipher | None) -> HostFile:
    """A file that guest clusters lie in, as they are read and written through it."""
    if cipher is None:
        return file
    from nbdserve.formats.luks.file import EncryptedFile

    return EncryptedFile(file, cipher)


def _bitmaps(file: HostFile, header: Header) -> tuple[BitmapTracker | None, list[Bitmap]]:
    """What keeps bitmaps right, if some are switched on, and all of them; none where they are not understood."""
    if header.bitmaps is None:
        return None, []
    from nbdserve.formats.qcow2.bitmaps import BitmapTracker, read_bitmaps

    try:
        bitmaps = read_bitmaps(file, header)
        tracked = any(bitmap.must_track for bitmap in bitmaps)
        return BitmapTracker(file, header, bitmaps) if tracked else None, bitmaps
    except FormatError:
        return None, []


# Only what an image needs is loaded: its user waits for that.


def _subcluster_image() -> type[Qcow2Image]:
    from nbdserve.formats.qcow2.subclusters import SubclusterImage

    return SubclusterImage


def _writable_image() -> type[WritableQcow2Image]:
    from nbdserve.formats.qcow2.writable import WritableQcow2Image

    return WritableQcow2Image


def _writable_subcluster_image() -> type[WritableQcow2Image]:
    from nbdserve.formats.qcow2.writable_subclusters import WritableSubclusterImage

    return WritableSubclusterImage


def _compressed(file: HostFile, header: Header) -> CompressedClusters:
    return CompressedClusters(file, header.geometry, inflater(header.compression, file.name))


def _open_others(
    file: HostFile, header: Header, options: OpenOptions, space: HostSpace, opened: ExitStack
) -> tuple[HostSpace, BlockDevice | None]:
    """Where guest clusters lie, and the backing device."""
    data = space
    if header.geometry.is_external:
        data = HostSpace(_open_file(file, header, options), header.geometry)
        opened.callback(data.file.close)
        if not options.read_only:
            _lengthen(data, header.size)
    backing = None
    if header.backing_name is not None:
        backing = options.open_reference(header.backing_name, header.backing_format)
        opened.callback(backing.close)
    return data, backing


def _open_file(file: HostFile, header: Header, options: OpenOptions) -> HostFile:
    if header.data_name is None:
        raise Unsupported(f"{file.name}: does not say which data file holds its content; record it with QEMU first")
    data = options.open_file(header.data_name, writable=not options.read_only)
    if os.path.sameopenfile(data.fd, file.fd):
        data.close()
        raise FormatError(f"{file.name}: names itself as its data file; the image is damaged")
    return data


def _lengthen(data: HostSpace, size: int) -> None:
    """Let the data file be as long as the disk, its last cluster included."""
    mask = data.geometry.cluster_size - 1
    if not data.file.is_device and data.end < size:
        data.file.resize(size)
        data.end = size
    data.full_end = data.end & ~mask


def _tables(file: HostFile, header: Header, l1: array[int], bitmaps: list[Bitmap]) -> Iterator[tuple[int, int, str]]:
    """Where all tables lie: host offset, bytes, what it is."""
    cluster_size, mask = header.geometry.cluster_size, header.geometry.offset_mask
    length = header.refcount_table_clusters << header.geometry.cluster_bits
    yield 0, cluster_size, "the header"
    if header.encryption_place is not None:
        yield *header.encryption_place, "the LUKS header"
    if l1:
        yield header.l1_offset, header.l1_entries * ENTRY_SIZE, "the L1 table"
    yield header.refcount_table_offset, length, "the refcount table"
    if bitmaps:
        from nbdserve.formats.qcow2.bitmaps import bitmap_places

        for offset, size in bitmap_places(file, header, bitmaps):
            yield offset, size, "a bitmap"
    snapshots, directory_size = read_snapshots(file, header)
    if snapshots:
        yield header.snapshots_offset, directory_size, "the snapshot table"
    for snapshot in snapshots:
        if snapshot.l1_entries:
            yield snapshot.l1_offset, snapshot.l1_entries * ENTRY_SIZE, "a snapshot's L1 table"
    for entry in read_table(file, header.refcount_table_offset, length // ENTRY_SIZE):
        if entry:
            yield entry, cluster_size, "a refcount block"
    for entry in l1:
        if entry & mask:
            yield entry & mask, cluster_size, "an L2 table"
