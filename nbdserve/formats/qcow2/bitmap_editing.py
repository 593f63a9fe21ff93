"""Adds, removes, empties and merges persistent bitmaps (QEMU, docs/interop/qcow2, "Bitmaps").

The rule this file keeps: *the directory that the header leads to is whole.* What is new goes to new clusters; when it
is on stable storage, one write of the header's first sector lets it count (relinking.py), and only then are clusters
given up to which nothing leads any more. A crash leaves the old or the new bitmaps, and a leak at most.

Nobody else may use the image meanwhile, and its disk is not written through the same object.
"""

from __future__ import annotations

from array import array
from dataclasses import replace

from nbdserve.block.file import HostFile
from nbdserve.errors import OpenError
from nbdserve.formats.qcow2.bitmaps import (
    MAXIMUM_BITMAPS,
    Bitmap,
    Flags,
    bitmap_places,
    build_bitmaps,
    build_place,
    read_bitmaps,
    table_entries,
)
from nbdserve.formats.qcow2.entries import ENTRY_SIZE, table_bytes
from nbdserve.formats.qcow2.header import Autoclear, Header
from nbdserve.formats.qcow2.relinking import replace_bitmaps
from nbdserve.formats.qcow2.snapshots import free_tables, write_row
from nbdserve.formats.qcow2.writable import WritableQcow2Image

_MAXIMUM_NAME = 1023  # bytes, as in QEMU
_ALL_ONES = 1  # a table entry that stands for a cluster of set bits


