"""fusemount as a user runs it: mounts that always end, whoever fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parent.parent.parent
COMMAND = (sys.executable, "-m", "fusemount")
NOBODY = 65534
AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
SECONDS = 300.0

FAILS = 'fails() { if "$@" 2> /dev/null; then echo "succeeded: $*" >&2; exit 1; fi; }\n'
"""A function for shell scripts: what `!` is not under `sh -e`."""

Argument = str | os.PathLike[str]

needs_fuse = pytest.mark.needs("fusermount3", "setpriv", "module:pyfuse3")


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}


def prefix(nobody: bool) -> tuple[str, ...]:
    """What runs a command as an ordinary user, where we are root ourselves."""
    return AS_NOBODY if nobody and os.geteuid() == 0 else ()


def run(
    command: Sequence[Argument], *, nobody: bool = False, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, as an ordinary user if wanted."""
    return subprocess.run(
        [*prefix(nobody), *command],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=environment(),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
    )


def fusemount(*arguments: Argument, nobody: bool = False) -> subprocess.CompletedProcess[str]:
    """Run fusemount; it never shows a traceback."""
    result = run([*COMMAND, *arguments], nobody=nobody)
    assert "Traceback" not in result.stderr, result.stderr
    return result


def refusal(*arguments: Argument, nobody: bool = False) -> str:
    """The one line with which fusemount refuses, without the program's name."""
    result = fusemount(*arguments, nobody=nobody)
    lines = result.stderr.splitlines()
    assert (result.returncode, result.stdout, len(lines)) == (1, "", 1), (result, lines)
    assert lines[0].startswith("fusemount: ")
    return lines[0].removeprefix("fusemount: ")


def is_mounted(mountpoint: Path) -> bool:
    """Asks the kernel's table: other users cannot look into a mount, nor anybody into a dead one."""
    return any(line.split()[1] == str(mountpoint) for line in Path("/proc/mounts").read_text().splitlines())


def tear_down(mountpoint: Path) -> None:
    """Take away whatever is still mounted there."""
    if is_mounted(mountpoint):
        with suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(["fusermount3", "-u", "-z", mountpoint], timeout=SECONDS, capture_output=True)


@contextmanager
def mounted(
    image: Argument, mountpoint: Path, *options: Argument, nobody: bool = False, said: list[str] | None = None
) -> Iterator[Path]:
    """A mount, ended with --unmount, which has to go well.

    Args:
        said: gets the lines that fusemount said when it mounted; without it there must be none.
    """
    try:
        result = fusemount(*options, image, mountpoint, nobody=nobody)
        assert result.returncode == 0, result.stderr
        if said is not None:
            said += result.stderr.splitlines()
        else:
            assert result.stderr == ""
        yield mountpoint
        ended = fusemount("--unmount", mountpoint, nobody=nobody)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert not is_mounted(mountpoint)
    finally:
        tear_down(mountpoint)


@contextmanager
def open_folder() -> Iterator[Path]:
    """A directory that every user can use; pytest's own are closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="fusemount-test-"))
    try:
        folder.chmod(0o777)
        yield folder
    finally:
        for each in folder.iterdir():
            tear_down(each)
        shutil.rmtree(folder)


def process_behind(mountpoint: Path) -> int:
    """The process behind a mount of the ordinary user."""
    command = ["getfattr", "--only-values", "-n", "user.fusemount.process", mountpoint]
    return int(run(command, nobody=True).stdout.split()[0])


def is_running(process: int) -> bool:
    """Whether it has not ended; a zombie has, and only waits for somebody to notice."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_end(process: int) -> None:
    """Wait until a process that is not our child is gone."""
    deadline = time.monotonic() + SECONDS
    while is_running(process):
        assert time.monotonic() < deadline, f"process {process} does not end"
        time.sleep(0.02)


class CountingMount:
    """A CountingFileSystem, mounted by a process of its own (see counting_mount.py) as an ordinary user.

    Attributes:
        process: it.
        end: what the process knew of the file system in the end, after stop().
    """

    def __init__(self, mountpoint: Path, **options: Any) -> None:
        self.mountpoint = mountpoint
        self._options = json.dumps(options)
        self.end: dict[str, Any] = {}

    def __enter__(self) -> CountingMount:
        self.mountpoint.mkdir(exist_ok=True)
        if os.geteuid() == 0:
            os.chown(self.mountpoint, NOBODY, NOBODY)
        command = [*prefix(True), sys.executable, "-m", "tests.fusemount.counting_mount"]
        self.process = subprocess.Popen(
            [*command, self.mountpoint, self._options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            cwd=REPOSITORY,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == "ready\n", self.process.communicate(timeout=SECONDS)
        return self

    def do(self, program: str, **values: object) -> str:
        """Run Python statements in the mount, as the user who has mounted it; what they print."""
        lines = [f"{name} = {value!r}" for name, value in values.items()]
        source = "\n".join(["import os, stat, errno, mmap", *lines, program])
        result = run([sys.executable, "-c", source], nobody=True)
        return self._checked(result)

    def sh(self, script: str) -> str:
        """Run a shell script in the mount, as the user who has mounted it."""
        return self._checked(run(["sh", "-ec", f"{FAILS}cd {self.mountpoint}\n{script}"], nobody=True))

    def _checked(self, result: subprocess.CompletedProcess[str]) -> str:
        assert result.returncode == 0, result.stderr
        return result.stdout

    def stop(self) -> None:
        """Unmount, and see that the process ends well."""
        assert run(["fusermount3", "-u", self.mountpoint], nobody=True).returncode == 0
        self.wait()

    def wait(self, said: str = "") -> None:
        out, err = self.process.communicate(timeout=SECONDS)
        assert (self.process.returncode, err) == (0, said), (self.process.returncode, err, out)
        self.end = json.loads(out)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self.process.poll() is None:
                self.stop()
        finally:
            tear_down(self.mountpoint)
            self.process.kill()
            self.process.communicate()
