"""Opening a qcow2 image: the checks before it may be written, its backing device, the view of a snapshot."""

from __future__ import annotations

from nbdserve.block.file import HostFile
from nbdserve.errors import Unsupported
from nbdserve.formats import OpenOptions
from nbdserve.formats.qcow2.header import AUTOCLEAR, CORRUPT, DIRTY, Header, read_header
from nbdserve.formats.qcow2.image import Qcow2Image
from nbdserve.formats.qcow2.snapshots import find_snapshot, read_snapshots


def open_qcow2(file: HostFile, options: OpenOptions) -> Qcow2Image:
    """See nbdserve.formats.qcow2.open_image()."""
    header = read_header(file)
    snapshots, snapshots_end = read_snapshots(file, header)
    size, l1 = header.size, (header.l1_offset, header.l1_entries)
    if options.snapshot is not None:
        shown = find_snapshot(snapshots, options.snapshot, file, header)
        size, l1 = shown.size, (shown.l1_offset, shown.l1_entries)
    if not options.read_only:
        _check_writable(header, file.name)
    backing = None
    if header.backing_name is not None:
        backing = options.open_reference(header.backing_name, header.backing_format)
    try:
        image = Qcow2Image(file, header, size, l1, backing, read_only=options.read_only)
        if not options.read_only:
            image.protect([(header.snapshots_offset, snapshots_end)] if snapshots else [], snapshots)
            _clear_autoclear(file, header)
    except BaseException:
        if backing is not None:
            backing.close()
        raise
    return image


def _check_writable(header: Header, name: str) -> None:
    if header.incompatible & CORRUPT:
        raise Unsupported(f"{name}: is marked as corrupt; repair it with 'qemu-img check -r all', or open it read-only")
    if header.incompatible & DIRTY:
        raise Unsupported(
            f"{name}: was not closed properly (lazy refcounts); repair it with 'qemu-img check -r all', or open it "
            "read-only"
        )


def _clear_autoclear(file: HostFile, header: Header) -> None:
    """What the autoclear bits vouch for (bitmaps) is not kept right here, so they must go before the first write."""
    if header.autoclear:
        file.write(AUTOCLEAR, bytes(8))
        file.sync()
