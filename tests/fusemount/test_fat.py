"""FAT volumes against mkfs.fat, fsck.vfat and mtools."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusemount.filesystems.fat import open_filesystem
from nbdserve.block import MemoryDevice
from tests.fusemount.conformance import check_filesystem
from tests.fusemount.fat_images import FAT12, FAT16, FAT32, TRAITS, Shape, judge
from tests.reference import needs


@needs("mkfs.fat", "fsck.vfat")
@pytest.mark.parametrize("shape", [FAT12, FAT16, FAT32], ids=str)
def test_conformance(tmp_path: Path, shape: Shape) -> None:
    empty = shape.make(tmp_path).read_bytes()
    check_filesystem(lambda: MemoryDevice(bytearray(empty)), open_filesystem, judge, traits=TRAITS)
