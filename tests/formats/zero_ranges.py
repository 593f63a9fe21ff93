"""Which parts of a disk read as zeros without being looked at: by our extents, and by qemu-img map."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nbdserve.block import BlockDevice, Zero
from tests.reference import qemu_map

Range = tuple[int, int]


def _merged(ranges: Iterable[Range]) -> list[Range]:
    merged: list[Range] = []
    for start, end in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def our_zeros(device: BlockDevice) -> list[Range]:
    """(start, end) of what our map() calls Zero."""
    offset, ranges = 0, []
    for extent in device.extents(0, device.size):
        if isinstance(extent, Zero):
            ranges.append((offset, offset + extent.length))
        offset += extent.length
    return _merged(ranges)


def qemu_zeros(image: Path, format: str) -> list[Range]:
    """The same, according to qemu-img map."""
    return _merged((each["start"], each["start"] + each["length"]) for each in qemu_map(image, format) if each["zero"])
