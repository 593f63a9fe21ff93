"""A tree of some size, read through a mount; `scripts/trial big-tree` has larger ones."""

from __future__ import annotations

import random
from pathlib import Path

from tests.fusemount.big_tree import check_mount, make_image, make_tree
from tests.fusemount.mounted import needs_fuse
from tests.reference import needs

pytestmark = [needs_fuse, needs("mkfs.ext4", "qemu-img")]


def test_a_tree_of_1200_files_and_a_large_one_with_holes(folder: Path, mnt: Path) -> None:
    make_tree(folder / "source", random.Random(1), 1200, 60 << 20)
    make_image(folder / "image.qcow2", folder / "source", 128 << 20)
    check_mount(folder / "image.qcow2", mnt, folder / "source")
