"""ExfatReader: the files of an exFAT volume.

A file's number is the place of its first directory entry, in units of 32 bytes. Names are found without regard to case,
by the volume's own table, and shown as they were given.
"""

from __future__ import annotations

import errno
import stat
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from fusemount.filesystems.base import LONGEST_UTF16_NAME, Attributes, Entry, FileSystem, Inode, Space, error
from fusemount.filesystems.exfat.boot import Geometry
from fusemount.filesystems.exfat.clusters import Chain, Clusters
from fusemount.filesystems.exfat.entries import SIZE, File, FileAttributes, Table, parse_directory
from nbdserve.block import BlockDevice
from nbdserve.block.file import ReadBuffer

_ROOT = Inode(1)
_LARGEST_DIRECTORY = 256 << 20  # section 7.4.9 allows no more
_LARGEST_TABLE = 128 << 10
_KEPT_DIRECTORIES = 256


@dataclass(frozen=True, slots=True)
class Directory:
    """The files in a directory in the order of their entries, by name and by name without regard to case."""

    files: dict[bytes, Inode]
    folded: dict[str, Inode]


class ExfatReader(FileSystem):
    """A volume."""

    has_owners = False

    def __init__(self, device: BlockDevice, geometry: Geometry) -> None:
        self._geometry = geometry
        self._clusters = Clusters(device, geometry)
        self._files: dict[Inode, File] = {}
        self._directory = lru_cache(_KEPT_DIRECTORIES)(self._read_directory)
        self._chain = lru_cache(256)(self._find_chain)
        self._tables: list[Table] | None = None
        self._upcase: array[int] | None = None
        self._free: int | None = None
        self.root = _ROOT

    def lookup(self, directory: Inode, name: bytes) -> Inode:
        known = self._directory(directory)
        found = known.files.get(name)
        if found is None:
            try:
                found = known.folded.get(self._fold(name))
            except UnicodeDecodeError:
                found = None
        if found is None:
            raise error(errno.ENOENT)
        return found

    def attributes(self, inode: Inode) -> Attributes:
        file = self._file(inode)
        if file is None:
            size = self._chain(_ROOT).count * self._geometry.cluster
            return Attributes(_ROOT, stat.S_IFDIR | 0o755, 1, 0, 0, size, size // 512, 0, 0, 0)
        mode = 0o755 if is_directory(file) or not file.attributes & FileAttributes.READ_ONLY else 0o555
        cluster = self._geometry.cluster
        return Attributes(
            inode=inode,
            mode=(stat.S_IFDIR if is_directory(file) else stat.S_IFREG) | mode,
            links=1,
            uid=0,
            gid=0,
            size=file.size,
            blocks=-(-file.size // cluster) * (cluster // 512),
            atime_ns=file.atime_ns,
            mtime_ns=file.mtime_ns,
            ctime_ns=file.ctime_ns,
        )

    def entries(self, directory: Inode, position: int = 0) -> Iterator[Entry]:
        for index, (name, inode) in enumerate(self._directory(directory).files.items(), 1):
            if index > position:
                kind = stat.S_IFDIR if is_directory(self._files[inode]) else stat.S_IFREG
                yield Entry(index, name, inode, kind)

    def read(self, inode: Inode, offset: int, length: int) -> ReadBuffer:
        file = self._file(inode)
        if file is None or is_directory(file):
            raise error(errno.EISDIR)
        length = max(0, min(length, file.size - offset))
        written = max(0, min(length, file.valid - offset))
        if not written:
            return bytes(length)
        content = self._clusters.read(self._chain(inode), offset, written)
        content.extend(bytes(length - written))
        return content

    def space(self) -> Space:
        if self._free is None:
            self._free = self._count_free()
        return Space(self._geometry.cluster, self._geometry.clusters, self._free, 0, 0, LONGEST_UTF16_NAME)

    # Files and directories

    def _file(self, inode: Inode) -> File | None:
        """A file; None for the root directory, which has no entry."""
        if inode == _ROOT:
            return None
        file = self._files.get(inode)
        if file is None:
            raise error(errno.ESTALE)
        return file

    def _find_chain(self, inode: Inode) -> Chain:
        file = self._file(inode)
        if file is None:
            return self._clusters.follow(self._geometry.root)
        if not file.size:
            return Chain([], [], 0)
        count = -(-file.size // self._geometry.cluster)
        if file.contiguous:
            return self._clusters.contiguous(file.first, count)
        return self._clusters.follow(file.first, count)

    def _read_directory(self, inode: Inode) -> Directory:
        file = self._file(inode)
        if file is not None and not is_directory(file):
            raise error(errno.ENOTDIR)
        chain = self._chain(inode)
        found = self._parse(chain)
        files = {file.name: file for file in found if isinstance(file, File) and is_name(file.name)}
        per_cluster = self._geometry.cluster // SIZE
        numbers = {}
        for name, file in files.items():
            cluster, index = divmod(file.index, per_cluster)
            number = Inode(self._clusters.place(chain, cluster) // SIZE + index)
            self._files[number] = file
            numbers[name] = number
        return Directory(numbers, {self._fold(name): number for name, number in numbers.items()})

    def _parse(self, chain: Chain) -> list[File | Table]:
        size = chain.count * self._geometry.cluster
        if size > _LARGEST_DIRECTORY:
            raise error(errno.EIO)
        return list(parse_directory(bytes(self._clusters.read(chain, 0, size))))

    # Tables of the volume, which stand in the root directory

    def _table(self, *, bitmap: bool) -> Table | None:
        if self._tables is None:
            self._tables = [found for found in self._parse(self._chain(_ROOT)) if isinstance(found, Table)]
        return next((table for table in self._tables if table.is_bitmap == bitmap), None)

    def _fold(self, name: bytes) -> str:
        """A name in capitals, by the volume's own table."""
        if self._upcase is None:
            self._upcase = self._read_upcase()
        return name.decode("utf-8", "surrogatepass").translate(self._upcase)

    def _read_upcase(self) -> array[int]:
        """The up-case table (7.2): one unit for each character, where 0xFFFF and a count stand for what stays."""
        table = self._table(bitmap=False)
        stored: array[int] = array("H")
        if table is not None and table.size <= _LARGEST_TABLE and table.size % 2 == 0:
            chain = self._clusters.follow(table.first, -(-table.size // self._geometry.cluster))
            stored.frombytes(self._clusters.read(chain, 0, table.size))
        result = array("H", range(0x10000))
        position = 0
        units = iter(stored)
        for unit in units:
            if unit == 0xFFFF:
                position += next(units, 0)
            elif position < len(result):
                result[position] = unit
                position += 1
        return result

    def _count_free(self) -> int:
        table = self._table(bitmap=True)
        clusters = self._geometry.clusters
        if table is None or table.size < -(-clusters // 8):
            raise error(errno.EIO)
        length = -(-clusters // 8)
        chain = self._clusters.follow(table.first, -(-length // self._geometry.cluster))
        used = 0
        for offset in range(0, length, 1 << 20):
            part = int.from_bytes(self._clusters.read(chain, offset, min(1 << 20, length - offset)), "little")
            used += (part & (1 << min(clusters - offset * 8, 1 << 23)) - 1).bit_count()
        return clusters - used


def is_directory(file: File) -> bool:
    """Whether a file is a directory."""
    return bool(file.attributes & FileAttributes.DIRECTORY)


def is_name(name: bytes) -> bool:
    """Whether a name may be shown."""
    return bool(name) and b"/" not in name and b"\0" not in name and name not in (b".", b"..")
