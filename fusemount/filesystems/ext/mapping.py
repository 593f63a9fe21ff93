"""Where the blocks of a file lie: the extent trees of ext4 and the block maps of ext2 and ext3, read directly.

What it keeps: no number from a tree is used before it was checked. Blocks lie inside the file system, logical numbers
rise strictly, the depth falls by one a level; so no walk runs in a circle, whatever the image holds. A map is read
piece by piece (a segment: what one node tells), each when somebody asks for a block that it covers, and kept with the
inode.

Sources: Documentation/filesystems/ext4/ifork.rst and blockmap.rst of the kernel.
"""

from __future__ import annotations

import errno
import struct
from bisect import bisect_right
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from fusemount.filesystems.base import error
from fusemount.filesystems.ext.checksum import crc32c
from fusemount.filesystems.ext.inodes import Flag, Record
from fusemount.filesystems.ext.superblock import Superblock
from nbdserve.block.device import BlockDevice

EXTENT_MAGIC = 0xF30A
MAX_LOGICAL = 1 << 32
DIRECT = 12  # pointers in a block map that lead straight to data
_MAX_DEPTH = 5
_UNWRITTEN = 0x8000
_MOST_RUNS = 400_000  # kept in memory for all files together
_HEADER = struct.Struct("<HHHHI")
_ENTRY = struct.Struct("<IHHI")


class Run(NamedTuple):
    """Neighbours in the file that are neighbours on disk: `length` blocks; unwritten ones read as zeros."""

    logical: int
    physical: int
    length: int
    unwritten: bool = False

    @property
    def end(self) -> int:
        return self.logical + self.length


class Segment(NamedTuple):
    """All that is mapped between the logical blocks `first` and `end`, as the node in `block` tells (0: the inode)."""

    first: int
    end: int
    runs: list[Run]
    block: int


