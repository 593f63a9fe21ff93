"""The contract of FileSystem, point by point: read-only, and devices that will not wait."""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable

from fusemount.filesystems.base import Changes
from nbdserve.block import BlockDevice, Window
from nbdserve.block.file import ReadBuffer
from tests.fusemount.devices import Reluctant
from tests.fusemount.model import Node, pattern
from tests.fusemount.subject import (
    Subject,
    attempt,
    compare_entries,
    names,
    new_file,
    without_waiting,
)


def check_read_only(subject: Subject) -> None:
    """Opened read-only, all is there, nothing can be changed, and nothing is written."""
    device = subject.make()
    fs = subject.open(device, writable=True)
    model = Node(fs.attributes(fs.root).mode)
    hidden = frozenset(names(fs, fs.root))
    for path, text in ((b"one", b"1"), (b"two", pattern(2, 70_000))):
        fs.forget(new_file(fs, path, text))
        model.entries[path] = path, Node(subject.traits.shown_mode(stat.S_IFREG | 0o644), content=bytearray(text))
    fs.close()
    fs = subject.open(Untouchable(device), writable=False)
    assert fs.read_only
    compare_entries(fs, subject.traits, model, fs.root, hidden)
    one, root = fs.lookup(fs.root, b"one"), fs.root
    refused: list[Callable[[], object]] = [
        lambda: fs.create(root, b"new", stat.S_IFREG | 0o644, 0, 0),
        lambda: fs.make_directory(root, b"new", 0o755, 0, 0),
        lambda: fs.make_symlink(root, b"new", b"target", 0, 0),
        lambda: fs.link(one, root, b"new"),
        lambda: fs.unlink(root, b"one"),
        lambda: fs.remove_directory(root, b"one"),
        lambda: fs.rename(root, b"one", root, b"new"),
        lambda: fs.write(one, 0, b"x"),
        lambda: fs.truncate(one, 0),
        lambda: fs.change(one, Changes(mode=0o600)),
        lambda: fs.set_xattr(one, b"user.a", b"x"),
        lambda: fs.remove_xattr(one, b"user.a"),
    ]
    for act in refused:
        attempt({errno.EROFS}, act)
    fs.sync()
    fs.close()
    device.close()


class Untouchable(Window):
    """A device that must not be written to, although it could."""

    def __init__(self, whole: BlockDevice) -> None:
        super().__init__(whole, 0, whole.size)

    def write(self, offset: int, data: ReadBuffer) -> None:
        raise AssertionError("written to, though opened read-only")

    def write_nowait(self, offset: int, data: ReadBuffer) -> bool:
        raise AssertionError("written to, though opened read-only")

    def zero(self, offset: int, length: int, *, unmap: bool = True) -> None:
        raise AssertionError("zeroed, though opened read-only")

    def discard(self, offset: int, length: int) -> None:
        raise AssertionError("discarded, though opened read-only")


def check_waiting(subject: Subject) -> None:
    """BlockingIOError of the device passes through, changes nothing, and the call gets further when made again."""
    device = subject.make()
    fs = subject.open(device, writable=True)
    model = Node(fs.attributes(fs.root).mode)
    hidden = frozenset(names(fs, fs.root))
    outer = fs.make_directory(fs.root, b"outer", 0o755, 0, 0)
    directory = Node(subject.traits.shown_mode(stat.S_IFDIR | 0o755))
    model.entries[b"outer"] = b"outer", directory
    for i in range(40):
        name, text = b"a rather long name, number %d" % i, pattern(i, i * 3000)
        fs.forget(new_file(fs, name, text, directory=outer))
        node = Node(subject.traits.shown_mode(stat.S_IFREG | 0o644), content=bytearray(text))
        directory.entries[subject.traits.key(name)] = name, node
    fs.close()
    slow = Reluctant(device)
    fs = subject.open(slow, writable=True)
    slow.nowait = True
    compare_entries(fs, subject.traits, model, fs.root, hidden)
    attempt({errno.ENOENT}, without_waiting, fs.lookup, fs.root, b"missing")
    without_waiting(fs.space)
    assert slow.refusals
    slow.nowait = False
    fs.close()
    subject.judge(device)
    device.close()


CHECKS = (
    check_read_only,
    check_waiting,
)
