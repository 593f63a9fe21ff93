"""What the parts of the conformance suite share: the subject, calling it, comparing it with the model."""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from fusemount.filesystems.base import FileSystem, Inode
from nbdserve.block import BlockDevice
from nbdserve.block.file import ReadBuffer
from tests.fusemount.model import Node, Traits

T = TypeVar("T")
SECOND = 10**9
MIB = 1 << 20
MISSING_FEATURE = {errno.EPERM, errno.ENOTSUP, errno.EROFS, errno.ENOSYS}


@dataclass(frozen=True)
class Subject:
    """A kind of file system under test; see conformance.check_filesystem()."""

    make: Callable[[], BlockDevice]
    open: Callable[..., FileSystem]
    judge: Callable[[BlockDevice], None]
    traits: Traits


def attempt(
    expected: set[int], call: Callable[..., T], *arguments: Any, may_succeed: bool = False, **options: Any
) -> T | None:
    """Call; it must fail with one of the expected errnos, or succeed when there are none. None when it failed."""
    what = f"{call.__name__}{arguments}"
    try:
        result = call(*arguments, **options)
    except OSError as error:
        if error.errno not in expected:
            raise AssertionError(f"{what} failed, expected {expected or 'success'}") from error
        return None
    assert may_succeed or not expected, f"{what} succeeded, expected {[errno.errorcode[number] for number in expected]}"
    return result


def without_waiting(call: Callable[..., T], *arguments: Any) -> T:
    """Call again as long as it says BlockingIOError."""
    for _ in range(10_000):
        with suppress(BlockingIOError):
            return call(*arguments)
    raise AssertionError(f"{call.__name__} never gets further")


@contextmanager
def mounted(subject: Subject) -> Iterator[FileSystem]:
    """A new file system, judged afterwards."""
    device = subject.make()
    filesystem = subject.open(device, writable=True)
    assert not filesystem.read_only
    yield filesystem
    filesystem.close()
    filesystem.close()  # is idempotent
    subject.judge(device)
    device.close()


def new_file(fs: FileSystem, name: bytes, content: bytes = b"", directory: Inode | None = None) -> Inode:
    inode = fs.create(directory or fs.root, name, stat.S_IFREG | 0o644, 0, 0)
    fs.write(inode, 0, content)
    return inode


def content(fs: FileSystem, inode: Inode) -> ReadBuffer:
    return fs.read(inode, 0, fs.attributes(inode).size)


def names(fs: FileSystem, directory: Inode) -> list[bytes]:
    return [entry.name for entry in fs.entries(directory)]


def compare(filesystem: FileSystem, traits: Traits, model: Node, inode: Inode, hidden: frozenset[bytes]) -> None:
    """A file and all below it equal the model. `hidden`: names in this directory that belong to the file system."""
    found = without_waiting(filesystem.attributes, inode)
    assert found.inode == inode
    assert found.mode == model.mode, f"mode {found.mode:o}, expected {model.mode:o}"
    if traits.owners:
        assert (found.uid, found.gid) == (model.uid, model.gid)
    if model.mtime_ns is not None:
        assert found.mtime_ns == model.mtime_ns - model.mtime_ns % traits.mtime_granularity_ns
    if model.atime_ns is not None:
        assert found.atime_ns == model.atime_ns - model.atime_ns % traits.atime_granularity_ns
    if traits.xattrs and not stat.S_ISLNK(model.mode):
        values = {name: filesystem.xattr(inode, name) for name in filesystem.xattr_names(inode)}
        assert {name: value for name, value in values.items() if name.startswith(b"user.")} == model.xattrs
    if model.is_directory:
        compare_entries(filesystem, traits, model, inode, hidden)
        return
    assert found.links == model.names
    if model.is_file:
        assert found.size == len(model.content)
        assert without_waiting(filesystem.read, inode, 0, found.size + 100) == model.content
    elif stat.S_ISLNK(model.mode):
        assert without_waiting(filesystem.read_link, inode) == model.content


def compare_entries(
    filesystem: FileSystem, traits: Traits, model: Node, inode: Inode, hidden: frozenset[bytes] = frozenset()
) -> None:
    """A directory has the model's entries, and what they stand for equals the model."""
    entries = without_waiting(lambda: list(filesystem.entries(inode)))
    assert len({entry.position for entry in entries}) == len(entries)
    shown = {entry.name: entry for entry in entries if entry.name not in hidden}
    assert sorted(shown) == sorted(name for name, _ in model.entries.values())
    for name, child in model.entries.values():
        assert shown[name].type == stat.S_IFMT(child.mode)
        number = without_waiting(filesystem.lookup, inode, name)
        assert number == shown[name].inode
        assert 0 < number < 1 << 48
        assert child.inode in (None, number), f"{name!r} was {child.inode} and is now {number}"
        try:
            compare(filesystem, traits, child, number, frozenset())
        finally:
            filesystem.forget(number)
