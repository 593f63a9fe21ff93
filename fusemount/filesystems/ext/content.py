"""Changing what files hold: finding room for blocks, linking them into a file's map, cutting files.

What it keeps: space is taken from the bitmaps, then filled, then linked into the map, and given back when that fails;
so a file never shows what was on the disk before. A map is walked and checked (mapping.whole, and that it touches no
block of the file system's own) before libext2fs may free what it lists.
"""

from __future__ import annotations

import errno
import struct
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fusemount.filesystems.base import error
from fusemount.filesystems.ext.inodes import Flag, Record
from fusemount.filesystems.ext.library import EXTENT_NOT_FOUND, NO_CURRENT_NODE
from fusemount.filesystems.ext.mapping import DIRECT, EXTENT_MAGIC, MAX_LOGICAL, Run
from fusemount.filesystems.ext.superblock import Incompat, ReadOnlyCompat
from nbdserve.block.file import ReadBuffer

if TYPE_CHECKING:
    from fusemount.filesystems.ext.store import Store

EMPTY_EXTENTS = struct.pack("<HHHHI", EXTENT_MAGIC, 0, 4, 0, 0) + bytes(48)
EMPTY_MAP = bytes(60)
_LONGEST_EXTENT = 32768
_CURRENT, _INSERT_BEFORE, _INSERT_AFTER = 0, 0, 1
_UNWRITTEN_FLAG = 2
_SIZE_OF_LARGE_FILE = 1 << 31
_MOST_POINTER = 1 << 32


