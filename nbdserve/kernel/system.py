"""What the kernel tells in /sys and /proc about its NBD devices (Documentation/ABI, drivers/block/nbd.c)."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nbdserve.errors import NbdserveError

_SECTOR = 512  # bytes; what sysfs counts in, whatever the device has
_DEVICE_NAME = re.compile(r"nbd\d+")


class KernelError(NbdserveError):
    """Something with the kernel's devices went wrong."""


class Unavailable(KernelError):
    """The kernel's devices cannot be used here at all."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; 'fusemount IMAGE DIR' needs none of this")


@dataclass(frozen=True, slots=True)
class Module:
    """The parameters with which the nbd module was loaded."""

    max_part: int


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition that the kernel has found; offset and size in bytes."""

    name: str
    number: int
    offset: int
    size: int

    @property
    def path(self) -> str:
        """Its device node."""
        return f"/dev/{self.name}"


@dataclass(frozen=True, slots=True)
class Device:
    """One /dev/nbdN.

    Attributes:
        size: bytes; 0 while it is not connected.
        pid: the process that has connected it, which need not live any more; None: it is not connected.
        backend: what that process said of its server, if the kernel keeps that (from 5.14 on).
    """

    name: str
    size: int
    pid: int | None
    read_only: bool
    backend: str
    partitions: tuple[Partition, ...]

    @property
    def path(self) -> str:
        """Its device node."""
        return f"/dev/{self.name}"

    @property
    def index(self) -> int:
        """The N of nbdN."""
        return int(self.name.removeprefix("nbd"))

    @property
    def is_connected(self) -> bool:
        """Whether something has connected it, be it alive or not."""
        return self.pid is not None


@dataclass(frozen=True, slots=True)
class Mount:
    """A file system of a device or a partition, and where it is mounted."""

    source: str
    target: str


class System:
    """The host, below a root directory that tests choose."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._block = root / "sys/block"

    def module(self) -> Module | None:
        """The nbd module, or None while it is not loaded."""
        max_part = _read(self._root / "sys/module/nbd/parameters/max_part")
        return None if max_part is None else Module(int(max_part))

    def device(self, name: str) -> Device | None:
        """The device of a name like nbd0, or None if there is none."""
        folder = self._block / name
        size = _read(folder / "size")
        if size is None:
            return None
        pid = _read(folder / "pid")
        partitions = [
            Partition(
                path.parent.name,
                int(_read(path) or 0),
                int(_read(path.parent / "start") or 0) * _SECTOR,
                int(_read(path.parent / "size") or 0) * _SECTOR,
            )
            for path in folder.glob(f"{name}p*/partition")
        ]
        return Device(
            name,
            int(size) * _SECTOR,
            int(pid) if pid else None,
            _read(folder / "ro") == "1",
            _read(folder / "backend") or "",
            tuple(sorted(partitions, key=lambda partition: partition.number)),
        )

    def devices(self) -> list[Device]:
        """All that there are, in the order of their numbers."""
        names = [path.name for path in self._block.glob("nbd*") if _DEVICE_NAME.fullmatch(path.name)]
        found = [self.device(name) for name in names]
        return sorted((device for device in found if device is not None), key=lambda device: device.index)

    def number(self, name: str) -> str:
        """MAJOR:MINOR of a device or partition."""
        folder = self._block / name.partition("p")[0]
        return _read((folder if folder.name == name else folder / name) / "dev") or ""

    def mounts(self, device: Device) -> list[Mount]:
        """Where the device and its partitions are mounted, in the order in which that was done."""
        names = [device.name, *(partition.name for partition in device.partitions)]
        by_number = {self.number(name): f"/dev/{name}" for name in names}
        found = []
        # proc_pid_mountinfo(5): the third field is the device, the fifth the mount point, and behind a dash come the
        # type and the source, which alone names the device where the file system has several (btrfs).
        for line in (self._root / "proc/self/mountinfo").read_text().splitlines():
            fields, _, rest = line.partition(" - ")
            source = _unescaped(rest.split()[1])
            by_name = source if source in by_number.values() else None
            if used := by_number.get(fields.split()[2], by_name):
                found.append(Mount(used, _unescaped(fields.split()[4])))
        return found

    def other_users(self, device: Device) -> list[str]:
        """What else stands on the device or its partitions: LVM, LUKS, RAID, swap."""
        folders = [self._block / device.name, *(self._block / device.name / part.name for part in device.partitions)]
        users = [user.name for folder in folders for user in (folder / "holders").glob("*")]
        paths = [device.path, *(partition.path for partition in device.partitions)]
        swaps = (_read(self._root / "proc/swaps") or "").splitlines()
        return users + ["swap" for line in swaps if line.split()[0] in paths]


def find_program(name: str) -> str | None:
    """The path of a program, looked for in the administrator's directories too."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]))


def run(command: Sequence[str]) -> None:
    """Run a program to its end.

    Raises:
        Unavailable: it is not installed.
        KernelError: it failed; with the command and the last line that it said.
    """
    program = find_program(command[0])
    if program is None:
        raise Unavailable(f"{command[0]} is not installed")
    result = subprocess.run([program, *command[1:]], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode:
        said = (result.stderr or result.stdout).strip().splitlines()
        raise KernelError(f"'{shlex.join(command)}' failed: {said[-1] if said else f'status {result.returncode}'}")


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Look until a condition holds; whether it did in that time."""
    deadline = time.monotonic() + seconds
    pause = 0.005
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    return True


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:  # ENODEV, while the device goes away under us
        return None


def _unescaped(text: str) -> str:
    r"""A name in mountinfo, where blanks and backslashes are written as \040 and the like."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
