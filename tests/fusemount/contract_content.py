"""The contract of FileSystem, point by point: content, times, space."""

from __future__ import annotations

import errno
import os
import time

import pytest

from fusemount.filesystems.base import Changes, FileSystem, Inode
from tests.fusemount.model import pattern
from tests.fusemount.subject import (
    MIB,
    SECOND,
    Subject,
    attempt,
    content,
    mounted,
    names,
    new_file,
)


def check_holding(subject: Subject) -> None:
    """Unlinked or replaced while held, a file keeps its content; its space comes back when nobody knows it."""
    with mounted(subject) as fs:
        new_file(fs, b"first")
        before = fs.space()
        text = pattern(1, 300_000)
        for replaced in (False, True):
            inode = new_file(fs, b"held", text)
            fs.hold(inode)
            fs.hold(inode)
            if replaced:
                fs.rename(fs.root, b"first", fs.root, b"held")
                assert names(fs, fs.root).count(b"held") == 1
            else:
                fs.unlink(fs.root, b"held")
                attempt({errno.ENOENT}, fs.lookup, fs.root, b"held")
            fs.let_go(inode)
            assert fs.attributes(inode).links == 0
            fs.write(inode, 1000, b"new")
            fs.write(inode, len(text), b"end")
            other = new_file(fs, b"other", b"o" * 100_000)
            assert content(fs, inode) == text[:1000] + b"new" + text[1003:] + b"end"
            fs.sync()
            assert fs.space().free_blocks < before.free_blocks
            fs.let_go(inode)
            fs.forget(inode)
            fs.unlink(fs.root, b"other")
            fs.forget(other)
        assert (before.free_blocks - fs.space().free_blocks) * before.block_size < 100_000


def check_sparse(subject: Subject) -> None:
    """What was never written reads as zeros, also where something else lay on the disk before."""
    with mounted(subject) as fs:
        for i in range(4):
            new_file(fs, b"old%d" % i, b"\xff" * MIB)
            fs.unlink(fs.root, b"old%d" % i)
        inode = new_file(fs, b"sparse", b"\xff" * 70_001)
        fs.truncate(inode, 10)
        fs.truncate(inode, 100_000)
        assert content(fs, inode) == b"\xff" * 10 + bytes(99_990)
        fs.write(inode, MIB + 3, b"end")
        assert content(fs, inode) == b"\xff" * 10 + bytes(MIB - 7) + b"end"
        assert fs.read(inode, MIB + 6, 10) == fs.read(inode, 10 * MIB, 10) == b""
        fs.truncate(inode, 0)
        fs.write(inode, 5, b"x")
        assert content(fs, inode) == bytes(5) + b"x"


def check_large_files(subject: Subject) -> None:
    """Two files that grow in turns, so that neither lies in one piece."""
    with mounted(subject) as fs:
        models = {new_file(fs, b"one"): bytearray(), new_file(fs, b"two"): bytearray()}
        for i in range(12):
            for inode, model in models.items():
                piece = pattern(i + inode, 131_072 + i)
                fs.write(inode, len(model), memoryview(piece))
                model += piece
        for inode, model in models.items():
            fs.write(inode, 65_000, b"-" * 300_000)
            model[65_000:365_000] = b"-" * 300_000
            assert content(fs, inode) == model
            assert all(fs.read(inode, at, 4096) == model[at : at + 4096] for at in range(0, len(model), 99_991))
            assert fs.attributes(inode).blocks * 512 >= len(model)


def check_times(subject: Subject) -> None:
    """What changes is dated now, and dates can be set."""
    grain = max(subject.traits.mtime_granularity_ns, SECOND)
    with mounted(subject) as fs:
        directory = fs.make_directory(fs.root, b"dir", 0o755, 0, 0)
        long_ago = 1_234_567_890 * SECOND
        for act in (
            lambda: new_file(fs, b"file", directory=directory),
            lambda: fs.rename(directory, b"file", directory, b"other"),
            lambda: fs.unlink(directory, b"other"),
        ):
            fs.change(directory, Changes(mtime_ns=long_ago))
            assert fs.attributes(directory).mtime_ns == long_ago
            act()
            assert abs(time.time_ns() - fs.attributes(directory).mtime_ns) < 30 * SECOND + grain
        inode = new_file(fs, b"file")
        for act in (lambda: fs.write(inode, 0, b"text"), lambda: fs.truncate(inode, 2)):
            fs.change(inode, Changes(mtime_ns=long_ago, atime_ns=long_ago))
            act()
            assert abs(time.time_ns() - fs.attributes(inode).mtime_ns) < 30 * SECOND + grain
            assert fs.attributes(inode).atime_ns == long_ago - long_ago % subject.traits.atime_granularity_ns


def fill(fs: FileSystem, inode: Inode, piece: bytes) -> None:
    for offset in range(0, 65 * MIB, len(piece)):
        fs.write(inode, offset, piece)


def check_full(subject: Subject) -> None:
    """ENOSPC costs nothing that was there, and what is removed makes room again."""
    with mounted(subject) as fs:
        kept = pattern(3, 100_000)
        files = [new_file(fs, b"kept", kept)]
        space = fs.space()
        if space.free_blocks * space.block_size > 64 * MIB:
            return
        assert space.free_blocks <= space.blocks and space.longest_name >= 255
        piece = pattern(4, MIB)
        inode = new_file(fs, b"large")
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            fill(fs, inode, piece)
        written = fs.attributes(inode).size
        assert written // MIB * MIB >= space.free_blocks * space.block_size * 9 // 10 - MIB
        assert fs.space().free_blocks * space.block_size < 2 * MIB
        fs.truncate(inode, written // MIB * MIB)
        assert content(fs, inode) == piece * (written // MIB)
        assert content(fs, files[0]) == kept
        fs.unlink(fs.root, b"large")
        fs.forget(inode)
        again = new_file(fs, b"again", piece)
        assert content(fs, again) == piece
        assert content(fs, files[0]) == kept


CHECKS = (
    check_holding,
    check_sparse,
    check_large_files,
    check_times,
    check_full,
)
