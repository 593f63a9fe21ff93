"""What has to happen to a file system that was not unmounted: its log is replayed, its orphans are dealt with.

Orphans are inodes that a crash caught without a name or in the middle of a truncation; the superblock begins a list of
them, and newer file systems keep a file of them too (Documentation/filesystems/ext4/orphan.rst of the kernel).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from fusemount.cache import WriteBackCache
from fusemount.filesystems.base import error
from fusemount.filesystems.ext.checksum import ALL_ONES, crc32c
from fusemount.filesystems.ext.inodes import ROOT, Record
from fusemount.filesystems.ext.journal import Damaged, Journal, Log, Replayed
from fusemount.filesystems.ext.reading import ExtFileSystem
from fusemount.filesystems.ext.superblock import (
    CHECKSUM_OFFSET,
    OFFSET,
    SIZE,
    Compat,
    Incompat,
    ReadOnlyCompat,
    State,
    Superblock,
    read_superblock,
)
from nbdserve.block.device import BlockDevice

ORPHAN_TAIL = 8
_ORPHAN_MAGIC = 0x0B10CA04
_MOST_ORPHANS = 1 << 20


@dataclass(frozen=True, slots=True)
class Found:
    """A file system as it was found.

    Attributes:
        device: the device as it is after a replay; the device itself where there is nothing to replay.
        superblock: as it is after a replay.
        journal: the log's journal; None without one, or when it cannot be read.
        log: what is to be replayed; None when it was unmounted cleanly.
        refusal: why it cannot be written, and what still works; "" when it can.
    """

    device: BlockDevice
    superblock: Superblock
    journal: Journal | None
    log: Log | None
    refusal: str

    @property
    def dirty(self) -> bool:
        """Whether it was not unmounted cleanly."""
        return self.log is not None or not self.superblock.state & State.VALID or self.superblock.has(Incompat.RECOVER)


def find(device: BlockDevice) -> Found:
    """Look at a file system and its log, changing nothing. Raises FormatError, Unsupported."""
    superblock = read_superblock(device)
    if not superblock.has(Compat.HAS_JOURNAL):
        return Found(device, superblock, None, None, superblock.why_not_writable())
    dirty = superblock.has(Incompat.RECOVER)
    if not superblock.journal_inode:
        lost = "its journal is on another device, which cannot be used here; it can be read, without the latest changes"
        return Found(device, superblock, None, None, lost if dirty else superblock.why_not_writable())
    try:
        journal = _journal(device, superblock)
        if not dirty:
            problem = (
                "its journal recorded an error; run e2fsck on it to write, it can be read" if journal.error else ""
            )
            return Found(device, superblock, journal, None, problem or superblock.why_not_writable())
        log = journal.scan()
    except (Damaged, OSError) as problem:
        if isinstance(problem, OSError) and problem.errno != errno.EIO:
            raise
        reason = str(problem) if isinstance(problem, Damaged) else "cannot be read"
        return Found(device, superblock, None, None, f"its journal {reason}; run e2fsck on it to write, it can be read")
    replayed = Replayed(device, superblock.block_size, log)
    superblock = read_superblock(replayed)
    refusal = superblock.why_not_writable()
    if journal.error:
        refusal = "its journal recorded an error; run e2fsck on it to write, it can be read"
    if log.damage:
        refusal = f"its journal {log.damage}; run e2fsck on it to write; it can be read as it was before that"
    return Found(replayed, superblock, journal, log, refusal)


def replay(found: Found, device: BlockDevice) -> None:
    """Carry out on the device what the log says, and mark it as clean of it."""
    if found.log is None or found.journal is None:
        return
    found.journal.replay(found.log)
    raw = device.read(OFFSET, SIZE)
    (incompat,) = struct.unpack_from("<I", raw, 0x60)
    struct.pack_into("<I", raw, 0x60, incompat & ~Incompat.RECOVER)
    if found.superblock.checksum_seed is not None:
        struct.pack_into("<I", raw, CHECKSUM_OFFSET, crc32c(raw[:CHECKSUM_OFFSET], ALL_ONES))
    device.write(OFFSET, raw)
    device.flush()


def view(found: Found) -> ExtFileSystem:
    """The file system to read, as the kernel would show it. Raises OSError when its root cannot be read."""
    filesystem = ExtFileSystem(WriteBackCache(found.device), found.superblock)
    if not filesystem.record(ROOT).is_directory:
        raise error(errno.EIO)
    if found.log is not None:
        blocks = inodes = 0
        try:
            for record in orphans(filesystem):
                blocks += _count_doomed(filesystem, record)
                inodes += not record.links
        except OSError as problem:
            if problem.errno != errno.EIO:
                raise
        filesystem.freed_by_recovery = (blocks, inodes)
    return filesystem


def orphans(filesystem: ExtFileSystem) -> Iterator[Record]:
    """The inodes without a name (links is 0) or with blocks behind their end. Raises EIO for a damaged list."""
    seen = set[int]()
    number = filesystem.superblock.orphan_list
    while number:
        record = _orphan(filesystem, number, seen)
        number = record.dtime
        yield record
    for block in orphan_file_blocks(filesystem):
        content = filesystem.read_block(block)[:-ORPHAN_TAIL]
        for (number,) in struct.iter_unpack("<I", content):
            if number:
                yield _orphan(filesystem, number, seen)


def orphan_file_blocks(filesystem: ExtFileSystem) -> Iterator[int]:
    """Where the file of orphans lies, if there are some in it."""
    superblock = filesystem.superblock
    if not (superblock.has(Compat.ORPHAN_FILE) and superblock.has(ReadOnlyCompat.ORPHAN_PRESENT)):
        return
    record = filesystem.record(superblock.orphan_file)
    for run in filesystem.mapper.runs(record, 0, -(-record.size // superblock.block_size)):
        for block in range(run.physical, run.physical + run.length):
            magic = filesystem.read_block(block)[-ORPHAN_TAIL:-4]
            if int.from_bytes(magic, "little") != _ORPHAN_MAGIC:
                raise error(errno.EIO)
            yield block


def orphan_checksum(filesystem: ExtFileSystem, block: int, content: bytes) -> bytes:
    """What belongs at the end of a block of the file of orphans."""
    seed = filesystem.mapper.inode_seed(filesystem.record(filesystem.superblock.orphan_file))
    return crc32c(content[:-ORPHAN_TAIL], crc32c(struct.pack("<Q", block), seed)).to_bytes(4, "little")


def _orphan(filesystem: ExtFileSystem, number: int, seen: set[int]) -> Record:
    if number in seen or len(seen) > _MOST_ORPHANS or number < filesystem.superblock.first_inode:
        raise error(errno.EIO)
    seen.add(number)
    return filesystem.record(number)


def _count_doomed(filesystem: ExtFileSystem, record: Record) -> int:
    """The blocks that an orphan will give back."""
    superblock = filesystem.superblock
    if not record.links:
        return record.sectors * 512 // superblock.block_size
    kept = -(-record.size // superblock.block_size)
    if not record.is_regular or record.has_inline_data:
        return 0
    return sum(max(0, run.end - max(run.logical, kept)) for run in filesystem.mapper.whole(record))


def _journal(device: BlockDevice, superblock: Superblock) -> Journal:
    filesystem = ExtFileSystem(WriteBackCache(device, capacity=1 << 20), superblock)
    record = filesystem.record(superblock.journal_inode)
    if not record.is_regular or not record.links or record.has_inline_data:
        raise Damaged("is no file")
    return Journal(device, superblock, list(filesystem.mapper.whole(record)))
