"""Let an image stand on another backing file, or on none (QEMU, docs/interop/qcow2, "Header" and "Header extensions").

The rule this file keeps: *the image stands on the old file or on the new one, at every moment.* What says so is the
first sector alone, which a disk writes as a whole: the header fields that lead to the name, and the extension with the
format. The name itself, where it does not fit into that sector, goes first to a place in the first cluster that nothing
leads to yet, and is on stable storage before the sector is written.

So all extensions have to fit into the first sector. The names of features, which only help programs that do not know
them, are left out from the last one on as far as that takes; everything else stays.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from nbdserve.block.file import HostFile
from nbdserve.errors import OpenError
from nbdserve.formats.qcow2.extensions import FEATURE_NAME_SIZE, Extension, build_extension, read_extensions
from nbdserve.formats.qcow2.header import BACKING_FIELDS, FIRST_SIZE, HEADER_LENGTH_FIELD, Header

_SECTOR = 512
_MAXIMUM_NAME = 1023  # bytes


class _Range(NamedTuple):
    """Bytes of the first cluster."""

    start: int
    stop: int


def relink(file: HostFile, name: str | None, format: str | None) -> None:
    """Record another backing file, by the name with which the image is to find it, and its format.

    The image shows something else afterwards, unless its owner has seen to that before; see imagetools/rebasing.py.
    Nobody else may use it meanwhile.

    Args:
        name: None: the image stands on its own from now on.

    Raises:
        OpenError: the name is too long, or the header has no room for it.
        OSError: from the host.
    """
    header = Header.read(file)
    encoded = b"" if name is None else os.fsencode(name)
    if len(encoded) > _MAXIMUM_NAME or (name is not None and not encoded):
        raise OpenError(f"{file.name}: the backing file's name has to have 1 to {_MAXIMUM_NAME} bytes")
    cluster = bytearray(file.read(0, header.geometry.cluster_size))
    start = FIRST_SIZE if header.version == 2 else int.from_bytes(cluster[HEADER_LENGTH_FIELD:][:4], "big")
    old_name_at = int.from_bytes(cluster[BACKING_FIELDS:][:8], "big")
    old_name = _Range(old_name_at, old_name_at + int.from_bytes(cluster[BACKING_FIELDS + 8 :][:4], "big"))
    limit = old_name.start or len(cluster)
    extensions = read_extensions(bytes(cluster[start:limit]), 0)
    taken = (_Range(start, min(limit, _end_of(start, extensions))), old_name)
    area, place = _layout(
        file.name, extensions, None if name is None else format, start, len(encoded), len(cluster), taken
    )
    sector = (bytes(cluster[:start]) + area).ljust(_SECTOR, b"\0")
    if place >= _SECTOR:
        file.write(place, encoded)
        file.sync()
    else:
        sector = sector[:place] + encoded + sector[place + len(encoded) :]
    fields = (place if encoded else 0).to_bytes(8, "big") + len(encoded).to_bytes(4, "big")
    file.write(0, sector[:BACKING_FIELDS] + fields + sector[BACKING_FIELDS + len(fields) :])
    file.sync()


def _layout(
    image: str,
    extensions: dict[int, bytes],
    format: str | None,
    start: int,
    length: int,
    size: int,
    taken: tuple[_Range, ...],
) -> tuple[bytes, int]:
    """The extensions, which begin at `start`, and where the name goes; behind the first sector if it can be."""
    for reserved in (0, length):
        area = _extension_area(extensions, format, _SECTOR - start - reserved)
        if area is None:
            break
        place = start + len(area)
        if place + length > _SECTOR:
            place = _free_place(length, size, taken)
        if place:
            return area, place
    raise OpenError(f"{image}: its header has no room for the backing file's name; use a shorter one, or convert it")


def _end_of(start: int, extensions: dict[int, bytes]) -> int:
    return start + sum(8 + -(-len(data) // 8) * 8 for data in extensions.values()) + 8


def _extension_area(extensions: dict[int, bytes], format: str | None, room: int) -> bytes | None:
    """All extensions with the new format, at most `room` bytes; None if they do not fit."""
    first = b"" if format is None else build_extension(Extension.BACKING_FORMAT, format.encode())
    spared = (Extension.BACKING_FORMAT, Extension.FEATURE_NAMES)
    kept = b"".join(build_extension(kind, data) for kind, data in extensions.items() if kind not in spared)
    end = build_extension(Extension.END, b"")
    room -= len(first) + len(kept) + len(end)
    if room < 0:
        return None
    names = extensions.get(Extension.FEATURE_NAMES, b"")
    names = names[: min(len(names), room - 8) // FEATURE_NAME_SIZE * FEATURE_NAME_SIZE] if room > 8 else b""
    return first + kept + (build_extension(Extension.FEATURE_NAMES, names) if names else b"") + end


def _free_place(length: int, size: int, taken: tuple[_Range, ...]) -> int:
    """Where `length` bytes fit behind the first sector, beside what is taken; 0 if nowhere."""
    for place in (_SECTOR, *(used.stop for used in taken if used.stop > _SECTOR)):
        if place + length <= size and all(place >= used.stop or place + length <= used.start for used in taken):
            return place
    return 0
