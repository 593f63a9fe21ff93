"""Images as a crash leaves them: copied while the kernel has them mounted, with a log that is to be replayed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.fusemount.ext_images import mkfs, mounted

JOURNAL_MAGIC = b"\xc0\x3b\x39\x98"


def crashed(
    directory: Path, options: tuple[str, ...], work: Callable[[bytes], None], *, mount_options: str = "rw"
) -> Path:
    """An image whose machine stopped after `work`, the last of which is on disk only in the log."""
    image = mkfs(directory / "running", "24M", *options)
    copy = directory / "crashed"
    with mounted(image) as top:
        for index in range(20):
            _write(top, b"old%d" % index, b"old content %d" % index * 500)
        os.mkdir(os.path.join(top, b"directory"))
    with mounted(image, mount_options) as top:
        work(top)
        shutil.copyfile(image, copy)
        while _open:
            os.close(_open.pop())
    return copy


def work(top: bytes) -> None:
    """Changes in several transactions, with blocks that are freed and used again (revoke records)."""
    for round in range(4):
        for index in range(25):
            _write(top, b"directory/new%d.%d" % (round, index), b"new content %d" % index * 100)
        os.mkdir(os.path.join(top, b"dir%d" % round))
        for index in range(12):
            _write(top, b"dir%d/file%d" % (round, index), b"x" * 3000)
        commit(top)
        for index in range(12):
            os.unlink(os.path.join(top, b"dir%d/file%d" % (round, index)))
        os.rmdir(os.path.join(top, b"dir%d" % round))
        os.unlink(os.path.join(top, b"old%d" % round))
        os.rename(os.path.join(top, b"old%d" % (round + 10)), os.path.join(top, b"directory/moved%d" % round))
        _write(top, b"reused%d" % round, JOURNAL_MAGIC * 3000)
        commit(top)


def wrap(top: bytes) -> None:
    """So many transactions that a small log begins again from its start."""
    for round in range(120):
        for index in range(round % 7 + 1):
            _write(top, b"directory/%d.%d" % (round, index), b"wrap" * 300)
        commit(top)
    for index in range(0, 120, 3):
        os.unlink(os.path.join(top, b"directory/%d.0" % index))
    commit(top)


def leave_orphans(top: bytes) -> None:
    """Files that are unlinked while they are open: only the crash lets go of them."""
    for index in range(9):
        path = os.path.join(top, b"orphan%d" % index)
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.write(file, os.urandom(50_000 * index))
        os.fsync(file)
        os.unlink(path)
        _open.append(file)
    commit(top)


_open: list[int] = []


def commit(top: bytes) -> None:
    """Have the kernel write a transaction into the log; sync() would write its blocks home as well."""
    directory = os.open(os.path.join(top, b"directory"), os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def _write(top: bytes, name: bytes, content: bytes) -> None:
    with open(os.path.join(top, name), "wb") as file:
        file.write(content)
