"""The operations of a writable ext file system: making, linking, renaming and removing files, changing what they hold.

What it keeps: a call that cannot succeed is refused before anything was changed; a new inode that gets no name is given
back. A name is made before another one of the same file is taken away.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterator

from fusemount.cache import WriteBackCache
from fusemount.filesystems.base import XATTR_CREATE, XATTR_REPLACE, Changes, Entry, Inode, Space, error
from fusemount.filesystems.ext import directories, recovery, xattrs
from fusemount.filesystems.ext.content import EMPTY_EXTENTS
from fusemount.filesystems.ext.directories import Found
from fusemount.filesystems.ext.inodes import ROOT, Flag, Record, clamp_time, device_block
from fusemount.filesystems.ext.library import Engine
from fusemount.filesystems.ext.store import Store
from fusemount.filesystems.ext.superblock import Incompat, ReadOnlyCompat, read_superblock
from nbdserve.block.device import BlockDevice
from nbdserve.block.file import ReadBuffer

_MOST_LINKS = 65000
_INHERITED = Flag.SYNC | Flag.NODUMP | Flag.NOATIME


def open_for_writing(device: BlockDevice, found: recovery.Found) -> WritableExtFileSystem:
    """Replay the log for real, deal with orphans, mark the file system as in use."""
    recovery.replay(found, device)
    cache = WriteBackCache(device)
    superblock = read_superblock(cache)
    engine = Engine(cache, superblock.block_size, superblock.groups)
    try:
        return WritableExtFileSystem(cache, superblock, engine)
    except BaseException:
        engine.free()
        raise


class WritableExtFileSystem(Store):
    """An ext file system that is read and written."""

    # Looking

    def lookup(self, directory: Inode, name: bytes) -> Inode:
        inode = super().lookup(directory, name)
        self._known[inode] = self._known.get(inode, 0) + 1
        return inode

    def find(self, directory: Record, name: bytes) -> tuple[int, int] | None:
        if not self.names.is_indexed(directory) or directory.has_inline_data:
            return super().find(directory, name)
        if not 0 < len(name) <= 255:
            raise error(errno.ENAMETOOLONG)
        try:
            found = self.names.find(directory, name).found
        except FileNotFoundError:
            return None
        return found.inode, found.type

    def entries(self, directory: Inode, position: int = 0) -> Iterator[Entry]:
        record = self._directory(directory)
        if not self.names.is_in_hash_order(record):
            yield from super().entries(directory, position)
            return
        try:
            yield from self.names.in_hash_order(record, position)
        except BlockingIOError:
            raise
        except OSError:
            if not position:  # the index is damaged, the entries below it need not be
                yield from super().entries(directory)

    def space(self) -> Space:
        free_blocks, free_inodes = self.free_counts()
        sb = self.superblock
        return Space(sb.block_size, sb.blocks, free_blocks, sb.inodes, free_inodes)

    # Making

    def create(self, directory: Inode, name: bytes, mode: int, uid: int, gid: int, device: int = 0) -> Inode:
        parent = self._parent(directory, name)
        kind = stat.S_IFMT(mode) or stat.S_IFREG
        if kind in (stat.S_IFDIR, stat.S_IFLNK):
            raise error(errno.EINVAL)
        record = self._new_inode(parent, kind | mode & 0o7777, uid, gid)
        if kind in (stat.S_IFBLK, stat.S_IFCHR):
            record.block = device_block(device)
        return self._make(parent, name, record)

    def make_directory(self, directory: Inode, name: bytes, mode: int, uid: int, gid: int) -> Inode:
        parent = self._parent(directory, name)
        if parent.links >= _MOST_LINKS and not self._may_have_many_links(parent):
            raise error(errno.EMLINK)
        record = self._new_inode(parent, stat.S_IFDIR | mode & 0o7777, uid, gid)
        try:
            record.links = 2
            dots = [Found(0, 0, record.number, b".", stat.S_IFDIR), Found(0, 0, parent.number, b"..", stat.S_IFDIR)]
            self.add_directory_block(record, self.names.pack(dots))
        except BaseException:
            self._discard(record)
            raise
        return self._make(parent, name, record)

    def make_symlink(self, directory: Inode, name: bytes, target: bytes, uid: int, gid: int) -> Inode:
        parent = self._parent(directory, name)
        if not target or b"\0" in target:
            raise error(errno.ENOENT if not target else errno.EINVAL)
        if len(target) >= self._block_size:
            raise error(errno.ENAMETOOLONG)
        record = self._new_inode(parent, stat.S_IFLNK | 0o777, uid, gid)
        if len(target) < len(record.block):
            record.flags &= ~Flag.EXTENTS
            record.block = target.ljust(len(record.block), b"\0")
            record.size = len(target)
        else:
            try:
                self.content.write(record, 0, target + b"\0")
                record.size = len(target)
            except BaseException:
                self._discard(record)
                raise
        return self._make(parent, name, record)

    def link(self, inode: Inode, directory: Inode, name: bytes) -> None:
        record = self.record(inode)
        if record.is_directory:
            raise error(errno.EPERM)
        parent = self._parent(directory, name)
        self.check_mutable(record)
        if not record.links:
            raise error(errno.ENOENT)
        if record.links >= _MOST_LINKS:
            raise error(errno.EMLINK)
        self._add_name(parent, name, record)
        record.links += 1
        self.touch(record)

    def _parent(self, directory: Inode, name: bytes) -> Record:
        """The directory in which a name is to be made, which it may not hold yet."""
        self.make_room(0)
        parent = self._directory(directory)
        if not directories.is_shown(name):
            raise error(errno.EEXIST if name in (b".", b"..") else errno.EINVAL)
        if self.find(parent, name) is not None:
            raise error(errno.EEXIST)
        if not parent.links:
            raise error(errno.ENOENT)
        self.check_mutable(parent)
        return parent

    def _new_inode(self, parent: Record, mode: int, uid: int, gid: int) -> Record:
        """A new inode, allocated, with neither name nor content; set-group-ID directories hand down their group."""
        lib, fs = self.engine.lib, self.engine.fs
        number = self.engine.ffi.new("uint32_t *")
        self.engine.check(lib.ext2fs_new_inode(fs, parent.number, mode, self.engine.ffi.NULL, number))
        lib.ext2fs_inode_alloc_stats2(fs, number[0], 1, stat.S_ISDIR(mode))
        record = Record(Inode(number[0]), bytes(self.superblock.inode_size))
        record.extra_size = self.superblock.want_extra_size
        if parent.mode & stat.S_ISGID:
            gid = parent.gid
            mode |= stat.S_ISGID if stat.S_ISDIR(mode) else 0
        record.mode, record.uid, record.gid, record.links = mode, uid, gid, 1
        now = self.now(record)
        record.atime_ns = record.mtime_ns = record.ctime_ns = now
        record.crtime_ns = now if record.extra_size >= 24 else None
        record.generation = int.from_bytes(os.urandom(4), "little")
        record.flags = parent.flags & _INHERITED
        if self.superblock.has(Incompat.EXTENTS) and stat.S_IFMT(mode) in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
            record.flags |= Flag.EXTENTS
            record.block = EMPTY_EXTENTS
        return record

    def _make(self, parent: Record, name: bytes, record: Record) -> Inode:
        """Save a new inode and give it its name."""
        try:
            self.save(record)
            self._add_name(parent, name, record)
        except BaseException:
            self._discard(record)
            raise
        if record.is_directory:
            self._gain(parent)
        self._records[record.number] = record
        self._known[record.number] = 1
        return record.number

    def _may_have_many_links(self, directory: Record) -> bool:
        return self.superblock.has(ReadOnlyCompat.DIR_NLINK) and self.names.is_indexed(directory)

    def _discard(self, record: Record) -> None:
        """Take back an inode that never got a name."""
        record.links = 0
        self.free_inode(record)

    # Names

    def _add_name(self, directory: Record, name: bytes, record: Record) -> None:
        try:
            if directory.has_inline_data:
                self.expand_directory(directory)
            self.names.add(directory, name, record.number, stat.S_IFMT(record.mode))
        except BaseException:
            self.names_unknown(directory)
            raise
        self.touch(directory, content=True)

    def _remove_name(self, directory: Record, name: bytes) -> None:
        if directory.has_inline_data:
            self.expand_directory(directory)
        self.names.remove(directory, name)
        self.touch(directory, content=True)

    def _entry(self, directory: Inode, name: bytes) -> tuple[Record, Record]:
        """A directory that may be changed, and what one of its names stands for."""
        parent = self._directory(directory)
        found = self.find(parent, name)
        if found is None:
            raise error(errno.ENOENT)
        self.check_mutable(parent)
        record = self._named(found[0])
        self.check_mutable(record)
        return parent, record

    def unlink(self, directory: Inode, name: bytes) -> None:
        parent, record = self._entry(directory, name)
        if record.is_directory:
            raise error(errno.EISDIR)
        self._remove_name(parent, name)
        self._lose_name(record)

    def remove_directory(self, directory: Inode, name: bytes) -> None:
        parent, record = self._entry(directory, name)
        if not record.is_directory:
            raise error(errno.ENOTDIR)
        self._check_empty(record)
        self._remove_name(parent, name)
        self._lose_directory(parent, record)

    def _lose_name(self, record: Record) -> None:
        record.links -= 1
        self.touch(record)
        if not record.links:
            self.make_orphan(record)

    def _lose_directory(self, parent: Record, record: Record) -> None:
        record.links = 0
        self.touch(record)
        self._lose(parent)
        self.make_orphan(record)

    def _gain(self, parent: Record) -> None:
        """A directory has one subdirectory more; a count of 1 means that there are too many to count."""
        if parent.links != 1:
            parent.links = parent.links + 1 if parent.links < _MOST_LINKS else 1
            self.save(parent)

    def _lose(self, parent: Record) -> None:
        """A directory has one subdirectory less."""
        if parent.links > 2:
            parent.links -= 1
            self.save(parent)

    def _check_empty(self, directory: Record) -> None:
        for part in self.directory_parts(directory):
            try:
                if any(entry.inode and entry.name not in (b".", b"..") for entry in part.entries(self._has_types)):
                    raise error(errno.ENOTEMPTY)
            except directories.BrokenBlock:
                raise error(errno.EIO) from None

    def rename(
        self, directory: Inode, name: bytes, new_directory: Inode, new_name: bytes, *, replace: bool = True
    ) -> None:
        self.make_room(0)
        parent, record = self._entry(directory, name)
        new_parent = parent if new_directory == directory else self._directory(new_directory)
        if not directories.is_shown(new_name):
            raise error(errno.EBUSY if new_name in (b".", b"..") else errno.EINVAL)
        self.check_mutable(new_parent)
        found = self.find(new_parent, new_name)
        if found is not None and not replace:
            raise error(errno.EEXIST)
        if found is not None and found[0] == record.number:
            return
        if not new_parent.links:
            raise error(errno.ENOENT)
        moved = record.is_directory and parent is not new_parent
        if record.is_directory:
            self._check_not_inside(new_parent, record)
        if found is None:
            if moved and new_parent.links >= _MOST_LINKS and not self._may_have_many_links(new_parent):
                raise error(errno.EMLINK)
            self._add_name(new_parent, new_name, record)
            self.settle()
        else:
            self._replace(new_parent, new_name, self._named(found[0]), record)
        self._remove_name(parent, name)
        self.touch(record)
        if moved:
            self._set_parent(record, new_parent)
            self._lose(parent)
            self._gain(new_parent)

    def _replace(self, directory: Record, name: bytes, target: Record, record: Record) -> None:
        """Let a name of `target` stand for `record`."""
        self.check_mutable(target)
        if target.is_directory:
            if not record.is_directory:
                raise error(errno.EISDIR)
            self._check_empty(target)
        elif record.is_directory:
            raise error(errno.ENOTDIR)
        if directory.has_inline_data:
            self.expand_directory(directory)
        self.names.point(directory, name, record.number, stat.S_IFMT(record.mode))
        self.touch(directory, content=True)
        self.settle()
        if target.is_directory:
            self._lose_directory(directory, target)
        else:
            self._lose_name(target)

    def _check_not_inside(self, directory: Record, record: Record) -> None:
        """A directory must not be moved below itself."""
        seen = set[int]()
        while directory.number != ROOT:
            if directory.number == record.number:
                raise error(errno.EINVAL)
            if directory.number in seen:
                raise error(errno.EIO)
            seen.add(directory.number)
            directory = self._directory(Inode(self.parent_of(directory)))

    def _set_parent(self, directory: Record, parent: Record) -> None:
        if directory.has_inline_data:
            directory.block = struct.pack("<I", parent.number) + directory.block[4:]
            self.save(directory)
            return
        place = self.names.find(directory, b"..")
        struct.pack_into("<I", place.block, place.found.offset, parent.number)
        self.write_directory_block(directory, place.logical, place.block)
        self.names.index.forget(directory)

    # Content

    def write(self, inode: Inode, offset: int, data: ReadBuffer) -> None:
        record = self._file(inode)
        if not len(data):
            return
        self.make_room(len(data))
        try:
            if record.has_inline_data:
                self.expand_file(record)
            self.content.write(record, offset, data)
        except BaseException:
            self._take_back(record)
            raise
        self.touch(record, content=True)

    def truncate(self, inode: Inode, size: int) -> None:
        record = self._file(inode)
        try:
            if record.has_inline_data:
                self.expand_file(record)
            self.content.truncate(record, size)
        except BaseException:
            self._take_back(record)
            raise
        self.touch(record, content=True)

    def _take_back(self, record: Record) -> None:
        """After a failure: what was added behind the file's end goes, and the map is read again."""
        self.content.free(record, -(-record.size // self._block_size))
        self.save(record)

    def _file(self, inode: Inode) -> Record:
        record = self.record(inode)
        if record.is_directory:
            raise error(errno.EISDIR)
        if not record.is_regular:
            raise error(errno.EINVAL)
        self.check_mutable(record)
        return record

    # Attributes

    def change(self, inode: Inode, changes: Changes) -> None:
        record = self.record(inode)
        self.check_mutable(record)
        if changes.mode is not None:
            self._change_acl(record, changes.mode)
            record.mode = stat.S_IFMT(record.mode) | changes.mode & 0o7777
        if changes.uid is not None:
            record.uid = changes.uid
        if changes.gid is not None:
            record.gid = changes.gid
        if changes.atime_ns is not None:
            record.atime_ns = clamp_time(changes.atime_ns, record.extra_size)
        if changes.mtime_ns is not None:
            record.mtime_ns = clamp_time(changes.mtime_ns, record.extra_size)
        self.touch(record)

    def _change_acl(self, record: Record, mode: int) -> None:
        try:
            acl = self.xattr(record.number, xattrs.ACCESS_ACL)
        except OSError as problem:
            if problem.errno != errno.ENODATA:
                raise
            return
        changed = xattrs.acl_as_stored(xattrs.acl_with_mode(acl, mode))
        self.change_attribute(record, xattrs.ACCESS_ACL, changed)

    def set_xattr(self, inode: Inode, name: bytes, value: bytes, flags: int = 0) -> None:
        self.make_room(len(value))
        record = self.record(inode)
        self.check_mutable(record)
        if not xattrs.is_settable(name) or b"\0" in name:
            raise error(errno.ENOTSUP)
        if len(name) > 255:
            raise error(errno.ERANGE)
        if len(value) > xattrs.MAX_VALUE:
            raise error(errno.E2BIG)
        if name.startswith(b"user.") and not (record.is_regular or record.is_directory):
            raise error(errno.EPERM)
        exists = any(attribute.name == name for attribute in self.stored_attributes(record))
        if exists and flags & XATTR_CREATE:
            raise error(errno.EEXIST)
        if not exists and flags & XATTR_REPLACE:
            raise error(errno.ENODATA)
        stored: bytes | None = value
        mode = record.mode
        if name in (xattrs.ACCESS_ACL, xattrs.DEFAULT_ACL):
            permissions, is_plain = xattrs.acl_mode(value)
            stored = xattrs.acl_as_stored(value)
            if name == xattrs.ACCESS_ACL:
                mode = record.mode & ~0o777 | permissions
                stored = None if is_plain else stored
            elif not record.is_directory:
                raise error(errno.EACCES)
        if stored is not None or exists:
            self.change_attribute(record, name, stored)
        record.mode = mode
        self.touch(record)

    def remove_xattr(self, inode: Inode, name: bytes) -> None:
        record = self.record(inode)
        self.check_mutable(record)
        stored = [attribute.name for attribute in self.stored_attributes(record)]
        if name not in stored or name == xattrs.INLINE_DATA:
            raise error(errno.ENODATA)
        self.change_attribute(record, name, None)
        self.touch(record)
