"""An ext file system that is changed, through libext2fs and, for directories and the maps of files, by ourselves.

What it keeps:

- We write without the journal, so the journal is empty before the first change, and as long as the file system is open
  for writing its superblock says that it was not unmounted: after a crash e2fsck puts it right.
- An inode is on disk (in the cache above the device) as soon as a method that changed it returns; libext2fs is told to
  forget its copy first, so that both always see the same. Bitmaps and counts live in the library until sync().
- An inode without a name stays allocated, in the superblock's list of orphans, until it is neither held nor known to
  the caller: its number is not used for another file before that.
- A call that fails leaves memory as the disk is: records that it may have changed are read again.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import time
from collections.abc import Iterator

from fusemount.cache import WriteBackCache
from fusemount.filesystems.base import Changes, Entry, Inode, Space, error
from fusemount.filesystems.ext import attributes, directories, recovery
from fusemount.filesystems.ext.content import EMPTY_EXTENTS, EMPTY_MAP, Content
from fusemount.filesystems.ext.directories import Found
from fusemount.filesystems.ext.inodes import ROOT, Flag, Record, clamp_time, device_block
from fusemount.filesystems.ext.library import Engine
from fusemount.filesystems.ext.names import DirectoryWriter
from fusemount.filesystems.ext.reading import ExtFileSystem
from fusemount.filesystems.ext.superblock import (
    Incompat,
    ReadOnlyCompat,
    State,
    Superblock,
    read_superblock,
)
from nbdserve.block.device import BlockDevice
from nbdserve.block.file import ReadBuffer

_MOST_LINKS = 65000
_STATE, _ORPHANS, _FREE_BLOCKS, _FREE_BLOCKS_HIGH, _FREE_INODES = 0x3A, 0xE8, 0x0C, 0x158, 0x10
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


class WritableExtFileSystem(ExtFileSystem):
    """An ext file system that is read and written."""

    read_only = False

    def __init__(self, cache: WriteBackCache, superblock: Superblock, engine: Engine) -> None:
        super().__init__(cache, superblock)
        self.engine = engine
        self.content = Content(self)
        self.names = DirectoryWriter(self)
        self._known: dict[int, int] = {}  # inode -> how often the caller was given its number
        self._held: dict[int, int] = {}
        self._orphans: list[int] = []  # as in the superblock's list, the head last
        self._closed = False
        self._directory(ROOT)
        self._count_free()
        self._set_state(self._state & ~State.VALID)
        self.sync()
        self._finish_orphans()

    # Keeping what is known right

    def save(self, record: Record) -> None:
        """Write an inode."""
        raw = record.pack()
        lib, ffi = self.engine.lib, self.engine.ffi
        self.engine.check(
            lib.ext2fs_write_inode_full(self.engine.fs, record.number, ffi.from_buffer(raw), len(raw))
        )
        record.raw = bytes(raw)

    def drop(self, record: Record) -> None:
        """Forget an inode that may not be as it is on disk; its record becomes what is on disk."""
        self.engine.lib.ext2fs_flush_icache(self.engine.fs)
        self._reread(record)

    def _reread(self, record: Record) -> None:
        record.unpack(self.cache.read(self.inode_place(record.number), self.superblock.inode_size))

    def name_added(self, directory: Record, name: bytes, inode: int, kind: int) -> None:
        """A name of a directory stands for an inode now."""
        names = self._names.get(directory.number)
        if names is not None:
            self._name_count += name not in names
            names[name] = (inode, kind if self._has_types else 0)

    def name_removed(self, directory: Record, name: bytes) -> None:
        """A name of a directory is gone."""
        names = self._names.get(directory.number)
        if names is not None and names.pop(name, None) is not None:
            self._name_count -= 1

    def names_unknown(self, directory: Record) -> None:
        """Forget the names of a directory."""
        self._name_count -= len(self._names.pop(directory.number, ()))

    def type_of(self, number: int) -> int:
        """The type bits of an inode's mode."""
        return self._type_of(number)

    def write_block(self, block: int, data: ReadBuffer) -> None:
        """Write one block of metadata."""
        assert self.superblock.valid_range(block)
        self.cache.write(block * self._block_size, data)

    # Blocks of directories

    def has_block(self, directory: Record, logical: int) -> bool:
        """Whether a directory has no hole there."""
        return any(self.mapper.runs(directory, logical, logical + 1))

    def read_directory_block(self, directory: Record, logical: int) -> bytearray:
        """A block of a directory. Raises EIO when it is missing or its checksum wrong."""
        for run in self.mapper.runs(directory, logical, logical + 1):
            block = self.read_block(run.physical)
            if self.is_sound(directory, block):
                return block
        raise error(errno.EIO)

    def write_directory_block(self, directory: Record, logical: int, block: bytearray) -> None:
        """Write a block of a directory, its checksum set."""
        if self.superblock.checksum_seed is not None:
            if directories.has_tail(block):
                block[-4:] = self.directory_checksum(directory, block)
            else:
                table = directories.index_table(block)
                if table is None:
                    raise error(errno.EIO)
                end = table + 8 * int.from_bytes(block[table : table + 2], "little")
                block[end + 4 : end + 8] = self.index_checksum(directory, block, table)
        for run in self.mapper.runs(directory, logical, logical + 1):
            self.content.check_own(run)
            self.write_block(run.physical, block)

    def add_directory_block(self, directory: Record, block: bytearray) -> int:
        """One more block for a directory; its logical number."""
        logical = directory.size // self._block_size
        self.content.add_block(directory, logical)
        self.content.set_size(directory, directory.size + self._block_size)
        self.save(directory)
        self.write_directory_block(directory, logical, block)
        return logical

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
        free_blocks, free_inodes = self._free()
        sb = self.superblock
        return Space(sb.block_size, sb.blocks, free_blocks, sb.inodes, free_inodes)

    # Holding

    def hold(self, inode: Inode) -> None:
        self._held[inode] = self._held.get(inode, 0) + 1

    def let_go(self, inode: Inode) -> None:
        self._held[inode] -= 1
        if not self._held[inode]:
            del self._held[inode]
            self._reap(inode)

    def forget(self, inode: Inode, count: int = 1) -> None:
        left = self._known.get(inode, 0) - count
        if left > 0:
            self._known[inode] = left
        else:
            self._known.pop(inode, None)
            self._reap(inode)

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
        self._check_mutable(record)
        if not record.links:
            raise error(errno.ENOENT)
        if record.links >= _MOST_LINKS:
            raise error(errno.EMLINK)
        self._add_name(parent, name, record)
        record.links += 1
        self._touch(record)

    def _parent(self, directory: Inode, name: bytes) -> Record:
        """The directory in which a name is to be made, which it may not hold yet."""
        parent = self._directory(directory)
        if not directories.is_shown(name):
            raise error(errno.EEXIST if name in (b".", b"..") else errno.EINVAL)
        if self.find(parent, name) is not None:
            raise error(errno.EEXIST)
        if not parent.links:
            raise error(errno.ENOENT)
        self._check_mutable(parent)
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
        now = self._now(record)
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
            many = self._may_have_many_links(parent) and (parent.links == 1 or parent.links >= _MOST_LINKS)
            parent.links = 1 if many else parent.links + 1
            self.save(parent)
        self._records[record.number] = record
        self._known[record.number] = 1
        return record.number

    def _may_have_many_links(self, directory: Record) -> bool:
        return self.superblock.has(ReadOnlyCompat.DIR_NLINK) and self.names.is_indexed(directory)

    def _discard(self, record: Record) -> None:
        """Take back an inode that never got a name."""
        record.links = 0
        self._free_inode(record)

    # Names

    def _add_name(self, directory: Record, name: bytes, record: Record) -> None:
        try:
            if directory.has_inline_data:
                self._expand_directory(directory)
            self.names.add(directory, name, record.number, stat.S_IFMT(record.mode))
        except BaseException:
            self.names_unknown(directory)
            raise
        self._touch(directory, content=True)

    def _remove_name(self, directory: Record, name: bytes) -> None:
        if directory.has_inline_data:
            self._expand_directory(directory)
        self.names.remove(directory, name)
        self._touch(directory, content=True)

    def _entry(self, directory: Inode, name: bytes) -> tuple[Record, Record]:
        """A directory that may be changed, and what one of its names stands for."""
        parent = self._directory(directory)
        found = self.find(parent, name)
        if found is None:
            raise error(errno.ENOENT)
        self._check_mutable(parent)
        record = self._named(found[0])
        self._check_mutable(record)
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
        self._touch(record)
        if not record.links:
            self._make_orphan(record)

    def _lose_directory(self, parent: Record, record: Record) -> None:
        record.links = 0
        self._touch(record)
        self._leave(parent)
        self._make_orphan(record)

    def _leave(self, parent: Record) -> None:
        """A directory has one subdirectory less; a count of 1 means that there are too many to count."""
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
        parent, record = self._entry(directory, name)
        new_parent = self._directory(new_directory)
        if not directories.is_shown(new_name):
            raise error(errno.EBUSY if new_name in (b".", b"..") else errno.EINVAL)
        self._check_mutable(new_parent)
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
        else:
            self._replace(new_parent, new_name, self._named(found[0]), record)
        self._remove_name(parent, name)
        self._touch(record)
        if moved:
            self._set_parent(record, new_parent)
            self._leave(parent)
            if new_parent.links > 1:
                new_parent.links += 1
            self.save(new_parent)

    def _replace(self, directory: Record, name: bytes, target: Record, record: Record) -> None:
        """Let a name of `target` stand for `record`."""
        self._check_mutable(target)
        if target.is_directory:
            if not record.is_directory:
                raise error(errno.EISDIR)
            self._check_empty(target)
        elif record.is_directory:
            raise error(errno.ENOTDIR)
        if directory.has_inline_data:
            self._expand_directory(directory)
        self.names.point(directory, name, record.number, stat.S_IFMT(record.mode))
        self._touch(directory, content=True)
        if target.is_directory:
            self._lose_directory(directory, target)
        else:
            self._lose_name(target)

    def _check_not_inside(self, directory: Record, record: Record) -> None:
        """A directory must not be moved below itself."""
        seen = set[int]()
        while directory.number != ROOT:
            if directory is record:
                raise error(errno.EINVAL)
            if directory.number in seen:
                raise error(errno.EIO)
            seen.add(directory.number)
            directory = self._directory(Inode(self._parent_of(directory)))

    def _parent_of(self, directory: Record) -> int:
        if directory.has_inline_data:
            return int.from_bytes(directory.block[:4], "little")
        return self.names.find(directory, b"..").found.inode

    def _set_parent(self, directory: Record, parent: Record) -> None:
        if directory.has_inline_data:
            directory.block = struct.pack("<I", parent.number) + directory.block[4:]
            self.save(directory)
            return
        place = self.names.find(directory, b"..")
        struct.pack_into("<I", place.block, place.found.offset, parent.number)
        self.write_directory_block(directory, place.logical, place.block)

    # Content

    def write(self, inode: Inode, offset: int, data: ReadBuffer) -> None:
        record = self._file(inode)
        if not len(data):
            return
        try:
            if record.has_inline_data:
                self._expand_file(record)
            self.content.write(record, offset, data)
        except BaseException:
            self._keep_map(record)
            raise
        self._touch(record, content=True)

    def truncate(self, inode: Inode, size: int) -> None:
        record = self._file(inode)
        try:
            if record.has_inline_data:
                self._expand_file(record)
            self.content.truncate(record, size)
        except BaseException:
            self._keep_map(record)
            raise
        self._touch(record, content=True)

    def _keep_map(self, record: Record) -> None:
        """After a failure: blocks that were linked before it stay, what is known of the map is read again."""
        record.map = []
        self.save(record)

    def _file(self, inode: Inode) -> Record:
        record = self.record(inode)
        if record.is_directory:
            raise error(errno.EISDIR)
        if not record.is_regular:
            raise error(errno.EINVAL)
        self._check_mutable(record)
        return record

    def _expand_file(self, record: Record) -> None:
        """Move a file's content out of its inode."""
        content = bytes(self.read_content(record, 0, record.size))
        self._expand(record, content, record.size)

    def _expand_directory(self, directory: Record) -> None:
        """Move a directory's entries out of its inode."""
        parent = self._parent_of(directory)
        entries = [Found(0, 0, directory.number, b".", stat.S_IFDIR), Found(0, 0, parent, b"..", stat.S_IFDIR)]
        for part in self.directory_parts(directory):
            try:
                entries += [found for found in part.entries(self._has_types) if found.inode]
            except directories.BrokenBlock:
                raise error(errno.EIO) from None
        block = self.names.pack(entries)
        if directories.has_tail(block):
            block[-4:] = self.directory_checksum(directory, block)
        self._expand(directory, bytes(block), self._block_size)

    def _expand(self, record: Record, content: bytes, size: int) -> None:
        block = self.content.take_block(record) if content else 0
        if block:
            self.write_block(block, content.ljust(self._block_size, b"\0"))
        record.flags &= ~Flag.INLINE_DATA
        if self.superblock.has(Incompat.EXTENTS):
            record.flags |= Flag.EXTENTS
        record.block = EMPTY_EXTENTS if record.flags & Flag.EXTENTS else EMPTY_MAP
        record.map = []
        record.size = size
        self.save(record)
        self._change_attribute(record, attributes.INLINE_DATA, None)
        if block:
            self.content.link_first(record, block)
            self.save(record)

    # Attributes

    def change(self, inode: Inode, changes: Changes) -> None:
        record = self.record(inode)
        self._check_mutable(record)
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
        self._touch(record)

    def _change_acl(self, record: Record, mode: int) -> None:
        try:
            acl = self.xattr(record.number, attributes.ACCESS_ACL)
        except OSError as problem:
            if problem.errno != errno.ENODATA:
                raise
            return
        changed = attributes.acl_as_stored(attributes.acl_with_mode(acl, mode))
        self._change_attribute(record, attributes.ACCESS_ACL, changed)

    def set_xattr(self, inode: Inode, name: bytes, value: bytes, flags: int = 0) -> None:
        from fusemount.filesystems.base import XATTR_CREATE, XATTR_REPLACE

        record = self.record(inode)
        self._check_mutable(record)
        if not attributes.is_settable(name) or b"\0" in name:
            raise error(errno.ENOTSUP)
        if len(name) > 255:
            raise error(errno.ERANGE)
        if len(value) > attributes.MAX_VALUE:
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
        if name in (attributes.ACCESS_ACL, attributes.DEFAULT_ACL):
            permissions, is_plain = attributes.acl_mode(value)
            stored = attributes.acl_as_stored(value)
            if name == attributes.ACCESS_ACL:
                mode = record.mode & ~0o777 | permissions
                stored = None if is_plain else stored
            elif not record.is_directory:
                raise error(errno.EACCES)
        if stored is not None or exists:
            self._change_attribute(record, name, stored)
        record.mode = mode
        self._touch(record)

    def remove_xattr(self, inode: Inode, name: bytes) -> None:
        record = self.record(inode)
        self._check_mutable(record)
        stored = [attribute.name for attribute in self.stored_attributes(record)]
        if name not in stored or name == attributes.INLINE_DATA:
            raise error(errno.ENODATA)
        self._change_attribute(record, name, None)
        self._touch(record)

    def _change_attribute(self, record: Record, name: bytes, value: bytes | None) -> None:
        """Set an extended attribute, or remove it (None), in the inode as it is saved; the record follows."""
        self.stored_attributes(record)  # raises EIO when the library had better not look at them
        lib, ffi, check = self.engine.lib, self.engine.ffi, self.engine.check
        lib.ext2fs_flush_icache(self.engine.fs)
        handle = ffi.new("void **")
        check(lib.ext2fs_xattrs_open(self.engine.fs, record.number, handle))
        try:
            raw_form = ffi.new("unsigned int *", 1)
            check(lib.ext2fs_xattrs_flags(handle[0], raw_form, ffi.NULL))
            check(lib.ext2fs_xattrs_read(handle[0]))
            if value is None:
                check(lib.ext2fs_xattr_remove(handle[0], name))
            else:
                check(lib.ext2fs_xattr_set(handle[0], name, value, len(value)))
                self._set_feature(0x5C, 8)
        finally:
            lib.ext2fs_xattrs_close(handle)
            known = record.map
            self._reread(record)
            record.map = known

    def _check_mutable(self, record: Record) -> None:
        if record.flags & (Flag.IMMUTABLE | Flag.APPEND | Flag.VERITY):
            raise error(errno.EPERM)

    def _touch(self, record: Record, *, content: bool = False) -> None:
        """Note the time of a change and save the inode."""
        record.ctime_ns = self._now(record)
        if content:
            record.mtime_ns = record.ctime_ns
        self.save(record)

    @staticmethod
    def _now(record: Record) -> int:
        return clamp_time(time.time_ns(), record.extra_size)

    # Orphans

    def _make_orphan(self, record: Record) -> None:
        """An inode has lost its last name: it goes when nobody knows it any more."""
        self.names_unknown(record)
        self.names.forget(record)
        record.dtime = self._orphans[-1] if self._orphans else 0
        self.save(record)
        self._orphans.append(record.number)
        self._set_head()
        self._reap(record.number)

    def _reap(self, inode: int) -> None:
        if inode in self._known or inode in self._held or inode not in self._orphans:
            return
        record = self.record(inode)
        self._free_inode(record)
        index = self._orphans.index(inode)
        del self._orphans[index]
        if index < len(self._orphans):
            following = self.record(self._orphans[index])
            following.dtime = self._orphans[index - 1] if index else 0
            self.save(following)
        self._set_head()

    def _free_inode(self, record: Record) -> None:
        """Give back all that an inode without a name has, and its number."""
        has_blocks = record.is_regular or record.is_directory or stat.S_ISLNK(record.mode)
        if has_blocks and not record.has_inline_data and not self.is_fast_symlink(record):
            self.content.free(record)
        for attribute in self.stored_attributes(record):
            if attribute.value_inode:
                self._change_attribute(record, attribute.name, None)
        if record.attribute_block:
            with self.content.native(record) as raw:
                lib = self.engine.lib
                self.engine.check(lib.ext2fs_free_ext_attr(self.engine.fs, record.number, raw))
        record.dtime = int(time.time()) & 0xFFFFFFFF
        record.size = 0
        self.save(record)
        self.engine.lib.ext2fs_inode_alloc_stats2(self.engine.fs, record.number, -1, record.is_directory)
        self._records.pop(record.number, None)

    def _set_head(self) -> None:
        head = self._orphans[-1] if self._orphans else 0
        self.engine.superblock[_ORPHANS : _ORPHANS + 4] = struct.pack("<I", head)
        self.engine.mark_super()

    def _finish_orphans(self) -> None:
        """Delete, or cut to their size, the inodes that a crash has left."""
        for record in list(recovery.orphans(self)):
            if record.links:
                if record.is_regular and not record.has_inline_data:
                    self.content.free(record, -(-record.size // self._block_size))
                record.dtime = 0
                self.save(record)
            else:
                self._free_inode(record)
        for block in recovery.orphan_file_blocks(self):
            content = self.read_block(block)
            content[: -recovery.ORPHAN_TAIL] = bytes(len(content) - recovery.ORPHAN_TAIL)
            if self.superblock.checksum_seed is not None:
                content[-4:] = recovery.orphan_checksum(self, block, bytes(content))
            self.write_block(block, content)
        place = slice(0x64, 0x68)
        (features,) = struct.unpack("<I", self.engine.superblock[place])
        self.engine.superblock[place] = struct.pack("<I", features & ~ReadOnlyCompat.ORPHAN_PRESENT)
        self._set_head()

    # The whole

    @property
    def _state(self) -> int:
        return int.from_bytes(self.engine.superblock[_STATE : _STATE + 2], "little")

    def _set_state(self, state: int) -> None:
        self.engine.superblock[_STATE : _STATE + 2] = struct.pack("<H", state)
        self.engine.mark_super()

    def _set_feature(self, offset: int, bit: int) -> None:
        raw = self.engine.superblock
        if not raw[offset][0] & bit:
            raw[offset] = bytes([raw[offset][0] | bit])
            self.engine.mark_super()

    def _free(self) -> tuple[int, int]:
        raw = self.engine.superblock
        blocks = int.from_bytes(raw[_FREE_BLOCKS : _FREE_BLOCKS + 4], "little")
        if self.superblock.has(Incompat.BIT64):
            blocks |= int.from_bytes(raw[_FREE_BLOCKS_HIGH : _FREE_BLOCKS_HIGH + 4], "little") << 32
        return blocks, int.from_bytes(raw[_FREE_INODES : _FREE_INODES + 4], "little")

    def _count_free(self) -> None:
        """The superblock's counts are only right after an unmount; those of the groups always are."""
        lib, fs, groups = self.engine.lib, self.engine.fs, range(self.superblock.groups)
        clusters = sum(lib.ext2fs_bg_free_blocks_count(fs, group) for group in groups)
        blocks = clusters * self.superblock.cluster_blocks
        inodes = sum(lib.ext2fs_bg_free_inodes_count(fs, group) for group in groups)
        raw = self.engine.superblock
        raw[_FREE_BLOCKS : _FREE_BLOCKS + 4] = struct.pack("<I", blocks & 0xFFFFFFFF)
        if self.superblock.has(Incompat.BIT64):
            raw[_FREE_BLOCKS_HIGH : _FREE_BLOCKS_HIGH + 4] = struct.pack("<I", blocks >> 32)
        raw[_FREE_INODES : _FREE_INODES + 4] = struct.pack("<I", inodes)

    def sync(self) -> None:
        self.engine.flush()
        self.cache.flush()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            self._known.clear()
            self._held.clear()
            for inode in list(self._orphans):
                self._reap(inode)
            self.sync()
            self._set_state(self._state | State.VALID)
            self.sync()
        finally:
            self.engine.free()
