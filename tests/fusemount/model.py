"""The model that the conformance suite holds a file system against: a tree of plain Python objects."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fusemount.filesystems.base import Inode

DAY_NS = 24 * 3600 * 10**9


@dataclass(frozen=True)
class Traits:
    """What a kind of file system has, and what it has not.

    Attributes:
        owners, links, symlinks, xattrs, devices: whether files have owners, several names, ...; what is missing must
            fail with EPERM, ENOTSUP, EROFS or ENOSYS, not do something else.
        case_sensitive: whether `a` and `A` are two names.
        mtime_granularity_ns, atime_granularity_ns: times are rounded down to multiples of it.
        text_targets: whether symbolic links can only hold UTF-8.
        shown_mode: what becomes of a mode, type bits included.
        names: what the files of the state machine are called.
        reach: how far into a file the state machine goes, in bytes.
    """

    owners: bool = True
    links: bool = True
    symlinks: bool = True
    xattrs: bool = True
    devices: bool = True
    case_sensitive: bool = True
    mtime_granularity_ns: int = 1
    atime_granularity_ns: int = 1
    text_targets: bool = False
    shown_mode: Callable[[int], int] = lambda mode: mode
    names: tuple[bytes, ...] = (
        b"a",
        b"A",
        b"readme.txt",
        b"README.TXT",
        "Gr\u00f6\u00dfe".encode(),
        "\u540d\u524d with a long name, and spaces.jpeg".encode(),
        b"x" * 255,
        "\U0001f600.c".encode(),
    )
    reach: int = 200_000

    def key(self, name: bytes) -> bytes:
        """Equal for names that mean the same file."""
        return name if self.case_sensitive else name.decode().lower().encode()


@dataclass(eq=False)
class Node:
    """A file of any type.

    Attributes:
        mode: type and permission bits, as they must be shown.
        names: how many names it has.
        held: how often it was opened.
        inode, known: its number, and how often the file system has told it; None while it was not told.
        mtime_ns, atime_ns: None when they are whatever the clock said.
        content: of a file; the target of a symbolic link.
        entries: of a directory: key -> (name as it was given, node).
    """

    mode: int
    uid: int = 0
    gid: int = 0
    names: int = 1
    held: int = 0
    inode: Inode | None = None
    known: int = 0
    mtime_ns: int | None = None
    atime_ns: int | None = None
    content: bytearray = field(default_factory=bytearray)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    entries: dict[bytes, tuple[bytes, Node]] = field(default_factory=dict)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    def below(self) -> Iterator[Node]:
        """The node itself and all that can be reached from it, hard links once."""
        seen: dict[Node, None] = {}
        waiting = [self]
        while waiting:
            node = waiting.pop(0)
            if node not in seen:
                seen[node] = None
                waiting += [child for _, child in node.entries.values()]
        yield from seen

    def write(self, offset: int, data: bytes) -> None:
        if data:
            self.content.extend(bytes(max(0, offset - len(self.content))))
            self.content[offset : offset + len(data)] = data

    def truncate(self, size: int) -> None:
        del self.content[size:]
        self.content.extend(bytes(size - len(self.content)))


def pattern(fill: int, length: int) -> bytes:
    """Bytes that tell where they came from and hold no zero."""
    piece = bytes((fill + i * 7) % 255 + 1 for i in range(251))
    return (piece * (length // 251 + 1))[:length]
