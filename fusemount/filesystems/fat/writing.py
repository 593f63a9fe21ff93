"""The half of a FAT file system that changes something, and in which order.

Everything is written when it is changed, nothing waits in memory. FAT has no log, so the order makes what a crash
leaves behind repairable by fsck.vfat, without loss of what was synced:

- Growing: data, then the allocation table, then the directory entry with size and first cluster. A crash in between
  leaves clusters that belong to nobody, or a chain that is longer than its file; both are cut off.
- Shrinking and unlinking: first the directory entry, then the allocation table (when that is safe, see volume.py).
- Renaming: first the new entry, then the old one goes. A crash in between leaves two entries for one content, of which
  fsck.vfat empties one.
- Renaming over a file: its entry gets the other content in one write of 32 bytes, so that the name always stands for
  the old or the new content. The old name is removed in the same write where both lie close together, else just before.

The content of a file that was unlinked while held belongs to nobody on the device: after a crash it is cut off as well.
"""

from __future__ import annotations

import copy
import errno
import stat
import time

from fusemount.filesystems.base import Changes, Inode, error
from fusemount.filesystems.fat import names
from fusemount.filesystems.fat.boot import ENTRY_SIZE
from fusemount.filesystems.fat.chain import Chain
from fusemount.filesystems.fat.directory import DOT, DOT_DOT, Directory
from fusemount.filesystems.fat.entries import Attribute, Entry, packed
from fusemount.filesystems.fat.inodes import ROOT, File
from fusemount.filesystems.fat.reading import FatReader
from fusemount.filesystems.fat.table import Run
from fusemount.filesystems.fat.volume import Piece, Volume
from nbdserve.block.file import ReadBuffer

LARGEST_FILE = (1 << 32) - 1
_OWNER_WRITES = 0o200
_DEEPEST = 65536


