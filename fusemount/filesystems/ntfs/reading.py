"""NtfsReader: the read-only view of an NTFS volume, in Python alone.

Nothing here can write, no library is needed, and a damaged or crafted volume costs no more than an EIO. Names are told
apart by case, as on Unix. System files ($MFT, ...) and the short DOS names are not shown. Alternate data streams are
extended attributes, user.NAME, as in ntfs-3g.

NTFS has owners, as security identifiers of Windows; they mean nothing to a Unix, so files have none here.
"""

from __future__ import annotations

import errno
import stat
import struct
from array import array
from collections import OrderedDict
from collections.abc import Iterator

from fusemount.filesystems.base import LONGEST_UTF16_NAME, Attributes, Entry, FileSystem, Inode, Space, error
from fusemount.filesystems.ntfs import links
from fusemount.filesystems.ntfs.directory import Directory, Name, read_directory
from fusemount.filesystems.ntfs.links import FileAttributes
from fusemount.filesystems.ntfs.records import Reference, Type
from fusemount.filesystems.ntfs.volume import BITMAP, ROOT, UPCASE, Node, Volume, inode_of, keep, reference_of
from nbdserve.block.file import ReadBuffer

INFORMATION = struct.Struct("<QQQQ I")
"""$STANDARD_INFORMATION: times of creation, of the data, of the inode and of access; FileAttributes."""

_UNIX_EPOCH = 116444736000000000  # 1970 in units of 100 ns since 1601
_KEPT_DIRECTORIES = 256
_KEPT_NAMES = 500_000
_LARGEST_XATTR = 64 << 10
_USER = b"user."


