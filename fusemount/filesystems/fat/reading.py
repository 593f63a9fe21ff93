"""The part of a FAT file system that only looks."""

from __future__ import annotations

import errno
import stat
from collections import OrderedDict
from collections.abc import Iterator

from fusemount.filesystems.base import LONGEST_UTF16_NAME, Attributes, Entry, FileSystem, Inode, Space, error
from fusemount.filesystems.fat import entries as fat_entries
from fusemount.filesystems.fat.boot import ENTRY_SIZE
from fusemount.filesystems.fat.chain import Chain
from fusemount.filesystems.fat.directory import Directory
from fusemount.filesystems.fat.inodes import ROOT, File, Inodes
from fusemount.filesystems.fat.volume import Volume
from nbdserve.block.file import ReadBuffer

_MOST_IN_MEMORY = 8 << 20  # bytes of directories, as they are on the device
_ALL = 0o755
_NO_WRITING = 0o222


class FatReader(FileSystem):
    """A FAT volume, read-only.

    As in Linux, everybody may do everything, but for files with the read-only attribute, which nobody may write to.
    Directories have one link: their subdirectories are not counted.
    """

    has_owners = False

    def __init__(self, volume: Volume) -> None:
        self.root = ROOT
        self.volume = volume
        self.device = volume.device
        root = fat_entries.Entry.new(fat_entries.Attribute.DIRECTORY, volume.geometry.root_cluster, 0)
        self.inodes = Inodes(File(ROOT, root, Chain(volume.table, 0)))
        self._directories: OrderedDict[int, Directory] = OrderedDict()

    # Finding

    def directory_of(self, file: File) -> Directory:
        """A file's entries. Raises ENOTDIR, ENOENT when it was removed, EIO."""
        if not file.entry.is_directory:
            raise error(errno.ENOTDIR)
        if not file.linked:
            raise error(errno.ENOENT)
        return self.directory_at(file.entry, is_root=file.number == ROOT)

    def directory_at(self, entry: fat_entries.Entry, *, is_root: bool = False) -> Directory:
        """The directory that an entry leads to."""
        first = entry.first
        if not is_root and first in (0, self.volume.geometry.root_cluster):
            raise error(errno.EIO)
        directory = self._directories.get(first)
        if directory is None:
            directory = Directory(self.volume, first, self.inodes)
            self._directories[first] = directory
            self._shrink_cache()
        else:
            self._directories.move_to_end(first)
        return directory

    def _shrink_cache(self) -> None:
        total = sum(directory.size for directory in self._directories.values())
        while total > _MOST_IN_MEMORY and len(self._directories) > 1:
            total -= self._directories.popitem(last=False)[1].size

    def drop_directory(self, first: int) -> None:
        """What is in memory about a directory is not to be used again."""
        self._directories.pop(first, None)

    def regular(self, inode: Inode) -> File:
        """A file that has bytes. Raises EISDIR."""
        file = self.inodes[inode]
        if file.entry.is_directory:
            raise error(errno.EISDIR)
        return file

    def tell(self, entry: fat_entries.Entry) -> Inode:
        """The number of an entry's file, which the caller knows from now on."""
        file = self.inodes.at(entry.position)
        if file is None:
            file = File(self.inodes.number_at(entry.position), entry, Chain(self.volume.table, entry.first))
            self.inodes.add(file)
        file.known += 1
        return file.number

    # What the interface asks for

    def lookup(self, directory: Inode, name: bytes) -> Inode:
        entry = self.directory_of(self.inodes[directory]).find(name)
        if entry is None:
            raise error(errno.ENOENT)
        return self.tell(entry)

    def attributes(self, inode: Inode) -> Attributes:
        file = self.inodes[inode]
        entry, cluster_size = file.entry, self.volume.geometry.cluster_size
        if entry.is_directory:
            mode, size = stat.S_IFDIR | _ALL, self._directory_size(file)
        else:
            mode, size = stat.S_IFREG | (_ALL & ~_NO_WRITING if entry.is_read_only else _ALL), entry.size
        atime, mtime = (entry.atime_ns, entry.mtime_ns) if inode != ROOT else (0, 0)
        return Attributes(
            inode=inode,
            mode=mode,
            links=int(file.linked),
            uid=0,
            gid=0,
            size=size,
            blocks=-(-size // cluster_size) * cluster_size // 512,
            atime_ns=atime,
            mtime_ns=mtime,
            ctime_ns=mtime,
        )

    def _directory_size(self, file: File) -> int:
        """Like in Linux the space that it takes, or 0 where that cannot be found out."""
        known = self._directories.get(file.entry.first)
        if known is not None:
            return known.size
        if file.number == ROOT and not file.entry.first:
            return self.volume.geometry.root_entries * ENTRY_SIZE
        try:
            return Chain(self.volume.table, file.entry.first).learn() * self.volume.geometry.cluster_size
        except BlockingIOError:
            raise
        except OSError:
            return 0

    def entries(self, directory: Inode, position: int = 0) -> Iterator[Entry]:
        file = self.inodes[directory]
        if file.entry.is_directory and not file.linked:
            return iter(())
        return self._entries(self.directory_of(file), position)

    def _entries(self, directory: Directory, position: int) -> Iterator[Entry]:
        # A position is the number of a slot plus one, so that 0 lies before them all.
        for entry in directory.entries_behind(position - 1):
            kind = stat.S_IFDIR if entry.is_directory else stat.S_IFREG
            yield Entry(entry.slot + 1, entry.name, self.inodes.number_at(entry.position), kind)

    def read(self, inode: Inode, offset: int, length: int) -> ReadBuffer:
        file = self.regular(inode)
        length = min(length, file.entry.size - offset)
        if length <= 0:
            return b""
        pieces = list(self.places(file, offset, length))
        if len(pieces) == 1:
            return self.device.read(*pieces[0])
        buffer = bytearray(length)
        view = memoryview(buffer)
        for place, size in pieces:
            self.device.read_into(place, view[:size])
            view = view[size:]
        return buffer

    def places(self, file: File, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Where a range of a file lies on the device: offsets and sizes in bytes; none if it is empty. Raises EIO."""
        if length <= 0:
            return
        geometry = self.volume.geometry
        size = geometry.cluster_size
        index, inside = divmod(offset, size)
        for first, count in file.chain.runs(index, -(-(inside + length) // size)):
            piece = min(count * size - inside, length)
            start = geometry.offset_of(first) + inside
            if start + piece > self.device.size:
                raise error(errno.EIO)
            yield start, piece
            length -= piece
            inside = 0

    def space(self) -> Space:
        geometry = self.volume.geometry
        return Space(geometry.cluster_size, geometry.end_cluster - 2, self.volume.free(), 0, 0, LONGEST_UTF16_NAME)

    # Holding

    def hold(self, inode: Inode) -> None:
        self.inodes[inode].held += 1

    def let_go(self, inode: Inode) -> None:
        file = self.inodes[inode]
        file.held -= 1
        if not file.held and not file.linked:
            self.discard(file)
        self.inodes.tidy(file)

    def discard(self, file: File) -> None:
        """The content of a file that has no entry is needed no more."""

    def forget(self, inode: Inode, count: int = 1) -> None:
        self.inodes.forget(inode, count)
