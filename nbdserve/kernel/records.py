"""Which devices are ours: one file for each in /run/nbdserve, and a lock beside it.

Invariant: a record is written and removed only under the device's lock, and a record of a device that is not connected
means nothing: whoever finds one may remove it. /run is empty after a boot, as the devices are.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from nbdserve.kernel.system import KernelError

_DIRECTORY = Path("/run/nbdserve")


@dataclass(frozen=True, slots=True)
class Process:
    """A process, which a later one with the same number is not mistaken for.

    Attributes:
        started: clock ticks after the boot (proc_pid_stat(5), field 22).
    """

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process with this number, unless it is dead."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else cls(pid, int(fields[19]))

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return Process.of(self.pid) == self

    def stop(self, seconds: float) -> bool:
        """Ask it to end (SIGTERM), and wait; whether it has."""
        try:
            fd = os.pidfd_open(self.pid)
        except OSError:
            return True
        try:
            if not self.is_alive:
                return True
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGTERM)
            return bool(select.select([fd], [], [], seconds)[0])
        finally:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class Record:
    """One of our devices.

    Attributes:
        image: as the user named it, but absolute.
        backend: "native" or "qemu".
        server: the process that serves it.
        command: what started that process.
        log: the file that the server writes to, and how much of it had been shown to the user when it was ready.
    """

    device: str
    image: str
    backend: str
    server: Process
    command: tuple[str, ...]
    connections: int
    seconds: int
    log: str = ""
    log_shown: int = 0

    @property
    def complaints(self) -> list[str]:
        """What the server has said since it was ready."""
        try:
            return Path(self.log).read_text(errors="replace")[self.log_shown :].splitlines() if self.log else []
        except OSError:
            return []


class Records:
    """The directory of records."""

    def __init__(self, directory: Path = _DIRECTORY) -> None:
        self._directory = directory

    def new_file(self, suffix: str) -> Path:
        """A path in the directory that nothing has."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self._directory / f"{secrets.token_hex(6)}.{suffix}"

    @contextmanager
    def lock(self, device: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold a device against others of us; yields whether we do, which is sure if we wait."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self._directory / f"{device}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(fd)

    def get(self, device: str) -> Record | None:
        """What is known of a device."""
        path = self._directory / f"{device}.json"
        try:
            found = json.loads(path.read_text())
            return Record(
                **{**found, "server": Process(**found["server"]), "command": tuple(found["command"])},
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise KernelError(f"{path}: damaged ({error}); remove it") from None

    def put(self, record: Record) -> None:
        """Write what is known of a device; under its lock."""
        draft = self.new_file("draft")
        draft.write_text(json.dumps(asdict(record)))
        draft.rename(self._directory / f"{record.device}.json")

    def remove(self, record: Record) -> None:
        """Forget a device, and the files of its server; under its lock."""
        if record.log:
            Path(record.log).unlink(missing_ok=True)
            Path(record.log).with_suffix(".sock").unlink(missing_ok=True)
        (self._directory / f"{record.device}.json").unlink(missing_ok=True)
