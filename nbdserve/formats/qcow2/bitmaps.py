"""Persistent bitmaps: which parts of the disk were written to (QEMU, docs/interop/qcow2, "Bitmaps").

The rule this file keeps: *a bitmap is right, or it says that it is not.* Bitmaps that are switched on ("auto") must
show every write. Before the first write of a session they are marked as in use, which tells everyone after a crash not
to trust them; at the end the new bits are added, brought to stable storage, and only then is the mark taken away.
Bitmaps that are switched off need nothing. Where the bitmaps cannot be understood, all of them are given up by the rule
for unknown features: the autoclear bit is cleared.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntFlag

from nbdserve.block.file import HostFile
from nbdserve.errors import FormatError
from nbdserve.formats.qcow2.allocation import Allocator
from nbdserve.formats.qcow2.entries import ENTRY_SIZE, Geometry, read_table
from nbdserve.formats.qcow2.header import Autoclear, Header, check_place
from nbdserve.formats.record import Record

_EXTENSION = Record(">", count="I", reserved="I", size="Q", offset="Q")
_ENTRY = Record(
    ">",
    table_offset="Q",
    table_entries="I",
    flags="I",
    type="B",
    granularity_bits="B",
    name_size="H",
    extra_size="I",
)
_FLAGS_AT = 12  # bytes into an entry
MAXIMUM_BITMAPS = 65535
_MAXIMUM_DIRECTORY = 64 << 20  # bytes
_MAXIMUM_TABLE = 8 << 20  # bytes
_MAXIMUM_TRACKED = 64 << 20  # bytes of bits in memory, for all bitmaps together
_DIRTY_TRACKING = 1


class Flags(IntFlag):
    """What the directory says of a bitmap."""

    IN_USE = 1
    AUTO = 2
    EXTRA_DATA_COMPATIBLE = 4


@dataclass(slots=True)
class Bitmap:
    """One persistent bitmap.

    Attributes:
        granularity: bytes of the disk for each bit.
        entry_offset: where its entry in the directory lies.
        table: the table of its clusters.
    """

    name: str
    flags: Flags
    granularity_bits: int
    has_extra: bool
    entry_offset: int
    table_offset: int
    table: array[int]
    touched: bytearray = field(default_factory=bytearray)

    @property
    def must_track(self) -> bool:
        """Whether writes have to be noted in it; not if it is known to be wrong already."""
        return bool(self.flags & Flags.AUTO) and not self.flags & Flags.IN_USE


def read_bitmaps(file: HostFile, header: Header) -> list[Bitmap]:
    """The bitmaps of an image; none where the image does not vouch for them.

    Raises:
        FormatError: the directory is damaged.
    """
    if header.bitmaps is None or not header.autoclear & Autoclear.BITMAPS:
        return []
    name, geometry = file.name, header.geometry
    if len(header.bitmaps) != _EXTENSION.size:
        raise FormatError(f"{name}: the extension for bitmaps has {len(header.bitmaps)} bytes; it is damaged")
    place = _EXTENSION.parse(header.bitmaps)
    if not 0 < place.count <= MAXIMUM_BITMAPS or place.size > _MAXIMUM_DIRECTORY:
        raise FormatError(f"{name}: announces {place.count} bitmaps in {place.size} bytes; the image is damaged")
    check_place(file, geometry, "bitmap directory", place.offset, place.size)
    content = bytes(file.read(place.offset, place.size))
    found: list[Bitmap] = []
    position = 0
    for _ in range(place.count):
        if position + _ENTRY.size > len(content):
            raise FormatError(f"{name}: the bitmap directory is cut short; the image is damaged")
        entry = _ENTRY.parse(content, position)
        names = position + _ENTRY.size + entry.extra_size
        if (
            entry.type != _DIRTY_TRACKING
            or not 9 <= entry.granularity_bits <= 31
            or names + entry.name_size > len(content)
            or entry.table_entries * ENTRY_SIZE > _MAXIMUM_TABLE
            or entry.table_entries != table_entries(header.size, entry.granularity_bits, geometry)
        ):
            raise FormatError(f"{name}: a bitmap does not fit the disk; the image is damaged")
        check_place(file, geometry, "bitmap table", entry.table_offset, entry.table_entries * ENTRY_SIZE)
        found.append(
            Bitmap(
                name=content[names : names + entry.name_size].decode("utf-8", "replace"),
                flags=Flags(entry.flags & 7),
                granularity_bits=entry.granularity_bits,
                has_extra=entry.extra_size > 0,
                entry_offset=place.offset + position,
                table_offset=entry.table_offset,
                table=read_table(file, entry.table_offset, entry.table_entries),
            )
        )
        position = -(-(names + entry.name_size) // 8) * 8
    return found


def table_entries(size: int, granularity_bits: int, geometry: Geometry) -> int:
    """How many clusters the bits of a bitmap take."""
    bits = -(-size >> granularity_bits)
    return -(-bits // (8 * geometry.cluster_size))


def bitmap_places(file: HostFile, header: Header, bitmaps: list[Bitmap] | None = None) -> Iterator[tuple[int, int]]:
    """The parts of the file (offset, bytes) that bitmaps take: the directory, the tables, the bits."""
    found = read_bitmaps(file, header) if bitmaps is None else bitmaps
    if found and header.bitmaps is not None:
        place = _EXTENSION.parse(header.bitmaps)
        yield place.offset, place.size
    for bitmap in found:
        if len(bitmap.table):
            yield bitmap.table_offset, len(bitmap.table) * ENTRY_SIZE
        for entry in bitmap.table:
            if entry & header.geometry.offset_mask:
                yield entry & header.geometry.offset_mask, header.geometry.cluster_size


def build_bitmaps(bitmaps: list[Bitmap]) -> bytes:
    """The directory as it lies on the disk."""
    directory = b""
    for bitmap in bitmaps:
        name = bitmap.name.encode()
        entry = _ENTRY.build(
            {
                "table_offset": bitmap.table_offset,
                "table_entries": len(bitmap.table),
                "flags": bitmap.flags,
                "type": _DIRTY_TRACKING,
                "granularity_bits": bitmap.granularity_bits,
                "name_size": len(name),
                "extra_size": 0,
            }
        )
        directory += (entry + name).ljust(-(-(len(entry) + len(name)) // 8) * 8, b"\0")
    return directory


def build_place(count: int, size: int, offset: int) -> bytes:
    """The extension that leads to a directory of `count` bitmaps, of `size` bytes."""
    return _EXTENSION.build({"count": count, "reserved": 0, "size": size, "offset": offset})


class BitmapTracker:
    """Notes writes while an image is open, for the bitmaps that are switched on.

    Raises:
        FormatError: the bitmaps are more, or finer, than can be kept in memory.
    """

    def __init__(self, file: HostFile, header: Header, bitmaps: list[Bitmap]) -> None:
        self._file = file
        self._cluster_size = header.geometry.cluster_size
        self._mask = header.geometry.offset_mask
        self._bitmaps = [bitmap for bitmap in bitmaps if bitmap.must_track]
        sizes = [(header.size >> bitmap.granularity_bits) // 8 + 1 for bitmap in self._bitmaps]
        if sum(sizes) > _MAXIMUM_TRACKED or any(bitmap.has_extra for bitmap in self._bitmaps):
            raise FormatError(f"{file.name}: its bitmaps are too fine, or of an unknown kind")
        for bitmap, size in zip(self._bitmaps, sizes, strict=True):
            bitmap.touched = bytearray(size)

    def start(self) -> None:
        """Mark the bitmaps as in use, before the first write."""
        self._mark(Flags.IN_USE)

    def _mark(self, flag: int) -> None:
        for bitmap in self._bitmaps:
            self._file.write(bitmap.entry_offset + _FLAGS_AT, (bitmap.flags | flag).to_bytes(4, "big"))
        self._file.sync()

    def touch(self, offset: int, length: int) -> None:
        """A range of the disk is written to."""
        for bitmap in self._bitmaps:
            first, last = offset >> bitmap.granularity_bits, (offset + length - 1) >> bitmap.granularity_bits
            low, high = first >> 3, last >> 3
            if low == high:
                bitmap.touched[low] |= (2 << last - first) - 1 << (first & 7)
            else:
                bitmap.touched[low] |= 0xFF << (first & 7) & 0xFF
                bitmap.touched[high] |= (2 << (last & 7)) - 1
                bitmap.touched[low + 1 : high] = b"\xff" * (high - low - 1)

    def add_bits(self, allocator: Allocator) -> list[tuple[int, bytes]]:
        """Write the new bits to the clusters of the bitmaps; returns what is to be written to their tables once that
        and the refcounts are on stable storage."""
        links: list[tuple[int, bytes]] = []
        size = self._cluster_size
        for bitmap in self._bitmaps:
            for number, entry in enumerate(bitmap.table):
                new = bytes(bitmap.touched[number * size : (number + 1) * size])
                if not any(new) or entry == 1:
                    continue
                place = entry & self._mask
                old = self._file.read(place, size) if place else bytearray(size)
                merged = int.from_bytes(old, "little") | int.from_bytes(new, "little")
                if not place:
                    place = allocator.allocate(1)[0] * size
                    links.append((bitmap.table_offset + number * ENTRY_SIZE, place.to_bytes(8, "big")))
                self._file.write(place, merged.to_bytes(size, "little"))
        return links

    def finish(self, links: list[tuple[int, bytes]]) -> None:
        """All bits and refcounts are on stable storage: lead to them, and vouch for the bitmaps again."""
        for offset, content in links:
            self._file.write(offset, content)
        self._file.sync()
        self._mark(0)
