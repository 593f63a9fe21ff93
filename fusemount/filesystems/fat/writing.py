"""The part of a FAT file system that changes names and directories, and the order of all writes.

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

from fusemount.filesystems.base import Inode, error
from fusemount.filesystems.fat import names
from fusemount.filesystems.fat.boot import ENTRY_SIZE
from fusemount.filesystems.fat.content import OWNER_WRITES, FatContent
from fusemount.filesystems.fat.directory import DOT, DOT_DOT, Directory
from fusemount.filesystems.fat.entries import Attribute, Entry, packed
from fusemount.filesystems.fat.inodes import ROOT
from fusemount.filesystems.fat.volume import Piece

_DEEPEST = 65536


class FatFileSystem(FatContent):
    """A FAT volume, read and write."""

    names_last = False  # `A` and `a` are one file: what the kernel knows of the one, a change of the other may undo

    def _touch(self, directory: Inode) -> list[Piece]:
        """A directory's content changes now; the root directory has no entry where that could be noted."""
        file, now = self.inodes[directory], packed(time.time_ns())
        if directory == ROOT or file.entry.modified == now:
            return []
        file.entry.modified = now
        return [self.piece(file.entry)]

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
        attributes = Attribute.ARCHIVE if mode & OWNER_WRITES else Attribute.ARCHIVE | Attribute.READ_ONLY
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
            self.volume.park(self.clusters_from(entry.first))
            return
        self.inodes.unlinked(file)
        if not file.held:
            self.discard(file)

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
        return [self.piece(dot_dot)]

    def _replace(self, place: Directory, entry: Entry, target: Entry, parent: list[Piece]) -> None:
        """The target's entry, which has the right name already, gets the other one's content."""
        file, replaced = self.inodes.at(entry.position), self.inodes.at(target.position)
        old = copy.copy(target)
        if replaced:
            replaced.entry = old
        removal = place.remove(entry)
        target.take_content(entry)
        self.volume.write([*removal, self.piece(target), *parent])
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
