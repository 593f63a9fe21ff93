"""Changes of the header that need more room or less: the backing file, bitmaps, the version (QEMU, docs/interop/qcow2,
"Header" and "Header extensions").

The rule this file keeps: *the header says the old or the new, at every moment.* What says so is the
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
from nbdserve.formats.qcow2.extensions import (
    FEATURE_NAME_SIZE,
    Extension,
    build_extension,
    build_feature_names,
    read_extensions,
)
from nbdserve.formats.qcow2.header import (
    AUTOCLEAR_FIELD,
    BACKING_FIELDS,
    FIRST_SIZE,
    FULL_SIZE,
    HEADER_LENGTH_FIELD,
    SECOND_HEADER,
    Autoclear,
    Header,
)

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
    encoded = b"" if name is None else os.fsencode(name)
    if len(encoded) > _MAXIMUM_NAME or (name is not None and not encoded):
        raise OpenError(f"{file.name}: the backing file's name has to have 1 to {_MAXIMUM_NAME} bytes")
    first = _FirstCluster(file)
    first.rewrite(first.fixed_part, first.extensions, encoded, None if name is None else format)


def replace_bitmaps(file: HostFile, place: bytes | None) -> None:
    """Let the header lead to another directory of bitmaps, or to none, in one step; it vouches for them afterwards.

    Args:
        place: the content of the extension.

    Raises:
        OpenError: the header has no room for it.
        OSError: from the host.
    """
    first = _FirstCluster(file)
    autoclear = first.header.autoclear & ~Autoclear.BITMAPS | (Autoclear.BITMAPS if place is not None else 0)
    fixed = first.fixed_part
    fixed = fixed[:AUTOCLEAR_FIELD] + autoclear.to_bytes(8, "big") + fixed[AUTOCLEAR_FIELD + 8 :]
    extensions = {kind: data for kind, data in first.extensions.items() if kind != Extension.BITMAPS}
    if place is not None:
        extensions[Extension.BITMAPS] = place
    first.rewrite(fixed, extensions, first.name, first.header.backing_format)


def upgrade(file: HostFile) -> None:
    """Turn a version 2 image into one of version 3; nothing but the header differs.

    Raises:
        OpenError: the header has no room for what is new.
        OSError: from the host.
    """
    first = _FirstCluster(file)
    second = {
        "incompatible_features": 0,
        "compatible_features": 0,
        "autoclear_features": 0,
        "refcount_order": 4,
        "header_length": FULL_SIZE + 8,
    }
    fixed = first.fixed_part[:4] + (3).to_bytes(4, "big") + first.fixed_part[8:FIRST_SIZE]
    fixed += SECOND_HEADER.build(second) + bytes(8)
    extensions = {**first.extensions, Extension.FEATURE_NAMES: build_feature_names()}
    first.rewrite(fixed, extensions, first.name, first.header.backing_format)


def downgrade(file: HostFile) -> None:
    """Turn an image of version 3 into one of version 2; nothing but the header may need that. See downgrading.py.

    Raises:
        OSError: from the host.
    """
    first = _FirstCluster(file)
    fixed = first.fixed_part[:4] + (2).to_bytes(4, "big") + first.fixed_part[8:FIRST_SIZE]
    extensions = {kind: data for kind, data in first.extensions.items() if kind != Extension.FEATURE_NAMES}
    first.rewrite(fixed, extensions, first.name, first.header.backing_format)


def rename_data_file(file: HostFile, name: str) -> None:
    """Record another name for the external data file, by which the image is to find it.

    Raises:
        OpenError: the header has no room for it.
        OSError: from the host.
    """
    first = _FirstCluster(file)
    extensions = {**first.extensions, Extension.DATA_FILE: os.fsencode(name)}
    first.rewrite(first.fixed_part, extensions, first.name, first.header.backing_format)


class _FirstCluster:
    """What the first cluster says now.

    Attributes:
        fixed_part: the bytes before the extensions.
        name: of the backing file; empty without one.
    """

    def __init__(self, file: HostFile) -> None:
        self._file = file
        self.header = header = Header.read(file)
        cluster = bytes(file.read(0, header.geometry.cluster_size))
        start = FIRST_SIZE if header.version == 2 else int.from_bytes(cluster[HEADER_LENGTH_FIELD:][:4], "big")
        name_at, length = (
            int.from_bytes(cluster[BACKING_FIELDS:][at : at + size], "big") for at, size in ((0, 8), (8, 4))
        )
        old_name = _Range(name_at, name_at + length)
        limit = old_name.start or len(cluster)
        self.fixed_part = cluster[:start]
        self.name = cluster[old_name.start : old_name.stop] if name_at else b""
        self.extensions = read_extensions(cluster[start:limit], 0)
        self._size = len(cluster)
        self._taken = (_Range(start, min(limit, _end_of(start, self.extensions))), old_name)

    def rewrite(self, fixed: bytes, extensions: dict[int, bytes], name: bytes, format: str | None) -> None:
        """Let it say something else, in one write of its first sector."""
        area, place = _layout(self._file.name, extensions, format, len(fixed), len(name), self._size, self._taken)
        sector = (fixed + area).ljust(_SECTOR, b"\0")
        if place >= _SECTOR:
            self._file.write(place, name)
            self._file.sync()
        else:
            sector = sector[:place] + name + sector[place + len(name) :]
        fields = (place if name else 0).to_bytes(8, "big") + len(name).to_bytes(4, "big")
        self._file.write(0, sector[:BACKING_FIELDS] + fields + sector[BACKING_FIELDS + len(fields) :])
        self._file.sync()


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
