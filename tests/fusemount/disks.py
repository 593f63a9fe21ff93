"""Disks to mount, made by the tools that know their contents, and given to the ordinary user who mounts them."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

from tests.fusemount.mounted import NOBODY, run
from tests.reference import needs

MIB = 1 << 20


def give(*paths: Path) -> None:
    """To the ordinary user who mounts."""
    if os.geteuid() == 0:
        for path in paths:
            os.chown(path, NOBODY, NOBODY)


def tool(*command: str | Path) -> str:
    result = run(command)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def tree(folder: Path) -> Path:
    """Some files and directories, the same every time."""
    source = folder / "tree"
    (source / "etc/deep/deeper").mkdir(parents=True)
    (source / "etc/hostname").write_text("guest\n")
    (source / "etc/deep/deeper/data").write_bytes(bytes(range(256)) * 2000)
    (source / "etc/link").symlink_to("/etc/hostname")
    (source / "empty").mkdir()
    (source / "bin").mkdir()
    return source


def make_ext4(path: Path, size: int = 32 * MIB, source: Path | None = None, *options: str) -> Path:
    path.touch()
    os.truncate(path, size)
    tool("mkfs.ext4", "-q", *(["-d", str(source)] if source else []), *options, path)
    give(path)
    return path


def make_disk(path: Path, script: str, parts: dict[int, Path], size: int = 128 * MIB) -> Path:
    """A disk with the partition table that sfdisk makes of a script, and parts copied to offsets in MiB."""
    path.touch()
    os.truncate(path, size)
    subprocess.run(["sfdisk", "-q", path], input=script, text=True, check=True, timeout=60, capture_output=True)
    for offset, part in parts.items():
        tool("dd", f"if={part}", f"of={path}", "bs=1M", f"seek={offset}", "conv=notrunc,sparse", "status=none")
    give(path)
    return path


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


ext = needs("mkfs.ext4", "e2fsck", "debugfs")
two = needs("mkfs.ext4", "e2fsck", "mkfs.vfat", "sfdisk")
