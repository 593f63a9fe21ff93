"""What tests of mounts share: a directory that every user can use, and a mount point in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fusemount.disks import give
from tests.fusemount.mounted import open_folder


@pytest.fixture
def folder() -> Iterator[Path]:
    with open_folder() as path:
        yield path


@pytest.fixture
def mnt(folder: Path) -> Path:
    path = folder / "mnt"
    path.mkdir()
    give(path)
    return path
