"""Bad input to the command fusemount: one line each, with the way out."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.fusemount.disks import MIB, ext, make_disk, make_ext4, tool, two
from tests.fusemount.mounted import (
    COMMAND,
    REPOSITORY,
    environment,
    fusemount,
    mounted,
    needs_fuse,
    prefix,
    refusal,
)
from tests.reference import needs

pytestmark = needs_fuse


@ext
def test_mount_points_that_cannot_be_used(folder: Path, mnt: Path) -> None:
    image = make_ext4(folder / "disk.raw")
    assert refusal(image, folder / "none", nobody=True) == (
        f"{folder}/none: there is no such directory; make it with 'mkdir -p {folder}/none'"
    )
    assert "is no directory" in refusal(image, image, nobody=True)
    if os.geteuid() == 0:
        (folder / "foreign").mkdir(0o755)
        assert "belongs to somebody else" in refusal(image, folder / "foreign", nobody=True)
    with mounted(image, mnt, nobody=True):
        assert "is busy, something is mounted there" in refusal(image, mnt, nobody=True)
    assert "nothing is mounted here by fusemount" in refusal("--unmount", mnt, nobody=True)


@ext
@needs("cryptsetup", "mkfs.xfs")
def test_images_that_cannot_be_mounted(folder: Path, mnt: Path) -> None:
    assert refusal(folder / "none", mnt, nobody=True) == f"{folder}/none: no such file; check the path"
    noise = folder / "noise"
    noise.write_bytes(b"x" * MIB)
    assert "no known file system; --raw shows it as a file" in refusal(noise, mnt, nobody=True)
    luks = folder / "luks"
    luks.touch()
    os.truncate(luks, 32 * MIB)
    tool(
        "cryptsetup",
        "luksFormat",
        "-q",
        "--type=luks1",
        "--pbkdf-force-iterations=1000",
        "--key-file=/etc/passwd",
        luks,
    )
    assert "encrypted (LUKS)" in refusal("--format=raw", luks, mnt, nobody=True)
    image = make_ext4(folder / "disk.raw")
    assert "no partition table" in refusal("--partition=3", image, mnt, nobody=True)
    assert "not a format known here" in refusal("--format=zip", image, mnt, nobody=True)
    assert "no range of numbers" in refusal("--map-uid=1", image, mnt, nobody=True)
    image.chmod(0o444)
    if os.geteuid() == 0:
        os.chown(image, 0, 0)
    assert "no permission to write" in refusal("--rw", image, mnt, nobody=True)


@two
def test_a_partition_that_is_not_there(folder: Path, mnt: Path) -> None:
    image = make_disk(folder / "disk.raw", "label: dos\nsize=24MiB\n", {})
    assert "no partition '7' on this disk; it has: p1" in refusal("--partition=7", image, mnt, nobody=True)
    assert "p1: no known file system" in refusal("--partition=1", image, mnt, nobody=True)


@pytest.mark.parametrize(
    "options",
    [
        "--raw -i",
        "--snapshot=a --rw",
        "--overlay=a --snapshot=b",
        "-o nonsense",
        "-o unmount=x",
        "--json",
        "--rw --read-only",
        "--rw --force-share",
        "--overlay=a --force-share",
    ],
)
def test_options_that_make_no_sense(folder: Path, mnt: Path, options: str) -> None:
    result = fusemount(*options.split(), folder / "x", mnt)
    assert result.returncode == 2
    assert result.stderr.startswith("usage: ")


@ext
def test_without_fusermount3_or_pyfuse3(folder: Path, mnt: Path) -> None:
    image = make_ext4(folder / "disk.raw")
    empty = folder / "empty"
    empty.mkdir()
    setpriv = shutil.which("setpriv")
    assert setpriv is not None
    command = [setpriv, *prefix(True)[1:], *COMMAND, image, mnt] if os.geteuid() == 0 else [*COMMAND, image, mnt]
    without = environment() | {"PATH": str(empty)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=without)
    assert result.returncode == 1
    assert result.stderr.startswith("fusemount: fusermount3 is not installed")
    (empty / "sitecustomize.py").write_text("import sys; sys.modules['pyfuse3'] = None\n")
    hidden = environment() | {"PYTHONPATH": f"{empty}:{REPOSITORY}"}
    result = subprocess.run([*COMMAND, image, mnt], capture_output=True, text=True, timeout=60, env=hidden)
    assert result.returncode == 1
    assert "pip install 'nbdserve[fuse]'" in result.stderr
    assert len(result.stderr.splitlines()) == 1
