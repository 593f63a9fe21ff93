"""Reading an ext file system: Python alone, straight from the device, so that no image can harm the process.

What it keeps: nothing is changed, in memory least of all by a call that fails; every call may be repeated. Checksums of
metadata are verified where the file system has them, and a wrong one is EIO for what it covers.
"""

from __future__ import annotations

import errno
import stat
import struct
import unicodedata
from collections import OrderedDict
from collections.abc import Iterator

from fusemount.cache import WriteBackCache
from fusemount.filesystems.base import Attributes, Entry, FileSystem, Inode, Space, error
from fusemount.filesystems.ext import directories, xattrs
from fusemount.filesystems.ext.checksum import crc32c
from fusemount.filesystems.ext.inodes import ROOT, Flag, Record
from fusemount.filesystems.ext.mapping import Mapper
from fusemount.filesystems.ext.superblock import Incompat, Superblock
from nbdserve.block.file import ReadBuffer

_MOST_RECORDS = 8192
_MOST_NAMES = 400_000  # kept in memory for all directories together
_ENOKEY = 126
_MOST_READ = 16 << 20  # bytes; no request of FUSE is longer than 1 MiB

Names = dict[bytes, tuple[int, int]]


class ExtFileSystem(FileSystem):
    """An ext file system that is only read.

    Attributes:
        cache: the device; inside cache.without_waiting() reads raise BlockingIOError sooner than wait for the disk.
        freed_by_recovery: free blocks and inodes that the group descriptors do not know of yet, see recovery.
    """

    root = ROOT

    def __init__(self, cache: WriteBackCache, superblock: Superblock) -> None:
        self.cache = cache
        self.superblock = superblock
        self.mapper = Mapper(cache, superblock)
        self._block_size = superblock.block_size
        self._descriptors = [bytes(self.read_block(block)) for block in superblock.descriptor_blocks()]
        self._has_types = superblock.has(Incompat.FILETYPE)
        self._records: OrderedDict[int, Record] = OrderedDict()
        self._names: OrderedDict[int, Names] = OrderedDict()
        self._name_count = 0
        self.freed_by_recovery = (0, 0)

    def read_block(self, block: int) -> bytearray:
        """One block of the file system. Raises EIO where there is none."""
        if not self.superblock.valid_range(block) and block:
            raise error(errno.EIO)
        return self.cache.read(block * self._block_size, self._block_size)

    # Inodes

    def record(self, number: int) -> Record:
        """An inode, from memory where it is known. Raises EIO for one that is damaged."""
        record = self._records.get(number)
        if record is None:
            raw = self.cache.read(self.inode_place(number), self.superblock.inode_size)
            record = Record(Inode(number), raw)
            self._verify_inode(record)
            if len(self._records) >= _MOST_RECORDS:
                self._records.popitem(last=False)
            self._records[number] = record
        return record

    def inode_place(self, number: int) -> int:
        """Where an inode lies on the device, in bytes."""
        sb = self.superblock
        if not 1 <= number <= sb.inodes:
            raise error(errno.EIO)
        group, index = divmod(number - 1, sb.inodes_per_group)
        table = self.places_of_group(group)[2]
        if not sb.valid_range(table, -(-sb.inodes_per_group * sb.inode_size // sb.block_size)):
            raise error(errno.EIO)
        return table * sb.block_size + index * sb.inode_size

    def places_of_group(self, group: int) -> tuple[int, int, int]:
        """Where a group's descriptor says that its bitmaps of blocks and inodes and its inode table lie; unchecked."""
        sb = self.superblock
        per_block = sb.block_size // sb.descriptor_size
        descriptors, place = self._descriptors[group // per_block], group % per_block * sb.descriptor_size
        low = struct.unpack_from("<3I", descriptors, place)
        if sb.descriptor_size < 64:
            return low
        high = struct.unpack_from("<3I", descriptors, place + 0x20)
        return low[0] | high[0] << 32, low[1] | high[1] << 32, low[2] | high[2] << 32

    def _verify_inode(self, record: Record) -> None:
        if self.superblock.checksum_seed is None:
            return
        raw = bytearray(record.raw)
        expected = int.from_bytes(raw[124:126], "little")
        raw[124:126] = bytes(2)
        mask = 0xFFFF
        if record.extra_size >= 4:
            expected |= int.from_bytes(raw[130:132], "little") << 16
            raw[130:132] = bytes(2)
            mask = 0xFFFFFFFF
        if crc32c(raw, self.mapper.inode_seed(record)) & mask != expected:
            raise error(errno.EIO)

    def _named(self, number: int) -> Record:
        """The inode that an entry leads to: one that may have a name."""
        if number < self.superblock.first_inode and number != ROOT:
            raise error(errno.EIO)
        record = self.record(number)
        if not record.mode or not record.links or record.flags & Flag.EA_INODE:
            raise error(errno.EIO)
        return record

    def attributes(self, inode: Inode) -> Attributes:
        return self.record(inode).attributes(self._block_size)

    # Directories

    def lookup(self, directory: Inode, name: bytes) -> Inode:
        record = self._directory(directory)
        found = self.find(record, name)
        if found is None:
            raise error(errno.ENOENT)
        return self._named(found[0]).number

    def find(self, directory: Record, name: bytes) -> tuple[int, int] | None:
        """The inode number and type (0: unknown) behind a name. Raises EIO when a damaged part may hide it."""
        if not 0 < len(name) <= 255:
            raise error(errno.ENAMETOOLONG)
        names = self._all_names(directory)
        key = _folded(name) if directory.flags & Flag.CASEFOLD else name
        found = names.get(key)
        if found is None and b"" in names:
            raise error(errno.EIO)
        return found

    def _all_names(self, directory: Record) -> Names:
        """All names of a directory; b"" among them says that some of it cannot be read."""
        names = self._names.get(directory.number)
        if names is not None:
            self._names.move_to_end(directory.number)
            return names
        names = {}
        fold = bool(directory.flags & Flag.CASEFOLD)
        for part in self.directory_parts(directory):
            try:
                for found in part.entries(self._has_types):
                    if found.inode and directories.is_shown(found.name):
                        names[_folded(found.name) if fold else found.name] = (found.inode, found.type)
            except directories.BrokenBlock:
                names[b""] = (0, 0)
        self._name_count += len(names)
        while self._names and self._name_count > _MOST_NAMES:
            self._name_count -= len(self._names.popitem(last=False)[1])
        self._names[directory.number] = names
        return names

    def entries(self, directory: Inode, position: int = 0) -> Iterator[Entry]:
        record = self._directory(directory)
        for part in self.directory_parts(record, position):
            try:
                for found in part.entries(self._has_types):
                    place = part.base + found.offset + 1
                    if place > position and found.inode and directories.is_shown(found.name):
                        yield Entry(place, found.name, Inode(found.inode), found.type or self._type_of(found.inode))
            except directories.BrokenBlock:
                continue

    def _type_of(self, number: int) -> int:
        try:
            return stat.S_IFMT(self.record(number).mode)
        except BlockingIOError:
            raise
        except OSError:
            return stat.S_IFREG

    def _directory(self, number: Inode) -> Record:
        record = self.record(number)
        if not record.is_directory:
            raise error(errno.ENOTDIR)
        return record

    def directory_parts(self, directory: Record, position: int = 0) -> Iterator[directories.Part]:
        """The blocks of a directory from a byte position on, or the two places in its inode when it is inline."""
        if directory.has_inline_data:
            if position < len(directory.block):
                yield directories.Part(0, 4, directory.block)  # begins with the number of the parent
            for attribute in xattrs.in_inode(directory):
                if attribute.name == xattrs.INLINE_DATA and attribute.value:
                    yield directories.Part(len(directory.block), 0, attribute.value)
            return
        size = self._block_size
        try:
            for run in self.mapper.runs(directory, position // size, -(-directory.size // size)):
                for index in range(run.length):
                    block = self.read_block(run.physical + index)
                    sound = self.is_sound(directory, block)
                    yield directories.Part((run.logical + index) * size, 0, block if sound else None)
        except BlockingIOError:
            raise
        except OSError:
            yield directories.Part(position, 0, None)

    def is_sound(self, directory: Record, block: bytes | bytearray) -> bool:
        """Whether the checksum of a directory's block is right, or there is none."""
        if self.superblock.checksum_seed is None:
            return True
        table = self.index_table(directory, block)
        if table is None:
            return directories.has_tail(block) and self.directory_checksum(directory, block) == block[-4:]
        limit, count = struct.unpack_from("<HH", block, table)
        end = table + 8 * limit
        return (
            count <= limit
            and end + 8 <= len(block)
            and (self.index_checksum(directory, block, table) == block[end + 4 : end + 8])
        )

    @staticmethod
    def index_table(directory: Record, block: bytes | bytearray) -> int | None:
        """Where the table in a block of a directory's hash index begins; None when the block holds entries."""
        return directories.index_table(block) if directory.flags & Flag.INDEX else None

    def directory_checksum(self, directory: Record, block: bytes | bytearray) -> bytes:
        """What belongs into the tail of a block of entries."""
        content = bytes(block[: -directories.TAIL_SIZE])
        return crc32c(content, self.mapper.inode_seed(directory)).to_bytes(4, "little")

    def index_checksum(self, directory: Record, block: bytes | bytearray, table: int) -> bytes:
        """What belongs behind the table of a block of a hash index."""
        limit, count = struct.unpack_from("<HH", block, table)
        end = table + 8 * limit
        value = crc32c(bytes(block[: table + 8 * count]), self.mapper.inode_seed(directory))
        return crc32c(bytes(block[end : end + 4]) + bytes(4), value).to_bytes(4, "little")

    # Content

    def read(self, inode: Inode, offset: int, length: int) -> ReadBuffer:
        record = self.record(inode)
        if not record.is_regular:
            raise error(errno.EISDIR if record.is_directory else errno.EINVAL)
        if record.flags & Flag.ENCRYPT:
            raise error(_ENOKEY)
        return self.read_content(record, offset, length)

    def read_content(self, record: Record, offset: int, length: int) -> ReadBuffer:
        """The bytes of an inode from offset on, fewer only at its end."""
        length = min(length, record.size - offset)
        if length <= 0:
            return b""
        if record.has_inline_data:
            inline = self._inline_content(record)
            return inline.ljust(min(record.size, len(record.raw)), b"\0")[offset : offset + length]
        size = self._block_size
        content = bytearray(length)
        view = memoryview(content)
        for run in self.mapper.runs(record, offset // size, -(-(offset + length) // size)):
            if not run.unwritten:
                start = max(run.logical * size, offset)
                end = min(run.end * size, offset + length)
                place = run.physical * size + start - run.logical * size
                self.cache.read_into(place, view[start - offset : end - offset])
        return content

    def _inline_content(self, record: Record) -> bytes:
        rest = [item.value for item in xattrs.in_inode(record) if item.name == xattrs.INLINE_DATA]
        return (record.block + b"".join(rest))[: record.size]

    def read_link(self, inode: Inode) -> bytes:
        record = self.record(inode)
        if not stat.S_ISLNK(record.mode):
            raise error(errno.EINVAL)
        if record.flags & Flag.ENCRYPT:
            raise error(_ENOKEY)
        if record.size > self._block_size or not record.size:
            raise error(errno.EIO)
        target: ReadBuffer
        if record.has_inline_data:
            target = self._inline_content(record)
        elif self.is_fast_symlink(record):
            target = record.block[: record.size]
        else:
            target = self.read_content(record, 0, record.size)
        if len(target) < record.size or 0 in target:
            raise error(errno.EIO)
        return bytes(target)

    def is_fast_symlink(self, record: Record) -> bool:
        """Whether the target of a symbolic link is kept in place of the map of its blocks."""
        if record.has_inline_data or not stat.S_ISLNK(record.mode):
            return False
        return not record.flags & Flag.EXTENTS and not record.sectors_of_data(self.superblock.cluster_size)

    # Extended attributes

    def xattr_names(self, inode: Inode) -> list[bytes]:
        names = [attribute.name for attribute in self.stored_attributes(self.record(inode))]
        return [name for name in names if name != xattrs.INLINE_DATA]

    def xattr(self, inode: Inode, name: bytes) -> bytes:
        for attribute in self.stored_attributes(self.record(inode)):
            if attribute.name == name and name != xattrs.INLINE_DATA:
                value = self._attribute_value(attribute)
                is_acl = name in (xattrs.ACCESS_ACL, xattrs.DEFAULT_ACL)
                return xattrs.acl_as_shown(value) if is_acl else value
        raise error(errno.ENODATA)

    def stored_attributes(self, record: Record) -> list[xattrs.Attribute]:
        """The extended attributes of an inode as they are stored."""
        found = list(xattrs.in_inode(record))
        if record.attribute_block:
            if not self.superblock.valid_range(record.attribute_block):
                raise error(errno.EIO)
            block = bytes(self.read_block(record.attribute_block))
            self._verify_attributes(record.attribute_block, block)
            found += xattrs.in_block(block)
        return found

    def _verify_attributes(self, number: int, block: bytes) -> None:
        if self.superblock.checksum_seed is not None:
            content = struct.pack("<Q", number) + block[:16] + bytes(4) + block[20:]
            if crc32c(content, self.superblock.checksum_seed) != int.from_bytes(block[16:20], "little"):
                raise error(errno.EIO)

    def _attribute_value(self, attribute: xattrs.Attribute) -> bytes:
        if not attribute.value_inode:
            return attribute.value
        record = self.record(attribute.value_inode)
        if not record.flags & Flag.EA_INODE or record.size != attribute.size or attribute.size > xattrs.MAX_VALUE:
            raise error(errno.EIO)
        return bytes(self.read_content(record, 0, record.size))

    # The whole

    def space(self) -> Space:
        sb = self.superblock
        clusters = inodes = 0
        for group in range(sb.groups):
            per_block = sb.block_size // sb.descriptor_size
            descriptors, place = self._descriptors[group // per_block], group % per_block * sb.descriptor_size
            low = struct.unpack_from("<2H", descriptors, place + 12)
            high = struct.unpack_from("<2H", descriptors, place + 0x2C) if sb.descriptor_size >= 64 else (0, 0)
            clusters += low[0] | high[0] << 16
            inodes += low[1] | high[1] << 16
        blocks = clusters * sb.cluster_blocks + self.freed_by_recovery[0]
        inodes += self.freed_by_recovery[1]
        return Space(sb.block_size, sb.blocks, min(blocks, sb.blocks), sb.inodes, min(inodes, sb.inodes))


def _folded(name: bytes) -> bytes:
    """What names of a case-insensitive directory are compared by: near to the kernel's NFDICF of Unicode 12.1."""
    try:
        return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name.decode()).casefold()).encode()
    except UnicodeDecodeError:
        return name
