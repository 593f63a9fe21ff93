"""The descriptor of a VMDK: a text, in a file of its own or inside a sparse extent (VDF, "The Descriptor File").

Names in it are checked by nobody here: what they may mean is for the gate that opens them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from nbdserve.errors import FormatError, Unsupported
from nbdserve.formats.vmdk import SECTOR

MAXIMUM_SIZE = 1 << 20  # of the text, in bytes
NO_PARENT = 0xFFFFFFFF
_MAXIMUM_EXTENTS = 4096
_MAXIMUM_SECTORS = 1 << 46  # of a disk

_EXTENT = re.compile(r'(RW|RDONLY|NOACCESS)[ \t]+(\d{1,19})[ \t]+(\w+)(?:[ \t]+"([^"]*)"(?:[ \t]+(\d{1,19}))?)?')
_CID = re.compile(rb"^[ \t]*CID[ \t]*=[ \t]*([0-9A-Fa-f]{1,8})[ \t]*\r?$", re.MULTILINE | re.IGNORECASE)
_HEXADECIMAL = re.compile("[0-9A-Fa-f]{1,8}")

# Disks that are, or stand on, physical disks of the machine they were made on.
_ON_DEVICES = frozenset(
    ("fullDevice", "partitionedDevice", "vmfsRaw", "vmfsRDM", "vmfsRawDeviceMap", "vmfsPassthroughRawDeviceMap")
)


class Access(StrEnum):
    """What may be done with an extent."""

    READ_WRITE = "RW"
    READ_ONLY = "RDONLY"
    NONE = "NOACCESS"


class ExtentType(StrEnum):
    """How an extent keeps its bytes."""

    FLAT = "FLAT"
    VMFS = "VMFS"
    ZERO = "ZERO"
    SPARSE = "SPARSE"
    VMFS_SPARSE = "VMFSSPARSE"
    SE_SPARSE = "SESPARSE"


@dataclass(frozen=True, slots=True)
class ExtentLine:
    """One line of the extent description.

    Attributes:
        size: bytes of the disk that it covers.
        name: of the file, as written; empty for ZERO.
        offset: where a flat extent begins in its file, in bytes.
    """

    access: Access
    size: int
    type: ExtentType
    name: str
    offset: int


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a descriptor says.

    Attributes:
        cid: content ID; changes when the disk is written for the first time after it was opened.
        cid_span: where its digits stand in the text, as offsets of bytes.
        parent_cid: the cid that the parent must have, or NO_PARENT.
        parent_name: the parent's file, as written; None without a parent.
    """

    create_type: str
    cid: int
    cid_span: tuple[int, int]
    parent_cid: int
    parent_name: str | None
    extents: tuple[ExtentLine, ...]


def parse_descriptor(raw: bytes, name: str) -> Descriptor:
    """Take a descriptor apart; `name` is the file's, for messages.

    Raises:
        FormatError: it is none, or contradicts itself.
        Unsupported: it describes a disk of a kind that is not handled here.
    """
    raw = raw.split(b"\0", 1)[0]
    lines = _decode(raw).split("\n")
    settings: dict[str, str] = {}
    for line in lines:
        key, equals, value = line.partition("=")
        if equals:
            settings.setdefault(key.strip().lower(), value.strip().strip('"'))
    cid = _CID.search(raw)
    create_type = settings.get("createtype")
    if create_type is None or cid is None:
        raise FormatError(f"{name}: the VMDK descriptor has no createType or no CID; it is damaged")
    if create_type in _ON_DEVICES:
        raise Unsupported(f"{name}: VMDK disks of type {create_type} stand on physical disks, which is not handled")
    parent_cid = settings.get("parentcid", "ffffffff")
    if not _HEXADECIMAL.fullmatch(parent_cid):
        raise FormatError(f"{name}: the VMDK descriptor's parentCID is not a number; it is damaged")
    parent_name = settings.get("parentfilenamehint") or None
    if (int(parent_cid, 16) == NO_PARENT) != (parent_name is None):
        raise FormatError(
            f"{name}: the VMDK descriptor must have both parentCID and parentFileNameHint, or neither; it is damaged"
        )
    return Descriptor(
        create_type, int(cid[1], 16), cid.span(1), int(parent_cid, 16), parent_name, _extents(lines, name)
    )


def _decode(raw: bytes) -> str:
    """The text; of the encodings that descriptors announce, Windows' Western one is the only other that is seen."""
    if b'encoding="windows-1252"' in raw.lower():
        return raw.decode("cp1252", "replace")
    return raw.decode("utf-8", "surrogateescape")


def _extents(text: list[str], name: str) -> tuple[ExtentLine, ...]:
    lines: list[ExtentLine] = []
    total = 0
    for found in filter(None, (_EXTENT.match(line.strip()) for line in text)):
        access, sectors, kind, file, offset = found.groups()
        if kind not in tuple(ExtentType):
            raise Unsupported(f"{name}: VMDK extents of type {kind[:20]} are not handled")
        if kind != ExtentType.ZERO and not file:
            raise FormatError(f"{name}: an extent of the VMDK descriptor has no file; the descriptor is damaged")
        total += int(sectors)
        lines.append(
            ExtentLine(Access(access), int(sectors) * SECTOR, ExtentType(kind), file, int(offset or 0) * SECTOR)
        )
        if len(lines) > _MAXIMUM_EXTENTS or total > _MAXIMUM_SECTORS or not int(sectors):
            raise FormatError(
                f"{name}: the VMDK descriptor has an empty extent, more than {_MAXIMUM_EXTENTS} of them, or "
                f"more than {_MAXIMUM_SECTORS} sectors in them; it is damaged"
            )
    return tuple(lines)


def build_descriptor(
    create_type: str,
    cid: int,
    extents: list[tuple[int, str, str]],
    size: int,
    *,
    parent: tuple[int, str] | None = None,
    adapter_type: str = "ide",
    hardware_version: int = 4,
) -> bytes:
    """The text that describes a disk of `size` bytes.

    Args:
        extents: (bytes, type and what follows the name, name) of each.
        parent: (CID, file name) of the disk to stand on.

    Raises:
        FormatError: a name cannot be written into a descriptor.
    """
    for each in (*(name for _, _, name in extents), *([parent[1]] if parent else [])):
        if not each or any(character in each for character in '"\r\n\0'):
            raise FormatError(f"{each!r} cannot be written into a VMDK descriptor; choose another name")
    heads = 16 if adapter_type == "ide" else 255
    lines = [
        *("# Disk DescriptorFile", "version=1", 'encoding="UTF-8"', f"CID={cid:08x}"),
        f"parentCID={parent[0] if parent else NO_PARENT:08x}",
        f'createType="{create_type}"',
        *([f'parentFileNameHint="{parent[1]}"'] if parent else []),
        *("", "# Extent description"),
        *(_extent_line(*extent) for extent in extents),
        *("", "# The Disk Data Base", "#DDB", ""),
        f'ddb.virtualHWVersion = "{hardware_version}"',
        f'ddb.geometry.cylinders = "{min(size // (heads * 63 * SECTOR), 16383 if heads == 16 else 1 << 30)}"',
        f'ddb.geometry.heads = "{heads}"',
        *('ddb.geometry.sectors = "63"', f'ddb.adapterType = "{adapter_type}"', ""),
    ]
    return "\n".join(lines).encode("utf-8", "surrogateescape")


def _extent_line(size: int, kind: str, name: str) -> str:
    word, _, rest = kind.partition(" ")
    return f'RW {size // SECTOR} {word} "{name}"' + (f" {rest}" if rest else "")
