"""Image locks that QEMU honours and that honour QEMU's.

The scheme is QEMU's ("Image file locking" in its manual; block/file-posix.c): locks are advisory record locks on
single bytes of the image file, whether or not the file is that long. Byte 100 + n is locked by everyone who *uses* the
image in way n (see Use), byte 200 + n by everyone who *refuses* that others use it so. All locks are shared ones, so
that any number of users may hold the same byte; a conflict shows only when somebody looks.

The invariant that excludes writers: whoever comes locks the bytes of its own uses and refusals first, and only then
looks at those of others; and it looks before it reads anything of the image. Of two who come at the same time at least
one sees the other (both may, and give up), so there is no moment at which two believe to be alone.

The locks belong to the open file description (F_OFD_SETLK, fcntl(2)): they end with the last descriptor, at a crash as
well, and two descriptors in one process exclude each other like two processes.
"""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import NewType

from nbdserve.block import HostFile
from nbdserve.errors import Locked

LockByte = NewType("LockByte", int)
"""The place in the file of a byte that is locked."""

_USES_BASE = 100
_REFUSALS_BASE = 200

_FLOCK = Struct("hhqqi0q")  # struct flock: type, whence, start, length, pid

# What fcntl() says where there are no such locks: on this kernel, on this file system, from its lock server.
_NO_LOCKS = frozenset((errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP))


class Use(IntEnum):
    """Ways to use an image, numbered as QEMU does (BlockPermission in its QAPI schema)."""

    READ = 0
    WRITE = 1
    REWRITE = 2  # write what is there already, as copy-on-read does; nothing here refuses or needs that
    RESIZE = 3


@dataclass(frozen=True, slots=True)
class Claim:
    """How we use an image, and which uses of others cannot go along with that."""

    uses: tuple[Use, ...]
    refuses: tuple[Use, ...]


# What QEMU claims for a disk of a virtual machine, and for an NBD export in that its size must not change.
READER = Claim(uses=(Use.READ,), refuses=(Use.WRITE, Use.RESIZE))
WRITER = Claim(uses=(Use.READ, Use.WRITE), refuses=(Use.WRITE, Use.RESIZE))
GROWER = Claim(uses=(Use.READ, Use.WRITE, Use.RESIZE), refuses=(Use.WRITE, Use.RESIZE))
"""A writer to a format whose files grow with what is written, as all but raw ones may."""
ONLOOKER = Claim(uses=(Use.READ,), refuses=())
"""A reader who puts up with writers (force-share): what it reads may never have been there as a whole."""

_EXCLUSIONS = {Use.READ: "read it", Use.WRITE: "write to it", Use.RESIZE: "change its length"}


def lock(file: HostFile, claim: Claim) -> bool:
    """Lock an image that was just opened, before anything of it is read; a claim may later be extended by another call.

    Returns:
        False where the file system (or the kernel) has no such locks: then nobody is kept away.

    Raises:
        Locked: another user excludes us, or we would have to exclude it. The caller closes the file, which gives back
            what is locked by then.
    """
    try:
        for byte in (*map(_use_byte, claim.uses), *map(_refusal_byte, claim.refuses)):
            _lock_shared(file, byte)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    for use in claim.refuses:
        _demand_unlocked(
            file,
            _use_byte(use),
            "is writing to it; stop that first, or look at the image as it changes with --read-only --force-share",
        )
    for use in claim.uses:
        remedy = "" if use is Use.READ else ", or open it read-only (-r)"
        _demand_unlocked(
            file, _refusal_byte(use), f"is using it and lets nobody {_EXCLUSIONS[use]}; stop that first{remedy}"
        )
    return True


def _use_byte(use: Use) -> LockByte:
    return LockByte(_USES_BASE + use)


def _refusal_byte(use: Use) -> LockByte:
    return LockByte(_REFUSALS_BASE + use)


def _lock_shared(file: HostFile, byte: LockByte) -> None:
    try:
        fcntl.fcntl(file.fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        # Nobody who follows the scheme has it for itself alone; but some programs lock their files as a whole.
        raise Locked(f"{file.name}: another program has locked it for itself; stop that first") from None


def _demand_unlocked(file: HostFile, byte: LockByte, text: str) -> None:
    """See that an exclusive lock would succeed, that is: that nobody else holds the byte; the text says what it means.

    Our own locks are given back before we look who does: that takes a while, in which they would keep others away.
    """
    answer = fcntl.fcntl(file.fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    if _FLOCK.unpack(answer)[0] == fcntl.F_UNLCK:
        return
    ours = _locks(f"/proc/self/fdinfo/{file.fd}")
    fcntl.fcntl(file.fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))
    process = _holder(ours[0][0], byte) if ours else None
    user = "another process" if process is None else f"{_command(process)} (process {process})"
    raise Locked(f"{file.name}: {user} {text}")


def _holder(file: str, byte: LockByte) -> str | None:
    """The number of a process with a lock on the byte, as far as /proc shows us other people's processes.

    The kernel names no process for locks of this kind (fcntl(2), F_OFD_GETLK), but lists them with each descriptor.
    """
    for process in filter(str.isdigit, _names("/proc")):
        for descriptor in _names(f"/proc/{process}/fdinfo"):
            for locked, first, last in _locks(f"/proc/{process}/fdinfo/{descriptor}"):
                if locked == file and first <= byte <= last:
                    return process
    return None


def _locks(path: str) -> list[tuple[str, int, int]]:
    """The record locks of a descriptor, as (file, first byte, last byte), from its page in /proc.

    A line there (proc_pid_fdinfo(5)) is "lock: 1: OFDLCK ADVISORY READ -1 fe:00:2172131 100 101".
    """
    locks = []
    for line in _text(path).splitlines():
        if line.startswith("lock:"):
            file, first, last = line.split()[-3:]
            locks.append((file, int(first), (1 << 63) - 1 if last == "EOF" else int(last)))
    return locks


def _command(process: str) -> str:
    return " ".join(_text(f"/proc/{process}/comm").split()) or "another program"


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # not ours to look at, or gone by now
        return []


def _text(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return ""
