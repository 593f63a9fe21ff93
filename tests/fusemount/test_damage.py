"""Damaged images of every kind of file system do no harm: no crash, no hang, no other error than those of the contract.

`scripts/trial mutated-filesystems` does the same for as long as one likes.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fusemount.mutated import survives
from tests.fusemount.small_images import ORIGINALS
from tests.reference import needs

COUNT = 20

pytestmark = [
    needs("mkfs.ext4", "mkfs.fat", "mkfs.ntfs", "ntfs-3g", "mkfs.exfat", "mount.exfat-fuse", "losetup"),
    needs("genisoimage", "xorriso", "mksquashfs"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount what is to be filled"),
]


@pytest.mark.parametrize("name", ORIGINALS)
def test_mutated_images(tmp_path: Path, name: str) -> None:
    original = ORIGINALS[name]
    image = original.make(tmp_path / "image")
    survives(original.kind, image, COUNT)
    if original.writable:
        survives(original.kind, image, COUNT, mode="write", seed=2)
