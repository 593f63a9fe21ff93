"""Another length for the disk of an existing image."""

from __future__ import annotations

import os
from typing import Literal

from nbdserve.block import BlockDevice
from nbdserve.errors import OpenError
from nbdserve.formats.raw import RawImage

Preallocation = Literal["off", "falloc", "full"]


def resize(device: BlockDevice, name: str, size: int, *, shrink: bool = False, fill: Preallocation = "off") -> None:
    """Let the disk be `size` bytes long.

    Args:
        shrink: what lies behind a new, nearer end may be lost.
        fill: falloc: set host space aside for what is new; full: write zeros there.

    Raises:
        OpenError: it cannot have that length, or would lose data that it may not.
        OSError: from the host.
    """
    if size < 0:
        raise OpenError(f"{name}: a disk cannot have {size} bytes")
    if size < device.size and not shrink:
        raise OpenError(f"{name}: would lose its last {device.size - size} bytes; say --shrink if that is meant")
    if isinstance(device, RawImage) and not device.file.is_device:
        _resize_raw(device, size, fill)
        return
    from nbdserve.formats.qcow2.resizing import resize as resize_qcow2
    from nbdserve.formats.qcow2.writable import WritableQcow2Image

    if not isinstance(device, WritableQcow2Image):
        raise OpenError(f"{name}: only raw files and qcow2 images change their length; convert it to another image")
    if fill != "off":
        raise OpenError(f"{name}: space is set aside only in raw files; leave --preallocation out")
    resize_qcow2(device, size)


def _resize_raw(device: RawImage, size: int, fill: Preallocation) -> None:
    old = device.size
    device.file.resize(size)
    if size > old and fill == "falloc":
        os.posix_fallocate(device.file.fd, old, size - old)
    elif size > old and fill == "full":
        device.file.write_zeros(old, size - old)
    device.size = size
