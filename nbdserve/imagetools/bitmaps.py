"""Persistent bitmaps of qcow2 images: which parts of a disk were written to since when."""

from __future__ import annotations

from nbdserve.block import BlockDevice
from nbdserve.errors import OpenError
from nbdserve.formats.qcow2.bitmap_editing import BitmapEditor, bits_of
from nbdserve.formats.qcow2.bitmaps import Flags, read_bitmaps
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.writable import WritableQcow2Image
from nbdserve.opening import ReferencePolicy, look_into


def editor_of(device: BlockDevice, name: str) -> BitmapEditor:
    """What changes the bitmaps of an image that is open for writing.

    Raises:
        OpenError: it has none, and cannot have any.
    """
    if not isinstance(device, WritableQcow2Image):
        raise OpenError(f"{name}: only qcow2 images have bitmaps; convert it to qcow2")
    return BitmapEditor(device)


def read_other(path: str, format: str | None, bitmap: str, policy: ReferencePolicy | None = None) -> tuple[bytes, int]:
    """The bits of a bitmap in another image, and its granularity as a power of two.

    Raises:
        OpenError: there is no such bitmap, or it may not be trusted.
    """
    with look_into(path, format=format, policy=policy) as image:
        if image.format != "qcow2":
            raise OpenError(f"{path}: only qcow2 images have bitmaps")
        header = Header.read(image.file)
        for found in read_bitmaps(image.file, header):
            if found.name == bitmap:
                if found.flags & Flags.IN_USE:
                    raise OpenError(f"{path}: bitmap {bitmap!r} was not kept to the end, so it says nothing")
                return bits_of(image.file, header, found), found.granularity_bits
    raise OpenError(f"{path}: no bitmap {bitmap!r}; 'nbdimg info' lists those there are")
