"""The journal of ext3 and ext4 (jbd2): what it holds, and the device as it is once that is replayed.

Nothing is copied to look at a file system with a dirty log: a scan tells for each block of which transaction's copy in
the log it is to be read, and Replayed is the device with those blocks in their place. Writing them there for real is
the same answer carried out.

What it keeps: a block that the log gives is used only when its transaction was committed, and not revoked since; the
checks are the kernel's (fs/jbd2/recovery.c), and what makes the kernel refuse to mount is told as `damage`. The device
is marked clean only after everything else is on stable storage.

Source: Documentation/filesystems/ext4/journal.rst of the kernel. All numbers in a journal are big-endian.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum

from fusemount.filesystems.ext.checksum import ALL_ONES, crc32_be, crc32c
from fusemount.filesystems.ext.mapping import Run
from fusemount.filesystems.ext.superblock import Superblock
from nbdserve.block.device import BlockDevice
from nbdserve.block.extents import Computed, Extent
from nbdserve.block.file import WriteBuffer

MAGIC = 0xC03B3998
_MAGIC_BYTES = struct.pack(">I", MAGIC)
_HEADER = struct.Struct(">III")
_SUPERBLOCK_SIZE = 1024
_SUPERBLOCK_CHECKSUM = slice(0xFC, 0x100)
_DEFAULT_FAST_COMMIT_BLOCKS = 256
_FAST_COMMIT_HEAD = struct.pack("<HH", 9, 8)
_CRC32 = 1


class BlockType(IntEnum):
    """h_blocktype"""

    DESCRIPTOR = 1
    COMMIT = 2
    SUPERBLOCK_V1 = 3
    SUPERBLOCK_V2 = 4
    REVOKE = 5


class TagFlag(IntEnum):
    """t_flags"""

    ESCAPE = 1
    SAME_UUID = 2
    LAST = 8


class Incompat(IntEnum):
    """s_feature_incompat of the journal"""

    REVOKE = 0x1
    BIT64 = 0x2
    ASYNC_COMMIT = 0x4
    CSUM_V2 = 0x8
    CSUM_V3 = 0x10
    FAST_COMMIT = 0x20


_COMPAT_CHECKSUM = 1


class Damaged(Exception):
    """The journal cannot be used; the message says why, to go behind "its journal"."""


@dataclass(slots=True)
class Log:
    """What a scan found.

    Attributes:
        moved: block of the file system -> where its newest committed copy lies on the device, in bytes.
        escaped: those of them whose first four bytes are to be the magic number that the log may not hold.
        end: the sequence number of the first transaction that is not there any more.
        damage: why the kernel would not go on from this; "" when it would.
    """

    moved: dict[int, int] = field(default_factory=dict)
    escaped: set[int] = field(default_factory=set)
    end: int = 0
    damage: str = ""


@dataclass(slots=True)
class _Transaction:
    """What is read of one transaction before its commit block: (block, place, escaped, checksum) and revoked blocks."""

    blocks: list[tuple[int, int, bool, int]] = field(default_factory=list)
    revoked: list[int] = field(default_factory=list)
    checksum: int = ALL_ONES
    suspect: bool = False


class Journal:
    """The journal of a file system, in the blocks `runs` of its device. Raises Damaged."""

    def __init__(self, device: BlockDevice, superblock: Superblock, runs: list[Run]) -> None:
        self._device = device
        self._super = superblock
        self._runs = runs
        self._block_size = superblock.block_size
        raw = self._raw = bytes(self._read(0)[:_SUPERBLOCK_SIZE])
        magic, kind, _ = _HEADER.unpack_from(raw)
        block_size, length, self._first, self._sequence, self._start = struct.unpack_from(">5I", raw, 12)
        (self.error,) = struct.unpack_from(">i", raw, 32)
        compat, incompat, ro_compat = (
            struct.unpack_from(">3I", raw, 36) if kind == BlockType.SUPERBLOCK_V2 else (0, 0, 0)
        )
        if magic != MAGIC or kind not in (BlockType.SUPERBLOCK_V1, BlockType.SUPERBLOCK_V2):
            raise Damaged("has no valid superblock")
        if incompat & ~sum(Incompat) or ro_compat:
            raise Damaged("uses a feature that is unknown here")
        self._incompat = incompat
        self._old_checksums = bool(compat & _COMPAT_CHECKSUM)
        self._checksums = bool(incompat & (Incompat.CSUM_V2 | Incompat.CSUM_V3))
        self._seed = crc32c(raw[48:64], ALL_ONES) if self._checksums else 0
        if self._checksums and self._superblock_checksum(raw) != raw[_SUPERBLOCK_CHECKSUM]:
            raise Damaged("has a superblock with a wrong checksum")
        self._end = length
        if incompat & Incompat.FAST_COMMIT:
            self._end -= struct.unpack_from(">I", raw, 84)[0] or _DEFAULT_FAST_COMMIT_BLOCKS
        mapped = sum(run.length for run in runs)
        if block_size != self._block_size or not 0 < self._first < self._end <= length <= mapped:
            raise Damaged("has an impossible size")
        if self._start and not self._first <= self._start < self._end:
            raise Damaged("begins outside itself")

    def scan(self) -> Log:
        """Read all committed transactions."""
        log = Log(end=self._sequence)
        if not self._start:
            return log
        revoked: dict[int, int] = {}
        transactions: list[list[tuple[int, int, bool, int]]] = []
        try:
            for transaction in self._transactions(log):
                number = len(transactions)
                revoked.update(dict.fromkeys(transaction.revoked, number))
                transactions.append(transaction.blocks)
        except Damaged as problem:
            log.damage = str(problem)
        for number, blocks in enumerate(transactions):
            sequence = (self._sequence + number) & ALL_ONES
            for block, place, escaped, checksum in blocks:
                if revoked.get(block, -1) < number:
                    self._take(log, block, place, escaped, checksum, sequence)
        if not log.damage and self._has_fast_commit(log.end):
            log.damage = "holds fast commits, which only the kernel can replay"
        return log

    def replay(self, log: Log) -> None:
        """Write the blocks where they belong and mark the journal empty, on the device."""
        replayed = Replayed(self._device, self._block_size, log)
        for block in sorted(log.moved):
            offset = block * self._block_size
            self._device.write(offset, replayed.read(offset, self._block_size))
        self._device.flush()
        self.mark_empty(log.end)

    def clear(self) -> None:
        """Mark the journal empty where it is not, though the file system says that nothing in it counts."""
        if self._start:
            self.mark_empty(self._sequence)

    def mark_empty(self, end: int) -> None:
        """Say on the device that nothing is to be replayed, and that transactions go on behind number `end`."""
        raw = bytearray(self._raw)
        struct.pack_into(">2I", raw, 24, (end + 1) & ALL_ONES, 0)
        if self._checksums:
            raw[_SUPERBLOCK_CHECKSUM] = self._superblock_checksum(raw)
        self._device.write(self._place(0), raw)
        self._device.flush()

    # Reading the log

    def _transactions(self, log: Log) -> Iterator[_Transaction]:
        """The committed transactions in order. Counts log.end up; raises Damaged where the kernel would give up."""
        position = self._start
        current = _Transaction()
        last_commit_time = 0
        for _ in range(self._end):  # no log is longer than its journal
            block = self._read(position)
            magic, kind, sequence = _HEADER.unpack_from(block)
            if magic != MAGIC or sequence != log.end:
                return
            place, position = position, self._next(position)
            match kind:
                case BlockType.DESCRIPTOR:
                    current.suspect |= not self._tail_is_right(block)
                    position = self._descriptor(block, place, position, current)
                case BlockType.REVOKE:
                    current.suspect |= not self._tail_is_right(block)
                    current.revoked += self._revoked(block)
                case BlockType.COMMIT:
                    (commit_time,) = struct.unpack_from(">Q", block, 48)
                    right = self._commit_is_right(block, current)
                    if current.suspect or not right:
                        if commit_time < last_commit_time:
                            return  # left over from an earlier round through the journal
                        if current.suspect or not self._incompat & Incompat.ASYNC_COMMIT:
                            raise Damaged(f"has a wrong checksum in transaction {log.end}")
                        return
                    last_commit_time = commit_time
                    yield current
                    log.end = (log.end + 1) & ALL_ONES
                    current = _Transaction()
                case _:
                    return

    def _descriptor(self, block: bytes, place: int, position: int, current: _Transaction) -> int:
        """Note the blocks that a descriptor lists, which follow it in the log; where the log goes on."""
        if self._old_checksums and not current.suspect:
            current.checksum = crc32_be(block, current.checksum)
        for number, flags, checksum in self._tags(block):
            current.blocks.append((number, self._place(position), bool(flags & TagFlag.ESCAPE), checksum))
            if self._old_checksums and not current.suspect:
                current.checksum = crc32_be(self._read(position), current.checksum)
            position = self._next(position)
            if len(current.blocks) > self._end:
                raise Damaged("lists more blocks than it has")
        return position

    def _tags(self, block: bytes) -> Iterator[tuple[int, int, int]]:
        """Block number, flags and checksum of each tag in a descriptor."""
        wide = bool(self._incompat & Incompat.BIT64)
        if self._incompat & Incompat.CSUM_V3:
            size = 16
        else:
            size = (12 if wide else 8) + (2 if self._incompat & Incompat.CSUM_V2 else 0)
        offset, end = _HEADER.size, len(block) - (4 if self._checksums else 0)
        while offset + size <= end:
            if size == 16:
                low, flags, high, checksum = struct.unpack_from(">4I", block, offset)
            else:
                low, checksum, flags = struct.unpack_from(">IHH", block, offset)
                high = struct.unpack_from(">I", block, offset + 8)[0] if wide else 0
            yield low | (high if wide else 0) << 32, flags, checksum
            offset += size + (0 if flags & TagFlag.SAME_UUID else 16)
            if flags & TagFlag.LAST:
                return

    def _revoked(self, block: bytes) -> list[int]:
        (used,) = struct.unpack_from(">I", block, 12)
        end = len(block) - (4 if self._checksums else 0)
        if used > end:
            raise Damaged("has an impossible revoke block")
        width = 8 if self._incompat & Incompat.BIT64 else 4
        count = max(used - 16, 0) // width
        return list(struct.unpack_from(f">{count}{'Q' if width == 8 else 'I'}", block, 16))

    def _take(self, log: Log, block: int, place: int, escaped: bool, checksum: int, sequence: int) -> None:
        """A committed copy of a block takes the place of an older one, if its checksum is right."""
        inside = block < self._super.blocks and not self._owns(block)
        if not inside:
            log.damage = log.damage or f"has a copy of block {block}, which cannot be written"
            return
        if self._checksums:
            content = bytes(self._device.read(place, self._block_size))
            found = crc32c(content, crc32c(struct.pack(">I", sequence), self._seed))
            mask = ALL_ONES if self._incompat & Incompat.CSUM_V3 else 0xFFFF
            if found & mask != checksum:
                log.damage = log.damage or f"has a wrong checksum of the copy of block {block}"
                return
        log.moved[block] = place
        (log.escaped.add if escaped else log.escaped.discard)(block)

    def _tail_is_right(self, block: bytes) -> bool:
        if not self._checksums:
            return True
        return crc32c(block[:-4] + bytes(4), self._seed) == int.from_bytes(block[-4:], "big")

    def _commit_is_right(self, block: bytes, current: _Transaction) -> bool:
        (found,) = struct.unpack_from(">I", block, 16)
        if self._checksums:
            return crc32c(block[:16] + bytes(4) + block[20:], self._seed) == int(found)
        if self._old_checksums:
            kind, size = block[12], block[13]
            unused = kind == 0 and size == 0 and found == 0
            return bool(unused or (kind == _CRC32 and size == 4 and current.checksum == found))
        return True

    def _has_fast_commit(self, end: int) -> bool:
        if not self._incompat & Incompat.FAST_COMMIT:
            return False
        block = self._read(self._end + 1)  # the kernel leaves one block unused before its fast commits
        return block.startswith(_FAST_COMMIT_HEAD) and int.from_bytes(block[8:12], "little") == end

    def _superblock_checksum(self, raw: bytes | bytearray) -> bytes:
        return crc32c(bytes(raw[:0xFC]) + bytes(4) + bytes(raw[0x100:]), ALL_ONES).to_bytes(4, "big")

    # Places

    def _next(self, position: int) -> int:
        return position + 1 if position + 1 < self._end else self._first

    def _read(self, position: int) -> bytes:
        return bytes(self._device.read(self._place(position), self._block_size))

    def _place(self, position: int) -> int:
        """Where a block of the journal lies on the device, in bytes."""
        index = bisect_right(self._runs, position, key=lambda run: run.logical) - 1
        if index < 0 or position >= self._runs[index].end:
            raise Damaged("has a hole")
        run = self._runs[index]
        return (run.physical + position - run.logical) * self._block_size

    def _owns(self, block: int) -> bool:
        return any(run.physical <= block < run.physical + run.length for run in self._runs)


class Replayed(BlockDevice):
    """A device with the blocks that its log gives in their place; the device itself stays as it is."""

    def __init__(self, below: BlockDevice, block_size: int, log: Log) -> None:
        super().__init__(below.size, read_only=True, pins=below.pins)
        self._below = below
        self._block_size = block_size
        self._log = log

    def map(self, offset: int, length: int) -> Extent:
        block, start = divmod(offset, self._block_size)
        if block in self._log.escaped:
            return Computed(min(length, self._block_size - start))
        return self._below.map(*self._place(offset, length))

    def map_nowait(self, offset: int, length: int) -> Extent | None:
        if offset // self._block_size in self._log.escaped:
            return None
        return self._below.map_nowait(*self._place(offset, length))

    def read_computed(self, offset: int, buffer: WriteBuffer) -> None:
        view = memoryview(buffer)
        while view:
            place, length = self._place(offset, len(view))
            self._below.read_into(place, view[:length])
            block, start = divmod(offset, self._block_size)
            if block in self._log.escaped and start < 4:
                count = min(4 - start, length)
                view[:count] = _MAGIC_BYTES[start : start + count]
            view = view[length:]
            offset += length

    def read_into(self, offset: int, buffer: WriteBuffer) -> None:
        self.read_computed(offset, buffer)

    def _place(self, offset: int, length: int) -> tuple[int, int]:
        """Where the bytes from offset on lie below, and how many of them lie together."""
        block, start = divmod(offset, self._block_size)
        place = self._log.moved.get(block)
        if place is not None:
            return place + start, min(length, self._block_size - start)
        end = offset + length
        following = block + 1
        while following * self._block_size < end and following not in self._log.moved:
            following += 1
        return offset, min(end, following * self._block_size) - offset
