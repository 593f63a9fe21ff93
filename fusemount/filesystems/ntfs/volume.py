"""An NTFS volume, read: MFT records by number, files put together from them.

A file is a base record, and when that gets too small, other records that an $ATTRIBUTE_LIST names. $MFT itself, the
file of all records, is record 0. Nothing here writes, and nothing here trusts: a record that is damaged, not in use or
used anew since the reference was made is an OSError for whoever asked for it.
"""

from __future__ import annotations

import errno
from collections import OrderedDict
from typing import TypeVar

from fusemount.filesystems.base import Inode, error
from fusemount.filesystems.ntfs.boot import read_geometry
from fusemount.filesystems.ntfs.records import (
    Attribute,
    ListEntry,
    Record,
    RecordFlags,
    Reference,
    Type,
    parse_attribute_list,
    parse_record,
)
from fusemount.filesystems.ntfs.streams import Stream
from nbdserve.block import BlockDevice

MFT, MIRROR, LOG, VOLUME, ROOT, BITMAP, UPCASE = 0, 1, 2, 3, 5, 6, 10
"""Numbers of the system files."""
FIRST_USER = 24
"""The first record that is no system file."""

_LARGEST_LIST = 1 << 20
_CHUNK = 64 << 10
_NODES = 4096
_CHUNKS = 64
T = TypeVar("T")


def inode_of(reference: Reference) -> Inode:
    """The number we give to a file: unlike that of its record, it does not come back when the record is used anew."""
    if reference.number >> 32:
        raise error(errno.EIO)  # NTFS has at most 2**32 - 1 files
    return Inode(reference.sequence << 32 | reference.number)


def reference_of(inode: Inode) -> Reference:
    """The inverse of inode_of()."""
    return Reference(inode & 0xFFFFFFFF, inode >> 32)


class Node:
    """A file: all its attributes."""

    def __init__(self, volume: Volume, record: Record, attributes: list[Attribute]) -> None:
        self._volume = volume
        self._streams: dict[tuple[int, str], Stream] = {}
        self.attributes = attributes
        self.reference = Reference(record.number, record.sequence)
        self.is_directory = bool(record.flags & RecordFlags.DIRECTORY)

    def values(self, kind: Type) -> list[bytes]:
        """The values of all resident attributes of a type."""
        return [found.value for found in self.attributes if found.type == kind and found.value is not None]

    def has(self, kind: Type, name: str = "") -> bool:
        """Whether there is such an attribute."""
        return any(found.type == kind and found.name == name for found in self.attributes)

    def stream(self, kind: Type, name: str = "") -> Stream:
        """The content of an attribute. Raises ENOENT when there is none, EIO when its runs are damaged."""
        key = (kind, name)
        stream = self._streams.get(key)
        if stream is None:
            pieces = [found for found in self.attributes if found.type == kind and found.name == name]
            if not pieces:
                raise error(errno.ENOENT)
            pieces.sort(key=lambda piece: piece.lowest)
            stream = self._streams[key] = Stream(self._volume.device, self._volume.geometry, pieces)
        return stream


class Volume:
    """A volume on a device.

    Raises:
        FormatError: the boot sector is not one of NTFS.
        OSError: EIO, the MFT cannot be read.
    """

    def __init__(self, device: BlockDevice) -> None:
        self.device = device
        self.geometry = read_geometry(device)
        self._nodes: OrderedDict[int, Node] = OrderedDict()
        self._chunks: OrderedDict[int, bytes] = OrderedDict()
        self._first = b""
        self.reload()

    def reload(self) -> None:
        """Forget what was read, because the volume has been changed."""
        self._nodes.clear()
        self._chunks.clear()
        geometry = self.geometry
        block = self.device.read(geometry.mft * geometry.cluster, geometry.record)
        if block == self._first:
            return  # it holds the sizes of the MFT, so the whole of it is where it was
        self._first = bytes(block)
        record = parse_record(MFT, block)
        own = [found for found in record.attributes if found.type == Type.DATA and not found.name]
        if not own or own[0].value is not None or own[0].lowest:
            raise error(errno.EIO)
        # The MFT describes itself: each further piece of it lies in a record that the pieces before it lead to.
        self._mft = Stream(self.device, geometry, own)
        attributes = list(record.attributes)
        for entry in self._listed(record):
            if entry.record.number != MFT:
                piece = self._piece(record, entry.record, entry.type, entry.instance)
                attributes.append(piece)
                if piece.type == Type.DATA and not piece.name:
                    self._mft.extend(piece)
        self.mft = Node(self, record, attributes)

    @property
    def records(self) -> int:
        """How many records the MFT has."""
        return self._mft.size // self.geometry.record

    def node(self, reference: Reference) -> Node:
        """The file of a reference. Raises ESTALE when its record was used anew, ENOENT when it is not in use."""
        node = self._nodes.get(reference.number)
        if node is None:
            node = self._read_node(reference.number)
            keep(self._nodes, reference.number, node, _NODES)
        if reference.sequence and node.reference.sequence != reference.sequence:
            raise error(errno.ESTALE)
        return node

    def system(self, number: int) -> Node:
        """A system file by its number."""
        return self.node(Reference(number, 0))

    def _read_node(self, number: int) -> Node:
        if number == MFT:
            return self.mft
        record = self.record(number)
        if record.base:
            raise error(errno.EIO)
        if not any(found.type == Type.ATTRIBUTE_LIST for found in record.attributes):
            return Node(self, record, list(record.attributes))
        own = {(found.type, found.instance): found for found in record.attributes}
        attributes = []
        for entry in self._listed(record):
            if entry.record.number == number:
                if (entry.type, entry.instance) in own:
                    attributes.append(own[entry.type, entry.instance])
            else:
                attributes.append(self._piece(record, entry.record, entry.type, entry.instance))
        return Node(self, record, attributes)

    def record(self, number: int) -> Record:
        """One MFT record."""
        size = self.geometry.record
        chunk_size = max(_CHUNK, size)
        index, offset = divmod(number * size, chunk_size)
        chunk = self._chunks.get(index)
        if chunk is None:
            chunk = bytes(self._mft.read(index * chunk_size, chunk_size))
            keep(self._chunks, index, chunk, _CHUNKS)
        if offset + size > len(chunk):
            raise error(errno.EIO)
        return parse_record(number, bytearray(chunk[offset : offset + size]))

    def _listed(self, record: Record) -> list[ListEntry]:
        """The entries of a record's attribute list."""
        found = [attribute for attribute in record.attributes if attribute.type == Type.ATTRIBUTE_LIST]
        if not found:
            return []
        stream = Stream(self.device, self.geometry, found)
        if stream.size > _LARGEST_LIST:
            raise error(errno.EIO)
        return list(parse_attribute_list(bytes(stream.read(0, stream.size))))

    def _piece(self, base: Record, reference: Reference, kind: int, instance: int) -> Attribute:
        record = self.record(reference.number)
        if Reference.unpack(record.base) != (base.number, base.sequence) or record.sequence != reference.sequence:
            raise error(errno.EIO)
        for found in record.attributes:
            if found.type == kind and found.instance == instance:
                return found
        raise error(errno.EIO)


def keep(cache: OrderedDict[int, T], key: int, value: T, most: int) -> None:
    """Put something into a cache of at most `most` things; the oldest one leaves."""
    cache[key] = value
    if len(cache) > most:
        cache.popitem(last=False)
