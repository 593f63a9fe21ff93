"""Damaged NTFS volumes: no crash, no hang; what is not damaged can still be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusemount.filesystems import ntfs
from nbdserve.block import MemoryDevice
from tests.fusemount.small_images import make_ntfs
from tests.fusemount.trees import facts_of

pytestmark = pytest.mark.needs("mkfs.ntfs", "ntfs-3g")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ntfs(tmp_path_factory.mktemp("ntfs") / "image")


def test_one_damaged_record_is_one_damaged_file(image: Path) -> None:
    content = bytearray(image.read_bytes())
    name = "file number 7".encode("utf-16-le")
    record = next(
        place
        for place in range(0, len(content), 1024)
        if content[place : place + 4] == b"FILE" and name in content[place : place + 1024]
    )
    content[record + 510] ^= 1  # torn: a sector of it was not written
    filesystem = ntfs.open_filesystem(MemoryDevice(content), writable=False)
    many = filesystem.lookup(filesystem.root, b"many")
    assert len(list(filesystem.entries(many))) == 31
    with pytest.raises(OSError, match="Input/output error"):
        filesystem.attributes(filesystem.lookup(many, b"file number 7"))
    assert facts_of(filesystem, filesystem.lookup(many, b"file number 8")).size == 1
