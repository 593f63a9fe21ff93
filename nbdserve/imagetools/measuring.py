"""How much space an image would take, without making it; to the byte what QEMU says (block/qcow2, qcow2_measure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nbdserve.block import BlockDevice, Zero
from nbdserve.errors import OpenError

_ENTRY = 8  # bytes of an L1 or refcount table entry
_BITMAP_ENTRY = 24  # bytes of an entry of the bitmap directory, without the name


@dataclass(frozen=True, slots=True)
class Measure:
    """Bytes.

    Attributes:
        required: what a new file would take.
        fully_allocated: what it would take once the guest has written everywhere.
        bitmaps: what persistent bitmaps would take in addition; None where they could not be kept.
    """

    required: int
    fully_allocated: int
    bitmaps: int | None = None


def measure(size: int, source: BlockDevice | None, format: str, values: Mapping[str, Any]) -> Measure:
    """What an image of a disk would take.

    Args:
        size: of the disk, in bytes.
        source: its content; None for an empty one.
        format: of the image: raw or qcow2.
        values: its options.

    Raises:
        OpenError: nothing is known of that format.
    """
    if format == "raw":
        return Measure(size, size)
    if format != "qcow2":
        raise OpenError(f"measure: how much a {format} image would take is not known; raw and qcow2 are")
    cluster_size = values.get("cluster_size", 65536)
    whole = _up(size, cluster_size)
    full = _full_qcow2(whole, cluster_size, values.get("refcount_bits", 16), 16 if values.get("extended_l2") else 8)
    if values.get("preallocation") in ("falloc", "full") or "backing_file" in values:
        used = whole
    else:
        used = 0 if source is None else _used(source, cluster_size)
    bitmaps = None
    if source is not None and values.get("compat") not in ("0.10", "v2"):
        bitmaps = _bitmaps(source, cluster_size)
    header = _luks_header(cluster_size) if "encrypt.format" in values else 0
    return Measure(full - whole + used + header, full + header, bitmaps)


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _full_qcow2(whole: int, cluster_size: int, refcount_bits: int, l2_entry: int) -> int:
    """An image of `whole` bytes in which every cluster has a place."""
    l2_entries = _up(whole // cluster_size, cluster_size // l2_entry)
    l1_entries = _up(l2_entries * l2_entry // cluster_size, cluster_size // _ENTRY)
    clusters = (cluster_size + l2_entries * l2_entry + l1_entries * _ENTRY + whole) // cluster_size
    blocks = table = 0
    while True:
        before = blocks + table
        blocks = -(-(clusters + before) // (cluster_size * 8 // refcount_bits))
        table = -(-blocks // (cluster_size // _ENTRY))
        if blocks + table == before:
            return (clusters + before) * cluster_size


def _luks_header(cluster_size: int) -> int:
    from nbdserve.formats.luks.create import HEADER_SIZE

    return _up(HEADER_SIZE, cluster_size)


def _used(source: BlockDevice, cluster_size: int) -> int:
    """Bytes of the clusters that data would take."""
    used = offset = told = 0
    for extent in source.extents(0, source.size):
        if not isinstance(extent, Zero):
            low = max(told, offset // cluster_size * cluster_size)
            told = max(told, _up(offset + extent.length, cluster_size))
            used += max(0, told - low)
        offset += extent.length
    return used


def _bitmaps(source: BlockDevice, cluster_size: int) -> int | None:
    from nbdserve.formats.qcow2.bitmaps import read_bitmaps
    from nbdserve.formats.qcow2.header import Header
    from nbdserve.formats.qcow2.image import Qcow2Image

    if not isinstance(source, Qcow2Image):
        return None
    clusters = directory = 0
    for bitmap in read_bitmaps(source.file, Header.read(source.file)):
        bits = -(-source.size >> bitmap.granularity_bits)
        own = _up(_up(bits, 8) // 8, cluster_size) // cluster_size
        clusters += own + -(-own * _ENTRY // cluster_size)
        directory += _up(_BITMAP_ENTRY + len(bitmap.name.encode()), 8)
    return (clusters + -(-directory // cluster_size)) * cluster_size
