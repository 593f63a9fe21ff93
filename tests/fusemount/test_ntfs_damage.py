"""Damaged NTFS volumes: no crash, no hang; what is not damaged can still be read."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from fusemount.filesystems import ntfs
from nbdserve.block import MemoryDevice
from tests.fusemount.mutated import survives
from tests.fusemount.ntfs_images import make_ntfs, mounted
from tests.fusemount.trees import facts_of

pytestmark = pytest.mark.needs("mkfs.ntfs", "ntfs-3g")


def make_image(path: Path) -> Path:
    """A small volume with something of everything, so that most damage hits what matters."""
    make_ntfs(path, 3 << 20, "-c", "512")
    with mounted(path, path.parent / "mnt", "-o", "compression") as root:
        (root / "compressed").mkdir()
        os.setxattr(root / "compressed", "system.ntfs_attrib_be", struct.pack(">I", 0x800))
        (root / "compressed/numbers").write_text("\n".join(map(str, range(5000))))
        (root / "many").mkdir()
        for number in range(60):
            (root / "many" / f"file number {number}").write_text(str(number))
        (root / "plain").write_bytes(os.urandom(9000))
        os.link(root / "plain", root / "many/hard link")
        os.symlink("many/hard link", root / "symlink")
        os.setxattr(root / "plain", "user.stream", b"s" * 2000)
        with (root / "one").open("wb", buffering=0) as one, (root / "two").open("wb", buffering=0) as two:
            for number in range(200):
                os.pwrite(one.fileno(), b"1" * 512, number * 1024)
                os.pwrite(two.fileno(), b"2" * 512, number * 1024)
    return path


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image(tmp_path_factory.mktemp("ntfs") / "image")


@pytest.mark.parametrize(("mode", "seed"), [("read", 1), ("write", 2)])
def test_mutated_images(image: Path, mode: str, seed: int) -> None:
    survives("fusemount.filesystems.ntfs", image, 60, mode=mode, seed=seed)


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
    assert len(list(filesystem.entries(many))) == 61
    with pytest.raises(OSError, match="Input/output error"):
        filesystem.attributes(filesystem.lookup(many, b"file number 7"))
    assert facts_of(filesystem, filesystem.lookup(many, b"file number 8")).size == 1