class BitmapEditor:
    """Changes the bitmaps of an image that is open for writing.

    Raises:
        OpenError: the image cannot have bitmaps.
        FormatError: the bitmaps it has are damaged.
    """

    def __init__(self, image: WritableQcow2Image) -> None:
        if image.header.version < 3:
            raise OpenError(f"{image.file.name}: version 2 images have no bitmaps; amend it to compat=1.1 first")
        image.stop_tracking()
        self._image = image
        self._file = image.file
        self._size = image.header.geometry.cluster_size
        self._bitmaps = read_bitmaps(image.file, image.header)
        if any(bitmap.has_extra for bitmap in self._bitmaps):
            raise OpenError(f"{image.file.name}: has bitmaps of an unknown kind; use qemu-img")

    def find(self, name: str) -> Bitmap:
        """The bitmap with this name.

        Raises:
            OpenError: there is none.
        """
        for bitmap in self._bitmaps:
            if bitmap.name == name:
                return bitmap
        there = ", ".join(bitmap.name for bitmap in self._bitmaps) or "none"
        raise OpenError(f"{self._file.name}: no bitmap {name!r}; it has: {there}")

    def add(self, name: str, granularity: int, *, enabled: bool = True) -> None:
        """Add an empty bitmap; `granularity` in bytes, a power of two."""
        if not 512 <= granularity <= 1 << 31 or granularity & granularity - 1:
            raise OpenError(f"bitmap: {granularity} bytes a bit do not exist; choose a power of two from 512 to 2G")
        if not 0 < len(name.encode()) <= _MAXIMUM_NAME or any(bitmap.name == name for bitmap in self._bitmaps):
            raise OpenError(f"{self._file.name}: a bitmap cannot be called {name!r}, or there is one of that name")
        if len(self._bitmaps) >= MAXIMUM_BITMAPS:
            raise OpenError(f"{self._file.name}: has {len(self._bitmaps)} bitmaps, which are the most; remove some")
        bits = granularity.bit_length() - 1
        entries = table_entries(self._image.size, bits, self._image.header.geometry)
        table = array("Q", bytes(ENTRY_SIZE * entries))
        offset = write_row(self._image, table_bytes(table))
        flags = Flags.AUTO if enabled else Flags(0)
        self._publish([*self._bitmaps, Bitmap(name, flags, bits, False, 0, offset, table)])

    def remove(self, name: str) -> None:
        """Remove a bitmap."""
        gone = self.find(name)
        self._publish([bitmap for bitmap in self._bitmaps if bitmap is not gone])
        self._give_up(gone)

    def clear(self, name: str) -> None:
        """Let no bit of a bitmap be set."""
        old = self._sound(name)
        table = array("Q", bytes(ENTRY_SIZE * len(old.table)))
        self._exchange(old, replace(old, table=table, table_offset=write_row(self._image, table_bytes(table))))

    def enable(self, name: str, enabled: bool) -> None:
        """Let a bitmap note writes from now on, or not."""
        old = self._sound(name)
        flags = old.flags | Flags.AUTO if enabled else old.flags & ~Flags.AUTO
        self._publish([replace(each, flags=flags) if each is old else each for each in self._bitmaps])

    def merge(self, name: str, other: bytes, granularity_bits: int) -> None:
        """Set the bits of a bitmap that are set in another one, given as bits(), of the same granularity."""
        old = self._sound(name)
        if granularity_bits != old.granularity_bits:
            raise OpenError(f"bitmap: {name!r} and the other one have different granularities; they cannot be merged")
        merged = int.from_bytes(bits_of(self._file, self._image.header, old), "little") | int.from_bytes(
            other, "little"
        )
        content = merged.to_bytes(len(old.table) * self._size, "little")
        table = array("Q", bytes(ENTRY_SIZE * len(old.table)))
        for number in range(len(table)):
            piece = content[number * self._size : (number + 1) * self._size]
            if any(piece):
                table[number] = write_row(self._image, piece)
        self._exchange(old, replace(old, table=table, table_offset=write_row(self._image, table_bytes(table))))

    def content(self, name: str) -> tuple[bytes, int]:
        """The bits of a bitmap, and its granularity as a power of two."""
        found = self._sound(name)
        return bits_of(self._file, self._image.header, found), found.granularity_bits

    def _sound(self, name: str) -> Bitmap:
        found = self.find(name)
        if found.flags & Flags.IN_USE:
            raise OpenError(f"{self._file.name}: bitmap {name!r} was not kept to the end; it can only be removed")
        return found

    def _exchange(self, old: Bitmap, new: Bitmap) -> None:
        self._publish([new if each is old else each for each in self._bitmaps])
        self._give_up(old)

    def _publish(self, bitmaps: list[Bitmap]) -> None:
        """Let the header lead to a new directory."""
        image = self._image
        before = next(bitmap_places(self._file, image.header, self._bitmaps), (0, 0)) if self._bitmaps else (0, 0)
        place = None
        if bitmaps:
            directory = build_bitmaps(bitmaps)
            place = build_place(len(bitmaps), len(directory), write_row(image, directory))
        image.flush()
        replace_bitmaps(self._file, place)
        autoclear = image.header.autoclear & ~Autoclear.BITMAPS | (Autoclear.BITMAPS if bitmaps else 0)
        image.header = replace(image.header, bitmaps=place, autoclear=autoclear)
        free_tables(image, *before)
        self._bitmaps = bitmaps

    def _give_up(self, bitmap: Bitmap) -> None:
        free_tables(self._image, bitmap.table_offset, len(bitmap.table) * ENTRY_SIZE)
        for entry in bitmap.table:
            if entry & self._image.header.geometry.offset_mask:
                free_tables(self._image, entry & self._image.header.geometry.offset_mask, self._size)


def bits_of(file: HostFile, header: Header, bitmap: Bitmap) -> bytes:
    """All bits of a bitmap, in whole clusters, the least significant bit of each byte first."""
    size, mask = header.geometry.cluster_size, header.geometry.offset_mask
    pieces = []
    for entry in bitmap.table:
        place = entry & mask
        pieces.append(bytes(file.read(place, size)) if place else (b"\xff" if entry & _ALL_ONES else b"\0") * size)
    return b"".join(pieces)
