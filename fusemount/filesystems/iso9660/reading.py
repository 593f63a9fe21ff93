"""IsoReader: the files of an ISO 9660 image.

Names, owners, modes and links are those of Rock Ridge where the image has it; else the names are those of Joliet; else
those of ISO 9660 itself, in lower case and without version, as Linux shows them. A file's number is the place of its
directory record, so any file can be found again without having read the way to it.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from fusemount.filesystems.base import Attributes, Entry, FileSystem, Inode, Space, error
from fusemount.filesystems.iso9660 import rockridge
from fusemount.filesystems.iso9660.records import (
    SECTOR,
    DirectoryRecord,
    Flags,
    VolumeDescriptor,
    parse_record,
)
from fusemount.filesystems.iso9660.rockridge import RockRidge
from fusemount.filesystems.iso9660.zisofs import CompressedFile
from nbdserve.block import BlockDevice
from nbdserve.block.file import ReadBuffer

_SELF, _PARENT = b"\0", b"\1"
_LARGEST_DIRECTORY = 256 << 20
_MOST_SECTIONS = 4096
_KEPT_DIRECTORIES = 256
_MOVED = (b"rr_moved", b".rr_moved")


@dataclass(frozen=True, slots=True)
class Node:
    """A file.

    Attributes:
        sections: where the content lies: (first byte on the device, length).
        size: the bytes in all sections.
        extra: what Rock Ridge says.
    """

    record: DirectoryRecord
    sections: tuple[tuple[int, int], ...]
    size: int
    kind: int
    extra: RockRidge


class IsoReader(FileSystem):
    """An image; args: the views of it that find_volumes() found."""

    def __init__(self, device: BlockDevice, volumes: list[VolumeDescriptor]) -> None:
        self._device = device
        self._volume = volumes[0]
        self._names = lru_cache(_KEPT_DIRECTORIES)(self._names_in)
        self._node = lru_cache(4096)(self._read_node)
        self._compressed = lru_cache(64)(self._open_compressed)
        self._skip = self._rock_ridge_of(volumes[0])
        if self._skip is None:
            self._volume = volumes[-1]
        self.has_owners = self._skip is not None
        self.root = Inode(self._volume.root)

    # Looking

    def lookup(self, directory: Inode, name: bytes) -> Inode:
        found = self._names(directory).get(name)
        if found is None:
            raise error(errno.ENOENT)
        return found[0]

    def attributes(self, inode: Inode) -> Attributes:
        node = self._node(inode)
        extra = node.extra
        mode = node.kind | (0o555 if extra.mode is None else stat.S_IMODE(extra.mode))
        modified = node.record.mtime_ns if extra.mtime_ns is None else extra.mtime_ns
        size = self._content_size(node)
        return Attributes(
            inode=inode,
            mode=mode,
            links=extra.links,
            uid=extra.uid,
            gid=extra.gid,
            size=size,
            blocks=-(-node.size // 512),
            atime_ns=modified if extra.atime_ns is None else extra.atime_ns,
            mtime_ns=modified,
            ctime_ns=modified if extra.ctime_ns is None else extra.ctime_ns,
            device=extra.device,
        )

    def entries(self, directory: Inode, position: int = 0) -> Iterator[Entry]:
        for name, (inode, kind) in self._names(directory).items():
            if inode > position:
                yield Entry(inode, name, inode, kind)

    def read(self, inode: Inode, offset: int, length: int) -> ReadBuffer:
        node = self._node(inode)
        if node.kind == stat.S_IFDIR:
            raise error(errno.EISDIR)
        if node.extra.strange:
            raise error(errno.EOPNOTSUPP)
        if node.extra.zisofs is not None:
            return self._compressed(inode).read(offset, length)
        return self._read_stored(node, offset, length)

    def read_link(self, inode: Inode) -> bytes:
        node = self._node(inode)
        if node.kind != stat.S_IFLNK:
            raise error(errno.EINVAL)
        return node.extra.target or b""

    def space(self) -> Space:
        return Space(self._volume.block, self._volume.size // self._volume.block, 0, 0, 0)

    # Directories

    def _names_in(self, directory: Inode) -> dict[bytes, tuple[Inode, int]]:
        """The names in a directory in the order of their records: {name: (number, type)}."""
        node = self._node(directory)
        if node.kind != stat.S_IFDIR:
            raise error(errno.ENOTDIR)
        return {name: found for name, found in self._read_names(node) if _is_name(name)}

    def _read_names(self, node: Node) -> Iterator[tuple[bytes, tuple[Inode, int]]]:
        continues = False
        for record in self._records(node):
            first, continues = not continues, bool(record.flags & Flags.MULTI_EXTENT)
            if not first or record.name in (_SELF, _PARENT) or record.flags & Flags.ASSOCIATED:
                continue
            inode = Inode(record.place)
            try:
                found = self._node(inode)
            except OSError as failure:
                if isinstance(failure, BlockingIOError):
                    raise
                yield self._plain_name(record), (inode, stat.S_IFREG)  # to say EIO when it is asked about
                continue
            name = found.extra.name or self._plain_name(record)
            if found.extra.moved or (node.record.place == self.root and name in _MOVED and self._only_moved(found)):
                continue
            yield name, (inode, found.kind)

    def _records(self, node: Node) -> Iterator[DirectoryRecord]:
        """The records of a directory, `.` and `..` too; they do not cross sectors."""
        if node.size > _LARGEST_DIRECTORY:
            raise error(errno.EIO)
        place, _ = node.sections[0]
        content = bytes(self._read_stored(node, 0, node.size))
        for start in range(0, len(content), SECTOR):
            sector = content[start : start + SECTOR]
            offset = 0
            while offset < len(sector) and sector[offset]:
                record = parse_record(sector, offset, place + start)
                yield record
                offset += record.length

    def _only_moved(self, node: Node) -> bool:
        """Whether a directory holds nothing but directories that lay too deep: they are shown where they belong."""
        if node.kind != stat.S_IFDIR:
            return False
        records = [record for record in self._records(node) if record.name not in (_SELF, _PARENT)]
        return all(self._extra(record).moved for record in records)

    def _plain_name(self, record: DirectoryRecord) -> bytes:
        """A record's name where Rock Ridge gives it none."""
        if self._volume.joliet:
            text = record.name[: len(record.name) & ~1].decode("utf-16-be", "surrogatepass")
            return text.removesuffix(";1").encode("utf-8", "surrogatepass")
        return record.name.removesuffix(b";1").removesuffix(b".").lower()

    # Files

    def _read_node(self, inode: Inode) -> Node:
        record = self._record(inode)
        extra = self._extra(record)
        if extra.child is not None:
            # A directory that was moved away: its own `.` record says what it is.
            own = self._record(Inode(extra.child * self._volume.block))
            kept = extra.name
            extra = self._extra(own)
            extra.name, extra.moved = kept, False
            return Node(record, self._sections([own]), own.size, stat.S_IFDIR, extra)
        if record.flags & Flags.DIRECTORY and inode == self.root and self._skip is not None:
            extra = self._extra(self._record(Inode(record.extent * self._volume.block)))
            extra.name = None
        records = [record]
        while records[-1].flags & Flags.MULTI_EXTENT:
            if len(records) > _MOST_SECTIONS:
                raise error(errno.EIO)
            records.append(self._next_record(records[-1]))
        size = sum(part.size for part in records)
        return Node(record, self._sections(records), size, self._kind(record, extra), extra)

    def _kind(self, record: DirectoryRecord, extra: RockRidge) -> int:
        if record.flags & Flags.DIRECTORY:
            return stat.S_IFDIR
        kind = stat.S_IFMT(extra.mode or stat.S_IFREG)
        if kind in (stat.S_IFDIR, 0) or (kind == stat.S_IFLNK and extra.target is None):
            raise error(errno.EIO)
        return kind

    def _sections(self, records: list[DirectoryRecord]) -> tuple[tuple[int, int], ...]:
        block = self._volume.block
        return tuple((record.extent * block, record.size) for record in records)

    def _content_size(self, node: Node) -> int:
        if node.kind == stat.S_IFLNK:
            return len(node.extra.target or b"")
        if node.kind == stat.S_IFREG and node.extra.zisofs is not None:
            return node.extra.zisofs[1]
        return node.size if node.kind in (stat.S_IFREG, stat.S_IFDIR) else 0

    def _record(self, inode: Inode) -> DirectoryRecord:
        """The directory record at a place."""
        place = inode // SECTOR * SECTOR
        return parse_record(self._read_device(place, min(SECTOR, self._device.size - place)), inode - place, place)

    def _next_record(self, record: DirectoryRecord) -> DirectoryRecord:
        """The record behind one, in the same sector or at the start of the next."""
        place = record.place + record.length
        if place % SECTOR == 0 or self._read_device(place, 1) == b"\0":
            place = -(-place // SECTOR) * SECTOR
        return self._record(Inode(place))

    def _extra(self, record: DirectoryRecord) -> RockRidge:
        if self._skip is None:
            return RockRidge()
        skip = 0 if record.name == _SELF and record.system_use[:2] == b"SP" else self._skip
        return rockridge.parse(record.system_use[skip:], self._read_block)

    def _rock_ridge_of(self, volume: VolumeDescriptor) -> int | None:
        try:
            root = self._record(Inode(volume.root))
            return rockridge.bytes_to_skip(self._record(Inode(root.extent * volume.block)).system_use)
        except BlockingIOError:
            raise
        except OSError:
            return None

    # The device

    def _read_stored(self, node: Node, offset: int, length: int) -> ReadBuffer:
        if node.record.interleaved:
            raise error(errno.EOPNOTSUPP)
        end = min(offset + length, node.size)
        pieces = []
        start = 0
        for place, size in node.sections:
            low, high = max(offset, start), min(end, start + size)
            if low < high:
                pieces.append(self._read_device(place + low - start, high - low))
            start += size
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _open_compressed(self, inode: Inode) -> CompressedFile:
        node = self._node(inode)
        assert node.extra.zisofs is not None
        return CompressedFile(
            lambda offset, length: bytes(self._read_stored(node, offset, length)), node.size, *node.extra.zisofs
        )

    def _read_block(self, block: int, offset: int, length: int) -> bytes:
        """A continuation area of Rock Ridge, which lies inside one logical block."""
        if offset + length > SECTOR:
            raise error(errno.EIO)
        return bytes(self._read_device(block * self._volume.block + offset, length))

    def _read_device(self, offset: int, length: int) -> bytearray:
        """Bytes of the image. Raises EIO where it has none."""
        if offset < 0 or length < 0 or offset + length > self._device.size:
            raise error(errno.EIO)
        return self._device.read(offset, length)


def _is_name(name: bytes) -> bool:
    """Whether a name may be shown."""
    return 0 < len(name) <= 255 and b"/" not in name and b"\0" not in name and name not in (b".", b"..")
