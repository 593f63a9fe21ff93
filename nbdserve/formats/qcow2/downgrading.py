"""From version 3 back to version 2 (QEMU, docs/interop/qcow2, "Header").

The rule this file keeps: *the disk shows the same all the time.* What version 2 cannot say is said otherwise first, by
writes like those of a guest; only then does one write of the header's first sector change the version.
"""

from __future__ import annotations

from nbdserve.block.file import HostFile
from nbdserve.errors import OpenError
from nbdserve.formats.qcow2.entries import COMPRESSED, ZERO, read_table
from nbdserve.formats.qcow2.header import CompressionType, Header
from nbdserve.formats.qcow2.snapshot_table import Snapshot, read_snapshots


def demand_downgradable(file: HostFile, header: Header, size: int) -> None:
    """Refuse what version 2 has no words for, but for zeros on the disk itself: those can be said otherwise.

    Args:
        size: what the length of the disk will be by then.

    Raises:
        OpenError: the message says what it is.
    """
    snapshots, _ = read_snapshots(file, header)
    for is_wrong, what in (
        (header.geometry.is_external, "an external data file"),
        (header.geometry.words > 1, "subclusters"),
        (header.compression != CompressionType.ZLIB, "clusters compressed with zstd"),
        (header.bitmaps is not None, "persistent bitmaps (remove them first)"),
        (any(each.size != size for each in snapshots), "snapshots of another length (delete them first)"),
        (any(_says_zeros(file, header, each) for each in snapshots), "zeros in snapshots (delete them first)"),
    ):
        if is_wrong:
            raise OpenError(f"{file.name}: has {what}, unknown to version 2; or convert it with -o compat=0.10")


def _says_zeros(file: HostFile, header: Header, snapshot: Snapshot) -> bool:
    """Whether an L2 entry of a snapshot says zeros by its flag."""
    geometry = header.geometry
    for entry in read_table(file, snapshot.l1_offset, snapshot.l1_entries):
        place = entry & geometry.offset_mask
        if place and any(each & (COMPRESSED | ZERO) == ZERO for each in read_table(file, place, geometry.table_words)):
            return True
    return False
