"""The order in which changes of an ext file system reach its device, so that a process may be killed in between.

We write without the journal, so e2fsck has to repair what a crash leaves behind, and it can only do that without loss
if no block refers to one that is not there yet. Hence, whenever the cache hands down what is dirty:

1. blocks that were free when the file system was last brought to the device as a whole: nothing on it refers to them,
   and they are not used again for anything else before the next time (see Engine.park);
2. inodes, which may now refer to them;
3. all else in place: blocks of directories, bitmaps, descriptors, the superblock.

A crash after 1 changes nothing that counts; after 2, an inode without a name, and names whose inodes are gone. In 3
entries may be found twice, in an old block and in a new one, but not nowhere. Between the two steps of an operation
that must not come in the wrong order (a new name, and the end of the old one) all is handed down (Store.settle).
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property

from fusemount.cache import LINE
from fusemount.filesystems.ext.superblock import ReadOnlyCompat, Superblock
from nbdserve.block.device import BlockDevice

_BLOCK_UNINIT = 0x2  # in bg_flags: the group's bitmap of blocks was never written, because none is used
_FLAGS = 0x12
_LONGEST = 1 << 20

Piece = tuple[int, int]


class WriteOrder:
    """Says which ranges of dirty lines are to be written first; see WriteBackCache.early.

    Args:
        device: that below the cache, on which bitmaps are as they were last written.
        places_of_group: see ExtFileSystem.places_of_group().
    """

    def __init__(
        self,
        device: BlockDevice,
        superblock: Superblock,
        places_of_group: Callable[[int], tuple[int, int, int]],
    ) -> None:
        self._device = device
        self._super = superblock
        self._places_of_group = places_of_group
        self._descriptor_blocks = list(superblock.descriptor_blocks())
        self._bitmaps: dict[int, bytes] = {}

    def __call__(self, lines: Sequence[int]) -> list[Piece]:
        """See Early."""
        self._bitmaps.clear()
        unused: list[Piece] = []
        inodes: list[Piece] = []
        size = self._super.block_size
        for line in lines:
            for offset in range(line * LINE, (line + 1) * LINE, min(size, LINE)):
                block = offset // size
                if block >= self._super.blocks:
                    break
                if self._is_inode_table(block):
                    _add(inodes, offset, min(size, LINE))
                elif self._was_free(block):
                    _add(unused, offset, min(size, LINE))
        return unused + inodes

    @cached_property
    def _tables(self) -> list[int]:
        return sorted(self._places_of_group(group)[2] for group in range(self._super.groups))

    def _is_inode_table(self, block: int) -> bool:
        sb = self._super
        index = bisect_right(self._tables, block) - 1
        return index >= 0 and block < self._tables[index] - (-sb.inodes_per_group * sb.inode_size // sb.block_size)

    def _was_free(self, block: int) -> bool:
        group, place = divmod(block - self._super.first_block, self._super.blocks_per_group)
        if group < 0:
            return False
        if group not in self._bitmaps:
            self._bitmaps[group] = self._bitmap(group)
        bit = place // self._super.cluster_blocks
        bitmap = self._bitmaps[group]
        return not bitmap or not bitmap[bit // 8] >> bit % 8 & 1

    def _bitmap(self, group: int) -> bytes:
        """A group's bitmap of blocks as it is on the device; empty when all of them are free."""
        sb = self._super
        per_block = sb.block_size // sb.descriptor_size
        block, index = self._descriptor_blocks[group // per_block], group % per_block
        place = block * sb.block_size + index * sb.descriptor_size
        (flags,) = struct.unpack("<H", self._device.read(place + _FLAGS, 2))
        has_flags = sb.has(ReadOnlyCompat.GDT_CSUM) or sb.has(ReadOnlyCompat.METADATA_CSUM)
        if has_flags and flags & _BLOCK_UNINIT:
            return b""
        return bytes(self._device.read(self._places_of_group(group)[0] * sb.block_size, sb.block_size))


def _add(pieces: list[Piece], offset: int, length: int) -> None:
    """Append a range, joined to the last one where they touch."""
    if pieces:
        start, before = pieces[-1]
        if start + before == offset and before + length <= _LONGEST:
            pieces[-1] = start, before + length
            return
    pieces.append((offset, length))
