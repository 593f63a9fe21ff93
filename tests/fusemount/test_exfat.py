"""exFAT: equal to what exfat-fuse shows of volumes that exfat-fuse has filled."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from fusemount.filesystems import exfat
from nbdserve.block import MemoryDevice
from nbdserve.errors import FormatError, OpenError
from tests.fusemount.small_images import exfat_mounted, new_exfat
from tests.fusemount.trees import Tree, device_of, host_tree_of, tree_of, without_owners

pytestmark = [
    pytest.mark.needs("mkfs.exfat", "mount.exfat-fuse", "losetup"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may set up a loop device"),
]


def fill(root: Path) -> None:
    (root / "empty").touch()
    (root / "small").write_text("small")
    (root / "large").write_bytes(os.urandom(2_000_000))
    (root / "deep/er/and/deeper").mkdir(parents=True)
    for name in ("naïve 目录 😀", "n" * 255, "漢" * 255, "two.dots.txt", "Größe"):
        (root / "deep" / name).write_text(name)
    (root / "many").mkdir()
    for number in range(200):
        (root / "many" / f"file number {number}").write_text(str(number))
    for number in range(0, 200, 5):
        (root / "many" / f"file number {number}").unlink()
    with (root / "one").open("wb", buffering=0) as one, (root / "two").open("wb", buffering=0) as two:
        for number in range(60):
            one.write(b"%06d" % number * 3000)
            two.write(b"%05d!" % number * 3000)
    with (root / "gap").open("wb") as file:
        file.truncate(400_000)
    os.utime(root / "small", (1_234_567_890, 1_234_567_890))


def comparable(tree: Tree) -> Tree:
    """Times as exFAT keeps them for both: to two seconds."""
    return {
        path: replace(facts, mtime_ns=facts.mtime_ns // 2_000_000_000) for path, facts in without_owners(tree).items()
    }


@pytest.mark.parametrize("options", [(), ("-c", "512"), ("-c", "32K")], ids=" ".join)
def test_shows_what_exfat_fuse_shows(tmp_path: Path, options: tuple[str, ...]) -> None:
    image = new_exfat(tmp_path / "image", 64 << 20, *options)
    with exfat_mounted(image, tmp_path / "mnt") as root:
        fill(root)
    with device_of(image) as device:
        assert exfat.examine(device).readable and not exfat.examine(device).dirty
        filesystem = exfat.open_filesystem(device, writable=False)
        ours, space = tree_of(filesystem), filesystem.space()
        deep = filesystem.lookup(filesystem.root, b"DEEP")
        assert filesystem.lookup(deep, "gRÖSSE".encode().replace(b"SS", "ß".encode())) == filesystem.lookup(
            deep, "Größe".encode()
        )
        with pytest.raises(FileNotFoundError):
            filesystem.lookup(deep, "Grösse".encode())
    with exfat_mounted(image, tmp_path / "mnt", "-o", "ro") as root:
        assert comparable(ours) == comparable(host_tree_of(root))
        assert os.statvfs(root).f_bfree == space.free_blocks
    assert {stat.S_IMODE(facts.mode) for facts in ours.values()} == {0o755}


def test_a_volume_in_use_is_read_with_a_remark(tmp_path: Path) -> None:
    image = new_exfat(tmp_path / "image", 16 << 20)
    with exfat_mounted(image, tmp_path / "mnt") as root:
        (root / "file").write_text("content")
        os.sync()
        content = bytearray(image.read_bytes())
    condition = exfat.examine(MemoryDevice(content))
    assert condition.readable and condition.dirty and "not cleanly unmounted" in condition.remark


def test_what_is_refused(tmp_path: Path) -> None:
    content = bytearray(new_exfat(tmp_path / "image", 16 << 20).read_bytes())
    with pytest.raises(OpenError, match="only read"):
        exfat.open_filesystem(MemoryDevice(content), writable=True)
    with pytest.raises(FormatError, match="cut off"):
        exfat.open_filesystem(MemoryDevice(content[: 8 << 20]), writable=False)
    content[96:100] = b"\xff\xff\xff\xff"
    condition = exfat.examine(MemoryDevice(content))
    assert not condition.readable and "boot sector is damaged" in condition.remark
    assert "right partition" in exfat.examine(MemoryDevice(bytearray(4096))).remark
