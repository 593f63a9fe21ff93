"""The conformance suite itself: what keeps the contract passes, and every way to break it is noticed."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from fusemount.filesystems.base import Changes, Entry, Inode, error
from nbdserve.block import BlockDevice
from nbdserve.block.file import ReadBuffer
from tests.fusemount.conformance import Traits, check_filesystem
from tests.fusemount.memory_filesystem import MemoryFileSystem, TreeDevice


def judge(device: BlockDevice) -> None:
    assert isinstance(device, TreeDevice)


def test_a_file_system_in_memory_passes() -> None:
    check_filesystem(TreeDevice, MemoryFileSystem, judge, traits=Traits(), examples=10)


class TruncatesTooFar(MemoryFileSystem):
    def truncate(self, inode: Inode, size: int) -> None:
        super().truncate(inode, size)
        self.files[inode].content[max(0, size - 1) :] = bytes(min(size, 1))


class LosesGaps(MemoryFileSystem):
    def write(self, inode: Inode, offset: int, data: ReadBuffer) -> None:
        super().write(inode, min(offset, len(self._file(inode).content)), data)


class ForgetsWhatIsHeld(MemoryFileSystem):
    def _reap(self, inode: Inode) -> None:
        if not self.files[inode].links:
            self.files[inode].content.clear()


class ReusesNumbers(MemoryFileSystem):
    def create(self, directory: Inode, name: bytes, mode: int, uid: int, gid: int, device: int = 0) -> Inode:
        free = [inode for inode, file in self.files.items() if not file.links and inode != self.root]
        inode = super().create(directory, name, mode, uid, gid, device)
        if free:
            self.files[free[0]] = self.files.pop(inode)
            place, _ = self._file(directory).entries[name]
            self._file(directory).entries[name] = place, free[0]
        return free[0] if free else inode


class CountsPositions(MemoryFileSystem):
    def entries(self, directory: Inode, position: int = 0) -> Iterator[Entry]:
        for index, entry in enumerate(super().entries(directory), 1):
            if index > position:
                yield entry._replace(position=index)


class ReplacesAlways(MemoryFileSystem):
    def rename(
        self, directory: Inode, name: bytes, new_directory: Inode, new_name: bytes, *, replace: bool = True
    ) -> None:
        super().rename(directory, name, new_directory, new_name)


class SaysPermission(MemoryFileSystem):
    def lookup(self, directory: Inode, name: bytes) -> Inode:
        try:
            return super().lookup(directory, name)
        except FileNotFoundError:
            raise error(errno.EACCES) from None


class DropsTimes(MemoryFileSystem):
    def change(self, inode: Inode, changes: Changes) -> None:
        super().change(inode, Changes(changes.mode, changes.uid, changes.gid, changes.atime_ns))


@pytest.mark.parametrize(
    "broken",
    [
        TruncatesTooFar,
        LosesGaps,
        ForgetsWhatIsHeld,
        ReusesNumbers,
        CountsPositions,
        ReplacesAlways,
        SaysPermission,
        DropsTimes,
    ],
)
def test_what_breaks_the_contract_is_noticed(broken: type[MemoryFileSystem]) -> None:
    with pytest.raises(AssertionError):
        check_filesystem(TreeDevice, broken, judge, traits=Traits(), examples=0)
