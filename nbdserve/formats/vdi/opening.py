"""Opening a VDI: its header, its parent, then the image."""

from __future__ import annotations

from nbdserve.block.file import HostFile
from nbdserve.errors import OpenError
from nbdserve.formats import OpenOptions
from nbdserve.formats.vdi.header import ImageType, read_header
from nbdserve.formats.vdi.image import VdiImage


def open_vdi(file: HostFile, options: OpenOptions) -> VdiImage:
    """See nbdserve.formats.vdi.open_image()."""
    if options.snapshot is not None:
        raise OpenError(f"{file.name}: VDI images have no internal snapshots; leave --snapshot out")
    header = read_header(file)
    parent = None
    if header.image_type == ImageType.DIFFERENCING:
        from nbdserve.formats.vdi.parent import open_parent

        parent = open_parent(file, header, options)
    try:
        return VdiImage(file, header, parent, read_only=options.read_only)
    except BaseException:
        if parent is not None:
            parent.close()
        raise
