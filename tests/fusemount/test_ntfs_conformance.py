"""NTFS keeps the contract of a file system, and what it writes is sound for the tools of ntfs-3g."""

from __future__ import annotations

import itertools
import stat
from pathlib import Path

import pytest

from fusemount.filesystems import ntfs
from nbdserve.block import BlockDevice
from nbdserve.formats.raw import RawImage
from tests.fusemount.conformance import Traits, check_filesystem
from tests.fusemount.ntfs_images import judge, make_ntfs
from tests.fusemount.trees import device_of


def shown_mode(mode: int) -> int:
    """NTFS knows no permissions, only whether a file may be written to."""
    kind = stat.S_IFMT(mode)
    if kind == stat.S_IFLNK:
        return kind | 0o777
    return kind | (0o555 if kind == stat.S_IFREG and not mode & 0o200 else 0o755)


TRAITS = Traits(
    owners=False, mtime_granularity_ns=100, atime_granularity_ns=100, text_targets=True, shown_mode=shown_mode
)


@pytest.mark.needs("mkfs.ntfs", "ntfsfix", "ntfsresize")
@pytest.mark.parametrize("cluster", ["512", "4096", "65536"])
def test_conformance(tmp_path: Path, cluster: str) -> None:
    numbers = itertools.count()
    blank = make_ntfs(tmp_path / "blank", 40 << 20, "-c", cluster)

    def make() -> BlockDevice:
        image = tmp_path / f"image{next(numbers)}"
        image.write_bytes(blank.read_bytes())
        return device_of(image, writable=True)

    def judge_device(device: BlockDevice) -> None:
        assert isinstance(device, RawImage)
        judge(Path(device.file.name))

    check_filesystem(make, ntfs.open_filesystem, judge_device, traits=TRAITS, examples=5, steps=40)
