"""Another length for the disk of an existing image."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from nbdserve.block import BlockDevice
from nbdserve.errors import OpenError
from nbdserve.formats.raw import RawImage

if TYPE_CHECKING:
    from nbdserve.formats.qcow2.writable import WritableQcow2Image

Preallocation = Literal["off", "metadata", "falloc", "full"]


def resize(device: BlockDevice, name: str, size: int, *, shrink: bool = False, fill: Preallocation = "off") -> None:
    """Let the disk be `size` bytes long.

    Args:
        shrink: what lies behind a new, nearer end may be lost.
        fill: for what is new. metadata: give every cluster its place; falloc: set host space aside, too; full: write
            zeros there.

    Raises:
        OpenError: it cannot have that length, or would lose data that it may not.
        OSError: from the host.
    """
    if size < 0:
        raise OpenError(f"{name}: a disk cannot have {size} bytes")
    if size < device.size and not shrink:
        raise OpenError(f"{name}: would lose its last {device.size - size} bytes; say --shrink if that is meant")
    if isinstance(device, RawImage) and device.file.is_device:
        raise OpenError(f"{name}: a device keeps its length; resize what it stands for")
    if isinstance(device, RawImage):
        if fill == "metadata":
            raise OpenError(f"{name}: a raw file has no metadata; choose falloc or full")
        _resize_raw(device, size, fill)
        return
    from nbdserve.formats.qcow2.resizing import resize as resize_qcow2
    from nbdserve.formats.qcow2.writable import WritableQcow2Image

    if not isinstance(device, WritableQcow2Image):
        raise OpenError(f"{name}: only raw files and qcow2 images change their length; convert it to another image")
    if fill != "off" and device.header.encryption:
        raise OpenError(f"{name}: in an encrypted image space set aside is not zeros; leave --preallocation out")
    if fill != "off" and device.backing is not None:
        raise OpenError(f"{name}: over a backing file no space is set aside; leave --preallocation out")
    if fill in ("metadata", "falloc") and device.header.encryption:
        raise OpenError(f"{name}: is encrypted, where new space reads as zeros only once it is written; choose full")
    old = device.size
    resize_qcow2(device, size)
    if size > old and fill != "off":
        _fill_qcow2(device, old, fill)


def _fill_qcow2(image: WritableQcow2Image, old: int, fill: Preallocation) -> None:
    file = image.data_file
    for host, length in image.place_all(old):
        if fill == "falloc":
            os.posix_fallocate(file.fd, host, length)
        elif fill == "full":
            file.write_zeros(host, length)
    image.flush()


def _resize_raw(device: RawImage, size: int, fill: Preallocation) -> None:
    old = device.size
    device.file.resize(size)
    if size > old and fill == "falloc":
        os.posix_fallocate(device.file.fd, old, size - old)
    elif size > old and fill == "full":
        device.file.write_zeros(old, size - old)
    device.size = size
