"""Files that appear under their names only when they are complete.

The order: the content goes to a file with a temporary name in the same directory, is brought to stable storage, and
then gets its real name in one step that refuses to replace an existing file. A crash leaves a file with a temporary
name at most, which begins with a dot and ends in ".partial".
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

_NO_LINKS = frozenset((errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK))


@contextmanager
def new_file(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[BinaryIO]:
    """A new, empty file to fill in the with-block, at the end of which it gets its name; an error leaves nothing.

    Args:
        durable: bring the content to stable storage first; False where the caller sees to that.

    Raises:
        FileExistsError: there is a file of that name, before the block or at its end.
    """
    name = os.fspath(path)
    if os.path.lexists(name):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
    directory, base = os.path.split(name)
    temporary = os.path.join(directory, f".{base[:200]}.{os.urandom(4).hex()}.partial")
    with open(temporary, "x+b") as file:
        try:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            _name(temporary, name)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
    if durable:
        _sync_directory(directory or ".")


def _name(temporary: str, name: str) -> None:
    """Give a complete file its name besides the temporary one."""
    try:
        os.link(temporary, name)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # No hard links here (FAT): claim the name, so that nobody's file is replaced, and rename over the claim.
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC))
        os.rename(temporary, name)


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
