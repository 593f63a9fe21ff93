"""New images that replace old ones only when they are complete.

The order: the image is made in a directory of its own beside the place where it is to be, under its own name, and
brought to stable storage if that is wanted or an old image would be lost; then its files are renamed into their places,
the one that names the others last. The end of this process at any moment leaves the former image or the new one under
the name, and perhaps a directory whose name begins with a dot and ends in ".partial". An image of several files cannot
be exchanged in one step: there the old one disappears first.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from nbdserve import locking
from nbdserve.block import HostFile
from nbdserve.errors import NbdserveError, OpenError


@contextmanager
def staged(path: str, *, beside: bool = False, durable: bool = True) -> Iterator[str]:
    """Where to make the image in the with-block, at the end of which it gets its name; an error leaves the old one.

    Args:
        beside: it is one file, which has to find others from the directory where it is to be.
        durable: bring it to stable storage before it gets its name; what replaces another image always is.

    Raises:
        OpenError: what has the name now is neither a file nor absent.
        Locked: another process uses what has the name now.
    """
    target = os.path.realpath(path)
    folder, base = os.path.split(target)
    with ExitStack() as held:
        former = None
        if os.path.exists(target):
            file = held.enter_context(HostFile.open(path, writable=True))
            locking.lock(file, locking.WRITER)
            former = os.fstat(file.fd)
        stage = os.path.join(folder, f".{base[:200]}.{os.urandom(4).hex()}.partial")
        try:
            os.mkdir(stage, 0o700)
        except OSError as error:
            raise OpenError(f"{path}: cannot be made there: {error.strerror}; choose another place") from None
        made = f"{stage}.file" if beside else os.path.join(stage, base)
        try:
            with _told_as(made, path):
                yield made
            if beside:
                os.rename(made, os.path.join(stage, base))
            if former is not None:
                durable = True
                _inherit(os.path.join(stage, base), former)
            if durable:
                _sync(stage)
            _publish(stage, folder, base)
            if durable:
                _sync_folder(folder)
        finally:
            with suppress(OSError):  # what led here is what the user has to hear
                for name in os.listdir(stage):
                    os.unlink(os.path.join(stage, name))
                os.rmdir(stage)
            with suppress(OSError):
                os.unlink(f"{stage}.file")


@contextmanager
def _told_as(made: str, path: str) -> Iterator[None]:
    """Let errors speak of the name that the user gave."""
    try:
        yield
    except NbdserveError as error:
        raise type(error)(str(error).replace(made, path)) from None
    except OSError as error:
        if error.filename == made:
            error.filename = path
        raise


def is_device(path: str) -> bool:
    """Whether an image of this name has to be written in place."""
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def _sync(stage: str) -> None:
    for name in os.listdir(stage):
        fd = os.open(os.path.join(stage, name), os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _inherit(path: str, former: os.stat_result) -> None:
    """Let a file have the mode and, where we may, the owner of the one that it replaces."""
    with suppress(OSError):
        os.chown(path, former.st_uid, former.st_gid)
    os.chmod(path, stat.S_IMODE(former.st_mode))


def _publish(stage: str, folder: str, base: str) -> None:
    others = sorted(set(os.listdir(stage)) - {base})
    if others:
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, base))
    for name in (*others, base):
        os.rename(os.path.join(stage, name), os.path.join(folder, name))


def _sync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
