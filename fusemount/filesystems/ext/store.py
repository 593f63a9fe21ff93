"""What is kept while an ext file system is changed: inodes, the bitmaps in libext2fs, orphans, the superblock's state.

What it keeps:

- We write without the journal, so the journal is empty before the first change, and as long as the file system is open
  for writing its superblock says that it was not unmounted: after a crash e2fsck puts it right. That it can do so
  without loss is what the order of writes is for; see order.
- An inode is on disk (in the cache above the device) as soon as it was saved, by libext2fs, so that both see the same.
  Bitmaps and counts live in the library until sync().
- An inode without a name stays allocated, in the superblock's list of orphans, until it is neither held nor known to
  the caller: its number is not used for another file before that.
"""

from __future__ import annotations

import errno
import stat
import struct
import time

from fusemount.cache import WriteBackCache
from fusemount.filesystems.base import Inode, error
from fusemount.filesystems.ext import directories, recovery, xattrs
from fusemount.filesystems.ext.content import EMPTY_EXTENTS, EMPTY_MAP, Content
from fusemount.filesystems.ext.directories import Found
from fusemount.filesystems.ext.inodes import Flag, Record, clamp_time
from fusemount.filesystems.ext.library import Engine
from fusemount.filesystems.ext.names import DirectoryWriter
from fusemount.filesystems.ext.order import WriteOrder
from fusemount.filesystems.ext.reading import ExtFileSystem
from fusemount.filesystems.ext.superblock import Incompat, ReadOnlyCompat, State, Superblock
from nbdserve.block.file import ReadBuffer

_STATE, _ORPHANS, _FREE_BLOCKS, _FREE_BLOCKS_HIGH, _FREE_INODES = 0x3A, 0xE8, 0x0C, 0x158, 0x10
_FEATURE_EXT_ATTR = 0x8
_RESERVE = 128  # blocks that the largest change but for content may need


class Store(ExtFileSystem):
    """The part of a writable file system below its operations; see writing.

    Attributes:
        engine: libext2fs.
        content, names: what changes the content of files, and directories.
    """

    read_only = False

    def __init__(self, cache: WriteBackCache, superblock: Superblock, engine: Engine) -> None:
        super().__init__(cache, superblock)
        self.engine = engine
        self.content = Content(self)
        self.names = DirectoryWriter(self)
        self._known: dict[int, int] = {}  # inode -> how often the caller was given its number
        self._held: dict[int, int] = {}
        self._orphans: list[int] = []  # as in the superblock's list, the head last
        self._has_leftovers = False
        self._closed = False
        self._count_free()
        self._set_state(self._state & ~State.VALID)
        cache.early = WriteOrder(cache.below, superblock, self.places_of_group)
        self.sync()
        self._finish_orphans()

    # Keeping what is known right

    def save(self, record: Record) -> None:
        """Write an inode."""
        raw = record.pack()
        lib, ffi = self.engine.lib, self.engine.ffi
        self.engine.check(lib.ext2fs_write_inode_full(self.engine.fs, record.number, ffi.from_buffer(raw), len(raw)))
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

    def touch(self, record: Record, *, content: bool = False) -> None:
        """Note the time of a change and save the inode."""
        record.ctime_ns = self.now(record)
        if content:
            record.mtime_ns = record.ctime_ns
        self.save(record)

    @staticmethod
    def now(record: Record) -> int:
        return clamp_time(time.time_ns(), record.extra_size)

    def check_mutable(self, record: Record) -> None:
        if record.flags & (Flag.IMMUTABLE | Flag.APPEND | Flag.VERITY):
            raise error(errno.EPERM)

    # Blocks of directories

    def has_block(self, directory: Record, logical: int) -> bool:
        """Whether a directory has no hole there."""
        return any(self.mapper.runs(directory, logical, logical + 1))

    def unverified_block(self, directory: Record, logical: int) -> bytes | bytearray:
        """A block of a directory to search in, nothing more; empty for a hole."""
        for run in self.mapper.runs(directory, logical, logical + 1):
            return self.read_block(run.physical)
        return b""

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
            table = self.index_table(directory, block)
            if table is None:
                if not directories.has_tail(block):
                    raise error(errno.EIO)
                block[-4:] = self.directory_checksum(directory, block)
            else:
                end = table + 8 * int.from_bytes(block[table : table + 2], "little")
                block[end + 4 : end + 8] = self.index_checksum(directory, block, table)
        for run in self.mapper.runs(directory, logical, logical + 1):
            self.content.check_own(run)
            self.write_block(run.physical, block)

    def add_directory_block(self, directory: Record, block: bytearray) -> int:
        """One more block for a directory; its logical number."""
        logical = directory.size // self._block_size
        self.content.check_size(directory, directory.size + self._block_size)
        self.content.add_block(directory, logical)
        self.content.set_size(directory, directory.size + self._block_size)
        self.save(directory)
        self.write_directory_block(directory, logical, block)
        return logical

    # Inline data

    def expand_file(self, record: Record) -> None:
        """Move a file's content out of its inode."""
        content = bytes(self.read_content(record, 0, record.size))
        self._expand(record, content, record.size)

    def expand_directory(self, directory: Record) -> None:
        """Move a directory's entries out of its inode."""
        parent = self.parent_of(directory)
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
        self.change_attribute(record, xattrs.INLINE_DATA, None)
        if block:
            self.content.link_first(record, block)
            self.save(record)

    def parent_of(self, directory: Record) -> int:
        if directory.has_inline_data:
            return int.from_bytes(directory.block[:4], "little")
        return self.names.find(directory, b"..").found.inode

    # Attributes

    def change_attribute(self, record: Record, name: bytes, value: bytes | None) -> None:
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
                self._set_feature(0x5C, _FEATURE_EXT_ATTR)
        finally:
            lib.ext2fs_xattrs_close(handle)
            known = record.map
            self._reread(record)
            record.map = known

    # Holding, and orphans

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

    def make_orphan(self, record: Record) -> None:
        """An inode has lost its last name: it goes when nobody knows it any more."""
        if record.is_directory:
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
        try:
            self.free_inode(record)
        except OSError:  # a damaged map: it stays in the list, for e2fsck
            self._has_leftovers = True
            self.drop(record)
            return
        index = self._orphans.index(inode)
        del self._orphans[index]
        if index < len(self._orphans):
            following = self.record(self._orphans[index])
            following.dtime = self._orphans[index - 1] if index else 0
            self.save(following)
        self._set_head()

    def free_inode(self, record: Record) -> None:
        """Give back all that an inode without a name has, and its number."""
        has_blocks = record.is_regular or record.is_directory or stat.S_ISLNK(record.mode)
        if has_blocks and not record.has_inline_data and not self.is_fast_symlink(record):
            self.content.free(record)
        for attribute in self.stored_attributes(record):
            if attribute.value_inode:
                self.change_attribute(record, attribute.name, None)
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
                self.free_inode(record)
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

    def free_counts(self) -> tuple[int, int]:
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

    def settle(self) -> None:
        """What has been changed so far is on the device before what follows, should the process be killed."""
        self.cache.write_back()

    def make_room(self, length: int) -> None:
        """To be called before so many bytes, or what it takes to make a file, are written: lets parked blocks go."""
        if self.engine.parked:
            free = self.free_counts()[0] - sum(count for _, count in self.engine.parked)
            if free < length // self._block_size + _RESERVE:
                self.sync()

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
            if not (self.cache.failed or self.engine.failed or self._has_leftovers):
                self._set_state(self._state | State.VALID)
                self.sync()
        finally:
            self.engine.free()
