"""How a differencing disk names its parent: by several paths, and by the GUID of the parent's content.

The locator is a GUID that says what kind it is, and keys and values in UTF-16 ([MS-VHDX] 2.6.2.6). The paths are tried
in the order that the specification gives; the volume's GUID and drive letters mean nothing here (see vpc.parents).
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from construct import Bytes, Int16ul, Int32ul, Padding, Struct

from nbdserve.block.device import BlockDevice
from nbdserve.errors import FormatError, Unsupported
from nbdserve.formats import OpenReference
from nbdserve.formats.vhdx.image import VhdxImage
from nbdserve.formats.vpc.parents import local_names, open_parent, windows_name

VHDX_LOCATOR = uuid.UUID("b04aefb7-d19e-4a81-b789-25b8e9445913")

_LOCATOR = Struct("kind" / Bytes(16), Padding(2), "count" / Int16ul)
_ENTRY = Struct("key" / Int32ul, "value" / Int32ul, "key_length" / Int16ul, "value_length" / Int16ul)


@dataclass(frozen=True, slots=True)
class ParentLocator:
    """What a parent locator says.

    Attributes:
        linkage: possible DataWriteGuids of the parent; the second one counts while two disks are being merged.
        names: where to look for it, in order, as local paths.
    """

    linkage: frozenset[uuid.UUID]
    names: list[str]

    @classmethod
    def parse(cls, item: bytes, name: str) -> ParentLocator:
        """Take the metadata item apart.

        Raises:
            FormatError: it is damaged.
            Unsupported: another kind of locator.
        """
        pairs = _pairs(item, name)
        try:
            linkage = [uuid.UUID(pairs[key]) for key in ("parent_linkage", "parent_linkage2") if key in pairs]
        except ValueError:
            raise _damaged(name) from None
        if "parent_linkage" not in pairs:
            raise _damaged(name)
        absolute = [pairs[key] for key in ("volume_path", "absolute_win32_path") if key in pairs]
        relative = [pairs["relative_path"]] if "relative_path" in pairs else []
        return cls(frozenset(linkage), local_names(relative, absolute))

    def open(self, owner: str, open_reference: OpenReference) -> BlockDevice:
        """Open the parent, whose content must be the one that the child was made for."""

        def check(device: BlockDevice) -> str | None:
            if not isinstance(device, VhdxImage):
                return "is no VHDX"
            if device.data_write_guid not in self.linkage:
                return "has been changed since this disk was made (its DataWriteGuid is another)"
            return None

        return open_parent(owner, self.names, "vhdx", open_reference, check)


def build_locator(relative_path: str, linkage: uuid.UUID) -> bytes:
    """The metadata item for a parent of that name, as the child is to find it."""
    pairs = {"parent_linkage": f"{{{linkage}}}", "relative_path": windows_name(relative_path)}
    table, strings = b"", b""
    first = _LOCATOR.sizeof() + len(pairs) * _ENTRY.sizeof()
    for pair in pairs.items():
        key, value = (part.encode("utf-16-le") for part in pair)
        at = first + len(strings)
        table += _ENTRY.build({"key": at, "value": at + len(key), "key_length": len(key), "value_length": len(value)})
        strings += key + value
    return _LOCATOR.build({"kind": VHDX_LOCATOR.bytes_le, "count": len(pairs)}) + table + strings


def _pairs(item: bytes, name: str) -> dict[str, str]:
    """The keys and values of a locator."""
    if len(item) < _LOCATOR.sizeof():
        raise _damaged(name)
    head = _LOCATOR.parse(item)
    kind = uuid.UUID(bytes_le=head.kind)
    if kind != VHDX_LOCATOR:
        raise Unsupported(f"{name}: its parent is found by a locator of kind {kind}, which is not known here")
    start, size = _LOCATOR.sizeof(), _ENTRY.sizeof()
    if start + head.count * size > len(item):
        raise _damaged(name)
    pairs = {}
    for index in range(head.count):
        entry = _ENTRY.parse(item[start + index * size : start + (index + 1) * size])
        if entry.key + entry.key_length > len(item) or entry.value + entry.value_length > len(item):
            raise _damaged(name)
        key = item[entry.key : entry.key + entry.key_length].decode("utf-16-le", "replace")
        pairs[key] = item[entry.value : entry.value + entry.value_length].decode("utf-16-le", "replace")
    return pairs


def _damaged(name: str) -> FormatError:
    return FormatError(f"{name}: the parent locator is damaged, so its parent disk cannot be found")
