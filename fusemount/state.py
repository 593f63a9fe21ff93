"""How someone who unmounts learns that the image is closed, and whether all went well.

The process behind a mount holds a file without a name (memfd), locked for as long as it lives. An extended attribute of
the mount's root, which is not listed, says where: `PID FD`. Whoever unmounts opens that file through /proc *before* it
unmounts, waits for the lock, and reads there how it ended. Nothing lies about in a directory, nothing can be stale, and
a process that was killed leaves the file saying that it was never finished.
"""

from __future__ import annotations

import errno
import fcntl
import os

from nbdserve.errors import NbdserveError, OpenError

FACT = b"user.fusemount.process"
_DONE = b"done"


class MountState:
    """The side of the process behind the mount."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("fusemount")
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    @property
    def facts(self) -> dict[bytes, bytes]:
        """The extended attribute that leads here."""
        return {FACT: f"{os.getpid()} {self._fd}".encode()}

    def finish(self, failure: str | None) -> None:
        """Leave word of how it ended; to be called when the image is closed. The lock goes with the process."""
        os.pwrite(self._fd, failure.encode("utf-8", "replace") if failure else _DONE, 0)


class MountEnd:
    """The side of whoever unmounts.

    Raises:
        OpenError: there is no such mount here, or its process cannot be found.
    """

    def __init__(self, mountpoint: str) -> None:
        self.mountpoint = mountpoint
        try:
            pid, fd = map(int, os.getxattr(mountpoint, FACT).split())
        except OSError as error:
            raise OpenError(_why_no_fact(mountpoint, error)) from None
        try:
            self._fd = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise OpenError(
                f"{mountpoint}: its process {pid} cannot be watched ({error.strerror}); unmount it as the user who "
                "mounted it"
            ) from None

    def wait(self) -> None:
        """Return when the image is closed.

        Raises:
            NbdserveError: what was written may not have arrived; the message says why.
        """
        fcntl.flock(self._fd, fcntl.LOCK_SH)
        result = os.pread(self._fd, 4096, 0)
        os.close(self._fd)
        if result != _DONE:
            reason = result.decode("utf-8", "replace") or "its process was killed before it had written everything"
            raise NbdserveError(f"{self.mountpoint}: unmounted, but {reason}")


def _why_no_fact(mountpoint: str, problem: OSError) -> str:
    match problem.errno:
        case errno.ENOTCONN:
            return (
                f"{mountpoint}: its process has died before; 'fusermount3 -u {mountpoint}' removes the mount, and what "
                "was not yet written is lost: check the guest's file systems"
            )
        case errno.ENOENT:
            return f"{mountpoint}: no such directory"
        case errno.EACCES:
            return f"{mountpoint}: no permission; unmount it as the user who mounted it"
        case _:
            return f"{mountpoint}: nothing is mounted here by fusemount"
