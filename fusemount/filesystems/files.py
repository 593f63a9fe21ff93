"""DeviceFiles: block devices as the files of one flat directory, and the empty directories that others are mounted on.

A device has its size, whatever is done to the file: cutting one is accepted and changes nothing, as with a block device
(`dd of=p1` and mkfs truncate what they are given). The kernel, however, believes a file that it opened with O_TRUNC to
be empty and, with its writeback cache on, never asks again; nor does it after a write past the end, which it believes
to have made the file longer. So the file goes on under a new inode number: its next lookup finds it in the length that
it has. This is why names do not last here (names_last).
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence

from fusemount.filesystems.base import Attributes, Changes, Entry, FileSystem, Inode, Space, error
from nbdserve.block.device import BlockDevice
from nbdserve.block.file import ReadBuffer


class DeviceFiles(FileSystem):
    """A directory of devices.

    Args:
        files: name -> device; those that are not read-only can be written.
        directories: the names of empty directories beside them.

    Attributes:
        nowait: raise BlockingIOError where a read would have to wait for the host's disk.
    """

    has_owners = False

    def __init__(self, files: Mapping[str, BlockDevice], directories: Sequence[str] = ()) -> None:
        self.root = Inode(1)
        self.nowait = False
        self.read_only = all(device.read_only for device in files.values())
        self.names_last = self.read_only
        self._devices = list(files.values())
        self._names = [os.fsencode(name) for name in (*files, *directories)]
        self._numbers = {name: number for number, name in enumerate(self._names)}
        self._epoch = [0] * len(self._names)
        self._times = [time.time_ns()] * len(self._names)

    # A file's inode is 2 + its number + its epoch times the count of files.

    def _inode(self, number: int) -> Inode:
        return Inode(2 + number + self._epoch[number] * len(self._names))

    def _number(self, inode: Inode) -> int:
        return (inode - 2) % len(self._names)

    def _device(self, inode: Inode) -> BlockDevice:
        if inode == self.root or self._number(inode) >= len(self._devices):
            raise error(errno.EISDIR)
        return self._devices[self._number(inode)]

    def directory(self, name: str) -> Inode:
        """The inode of one of the empty directories."""
        return self._inode(self._numbers[os.fsencode(name)])

    def lookup(self, directory: Inode, name: bytes) -> Inode:
        number = self._numbers.get(name) if directory == self.root else None
        if number is None:
            raise error(errno.ENOENT)
        return self._inode(number)

    def attributes(self, inode: Inode) -> Attributes:
        if inode == self.root:
            times = (max(self._times, default=0),) * 3
            links = 2 + len(self._names) - len(self._devices)
            return Attributes(inode, stat.S_IFDIR | 0o755, links, 0, 0, 0, 0, *times)
        number = self._number(inode)
        times = (self._times[number],) * 3
        if number >= len(self._devices):
            return Attributes(inode, stat.S_IFDIR | 0o755, 2, 0, 0, 0, 0, *times)
        device = self._devices[number]
        mode = stat.S_IFREG | (0o400 if device.read_only else 0o600)
        return Attributes(inode, mode, 1, 0, 0, device.size, -(-device.size // 512), *times)

    def entries(self, directory: Inode, position: int = 0) -> Iterator[Entry]:
        if directory == self.root:
            for number in range(position, len(self._names)):
                kind = stat.S_IFREG if number < len(self._devices) else stat.S_IFDIR
                yield Entry(number + 1, self._names[number], self._inode(number), kind)

    def read(self, inode: Inode, offset: int, length: int) -> ReadBuffer:
        device = self._device(inode)
        length = max(0, min(length, device.size - offset))
        return self._read_nowait(device, offset, length) if self.nowait else device.read(offset, length)

    def _read_nowait(self, device: BlockDevice, offset: int, length: int) -> ReadBuffer:
        buffer = bytearray(length)
        if not device.read_at_hand(offset, buffer):
            raise error(errno.EAGAIN)
        return buffer

    def space(self) -> Space:
        blocks = sum(-(-device.size // 4096) for device in self._devices)
        return Space(4096, blocks, 0, len(self._names), 0)

    def write(self, inode: Inode, offset: int, data: ReadBuffer) -> None:
        device = self._device(inode)
        if device.read_only:
            raise error(errno.EROFS)
        if offset + len(data) > device.size:
            self._epoch[self._number(inode)] += 1
            raise error(errno.ENOSPC)
        device.write(offset, data)
        self._times[self._number(inode)] = time.time_ns()

    def truncate(self, inode: Inode, size: int) -> None:
        device = self._device(inode)
        if device.read_only:
            raise error(errno.EROFS)
        if size > device.size:
            raise error(errno.ENOSPC)
        if size < device.size:
            self._epoch[self._number(inode)] += 1

    def change(self, inode: Inode, changes: Changes) -> None:
        """Owners and modes are not kept; times are, for the tools that set them."""
        if changes.mtime_ns is not None and inode != self.root:
            self._times[self._number(inode)] = changes.mtime_ns

    def sync(self) -> None:
        for device in self._devices:
            if not device.read_only:
                device.flush()