class FatFileSystem(FatReader):
    """A FAT volume, read and write."""

    read_only = False

    def __init__(self, volume: Volume) -> None:
        super().__init__(volume)
        self._closed = False

    def _piece(self, entry: Entry) -> Piece:
        return entry.position, entry.pack(wide=self.volume.wide)

    def _touch(self, directory: Inode) -> list[Piece]:
        """A directory's content changes now; the root directory has no entry where that could be noted."""
        file, now = self.inodes[directory], packed(time.time_ns())
        if directory == ROOT or file.entry.modified == now:
            return []
        file.entry.modified = now
        return [self._piece(file.entry)]

    def _new_place(self, directory: Inode, name: bytes) -> tuple[Directory, str]:
        """The directory and the characters of a name that does not exist yet. Raises EEXIST, ENOSPC, EINVAL."""
        place = self.directory_of(self.inodes[directory])
        text = names.new_text(name)
        if place.find(name):
            raise error(errno.EEXIST)
        self.volume.begin_change()
        place.make_room(text)
        return place, text

    # Names

    def create(self, directory: Inode, name: bytes, mode: int, uid: int, gid: int, device: int = 0) -> Inode:
        if not stat.S_ISREG(mode):
            raise error(errno.EPERM)
        place, text = self._new_place(directory, name)
        attributes = Attribute.ARCHIVE if mode & _OWNER_WRITES else Attribute.ARCHIVE | Attribute.READ_ONLY
        entry = Entry.new(attributes, 0, time.time_ns())
        self.volume.write(place.add(text, entry) + self._touch(directory))
        return self.tell(entry)

    def make_directory(self, directory: Inode, name: bytes, mode: int, uid: int, gid: int) -> Inode:
        place, text = self._new_place(directory, name)
        geometry = self.volume.geometry
        runs = self.volume.allocate(1)
        entry = Entry.new(Attribute.DIRECTORY, runs[0][0], time.time_ns())
        dot, dot_dot = copy.copy(entry), copy.copy(entry)
        dot.short, dot_dot.short = DOT, DOT_DOT
        dot_dot.first = self._first_for_children(directory)
        start = geometry.offset_of(entry.first)
        self.device.zero(start, geometry.cluster_size)
        self.device.write(start, dot.pack(wide=self.volume.wide) + dot_dot.pack(wide=self.volume.wide))
        self.volume.link(runs)
        self.volume.write(place.add(text, entry) + self._touch(directory))
        return self.tell(entry)

    def _first_for_children(self, directory: Inode) -> int:
        """What `..` says in the directories below this one: its first cluster, but 0 for the root directory."""
        return 0 if directory == ROOT else self.inodes[directory].entry.first

    def make_symlink(self, directory: Inode, name: bytes, target: bytes, uid: int, gid: int) -> Inode:
        raise error(errno.EPERM)

    def link(self, inode: Inode, directory: Inode, name: bytes) -> None:
        raise error(errno.EPERM)

    def set_xattr(self, inode: Inode, name: bytes, value: bytes, flags: int = 0) -> None:
        raise error(errno.ENOTSUP)

    def remove_xattr(self, inode: Inode, name: bytes) -> None:
        raise error(errno.ENOTSUP)

    def _existing(self, directory: Inode, name: bytes) -> tuple[Directory, Entry]:
        place = self.directory_of(self.inodes[directory])
        entry = place.find(name)
        if entry is None:
            raise error(errno.ENOENT)
        return place, entry

    def unlink(self, directory: Inode, name: bytes) -> None:
        place, entry = self._existing(directory, name)
        if entry.is_directory:
            raise error(errno.EISDIR)
        self._remove(directory, place, entry)

    def remove_directory(self, directory: Inode, name: bytes) -> None:
        place, entry = self._existing(directory, name)
        if not entry.is_directory:
            raise error(errno.ENOTDIR)
        if not self.directory_at(entry).is_empty:
            raise error(errno.ENOTEMPTY)
        self._remove(directory, place, entry)

    def _remove(self, directory: Inode, place: Directory, entry: Entry) -> None:
        self.volume.begin_change()
        self.volume.write(place.remove(entry) + self._touch(directory))
        self._vacate(directory, place, entry)
        self._lost_its_name(entry)

    def _vacate(self, directory: Inode, place: Directory, entry: Entry) -> None:
        place.vacate(entry)
        if place.ambiguous:
            self.drop_directory(self.inodes[directory].entry.first)

    def _lost_its_name(self, entry: Entry) -> None:
        """What an entry stood for goes, unless somebody holds it."""
        if entry.is_directory:
            self.drop_directory(entry.first)
        file = self.inodes.at(entry.position)
        if file is None:
            self.volume.park(self._clusters_from(entry.first))
            return
        self.inodes.unlinked(file)
        if not file.held:
            self.discard(file)

    def discard(self, file: File) -> None:
        first = file.entry.first
        file.chain = Chain(self.volume.table, 0)
        file.entry.first = file.entry.size = 0
        self.volume.park(self._clusters_from(first))

    def _clusters_from(self, first: int) -> list[Run]:
        """The clusters of a chain that is to be given up; none of a damaged one, which is left for fsck.vfat."""
        chain = Chain(self.volume.table, first)
        try:
            chain.learn()
        except OSError as damage:
            if damage.errno != errno.EIO:
                raise
            return []
        return chain.cut(0)

    # Renaming

    def rename(
        self, directory: Inode, name: bytes, new_directory: Inode, new_name: bytes, *, replace: bool = True
    ) -> None:
        place, entry = self._existing(directory, name)
        new_place = self.directory_of(self.inodes[new_directory])
        text = names.new_text(new_name)
        target = new_place.find(new_name)
        if target and not replace:
            raise error(errno.EEXIST)
        if entry.is_directory and self._lies_in(new_directory, entry.first):
            raise error(errno.EINVAL)
        if target is entry:
            if entry.name == text.encode():
                return
            target = None  # another case of the same name
        if target:
            self._check_replacing(entry, target)
        self.volume.begin_change()
        parent = self._new_parent(entry, directory, new_directory)
        if target and target.name == text.encode():
            self._replace(place, entry, target, parent)
        else:
            self._move(place, entry, new_place, text, target, parent)
        self.volume.write(self._touch(directory) + self._touch(new_directory))
        self._vacate(directory, place, entry)

    def _check_replacing(self, entry: Entry, target: Entry) -> None:
        if target.is_directory and not entry.is_directory:
            raise error(errno.EISDIR)
        if entry.is_directory and not target.is_directory:
            raise error(errno.ENOTDIR)
        if target.is_directory and not self.directory_at(target).is_empty:
            raise error(errno.ENOTEMPTY)

    def _lies_in(self, directory: Inode, first: int) -> bool:
        """Whether a directory is the one that begins with a cluster, or lies anywhere below it."""
        here = self._first_for_children(directory)
        for _ in range(_DEEPEST):
            if here == first:
                return True
            if here in (0, self.volume.geometry.root_cluster):
                return False
            here = self._dot_dot(here).first
        raise error(errno.EIO)

    def _dot_dot(self, first: int) -> Entry:
        """The `..` of the directory that begins with a cluster."""
        if not self.volume.table.is_cluster(first):
            raise error(errno.EIO)
        position = self.volume.geometry.offset_of(first) + ENTRY_SIZE
        entry = Entry(bytes(self.device.read(position, ENTRY_SIZE)), wide=self.volume.wide)
        if entry.short != DOT_DOT:
            raise error(errno.EIO)
        entry.position = position
        return entry

    def _new_parent(self, entry: Entry, directory: Inode, new_directory: Inode) -> list[Piece]:
        """What has to be written when a directory gets another parent."""
        if not entry.is_directory or directory == new_directory:
            return []
        dot_dot = self._dot_dot(entry.first)
        dot_dot.first = self._first_for_children(new_directory)
        return [self._piece(dot_dot)]

    def _replace(self, place: Directory, entry: Entry, target: Entry, parent: list[Piece]) -> None:
        """The target's entry, which has the right name already, gets the other one's content."""
        file, replaced = self.inodes.at(entry.position), self.inodes.at(target.position)
        old = copy.copy(target)
        if replaced:
            replaced.entry = old
        removal = place.remove(entry)
        target.take_content(entry)
        self.volume.write([*removal, self._piece(target), *parent])
        self._lost_its_name(old)
        if file:
            file.entry = target
            self.inodes.moved(file, entry.position)

    def _move(
        self, place: Directory, entry: Entry, new_place: Directory, text: str, target: Entry | None, parent: list[Piece]
    ) -> None:
        """A new entry comes, the old one and that of the target, which has the name in another case, go."""
        file = self.inodes.at(entry.position)
        new_place.make_room(text)
        removal = place.remove(entry)
        if target:
            removal = new_place.remove(target) + removal
        new = copy.copy(entry)
        self.volume.write(new_place.add(text, new) + parent + removal)
        if target:
            new_place.vacate(target)
            self._lost_its_name(target)
        if file:
            file.entry = new
            self.inodes.moved(file, entry.position)

    # Content

    def write(self, inode: Inode, offset: int, data: ReadBuffer) -> None:
        file = self.regular(inode)
        if len(data):
            self._put(file, offset, memoryview(data))

    def truncate(self, inode: Inode, size: int) -> None:
        file = self.regular(inode)
        if size < file.entry.size:
            self._shrink(file, size)
        else:
            self._put(file, size, memoryview(b""))

    def _put(self, file: File, offset: int, data: memoryview) -> None:
        """Write data at offset, and zeros between the old end of the file and there."""
        entry, chain, cluster_size = file.entry, file.chain, self.volume.geometry.cluster_size
        size = max(entry.size, offset + len(data))
        if size > LARGEST_FILE:
            raise error(errno.EFBIG)
        self.volume.begin_change()
        need, have = -(-size // cluster_size), 0
        if size > entry.size:
            have = chain.learn()
        last = chain.last if have else 0
        runs = self.volume.allocate(need - have, near=last + 1) if size > entry.size and need > have else []
        chain.extend(runs) if runs else None
        try:
            for place, length in self.places(file, entry.size, offset - entry.size) if offset > entry.size else ():
                self.device.zero(place, length)
            for place, length in self.places(file, offset, len(data)) if data else ():
                self.device.write(place, data[:length])
                data = data[length:]
        except BaseException:
            if runs:
                chain.cut(have)
            raise
        if runs:
            self.volume.link(runs, last)
            entry.first = chain.first
        entry.size = size
        self._changed(file)

    def _shrink(self, file: File, size: int) -> None:
        entry, table = file.entry, self.volume.table
        keep = -(-size // self.volume.geometry.cluster_size)
        last = next(file.chain.runs(keep - 1, 1))[0] if keep else 0
        # Looked at before the chain is cut, lest a circle in it goes unnoticed and leads back into what is kept.
        rest = self._clusters_from(table[last] if keep else entry.first)
        self.volume.begin_change()
        entry.size = size
        entry.first = entry.first if keep else 0
        self._changed(file)
        if keep and not table.is_end(table[last]):
            table[last] = table.end_of_chain
            table.flush()
        self.volume.park(rest)
        file.chain = Chain(table, entry.first)

    def _changed(self, file: File) -> None:
        """A file's content was changed now."""
        file.entry.modified = packed(time.time_ns())
        file.entry.attributes |= Attribute.ARCHIVE
        self._write_entry(file)

    def _write_entry(self, file: File) -> None:
        if file.linked and file.number != ROOT:
            self.volume.write([self._piece(file.entry)])

    def change(self, inode: Inode, changes: Changes) -> None:
        file = self.inodes[inode]
        entry = file.entry
        if changes.uid is not None or changes.gid is not None:
            raise error(errno.EPERM)
        self.volume.begin_change()
        if changes.mode is not None and not entry.is_directory:
            read_only = 0 if changes.mode & _OWNER_WRITES else Attribute.READ_ONLY
            entry.attributes = entry.attributes & ~Attribute.READ_ONLY | read_only
        if changes.atime_ns is not None:
            entry.accessed = packed(changes.atime_ns)[0]
        if changes.mtime_ns is not None:
            entry.modified = packed(changes.mtime_ns)
        self._write_entry(file)

    # The end

    def sync(self) -> None:
        self.volume.sync()

    def close(self) -> None:
        if self._closed:
            return
        for file in self.inodes.unlinked_files():
            self.discard(file)
        self.volume.close()
        self._closed = True
