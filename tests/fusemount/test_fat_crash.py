"""Crash a FAT volume everywhere: fsck.vfat -a must be able to repair it, and what was synced must be there."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fusemount.crash_story import check_claims, check_stop, files_of, stops, tell, written
from tests.fusemount.fat_images import MIB, Shape, fsck
from tests.reference import needs

pytestmark = needs("mkfs.fat", "fsck.vfat")
SHAPES = (Shape(12, 512, 1, MIB), Shape(16, 512, 1, 3 * MIB), Shape(32, 512, 1, MIB))
POWER_LOSSES = 25


def repaired(image: Path, content: bytes) -> bytes:
    """A volume after fsck.vfat has repaired it."""
    image.write_bytes(content)
    for _ in range(3):  # of a directory in two places it first empties one, then removes it, then its long name
        result = fsck(image, "-a")
        assert result.returncode in (0, 1), result.stdout + result.stderr
    result = fsck(image, "-n")
    assert result.returncode == 0, result.stdout + result.stderr
    return image.read_bytes()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_killed_anywhere(tmp_path: Path, shape: Shape) -> None:
    empty = shape.make(tmp_path).read_bytes()
    story = tell("vfat", empty, random.Random(str(shape)))
    for end in stops(story):
        check_stop(story, end, "vfat", repaired(tmp_path / "crashed", written(story, empty, end)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_power_lost_anywhere(tmp_path: Path, shape: Shape) -> None:
    """Any part of what was written since the last flush may be missing."""
    empty = shape.make(tmp_path).read_bytes()
    story = tell("vfat", empty, random.Random(str(shape)))
    log = story.device.log
    for _ in range(POWER_LOSSES):
        moment = story.chosen.choice(story.moments[1:])
        flushed = max(i for i in range(moment.end) if log[i] is None)
        content = bytearray(empty)
        for i in range(moment.end):
            change = log[i]
            if change and (i < flushed or story.chosen.random() < 0.5):
                content[change[0] : change[0] + len(change[1])] = change[1]
        found = files_of("vfat", repaired(tmp_path / "crashed", content))
        check_claims(found, [claim for claim in moment.claims if len(claim.paths) == 1])