class NtfsReader(FileSystem):
    """A volume that is only looked at."""

    has_owners = False

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.root = inode_of(volume.system(ROOT).reference)
        self._directories: OrderedDict[int, Directory] = OrderedDict()
        self._upcase: array[int] | None = None
        self._free: int | None = None

    # Looking

    def lookup(self, directory: Inode, name: bytes) -> Inode:
        found = self.directory(directory).names.get(name)
        if found is None:
            raise error(errno.ENOENT)
        return inode_of(found.reference)

    def attributes(self, inode: Inode) -> Attributes:
        node = self.node(inode)
        information = node.values(Type.STANDARD_INFORMATION)
        if not information or len(information[0]) < INFORMATION.size:
            raise error(errno.EIO)
        _, modified, changed, accessed, flags = INFORMATION.unpack_from(information[0])
        kind, device = links.type_of(node, flags)
        size, allocated = self._size(node, kind)
        return Attributes(
            inode=inode,
            mode=kind | (0o777 if kind == stat.S_IFLNK else 0o755 & ~self._protection(kind, flags)),
            links=1 if node.is_directory else self.link_count(node),
            uid=0,
            gid=0,
            size=size,
            blocks=-(-allocated // 512),
            atime_ns=from_ntfs_time(accessed),
            mtime_ns=from_ntfs_time(modified),
            ctime_ns=from_ntfs_time(changed),
            device=device,
        )

    def entries(self, directory: Inode, position: int = 0) -> Iterator[Entry]:
        names = self.directory(directory)
        for place, name in names.behind(position):
            entry = names.names.get(name)
            if entry is not None:
                yield Entry(place, name, inode_of(entry.reference), self._type(entry))

    def read(self, inode: Inode, offset: int, length: int) -> ReadBuffer:
        node = self.node(inode)
        if node.is_directory:
            raise error(errno.EISDIR)
        if links.tag_of(node) in links.ELSEWHERE:
            raise error(errno.EOPNOTSUPP)
        return node.stream(Type.DATA).read(offset, length)

    def read_link(self, inode: Inode) -> bytes:
        return self._target(self.node(inode))

    def xattr_names(self, inode: Inode) -> list[bytes]:
        return [_USER + name.encode("utf-8", "surrogatepass") for name in self.stream_names(self.node(inode))]

    def xattr(self, inode: Inode, name: bytes) -> bytes:
        node = self.node(inode)
        stream = stream_name(name)
        if not node.has(Type.DATA, stream):
            raise error(errno.ENODATA)
        content = node.stream(Type.DATA, stream)
        if content.size > _LARGEST_XATTR:
            raise error(errno.E2BIG)
        return bytes(content.read(0, content.size))

    def space(self) -> Space:
        free = self._free_clusters()
        cluster = self.volume.geometry.cluster
        spare = free * cluster // self.volume.geometry.record
        return Space(
            cluster, self.volume.geometry.clusters, free, self.volume.records + spare, spare, LONGEST_UTF16_NAME
        )

    # What the methods above share, with the writer too

    def node(self, inode: Inode) -> Node:
        """The file of a number."""
        return self.volume.node(reference_of(inode))

    def directory(self, inode: Inode) -> Directory:
        """The names in a directory."""
        known = self._directories.get(inode)
        if known is None:
            node = self.node(inode)
            if links.tag_of(node) in links.TYPES:
                raise error(errno.ENOTDIR)
            known = read_directory(node, self.volume.geometry)
            keep(self._directories, inode, known, _KEPT_DIRECTORIES)
            while len(self._directories) > 1 and sum(len(it.names) for it in self._directories.values()) > _KEPT_NAMES:
                self._directories.popitem(last=False)
        else:
            self._directories.move_to_end(inode)
        return known

    @staticmethod
    def stream_names(node: Node) -> list[str]:
        """The names of a file's alternate data streams."""
        names = {found.name for found in node.attributes if found.type == Type.DATA and found.name}
        return sorted(name for name in names if "\0" not in name)

    @staticmethod
    def link_count(node: Node) -> int:
        """How many names a file has; a short DOS name is no name of its own."""
        return sum(1 for value in node.values(Type.FILE_NAME) if len(value) > 65 and value[65] != 2)

    @staticmethod
    def parent(node: Node) -> Inode:
        """The directory that the first name of a file is in. Raises ENOENT when it has none."""
        for value in node.values(Type.FILE_NAME):
            if len(value) > 65:
                return inode_of(Reference.unpack(int.from_bytes(value[:8], "little")))
        raise error(errno.ENOENT)

    def _size(self, node: Node, kind: int) -> tuple[int, int]:
        if kind == stat.S_IFLNK:
            return len(self._target(node)), 0
        if node.is_directory:
            if not node.has(Type.INDEX_ALLOCATION, "$I30"):
                return 0, 0
            index = node.stream(Type.INDEX_ALLOCATION, "$I30")
            return index.size, index.allocated
        if kind != stat.S_IFREG or not node.has(Type.DATA):
            return 0, 0
        data = node.stream(Type.DATA)
        return data.size, data.allocated

    @staticmethod
    def _protection(kind: int, flags: int) -> int:
        return 0o222 if kind == stat.S_IFREG and flags & FileAttributes.READ_ONLY else 0

    def _type(self, entry: Name) -> int:
        if entry.flags & FileAttributes.REPARSE_POINT or entry.flags & FileAttributes.SYSTEM:
            try:
                return links.type_of(self.volume.node(entry.reference), entry.flags)[0]
            except OSError as failure:
                if isinstance(failure, BlockingIOError):
                    raise
        return stat.S_IFDIR if entry.flags & FileAttributes.DIRECTORY else stat.S_IFREG

    def _target(self, node: Node) -> bytes:
        """A link's target; one of Windows, which does not care for case, in the case that the names really have."""
        target = links.target_of(node)
        if links.tag_of(node) not in (links.Tag.MOUNT_POINT, links.Tag.SYMLINK):
            return target
        if target[1:3] == b":/":
            return self._in_true_case(self.root, target[3:], b"/") or target
        if target.startswith(b"/"):
            return self._in_true_case(self.root, target[1:], b"/") or target
        try:
            return self._in_true_case(self.parent(node), target, b"") or target
        except FileNotFoundError:
            return target

    def _in_true_case(self, directory: Inode, path: bytes, start: bytes) -> bytes | None:
        """The path as the names on the volume are written; None when it leads nowhere."""
        parts = []
        try:
            for part in filter(None, path.split(b"/")):
                if part == b"..":
                    directory = self.parent(self.node(directory))
                    parts.append(part)
                elif part != b".":
                    known = self.directory(directory)
                    name = part if part in known.names else known.folded(self._fold)[self._fold(part)]
                    directory = inode_of(known.names[name].reference)
                    parts.append(name)
        except BlockingIOError:
            raise
        except (OSError, KeyError, UnicodeDecodeError):
            return None
        return start + b"/".join(parts)

    def _fold(self, name: bytes) -> str:
        """A name in capitals, by the volume's own table."""
        if self._upcase is None:
            table = array("H")
            table.frombytes(bytes(self.volume.system(UPCASE).stream(Type.DATA).read(0, 1 << 17)))
            self._upcase = table
        return name.decode("utf-8", "surrogatepass").translate(self._upcase)

    def _free_clusters(self) -> int:
        if self._free is None:
            bitmap = self.volume.system(BITMAP).stream(Type.DATA)
            clusters = self.volume.geometry.clusters
            used = 0
            for offset in range(0, -(-clusters // 8), 1 << 20):
                part = int.from_bytes(bitmap.read(offset, 1 << 20), "little")
                used += (part & (1 << min(clusters - offset * 8, 1 << 23)) - 1).bit_count()
            self._free = clusters - used
        return self._free


def stream_name(xattr: bytes) -> str:
    """The stream that an extended attribute stands for. Raises EOPNOTSUPP outside the name space of users."""
    if not xattr.startswith(_USER) or len(xattr) == len(_USER):
        raise error(errno.EOPNOTSUPP)
    return xattr[len(_USER) :].decode("utf-8", "surrogatepass")


def from_ntfs_time(value: int) -> int:
    """Nanoseconds since 1970 from units of 100 ns since 1601."""
    return (value - _UNIX_EPOCH) * 100


def to_ntfs_time(value: int) -> int:
    """The inverse of from_ntfs_time(); what NTFS cannot hold becomes the nearest time that it can."""
    return min(max(value // 100 + _UNIX_EPOCH, 0), (1 << 63) - 1)
