"""Opening a VHDX: headers, log, layout, parent, in the order in which each can be believed."""

from __future__ import annotations

import uuid

from nbdserve.block.file import HostFile
from nbdserve.errors import FormatError, OpenError, Unsupported
from nbdserve.formats import OpenOptions
from nbdserve.formats.vhdx import MAXIMUM_FILE, SIGNATURE
from nbdserve.formats.vhdx.headers import NO_GUID, Headers
from nbdserve.formats.vhdx.image import VhdxImage
from nbdserve.formats.vhdx.layout import read_layout
from nbdserve.formats.vhdx.log import ReplayedFile, read_log, replay
from nbdserve.formats.vhdx.parent import ParentLocator


def open_vhdx(file: HostFile, options: OpenOptions) -> VhdxImage:
    """See nbdserve.formats.vhdx.open_image()."""
    if options.snapshot is not None:
        raise OpenError(f"{file.name}: VHDX images have no internal snapshots; leave --snapshot out")
    if file.read(0, len(SIGNATURE)) != SIGNATURE:
        raise FormatError(f"{file.name}: not a VHDX image: no signature at its start; check the format you gave")
    if not options.read_only and file.size > MAXIMUM_FILE:
        raise Unsupported(f"{file.name}: a file of {file.size} bytes is too large to be written; open it read-only")
    headers = Headers(file)
    replayed = _empty_log(file, headers, read_only=options.read_only)
    layout = read_layout(replayed or file, headers.current)
    backing = None
    if layout.parent_locator is not None:
        backing = ParentLocator.parse(layout.parent_locator, file.name).open(file.name, options.open_reference)
    try:
        return VhdxImage(file, headers, layout, backing, read_only=options.read_only, replayed=replayed)
    except BaseException:
        if backing is not None:
            backing.close()
        raise


def _empty_log(file: HostFile, headers: Headers, *, read_only: bool) -> ReplayedFile | None:
    """See to the log: nothing is left in it, or the file as it reads after the replay is returned."""
    wanted = read_log(file, headers.current)
    if wanted is not None and read_only:
        return ReplayedFile(file, wanted)
    if headers.current.log_guid != NO_GUID and not read_only:
        headers.update(file_write_guid=uuid.uuid4())  # before the first change (2.2.2.1)
        if wanted is not None:
            replay(file, wanted)
        headers.update(log_guid=NO_GUID)
    return None
