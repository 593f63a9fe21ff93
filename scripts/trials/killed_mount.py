"""A mount's process is killed in the middle of writing: fsck repairs what is left, nothing that was fsynced is lost.

Files in a qcow2 image are made, changed, moved and fsynced until kill -9 hits, at a moment chosen by chance. Then the
image has to be sound for qemu-img, the file system is repaired by the tool made for it (through `fusemount --raw`), is
mounted again, and has to hold what was acknowledged.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.fusemount.mounted import COMMAND, environment, is_mounted, mounted, tear_down
from tests.reference import run
from trials.acknowledged import Story
from trials.rounds import Round


@dataclass(frozen=True)
class Kind:
    """A kind of file system: how it is made, repaired and judged; each command gets the path at its end.

    Attributes:
        repaired: the statuses with which the repair has gone well.
        repairs: how often it has to be run: of a directory in two places fsck.vfat first empties one, then removes it,
            then its long name.
    """

    make: tuple[str, ...]
    repair: tuple[str, ...]
    judge: tuple[str, ...]
    repaired: tuple[int, ...] = (0, 1)
    repairs: int = 1
    options: tuple[str, ...] = ()


_EXT = ("e2fsck", "-fy"), ("e2fsck", "-fn")
_FAT = ("fsck.vfat", "-a"), ("fsck.vfat", "-n")
_ROOT = ("--as-root-of-guest",)

_KINDS = {
    "ext4": Kind(("mkfs.ext4", "-q", "-F"), *_EXT, options=_ROOT),
    "ext4-1k-blocks": Kind(("mkfs.ext4", "-q", "-F", "-b", "1024"), *_EXT, options=_ROOT),
    "ext4-without-journal": Kind(("mkfs.ext4", "-q", "-F", "-O", "^has_journal"), *_EXT, options=_ROOT),
    "ext2": Kind(("mkfs.ext2", "-q", "-F"), *_EXT, options=_ROOT),
    "fat16": Kind(("mkfs.fat", "-F", "16"), *_FAT, repairs=3),
    "fat32": Kind(("mkfs.fat", "-F", "32", "-s", "1"), *_FAT, repairs=3),
    "ntfs": Kind(("mkfs.ntfs", "-F", "-Q", "-q"), ("ntfsfix", "-d"), ("ntfsresize", "-i", "-f", "-P")),
}

KINDS = tuple(_KINDS)
ROUNDS = 50 * len(KINDS)
SIZE = "80M"
_LONGEST_LIFE = 2.5  # seconds of writing


def play(this: Round) -> None:
    """One kill, and all that follows from it."""
    kind = _KINDS[this.kind]
    image, mountpoint = this.folder / "image.qcow2", this.folder / "mnt"
    mountpoint.mkdir()
    make_image(image, kind)
    story = Story(mountpoint, this.chosen)
    try:
        write_until_killed(image, mountpoint, story, kind, this.chosen.uniform(0.05, _LONGEST_LIFE))
        this.count("operations", story.count)
        this.count("fsyncs", story.syncs)
        check_image(image)
        repair(image, mountpoint, kind)
        with mounted(image, mountpoint, "--rw", *kind.options):
            story.check()
            (mountpoint / "written afterwards").write_bytes(b"afterwards")
        check_image(image)
        with mounted(image, mountpoint, "--raw"):
            judged = fsck(kind.judge, mountpoint)
            assert judged.returncode == 0, judged.stdout
    finally:
        (this.folder / "story").write_text("\n".join(story.told))
        tear_down(mountpoint)


def make_image(image: Path, kind: Kind) -> None:
    """An empty file system in a qcow2 image."""
    raw = image.with_suffix(".raw")
    run("truncate", "-s", SIZE, raw)
    run(*kind.make, raw)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image)
    raw.unlink()


def write_until_killed(image: Path, mountpoint: Path, story: Story, kind: Kind, seconds: float) -> None:
    """Mount, and let the story go on until the process behind the mount has been killed."""
    command = [*COMMAND, "--foreground", "--rw", *kind.options, str(image), str(mountpoint)]
    with subprocess.Popen(command, env=environment(), stderr=sys.stderr) as process:
        try:
            while not is_mounted(mountpoint):
                assert process.poll() is None, "the mount has ended by itself"
                time.sleep(0.05)
            death = threading.Timer(seconds, process.kill)
            death.start()
            with suppress(ConnectionError, OSError):
                story.go_on()
            death.join()
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL, process.returncode
    run("fusermount3", "-u", "-z", mountpoint)


def check_image(image: Path) -> None:
    """Clusters that nothing refers to (status 3) are all that a crash may leave in a qcow2 image."""
    checked = subprocess.run(["qemu-img", "check", image], capture_output=True, text=True)
    assert checked.returncode in (0, 3), checked.stdout + checked.stderr


def repair(image: Path, mountpoint: Path, kind: Kind) -> None:
    """As a user does it: with the file system as a file, in a mount of its own."""
    with mounted(image, mountpoint, "--raw", "--rw"):
        for _ in range(kind.repairs):
            result = fsck(kind.repair, mountpoint)
            assert result.returncode in kind.repaired, result.stdout
        result = fsck(kind.judge, mountpoint)
        assert result.returncode == 0, result.stdout


def fsck(command: Sequence[str], mountpoint: Path) -> subprocess.CompletedProcess[str]:
    """Run a tool on the disk of a raw mount; its stdout has all that it says."""
    disk = os.path.join(mountpoint, "disk")
    return subprocess.run(
        [*command, disk], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
