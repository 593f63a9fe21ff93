"""The part of a FAT file system that changes what is in files: bytes, size, attributes.

The order of writes is told in writing.py; this is its first two points, growing and shrinking.
"""

from __future__ import annotations

import errno
import time

from fusemount.filesystems.base import Changes, Inode, error
from fusemount.filesystems.fat.chain import Chain
from fusemount.filesystems.fat.entries import Attribute, Entry, packed
from fusemount.filesystems.fat.inodes import ROOT, File
from fusemount.filesystems.fat.reading import FatReader
from fusemount.filesystems.fat.table import Run
from fusemount.filesystems.fat.volume import Piece, Volume
from nbdserve.block.file import ReadBuffer

LARGEST_FILE = (1 << 32) - 1
OWNER_WRITES = 0o200


class FatContent(FatReader):
    """A FAT volume whose files can be changed, but not their names."""

    read_only = False

    def __init__(self, volume: Volume) -> None:
        super().__init__(volume)
        self._closed = False

    def write(self, inode: Inode, offset: int, data: ReadBuffer) -> None:
        file = self.regular(inode)
        if len(data):
            self._put(file, offset, memoryview(data))

    def truncate(self, inode: Inode, size: int) -> None:
        file = self.regular(inode)
        if size < file.entry.size:
            self._shrink(file, size)
        else:
            self._put(file, size, memoryview(b""))

    def _put(self, file: File, offset: int, data: memoryview) -> None:
        """Write data at offset, and zeros between the old end of the file and there."""
        entry, chain = file.entry, file.chain
        size = max(entry.size, offset + len(data))
        if size > LARGEST_FILE:
            raise error(errno.EFBIG)
        self.volume.begin_change()
        have, last = 0, 0
        runs: list[Run] = []
        if size > entry.size:
            have, last = chain.learn(), chain.last
            need = -(-size // self.volume.geometry.cluster_size)
            runs = self.volume.allocate(max(0, need - have), near=last + 1)
            chain.extend(runs)
        try:
            for place, length in self.places(file, entry.size, offset - entry.size):
                self.device.zero(place, length)
            for place, length in self.places(file, offset, len(data)):
                self.device.write(place, data[:length])
                data = data[length:]
        except BaseException:
            if runs:
                chain.cut(have)
            raise
        self.volume.link(runs, last)
        if runs:
            entry.first = chain.first
        entry.size = size
        self._changed(file)

    def _shrink(self, file: File, size: int) -> None:
        entry, table = file.entry, self.volume.table
        keep = -(-size // self.volume.geometry.cluster_size)
        last = next(file.chain.runs(keep - 1, 1))[0] if keep else 0
        # Looked at before the chain is cut, lest a circle in it goes unnoticed and leads back into what is kept.
        rest = self.clusters_from(table[last] if keep else entry.first)
        self.volume.begin_change()
        entry.size = size
        entry.first = entry.first if keep else 0
        self._changed(file)
        if keep and not table.is_end(table[last]):
            table[last] = table.end_of_chain
            table.flush()
        self.volume.park(rest)
        file.chain = Chain(table, entry.first)

    def _changed(self, file: File) -> None:
        """A file's content was changed now."""
        file.entry.modified = packed(time.time_ns())
        file.entry.attributes |= Attribute.ARCHIVE
        self._write_entry(file)

    def _write_entry(self, file: File) -> None:
        if file.linked and file.number != ROOT:
            self.volume.write([self.piece(file.entry)])

    def change(self, inode: Inode, changes: Changes) -> None:
        file = self.inodes[inode]
        entry = file.entry
        if changes.uid is not None or changes.gid is not None:
            raise error(errno.EPERM)
        self.volume.begin_change()
        if changes.mode is not None and not entry.is_directory:
            read_only = 0 if changes.mode & OWNER_WRITES else Attribute.READ_ONLY
            entry.attributes = entry.attributes & ~Attribute.READ_ONLY | read_only
        if changes.atime_ns is not None:
            entry.accessed = packed(changes.atime_ns)[0]
        if changes.mtime_ns is not None:
            entry.modified = packed(changes.mtime_ns)
        self._write_entry(file)

    def set_xattr(self, inode: Inode, name: bytes, value: bytes, flags: int = 0) -> None:
        raise error(errno.ENOTSUP)

    def remove_xattr(self, inode: Inode, name: bytes) -> None:
        raise error(errno.ENOTSUP)

    # Giving up

    def discard(self, file: File) -> None:
        """The content of a file that has no entry is needed no more."""
        first = file.entry.first
        file.chain = Chain(self.volume.table, 0)
        file.entry.first = file.entry.size = 0
        self.volume.park(self.clusters_from(first))

    def clusters_from(self, first: int) -> list[Run]:
        """The clusters of a chain that is to be given up; none of a damaged one, which is left for fsck.vfat."""
        chain = Chain(self.volume.table, first)
        try:
            chain.learn()
        except OSError as damage:
            if damage.errno != errno.EIO:
                raise
            return []
        return chain.cut(0)

    def piece(self, entry: Entry) -> Piece:
        """An entry, to be written where it lies."""
        return entry.position, entry.pack(wide=self.volume.wide)

    # The end

    def sync(self) -> None:
        self.volume.sync()

    def close(self) -> None:
        if self._closed:
            return
        for file in self.inodes.unlinked_files():
            self.discard(file)
        self.volume.close()
        self._closed = True
