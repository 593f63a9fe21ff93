"""A tree of 100,000 files and one of 3 GiB with holes is read right through a mount, in bounded memory."""

from __future__ import annotations

from tests.fusemount.big_tree import check_mount, make_image, make_tree
from tests.fusemount.mounted import tear_down
from trials.rounds import Round

KINDS = ("small", "large")
ROUNDS = len(KINDS)
SECONDS = 7200.0
_SIZES = {"small": (5000, 100 << 20, 512 << 20), "large": (100_000, 3 << 30, 4 << 30)}


def play(this: Round) -> None:
    """Make, mount, compare."""
    count, large, size = _SIZES[this.kind]
    source, image, mountpoint = this.folder / "source", this.folder / "image.qcow2", this.folder / "mnt"
    make_tree(source, this.chosen, count, large)
    make_image(image, source, size)
    try:
        used = check_mount(image, mountpoint, source)
    finally:
        tear_down(mountpoint)
    this.count("files", count)
    this.count(f"MiB of memory, {this.kind}", used >> 20)
