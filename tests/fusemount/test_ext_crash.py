"""Kill what writes an ext file system anywhere: e2fsck must be able to repair it, and what was synced must be there."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from tests.fusemount.crash_story import check_stop, stops, tell, written
from tests.fusemount.ext_images import mkfs
from tests.reference import needs

pytestmark = needs("mkfs.ext4", "e2fsck")
MIXES = {
    "ext2": ("-t", "ext2", "-b", "1024"),
    "ext4": ("-b", "1024", "-J", "size=1"),
    "ext4-4k-blocks": ("-b", "4096", "-O", "^has_journal"),
    "ext4-inline": ("-b", "1024", "-O", "^metadata_csum,inline_data", "-J", "size=1"),
}
STOPS = 25


def repaired(image: Path, content: bytes) -> bytes:
    """A volume after e2fsck has repaired it."""
    image.write_bytes(content)
    for options, good in (("-fy", (0, 1)), ("-fn", (0,))):
        result = subprocess.run(["e2fsck", options, image], capture_output=True, text=True)
        assert result.returncode in good, result.stdout + result.stderr
    return image.read_bytes()


@pytest.mark.parametrize("mix", MIXES)
def test_killed_anywhere(tmp_path: Path, mix: str) -> None:
    empty = mkfs(tmp_path / "empty", "4M", *MIXES[mix], "-N", "512").read_bytes()
    story = tell("ext4", empty, random.Random(mix), steps=60, beginning=15)
    for end in story.chosen.sample(stops(story), STOPS):
        check_stop(story, end, "ext4", repaired(tmp_path / "crashed", written(story, empty, end)))
