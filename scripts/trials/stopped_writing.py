"""Writing to a volume is stopped at any of its writes: fsck repairs what is left, and what was synced is there.

The sharper brother of killed-mount, without processes and mounts: each round is one story, and some of its writes.
"""

from __future__ import annotations

from tests.fusemount import test_ext_crash, test_fat_crash
from tests.fusemount.crash_story import check_stop, stops, tell, written
from tests.fusemount.ext_images import mkfs
from trials.rounds import Round

_EXT = test_ext_crash.MIXES
_FAT = {f"fat{shape.bits}": shape for shape in test_fat_crash.SHAPES}

KINDS = (*_EXT, *_FAT)
ROUNDS = 20 * len(KINDS)
_STOPS = 40


def play(this: Round) -> None:
    """Tell a story, and stop it here and there."""
    if this.kind in _FAT:
        kind, repaired = "vfat", test_fat_crash.repaired
        empty = _FAT[this.kind].make(this.folder).read_bytes()
    else:
        kind, repaired = "ext4", test_ext_crash.repaired
        empty = mkfs(this.folder / "empty", "4M", *_EXT[this.kind], "-N", "512").read_bytes()
    steps, beginning = this.chosen.choice((20, 60, 150)), this.chosen.choice((6, 40))
    story = tell(kind, empty, this.chosen, steps=steps, beginning=beginning)
    places = stops(story)
    for end in this.chosen.sample(places, min(_STOPS, len(places))):
        (this.folder / "stop").write_text(f"after {end} writes\n")
        check_stop(story, end, kind, repaired(this.folder / "crashed", bytes(written(story, empty, end))))
        this.count("stops")
