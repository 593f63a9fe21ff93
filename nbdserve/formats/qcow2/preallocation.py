"""A place for every guest cluster of a new image, in advance."""

from __future__ import annotations

import os

from nbdserve.block.device import BlockDevice
from nbdserve.block.file import HostFile
from nbdserve.errors import OpenError
from nbdserve.formats import OpenOptions
from nbdserve.formats.qcow2.opening import open_qcow2
from nbdserve.formats.qcow2.writable import WritableQcow2Image


def preallocate(path: str, data_path: str | None, mode: str) -> None:
    """Give every cluster of an empty image a place.

    Args:
        data_path: its external data file.
        mode: metadata, falloc (set host space aside as well) or full (write zeros as well).
    """

    def open_file(name: str, *, writable: bool) -> HostFile:
        assert data_path is not None
        return HostFile.open(data_path, writable=writable)

    def open_reference(name: str, format: str | None) -> BlockDevice:
        raise OpenError(f"{path}: is not preallocated over a backing file")

    file = HostFile.open(path, writable=True)
    image = open_qcow2(file, OpenOptions(False, open_reference, open_file=open_file))
    with image:
        assert isinstance(image, WritableQcow2Image)
        for host, length in image.place_all():
            target = image.file if data_path is None else image.data_file
            if mode == "falloc":
                os.posix_fallocate(target.fd, host, length)
            elif mode == "full":
                target.write_zeros(host, length)