class Content:
    """Changes the content of the files of one file system."""

    def __init__(self, filesystem: Store) -> None:
        self._fs = filesystem
        self._super = filesystem.superblock
        self._block_size = self._super.block_size
        self._ratio = self._super.cluster_blocks
        self._engine = filesystem.engine
        self._lib = filesystem.engine.lib
        self._own = _own_blocks(filesystem)
        self._own_starts = [start for start, _ in self._own]

    # Files

    def write(self, record: Record, offset: int, data: ReadBuffer) -> None:
        """Put bytes into a file and set its size; the caller saves the inode."""
        view = memoryview(data).cast("B")
        end = offset + len(view)
        self.check_size(record, end)
        if offset > record.size:
            self._zero_tail(record)
        size = self._block_size
        first, last = offset // size, -(-end // size)
        position = first
        for run in [*self._fs.mapper.runs(record, first, last), Run(last, 0, 0)]:
            while position < run.logical:
                position += self._fill_hole(record, position, run.logical - position, offset, view)
            if run.length:
                self.check_own(run)
                self._put(record, run, offset, view)
                if run.unwritten:
                    self._mark_written(record, run)
                position = run.end
        if end > record.size:
            self.set_size(record, end)

    def truncate(self, record: Record, size: int) -> None:
        """Cut a file or let it grow; the caller saves the inode."""
        self.check_size(record, size)
        if size < record.size:
            self.free(record, -(-size // self._block_size))
            self.set_size(record, size)
        if size != record.size or size % self._block_size:
            self._zero_tail(record)
        self.set_size(record, size)

    def set_size(self, record: Record, size: int) -> None:
        """Set an inode's size, and the feature that sizes from 2 GiB on need."""
        record.size = size
        if size >= _SIZE_OF_LARGE_FILE and not self._super.has(ReadOnlyCompat.LARGE_FILE):
            self._engine.superblock[0x64] = bytes([self._engine.superblock[0x64][0] | ReadOnlyCompat.LARGE_FILE])
            self._engine.mark_super()

    def free(self, record: Record, first: int = 0) -> None:
        """Give up all blocks from the logical block `first` on."""
        record.map = []
        doomed = []
        for run in self._fs.mapper.whole(record):
            self.check_own(run)
            if run.end > first:
                start = max(run.logical, first)
                doomed.append(Run(start, run.physical + start - run.logical, run.end - start))
        if record.flags & Flag.EXTENTS:
            self._cut_extents(record, first)
            self._free_clusters(record, first, doomed)
        else:
            lib, null = self._lib, self._engine.ffi.NULL
            with self.native(record) as raw:
                code = lib.ext2fs_punch(self._engine.fs, record.number, raw, null, first, (1 << 64) - 1)
                self._engine.check(code)
        record.map = []

    def add_block(self, record: Record, logical: int) -> int:
        """Give a file one block, not written yet, where it has none; its number."""
        physical, _, taken = self._allocate(record, logical, 1)
        with self._given_back(physical, taken):
            self._link(record, logical, physical, 1, taken)
        return physical

    def take_block(self, record: Record) -> int:
        """A block for the beginning of a file that has none, not linked yet."""
        physical, _, _ = self._allocate(record, 0, 1)
        return physical

    def link_first(self, record: Record, physical: int) -> None:
        """Make the block from take_block() the first of a file whose map is empty."""
        self._link(record, 0, physical, 1, self._ratio)

    def give_back(self, physical: int, blocks: int) -> None:
        """Mark blocks as free."""
        self._lib.ext2fs_block_alloc_stats_range(self._engine.fs, physical, blocks, -1)
        self._engine.park(physical, blocks)

    @contextmanager
    def native(self, record: Record) -> Iterator[Any]:
        """The inode in the library's form, to be changed by it; the record is what it left when this ends."""
        raw = self._engine.ffi.new("char[]", bytes(record.pack()))
        try:
            yield raw
        except BaseException:
            self._fs.drop(record)
            raise
        known = record.map
        record.unpack(self._engine.ffi.buffer(raw, len(record.raw))[:])
        record.map = known

    # Parts of writing

    def _fill_hole(self, record: Record, logical: int, length: int, offset: int, view: memoryview) -> int:
        """Allocate blocks for (the beginning of) a hole, fill and link them; how many."""
        if not record.flags & Flag.EXTENTS:
            length = self._make_nodes(record, logical, length)
        physical, count, taken = self._allocate(record, logical, length)
        with self._given_back(physical, taken):
            self._put(record, Run(logical, physical, count, True), offset, view)
            self._link(record, logical, physical, count, taken)
        return count

    def _put(self, record: Record, run: Run, offset: int, view: memoryview) -> None:
        """Write the part of the data that belongs into a run; what is new of it and gets none becomes zeros."""
        size = self._block_size
        start, end = run.logical * size, run.end * size
        place = run.physical * size - start
        first, last = max(start, offset), min(end, offset + len(view))
        if run.unwritten and start < first:
            self._fs.cache.write(place + start, bytes(first - start))
        self._fs.cache.write(place + first, view[first - offset : last - offset])
        if run.unwritten and last < end:
            self._fs.cache.write(place + last, bytes(end - last))

    def _zero_tail(self, record: Record) -> None:
        """Whatever lies behind the end of a file in its last block becomes zeros."""
        size = self._block_size
        within = record.size % size
        if within and not record.has_inline_data:
            for run in self._fs.mapper.runs(record, record.size // size, record.size // size + 1):
                self.check_own(run)
                if not run.unwritten:
                    self._fs.cache.write(run.physical * size + within, bytes(size - within))

    def check_size(self, record: Record, size: int) -> None:
        """Whether a map can reach so far; raises EFBIG."""
        if record.flags & Flag.EXTENTS:
            most = (MAX_LOGICAL - 1) * self._block_size
        else:
            each = self._block_size // 4
            most = min(DIRECT + each + each**2 + each**3, MAX_LOGICAL - 1) * self._block_size
        if size > most:
            raise error(errno.EFBIG)

    def check_own(self, run: Run) -> None:
        """A file's map must not lead into bitmaps, inode tables and the like."""
        index = bisect_right(self._own_starts, run.physical + run.length - 1)
        if index and self._own[index - 1][1] > run.physical:
            raise error(errno.EIO)

    # Space

    def _allocate(self, record: Record, logical: int, count: int) -> tuple[int, int, int]:
        """Blocks for (the beginning of) a hole: the first, how many, and how many were taken from the free ones.

        A cluster that already holds a block of the file has room reserved for its neighbours: then nothing is taken.
        """
        ratio = self._ratio
        within = logical % ratio
        count = min(count, _LONGEST_EXTENT - ratio)
        if ratio > 1:
            start = logical - within
            for run in self._fs.mapper.runs(record, start, start + ratio):
                return run.physical - run.logical + logical, min(count, ratio - within), 0
            last = (logical + count - 1) // ratio * ratio
            if last > start and any(self._fs.mapper.runs(record, last, last + ratio)):
                count = last - logical
        wanted = -(-(within + count) // ratio) * ratio
        goal = self._goal(record, logical) // ratio * ratio
        found = self._engine.ffi.new("uint64_t[2]")
        self._engine.check(
            self._lib.ext2fs_new_range(self._engine.fs, 0, goal, wanted, self._engine.ffi.NULL, found, found + 1)
        )
        physical, got = int(found[0]), min(int(found[1]), wanted) // ratio * ratio
        if not got or not self._super.valid_range(physical, got) or physical % ratio:
            raise error(errno.ENOSPC)
        if not record.flags & Flag.EXTENTS and physical + got > _MOST_POINTER:
            raise error(errno.ENOSPC)
        count = min(count, got - within)
        taken = -(-(within + count) // ratio) * ratio
        self.check_own(Run(logical, physical, taken))
        self._lib.ext2fs_block_alloc_stats_range(self._engine.fs, physical, taken, 1)
        return physical + within, count, taken

    def _goal(self, record: Record, logical: int) -> int:
        """Where the block should lie: behind its predecessor, else in the inode's group."""
        if logical:
            for run in self._fs.mapper.runs(record, logical - 1, logical):
                return run.physical + 1
        return self._super.group_start((record.number - 1) // self._super.inodes_per_group)

    @contextmanager
    def _given_back(self, physical: int, taken: int) -> Iterator[None]:
        """Blocks that could not be put to use become free again."""
        try:
            yield
        except BaseException:
            if taken:
                self.give_back(physical // self._ratio * self._ratio, taken)
            raise

    def _count(self, record: Record, blocks: int) -> None:
        """Add blocks to an inode's i_blocks, which in a damaged file may be fewer than those that are taken away."""
        added = blocks if record.flags & Flag.HUGE_FILE else blocks * self._block_size // 512
        record.sectors = max(0, record.sectors + added)
        if record.sectors >= 1 << (48 if self._super.has(ReadOnlyCompat.HUGE_FILE) else 32):
            raise error(errno.EFBIG)

    # Maps

    def _link(self, record: Record, logical: int, physical: int, count: int, taken: int) -> None:
        if record.flags & Flag.EXTENTS:
            with self._extents(record) as handle:
                self._insert_extent(handle, logical, physical, count)
        else:
            self._set_pointers(record, logical, physical, count)
        self._count(record, taken)
        self._fs.mapper.note(record, Run(logical, physical, count))

    @contextmanager
    def _extents(self, record: Record) -> Iterator[Any]:
        opened = self._engine.ffi.new("ext2_extent_handle_t *")
        with self.native(record) as raw:
            self._engine.check(self._lib.ext2fs_extent_open2(self._engine.fs, record.number, raw, opened))
            try:
                yield opened[0]
            finally:
                self._lib.ext2fs_extent_free(opened[0])

    def _insert_extent(self, handle: Any, logical: int, physical: int, count: int) -> None:
        check, lib = self._engine.check, self._lib
        extent = self._engine.ffi.new("struct ext2fs_extent *")
        code = lib.ext2fs_extent_goto(handle, logical)
        if code not in (EXTENT_NOT_FOUND, NO_CURRENT_NODE):
            check(code)
        where = _INSERT_BEFORE
        code = lib.ext2fs_extent_get(handle, _CURRENT, extent)
        if code != NO_CURRENT_NODE:
            check(code)
            if extent.e_lblk < logical:
                where = _INSERT_AFTER
                if (
                    extent.e_lblk + extent.e_len == logical
                    and extent.e_pblk + extent.e_len == physical
                    and not extent.e_flags & _UNWRITTEN_FLAG
                    and extent.e_len + count <= _LONGEST_EXTENT
                ):
                    extent.e_len += count
                    check(lib.ext2fs_extent_replace(handle, 0, extent))
                    return
        extent.e_lblk, extent.e_pblk, extent.e_len, extent.e_flags = logical, physical, count, 0
        check(lib.ext2fs_extent_insert(handle, where, extent))
        check(lib.ext2fs_extent_fix_parents(handle))

    def _cut_extents(self, record: Record, first: int) -> None:
        """Remove all extents from the logical block `first` on from the tree. Their blocks stay allocated.

        ext2fs_punch() would free them too, but up to 1.47 it refuses to free the last block of a file system.
        """
        check, lib = self._engine.check, self._lib
        with self._extents(record) as handle:
            extent = self._engine.ffi.new("struct ext2fs_extent *")
            while True:
                code = lib.ext2fs_extent_goto(handle, MAX_LOGICAL)
                if code not in (EXTENT_NOT_FOUND, NO_CURRENT_NODE):
                    check(code)
                code = lib.ext2fs_extent_get(handle, _CURRENT, extent)
                if code == NO_CURRENT_NODE:
                    return
                check(code)
                if extent.e_lblk + extent.e_len <= first:
                    return
                if extent.e_lblk < first:
                    extent.e_len = first - extent.e_lblk
                    check(lib.ext2fs_extent_replace(handle, 0, extent))
                else:
                    check(lib.ext2fs_extent_delete(handle, 0))
                code = lib.ext2fs_extent_fix_parents(handle)
                if code != NO_CURRENT_NODE:
                    check(code)

    def _free_clusters(self, record: Record, first: int, doomed: list[Run]) -> None:
        """Give up the blocks of runs that were cut off, save for a cluster that still holds blocks before `first`."""
        record.map = []
        ratio = self._ratio
        start = first - first % ratio
        kept = {run.physical // ratio for run in self._fs.mapper.runs(record, start, first)} if start < first else set()
        freed_up_to = -1
        for run in doomed:
            begin, end = run.physical // ratio, -(-(run.physical + run.length) // ratio)
            if begin in kept or begin + 1 == freed_up_to:
                begin += 1
            if begin < end:
                self.give_back(begin * ratio, (end - begin) * ratio)
                self._count(record, (begin - end) * ratio)
                freed_up_to = end

    def _mark_written(self, record: Record, run: Run) -> None:
        """Part of an unwritten extent holds data now."""
        check, lib = self._engine.check, self._lib
        with self._extents(record) as handle:
            extent = self._engine.ffi.new("struct ext2fs_extent *")
            check(lib.ext2fs_extent_goto(handle, run.logical))
            check(lib.ext2fs_extent_get(handle, _CURRENT, extent))
            if (extent.e_lblk, extent.e_len) == (run.logical, run.length):
                extent.e_flags = 0
                check(lib.ext2fs_extent_replace(handle, 0, extent))
            else:
                for index in range(run.length):
                    check(lib.ext2fs_extent_set_bmap(handle, run.logical + index, run.physical + index, 0))
        record.map = []

    def _make_nodes(self, record: Record, logical: int, count: int) -> int:
        """Make the pointer block that the first of `count` blocks needs; how many of them it has room for."""
        if logical < DIRECT:
            return min(count, DIRECT - logical)
        each = self._block_size // 4
        node, index = self._node(record, logical)
        assert node
        return min(count, each - index)

    def _node(self, record: Record, logical: int) -> tuple[int, int]:
        """The block that holds the pointer to a logical block from DIRECT on, made if need be; the pointer's index."""
        each = self._block_size // 4
        position, level = logical - DIRECT, 1
        while position >= each**level:
            position -= each**level
            level += 1
        slot = DIRECT + level - 1
        pointers = list(struct.unpack("<15I", record.block))
        if not pointers[slot]:
            pointers[slot] = self._new_node(record, logical)
            record.block = struct.pack("<15I", *pointers)
            self._fs.save(record)
        node = pointers[slot]
        while level > 1:
            level -= 1
            index, position = divmod(position, each**level)
            block = self._fs.read_block(node)
            (below,) = struct.unpack_from("<I", block, index * 4)
            if not below:
                below = self._new_node(record, logical)
                struct.pack_into("<I", block, index * 4, below)
                self._fs.write_block(node, block)
            node = below
        self.check_own(Run(logical, node, 1))
        return node, position

    def _new_node(self, record: Record, logical: int) -> int:
        record.map = []
        physical, _, taken = self._allocate(record, logical, 1)
        with self._given_back(physical, taken):
            self._fs.write_block(physical, bytes(self._block_size))
            self._count(record, 1)
        return physical

    def _set_pointers(self, record: Record, logical: int, physical: int, count: int) -> None:
        numbers = range(physical, physical + count)
        if logical < DIRECT:
            pointers = list(struct.unpack("<15I", record.block))
            pointers[logical : logical + count] = numbers
            record.block = struct.pack("<15I", *pointers)
        else:
            node, index = self._node(record, logical)
            block = self._fs.read_block(node)
            struct.pack_into(f"<{count}I", block, index * 4, *numbers)
            self._fs.write_block(node, block)


def _own_blocks(filesystem: Store) -> list[tuple[int, int]]:
    """The ranges [start, end) of blocks that hold bitmaps, inode tables, descriptors and superblocks, in order."""
    sb = filesystem.superblock
    table = -(-sb.inodes_per_group * sb.inode_size // sb.block_size)
    ranges = [(block, block + 1) for block in sb.descriptor_blocks()]
    old_descriptors = 1 + (sb.first_meta_group if sb.has(Incompat.META_BG) else len(ranges))
    for group in range(sb.groups):
        if sb.has_super(group):
            start = sb.group_start(group)
            ranges.append((start, start + old_descriptors))
        for number, length in zip(filesystem.places_of_group(group), (1, 1, table), strict=True):
            ranges.append((number, number + length))
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged
