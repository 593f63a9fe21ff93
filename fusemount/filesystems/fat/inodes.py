"""Which file has which inode number.

FAT has no inodes: a file is known by the place of its directory entry. Its number is made from that place and then
remembered for as long as the caller knows it, so it stays the same when the entry moves. The place may be taken by
another file meanwhile; that one gets the next free number of the same series.
"""

from __future__ import annotations

import errno

from fusemount.filesystems.base import Inode, error
from fusemount.filesystems.fat.chain import Chain
from fusemount.filesystems.fat.entries import Entry

ROOT = Inode(1)
_SERIES = 1 << 40  # above the number of any place: a volume has less than 2**44 bytes


class File:
    """A file or directory that the caller knows.

    Attributes:
        entry: its directory entry. That of the root directory is made up and lies nowhere.
        chain: where its content lies.
        known: how often its number was told and not yet forgotten.
        held: how often it is open.
        linked: whether its entry is in its directory; False after it was unlinked.
    """

    __slots__ = ("chain", "entry", "held", "known", "linked", "number")

    def __init__(self, number: Inode, entry: Entry, chain: Chain) -> None:
        self.number = number
        self.entry = entry
        self.chain = chain
        self.known = 0
        self.held = 0
        self.linked = True


class Inodes:
    """The files that the caller knows, by number and by the position of their entries."""

    def __init__(self, root: File) -> None:
        self._by_number = {ROOT: root}
        self._by_position: dict[int, File] = {}
        root.known = 1

    def __getitem__(self, number: Inode) -> File:
        file = self._by_number.get(number)
        if file is None:
            raise error(errno.ESTALE)
        return file

    def at(self, position: int) -> File | None:
        """The known file whose entry lies at a position on the device."""
        return self._by_position.get(position)

    def number_at(self, position: int) -> Inode:
        """The number of the file whose entry lies there, known or not."""
        file = self._by_position.get(position)
        if file is not None:
            return file.number
        number = position // 32
        while number in self._by_number:
            number += _SERIES
        assert number < 1 << 48
        return Inode(number)

    def add(self, file: File) -> None:
        """Remember a file; count it with tell()."""
        self._by_number[file.number] = file
        self._by_position[file.entry.position] = file

    def forget(self, number: Inode, count: int) -> None:
        """The caller drops a number `count` times."""
        file = self._by_number.get(number)
        if file is not None and number != ROOT:
            file.known -= count
            self.tidy(file)

    def tidy(self, file: File) -> None:
        """Drop a file that is neither known nor held."""
        if file.known <= 0 and not file.held and file.number != ROOT:
            self._by_number.pop(file.number, None)
            if file.linked:
                self._by_position.pop(file.entry.position, None)

    def moved(self, file: File, old_position: int) -> None:
        """A file's entry now lies elsewhere."""
        del self._by_position[old_position]
        self._by_position[file.entry.position] = file

    def unlinked(self, file: File) -> None:
        """A file has lost its entry."""
        del self._by_position[file.entry.position]
        file.linked = False

    def unlinked_files(self) -> list[File]:
        """The files without entry that are still known."""
        return [file for file in self._by_number.values() if not file.linked]
