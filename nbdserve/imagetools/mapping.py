"""Which parts of a disk hold data, and where: through which image of the chain, at which place of which file.

The words are QEMU's (qapi/block-core.json, "MapEntry"): *present* means that an image of the chain says something of
the range, rather than all of them leaving it to the one below.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from nbdserve.block import BlockDevice, Computed, Data, HostFile, Window, Zero
from nbdserve.formats.base import MappedImage, Unallocated
from nbdserve.formats.qcow2.image import Qcow2Image
from nbdserve.formats.vmdk.disk import VmdkDisk

_WITHOUT_BACKING = ("VdiImage", "DynamicDisk")  # formats of which QEMU takes all for present


@dataclass(frozen=True, slots=True)
class Entry:
    """A range of the disk, in bytes, whose parts are alike.

    Attributes:
        depth: how far down the chain it was found; 0 is the image itself.
        offset: where it begins in the file called `file`; None when it does not lie there verbatim.
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    offset: int | None = None
    file: str | None = None

    def continues(self, other: Entry) -> bool:
        """Whether this entry is like another one and lies right behind it."""
        moved = None if other.offset is None else other.offset + other.length
        return self == replace(other, start=other.start + other.length, length=self.length, offset=moved)


def entries(device: BlockDevice, start: int = 0, length: int | None = None) -> Iterator[Entry]:
    """The entries of a range, in order, each as long as possible."""
    end = device.size if length is None else min(device.size, start + length)
    last: Entry | None = None
    while start < end:
        entry = replace(_entry(device, start, end - start, 0), start=start)
        start += entry.length
        if last is not None and entry.continues(last):
            last = replace(last, length=last.length + entry.length)
            continue
        if last is not None:
            yield last
        last = entry
    if last is not None:
        yield last


def _entry(device: BlockDevice, offset: int, length: int, depth: int) -> Entry:
    """What a device of the chain, `depth` images down, says of its range."""
    match device:
        case Window():
            return _entry(device.whole, device.start + offset, length, depth)
        case VmdkDisk():
            extent, inside = device.extent_at(offset)
            return _entry(extent, inside, min(length, extent.size - inside), depth)
        case MappedImage():
            return _mapped(device, offset, length, depth)
    extent_ = device.map(offset, length)
    match extent_:
        case Data():
            return _data(extent_, depth)
        case Zero():
            file = getattr(device, "file", None)
            return Entry(0, extent_.length, depth, True, True, extent_.allocated, offset, file and file.name)
    return Entry(0, extent_.length, depth, True, False, True)


def _mapped(device: MappedImage, offset: int, length: int, depth: int) -> Entry:
    own = device.lookup(offset, length)
    match own:
        case Data():
            return _data(own, depth)
        case Computed():
            return Entry(0, own.length, depth, True, False, True)
        case Unallocated() if device.backing is not None and offset < device.backing.size:
            return _entry(device.backing, offset, min(own.length, device.backing.size - offset), depth + 1)
        case Unallocated():
            return Entry(0, own.length, depth, type(device).__name__ in _WITHOUT_BACKING, True, False)
    if not isinstance(device, Qcow2Image) or not own.allocated or (place := device.place_of(offset)) is None:
        return Entry(0, own.length, depth, True, True, False)
    host, zero = place
    # A hole in the host's file: QEMU tells of those only where it finds that space was set aside in advance.
    told = zero or _is_preallocated(device.file, device.data_file, device.preferred_block)
    return Entry(0, own.length, depth, True, told, not zero, host, device.data_file.name)


def _is_preallocated(file: HostFile, data_file: HostFile, cluster_size: int) -> bool:
    """QEMU's rule (block/qcow2, qcow2_detect_metadata_preallocation): the file has a tenth more than the host gave."""
    if data_file is not file:
        return True
    status = os.fstat(file.fd)
    real = status.st_blocks * 512 // cluster_size
    return status.st_size // cluster_size >= max(real * 10 // 9, real + 2)


def _data(extent: Data, depth: int) -> Entry:
    return Entry(0, extent.length, depth, True, False, True, extent.host_offset, extent.file.name)