class Mapper:
    """Reads the maps of all files of one file system."""

    def __init__(self, device: BlockDevice, superblock: Superblock) -> None:
        self._device = device
        self._super = superblock
        self._kept: list[Record] = []
        self._count = 0

    def runs(self, record: Record, first: int, end: int) -> Iterator[Run]:
        """What is mapped between two logical blocks, in order, cut to them. Raises EIO for a damaged map."""
        end = min(end, MAX_LOGICAL)
        while first < end:
            segment = self._segment(record, first)
            runs = segment.runs
            for index in range(max(bisect_right(runs, first, key=_logical) - 1, 0), len(runs)):
                run = runs[index]
                if run.logical >= end:
                    break
                skipped = max(first - run.logical, 0)
                length = min(run.end, end) - run.logical - skipped
                if length > 0:
                    yield Run(run.logical + skipped, run.physical + skipped, length, run.unwritten)
            first = segment.end

    def whole(self, record: Record) -> Iterator[Run]:
        """Everything that is mapped, having checked that no part of the map is used twice."""
        seen = set[int]()
        position = total = 0
        while position < MAX_LOGICAL:
            segment = self._segment(record, position)
            total += sum(run.length for run in segment.runs)
            if segment.block in seen or total > self._super.blocks:
                raise error(errno.EIO)
            if segment.block:
                seen.add(segment.block)
            yield from segment.runs
            position = segment.end

    def note(self, record: Record, new: Run) -> None:
        """A run was added to a file's map: what is known of the map stays right."""
        index = bisect_right(record.map, new.logical, key=_first) - 1
        if index < 0 or record.map[index].end < new.end:
            record.map = []
            return
        runs = record.map[index].runs
        place = bisect_right(runs, new.logical, key=_logical)
        if place:
            before = runs[place - 1]
            if not before.unwritten and (before.end, before.physical + before.length) == (new.logical, new.physical):
                runs[place - 1] = before._replace(length=before.length + new.length)
                return
        runs.insert(place, new)

    def inode_seed(self, record: Record) -> int:
        """What the checksums of an inode's blocks start with."""
        assert self._super.checksum_seed is not None
        return crc32c(struct.pack("<II", record.number, record.generation), self._super.checksum_seed)

    def _segment(self, record: Record, block: int) -> Segment:
        index = bisect_right(record.map, block, key=_first)
        if index and record.map[index - 1].end > block:
            return record.map[index - 1]
        if record.flags & Flag.EXTENTS:
            segment = self._from_extents(record, block)
        else:
            segment = self._from_block_map(record, block)
        self._count += len(segment.runs) + 1
        if self._count > _MOST_RUNS:
            for other in self._kept:
                other.map = []
            self._kept = []
            self._count = 0
            index = 0
        if not record.map:
            self._kept.append(record)
        record.map.insert(index, segment)
        return segment

    def _from_extents(self, record: Record, block: int) -> Segment:
        node, place = record.block, 0
        first, end = 0, MAX_LOGICAL
        expected = None
        while True:
            magic, count, most, depth, _ = _HEADER.unpack_from(node)
            self._check(magic == EXTENT_MAGIC and count <= most <= len(node) // 12 - 1)
            self._check(depth <= _MAX_DEPTH if expected is None else depth == expected)
            entries = list(_ENTRY.iter_unpack(node[12 : 12 + 12 * count]))
            if depth == 0:
                return Segment(first, end, self._leaf(entries, first, end), place)
            firsts = [entry[0] for entry in entries]
            self._check(bool(firsts) and all(a < b for a, b in pairwise(firsts)))
            self._check(first <= firsts[0] and firsts[-1] < end)
            chosen = max(bisect_right(firsts, block) - 1, 0)
            if chosen:
                first = firsts[chosen]
            if chosen + 1 < count:
                end = firsts[chosen + 1]
            _, low, middle, high = entries[chosen]
            place = low | middle << 16 | (high & 0xFFFF) << 32
            node = self._read(place)
            self._verify_extents(record, node)
            expected = depth - 1

    def _leaf(self, entries: list[tuple[int, int, int, int]], first: int, end: int) -> list[Run]:
        runs = []
        for logical, length, high, low in entries:
            unwritten = length > _UNWRITTEN
            run = Run(logical, low | high << 32, length - _UNWRITTEN if unwritten else length, unwritten)
            self._check(first <= logical and run.end <= end and run.length > 0)
            self._check(self._super.valid_range(run.physical, run.length))
            first = run.end
            runs.append(run)
        return runs

    def _verify_extents(self, record: Record, node: bytes) -> None:
        if self._super.checksum_seed is not None:
            tail = 12 + 12 * int.from_bytes(node[4:6], "little")
            self._check(tail + 4 <= len(node))
            expected = int.from_bytes(node[tail : tail + 4], "little")
            self._check(crc32c(node[:tail], self.inode_seed(record)) == expected)

    def _from_block_map(self, record: Record, block: int) -> Segment:
        pointers = struct.unpack("<15I", record.block)
        if block < DIRECT:
            return Segment(0, DIRECT, self._collect(pointers[:DIRECT], 0), 0)
        each = self._super.block_size // 4
        first = DIRECT
        for level in range(1, 4):
            span = each**level
            if block < first + span:
                return self._descend(pointers[DIRECT + level - 1], level, first, block)
            first += span
        return Segment(first, MAX_LOGICAL, [], 0)

    def _descend(self, pointer: int, level: int, first: int, block: int) -> Segment:
        each = self._super.block_size // 4
        while pointer:
            pointers = struct.unpack(f"<{each}I", self._read(pointer))
            if level == 1:
                return Segment(first, first + each, self._collect(pointers, first), pointer)
            level -= 1
            chosen = (block - first) // each**level
            first += chosen * each**level
            pointer = pointers[chosen]
        return Segment(first, min(first + each**level, MAX_LOGICAL), [], 0)

    def _collect(self, pointers: tuple[int, ...], first: int) -> list[Run]:
        runs: list[Run] = []
        start = length = 0
        for index, pointer in enumerate((*pointers, 0)):
            if length and pointer != start + length:
                self._check(self._super.valid_range(start, length))
                runs.append(Run(first + index - length, start, length))
                length = 0
            if pointer:
                start = start if length else pointer
                length += 1
        return runs

    def _read(self, block: int) -> bytes:
        self._check(self._super.valid_range(block))
        return bytes(self._device.read(block * self._super.block_size, self._super.block_size))

    @staticmethod
    def _check(valid: bool) -> None:
        if not valid:
            raise error(errno.EIO)


def _logical(run: Run) -> int:
    return run.logical


def _first(segment: Segment) -> int:
    return segment.first
