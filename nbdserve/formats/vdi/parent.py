"""The parent of a differencing VDI: VirtualBox records only its UUID, and knows the path from a registry elsewhere.

So the parent is looked for by UUID: among the .vdi files of the image's own directory and, where that is called
Snapshots, as VirtualBox lays out its machines, among those of the directory above. Every file is opened through the
gate that is given, which may refuse it; the directory above must be allowed by the user.
"""

from __future__ import annotations

import os

from nbdserve.block.device import BlockDevice
from nbdserve.block.file import HostFile
from nbdserve.errors import FormatError, OpenError
from nbdserve.formats import OpenOptions
from nbdserve.formats.vdi.header import HEADER_SIZE, NO_UUID, Header, uuids_of

_MOST_CANDIDATES = 4096  # files looked into before giving up


def open_parent(file: HostFile, header: Header, options: OpenOptions) -> BlockDevice:
    """Open the image that a differencing one stands on.

    Raises:
        OpenError: it is not found, may not be opened, or has been changed since.
    """
    return options.open_reference(find_parent(file, header, options), "vdi")


def find_parent(file: HostFile, header: Header, options: OpenOptions) -> str:
    """The path, from the image's own directory, of the image that a differencing one stands on.

    Raises:
        OpenError: it is not found, may not be opened, or has been changed since.
    """
    refused: list[OpenError] = []
    stale = None
    for name in _candidates(file.name):
        uuids = _uuids(name, options, refused)
        if uuids is None or uuids[0] != header.parent_uuid:
            continue
        if header.parent_modification_uuid in (NO_UUID, uuids[1]):
            return name
        stale = name
    if stale is not None:
        raise FormatError(
            f"{file.name}: its parent {stale} has been written to since this image was made on it; both are of use "
            "only on their own"
        )
    where = f"; {refused[0]}" if refused else ""
    raise OpenError(
        f"{file.name}: is a differencing image, and no .vdi beside it has its parent's UUID {header.parent_uuid}; "
        f"put the parent into the same directory{where}"
    )


def _candidates(path: str) -> list[str]:
    """The files that may be the parent, as paths from the image's own directory."""
    home = os.path.dirname(path) or "."
    found = _vdi_files(home)
    if os.path.basename(os.path.realpath(home)) == "Snapshots":
        found += [os.path.join("..", name) for name in _vdi_files(os.path.join(home, ".."))]
    return found[:_MOST_CANDIDATES]


def _vdi_files(directory: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(directory) if name.lower().endswith(".vdi"))
    except OSError:
        return []


def _uuids(name: str, options: OpenOptions, refused: list[OpenError]) -> tuple[object, object] | None:
    """The UUIDs of a file; None when it is no VDI. What the gate refuses is noted: the one sought may be among it."""
    try:
        candidate = options.open_file(name, writable=False)
    except FormatError:  # an image that stands on this one
        return None
    except OpenError as error:
        refused.append(error)
        return None
    try:
        return uuids_of(bytes(candidate.read(0, HEADER_SIZE)))
    finally:
        candidate.close()
