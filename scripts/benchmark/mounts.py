"""The third kind of cases: images that are mounted, by fusemount and by what else does that without the kernel's help.

Every program mounts a tree of files read-only, is measured in all that reading is, and unmounts; then a fresh copy of
the image to be written; then the raw image as one file. So it goes on in turns, round after round. Programs run in the
foreground, and what is timed is what a user's command takes; "unmounted" means that the program has ended, with all
that was written in the image.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmark.cases import Sample
from benchmark.images import MIB
from benchmark.report import Row

OURS = "fusemount"
PEERS = ("fuse2fs", "guestmount", "qemu-storage-daemon", "nbdfuse")

_LARGE = 100 * MIB
_CREATED = 1000
_MOUNT_SECONDS = 300.0
_SMALL_FILES = (100, 1000, 2000, 5000, 9000)  # bytes, in turn

Command = Callable[[Path, Path, bool], list[str | Path]]
"""The words that mount an image (at a directory, to be written or not) and stay until it is unmounted."""


@dataclass(frozen=True)
class Mounter:
    """A program that mounts.

    Attributes:
        raw: whether it shows the image as one file, not the files in it.
        file: with `raw`, the name of that file below the mount point; "" if it is the mount point itself.
    """

    name: str
    command: Command
    raw: bool = False
    file: str = ""


@dataclass(frozen=True)
class MountCase:
    """One row of the table; seconds all through.

    Attributes:
        measure: takes the mount point (with `raw`, the file); None for what is known from mounting and unmounting.
    """

    name: str
    measure: Callable[[Path], None] | None = None
    raw: bool = False
    writable: bool = False
    unit: str = "s"
    less_is_better: bool = True


def all_cases(files: int) -> list[MountCase]:
    """Every row, for a tree of so many files."""
    return [
        MountCase("mount to first listing"),
        MountCase(f"mounted: walk of {files:,} files", _walk),
        MountCase(f"mounted: tar of {files:,} files", _tar),
        MountCase("mounted: 100 MiB read", lambda mount: _read(mount / "large")),
        MountCase("mounted: 100 MiB write, fsync", _write, writable=True),
        MountCase("mounted: 1,000 creates", _create, writable=True),
        MountCase("unmount after writing", writable=True),
        MountCase("image as a file: 100 MiB read", _read, raw=True),
    ]


def _walk(mount: Path) -> None:
    _run("find", mount, "-ls")


def _tar(mount: Path) -> None:
    _run(
        "sh", "-c", 'tar c -C "$1" --exclude=large . | cat > /dev/null', "sh", mount
    )  # GNU tar skips a plain /dev/null


def _read(path: Path) -> None:
    _run("dd", f"if={path}", "of=/dev/null", "bs=1M", "count=100", "status=none")


def _write(mount: Path) -> None:
    _run("dd", "if=/dev/zero", f"of={mount / 'written'}", "bs=1M", "count=100", "conv=fsync", "status=none")


def _create(mount: Path) -> None:
    folder = mount / "new"
    folder.mkdir()
    for number in range(_CREATED):
        file = os.open(folder / f"file-{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.write(file, b"x" * 1000)
        os.close(file)


def measured(cases: Sequence[MountCase], peers: Sequence[str], folder: Path, files: int, rounds: int) -> Iterator[Row]:
    """The rows, each as soon as all of its samples are there."""
    rows = [Row(case, ours=OURS) for case in cases]
    mounters = [each for each in _mounters() if each.name == OURS or (each.name in peers and shutil.which(each.name))]
    if not rows:
        return
    image = _tree(folder, files)
    for raw, writable in ((False, False), (False, True), (True, False)):
        chosen = [row for row in rows if (row.case.raw, row.case.writable) == (raw, writable)]
        if not chosen:
            continue
        for _ in range(rounds):
            for mounter in mounters:
                if mounter.raw == raw:
                    _measure(mounter, chosen, image, folder, writable)
        yield from chosen


def _measure(mounter: Mounter, rows: Sequence[Row], image: Path, folder: Path, writable: bool) -> None:
    """One mount, with one sample for each of the rows."""
    if writable:
        copy = folder / "copy"
        shutil.copyfile(image, copy)
        image = copy
    image.read_bytes()  # everything is measured from the page cache
    seconds: dict[str, float] = {}
    with _mounted(mounter, image, folder, writable, seconds) as path:
        for row in rows:
            if row.case.measure is not None:
                started = time.perf_counter()
                row.case.measure(path)
                seconds[row.case.name] = time.perf_counter() - started
    for row in rows:
        row.samples.setdefault(mounter.name, []).append(Sample(seconds[row.case.name]))


@contextmanager
def _mounted(mounter: Mounter, image: Path, folder: Path, writable: bool, seconds: dict[str, float]) -> Iterator[Path]:
    """A mount, or the raw file in it; tells how long mounting and unmounting took under the names of those cases."""
    mountpoint = folder / "mnt"
    shutil.rmtree(mountpoint, ignore_errors=True)
    mountpoint.mkdir()
    if mounter.raw and not mounter.file:
        mountpoint = mountpoint / "file"
        mountpoint.touch()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"LIBGUESTFS_BACKEND": "direct", "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"}
    command = mounter.command(image, mountpoint, writable)
    before = os.stat(mountpoint).st_dev
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment) as process:
        try:
            while os.stat(mountpoint).st_dev == before:
                if process.poll() is not None or time.perf_counter() > started + _MOUNT_SECONDS:
                    process.kill()
                    said = process.stderr.read().decode().strip() if process.stderr else ""
                    raise SystemExit(f"{mounter.name} does not mount: {said}")
                time.sleep(0.001)
            if mountpoint.is_dir():
                os.listdir(mountpoint)
            seconds["mount to first listing"] = time.perf_counter() - started
            yield mountpoint / mounter.file
        finally:
            started = time.perf_counter()
            _run("fusermount3", "-u", mountpoint)
            if mounter.name == "qemu-storage-daemon":  # goes on with its other exports, of which there are none
                process.terminate()
            process.wait(_MOUNT_SECONDS)
            seconds["unmount after writing"] = time.perf_counter() - started


def _mounters() -> list[Mounter]:
    return [
        Mounter(OURS, lambda image, at, rw: _fusemount(image, at, *(["--rw"] if rw else []))),
        Mounter("fuse2fs", lambda image, at, rw: _fuse2fs(image, at, "" if rw else ",ro")),
        Mounter("guestmount", _guestmount),
        Mounter(OURS, lambda image, at, _: _fusemount(image, at, "--raw"), raw=True, file="disk"),
        Mounter("qemu-storage-daemon", _storage_daemon, raw=True),
        Mounter("nbdfuse", _nbdfuse, raw=True, file="disk"),
    ]


def _fusemount(image: Path, mountpoint: Path, *options: str) -> list[str | Path]:
    command = [sys.executable, "-m", "fusemount", "-f", "--format", "raw", "--as-root-of-guest"]
    return [*command, *options, image, mountpoint]


def _fuse2fs(image: Path, mountpoint: Path, options: str) -> list[str | Path]:
    return ["fuse2fs", "-f", "-o", f"fakeroot{options}", image, mountpoint]


def _guestmount(image: Path, mountpoint: Path, writable: bool) -> list[str | Path]:
    mode = "--rw" if writable else "--ro"
    return ["guestmount", "--no-fork", "--format=raw", "-a", image, "-m", "/dev/sda", mode, mountpoint]


def _storage_daemon(image: Path, mountpoint: Path, _: bool) -> list[str | Path]:
    return [
        *("qemu-storage-daemon", "--blockdev", f"file,node-name=disk,filename={image},read-only=on"),
        *("--export", f"fuse,id=export,node-name=disk,mountpoint={mountpoint},writable=off"),
    ]


def _nbdfuse(image: Path, mountpoint: Path, _: bool) -> list[str | Path]:
    return ["nbdfuse", "-r", mountpoint / "disk", "[", "nbdkit", "-r", "file", image, "]"]


def _tree(folder: Path, files: int) -> Path:
    """An ext4 image with so many small files, in directories of 50, and a large one; with room for what is written."""
    source, image = folder / "tree", folder / "tree.ext4"
    chance = random.Random(3)
    content = chance.randbytes(MIB)
    for number in range(files):
        directory = source / f"{number // 1000:03}" / f"{number // 50 % 20:02}"
        if number % 50 == 0:
            directory.mkdir(parents=True)
        start = chance.randrange(MIB // 2)
        length = _SMALL_FILES[number % len(_SMALL_FILES)]
        (directory / f"file-{number:06}.txt").write_bytes(content[start : start + length])
    with (source / "large").open("wb") as file:
        for _ in range(_LARGE // MIB):
            file.write(chance.randbytes(MIB))
    inodes = files + files // 50 + 2 * _CREATED + 1000
    size = 4 * _LARGE + files * 8192 + inodes * 256
    _run("mkfs.ext4", "-q", "-N", str(inodes), "-d", source, image, str(size // 1024 + 32 * 1024))
    shutil.rmtree(source)
    return image


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
