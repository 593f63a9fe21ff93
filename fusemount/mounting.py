"""Mounting and unmounting on the host: what has to be there, and the programs that do it for an ordinary user."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec

from nbdserve.errors import NbdserveError, OpenError

DEVICE = "/dev/fuse"
_READ_AHEAD = 512  # KiB
_DETACH = 2  # MNT_DETACH, umount2(2)


def check_host() -> None:
    """See that this host can mount through FUSE at all.

    Raises:
        OpenError: with what is missing and how to get it.
    """
    if find_spec("pyfuse3") is None:
        raise OpenError("pyfuse3 is not installed; pip install 'nbdserve[fuse]' (it needs libfuse3-dev to build)")
    if not os.path.exists(DEVICE):
        raise OpenError(f"{DEVICE}: there is no such device; load it with 'modprobe fuse', or give it to the container")
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        raise OpenError(f"{DEVICE}: no permission; ask for 'chmod 666 {DEVICE}', or become a member of its group")
    if os.geteuid() != 0 and not _has_program("fusermount3"):
        raise OpenError("fusermount3 is not installed, and only root can mount without it; install the package fuse3")


def _has_program(name: str) -> bool:
    return any(os.access(os.path.join(folder, name), os.X_OK) for folder in os.get_exec_path())


def check_mountpoint(path: str) -> str:
    """The real path of a directory that can be mounted on.

    Raises:
        OpenError: it is missing, no directory, somebody else's, or mounted on already.
    """
    real = os.path.realpath(path)
    try:
        status = os.stat(path)
        os.statvfs(path)  # which, unlike the attributes, is never answered from the kernel's cache
    except FileNotFoundError:
        raise OpenError(f"{path}: there is no such directory; make it with 'mkdir -p {path}'") from None
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise OpenError(
                f"{path}: is busy with a mount whose process has died; remove it with 'fusermount3 -u {path}'"
            ) from None
        raise OpenError(f"{path}: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode):
        raise OpenError(f"{path}: is no directory; the mount point has to be one")
    if os.path.ismount(path):
        raise OpenError(f"{path}: is busy, something is mounted there; unmount it with 'fusemount --unmount {path}'")
    foreign = status.st_mode & stat.S_ISVTX and status.st_uid != os.geteuid()
    if os.geteuid() != 0 and (foreign or not os.access(path, os.W_OK)):
        raise OpenError(f"{path}: belongs to somebody else; choose a directory of your own as the mount point")
    return real


def widen_read_ahead(mountpoint: str) -> None:
    """Let the kernel read ahead more of a file than the 128 KiB of every new mount; only root may ask for that.

    Waits until the mount is served, since the kernel narrows it to 128 KiB just before.
    """
    with suppress(OSError):
        device = os.stat(mountpoint).st_dev
        with open(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb", "w", encoding="ascii") as file:
            file.write(str(_READ_AHEAD))


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Take a mount away.

    Args:
        lazy: although files in it are open; they go on to work.

    Raises:
        OSError: EBUSY if files are open, without `lazy`.
        NbdserveError: it failed for another reason.
    """
    if os.geteuid() == 0:
        _unmount_as_root(mountpoint, lazy)
        return
    import subprocess

    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", mountpoint]
    try:
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    except FileNotFoundError:
        raise OpenError("fusermount3 is not installed; install the package fuse3") from None
    if result.returncode:
        reason = result.stderr.strip().splitlines()[-1:] or ["fusermount3 failed"]
        if "busy" in reason[0].lower():
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), mountpoint)
        raise NbdserveError(f"{mountpoint}: {reason[0]}")


def _unmount_as_root(mountpoint: str, lazy: bool) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(mountpoint), _DETACH if lazy else 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), mountpoint)


def sync(mountpoint: str) -> OSError | None:
    """Have the kernel hand over everything that was written in a mount.

    Returns:
        what it could not store, at any time since the mount began, if nobody has been told yet.
    """
    fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync_open(fd)
    except OSError as error:
        return error
    finally:
        os.close(fd)
    return None


def sync_open(fd: int) -> None:
    """The same, given a descriptor of anything in the mount (syncfs(2)); raises OSError instead."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syncfs(fd):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def explained(mount: Callable[[], None]) -> None:
    """Call what mounts; what it prints about its failure becomes the error.

    Raises:
        OpenError: it failed.
    """
    said, stderr = os.memfd_create("stderr"), os.dup(2)
    os.dup2(said, 2)
    try:
        mount()
    except RuntimeError as error:
        lines = os.pread(said, 4096, 0).decode("utf-8", "replace").splitlines()
        reasons = [line.split(": ", 1)[-1] for line in lines if line.strip()]
        raise OpenError(f"mounting failed: {'; '.join(reasons) or error}") from None
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(said)
