"""NTFS images made by the real tools, and what those tools say about one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def run(*command: str | Path) -> str:
    """Run a program; what it said is in the error when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def make_ntfs(path: Path, size: int, *options: str) -> Path:
    """A new volume."""
    path.touch()
    os.truncate(path, size)
    run("mkfs.ntfs", "-F", "-Q", "-q", *options, path)
    return path


@contextmanager
def mounted(image: Path, mountpoint: Path, *options: str) -> Iterator[Path]:
    """The volume as ntfs-3g shows it."""
    mountpoint.mkdir(exist_ok=True)
    run("ntfs-3g", *options, image, mountpoint)
    try:
        yield mountpoint
    finally:
        run("umount", mountpoint)


def judge(image: Path) -> None:
    """Assert that the volume is sound: for ntfsfix, and for ntfsresize, which looks at every record and cluster."""
    assert "processed successfully" in run("ntfsfix", "--no-action", image)
    run("ntfsresize", "--info", "--force", "--no-progress-bar", image)
