"""squashfs: equal to what the kernel shows of what mksquashfs has packed."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fusemount.filesystems import squashfs
from nbdserve.block import MemoryDevice
from nbdserve.errors import FormatError, OpenError, Unsupported
from tests.fusemount.trees import Tree, device_of, host_tree_of, tree_of

pytestmark = pytest.mark.needs("mksquashfs", "mount")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that fill blocks, fragments, and neither."""
    root = tmp_path_factory.mktemp("source")
    numbers = b"".join(b"%d\n" % number for number in range(70_000))
    for length in (0, 1, 4095, 131_072, 131_073, 400_000):
        (root / f"{length} numbers").write_bytes(numbers[:length])
    (root / "noise").write_bytes(os.urandom(300_000))
    with (root / "sparse").open("wb") as file:
        file.truncate(5_000_000)
        os.pwrite(file.fileno(), numbers, 2_000_000)
    (root / "many").mkdir()
    for number in range(600):
        (root / "many" / f"file number {number} with a long name").write_bytes(b"%d" % number)
    os.link(root / "noise", root / "many/hard link")
    for name in ("naïve 目录 😀", "n" * 255):
        (root / name).mkdir()
    os.symlink("../" * 100 + "target", root / "many/link")
    os.mkfifo(root / "fifo")
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "disk", stat.S_IFBLK | 0o660, os.makedev(259, 70_000))
    os.mknod(root / "socket", stat.S_IFSOCK | 0o600)
    os.chown(root / "noise", 1000, 70_000)
    os.chmod(root / "noise", 0o4751)
    os.utime(root / "sparse", (1, 1_234_567_890))
    return root


def pack(source: Path, image: Path, *options: str) -> Path:
    command = ["mksquashfs", source, image, "-quiet", "-no-progress", "-processors", "1", *options]
    subprocess.run(command, check=True, capture_output=True)
    return image


@contextmanager
def loop_mounted(image: Path, mountpoint: Path) -> Iterator[Path]:
    mountpoint.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "squashfs", "-o", "loop,ro", image, mountpoint], check=True, capture_output=True)
    try:
        yield mountpoint
    finally:
        subprocess.run(["umount", mountpoint], check=True)


def read(image: Path) -> Tree:
    with device_of(image) as device:
        condition = squashfs.examine(device)
        assert condition.readable and not condition.writable
        return tree_of(squashfs.open_filesystem(device, writable=False))


def as_packed(tree: Tree) -> Tree:
    """What an image keeps of a tree: whole seconds, nothing of the host's directories."""
    return {
        path: replace(
            facts,
            mtime_ns=facts.mtime_ns // 10**9,
            size=0 if stat.S_ISDIR(facts.mode) else facts.size,
            links=0 if stat.S_ISDIR(facts.mode) else facts.links,
        )
        for path, facts in tree.items()
    }


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("-comp", "xz", "-b", "64K"),
        ("-comp", "zstd", "-b", "1M", "-always-use-fragments"),
        ("-noI", "-noD", "-noF", "-noX", "-noId"),
        ("-no-fragments", "-b", "4K"),
    ],
    ids=" ".join,
)
def test_shows_what_the_kernel_shows(tmp_path: Path, source: Path, options: tuple[str, ...]) -> None:
    image = pack(source, tmp_path / "image", *options)
    ours = read(image)
    with loop_mounted(image, tmp_path / "mnt") as root:
        assert ours == host_tree_of(root)


@pytest.mark.parametrize("compressor", ["lz4", "lzma"])
def test_compressors_that_this_kernel_may_not_have(tmp_path: Path, source: Path, compressor: str) -> None:
    image = pack(source, tmp_path / "image", "-comp", compressor)
    assert as_packed(read(image)) == as_packed(host_tree_of(source))


def test_extended_attributes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "directory").mkdir(parents=True)
    values = {}
    for number in range(40):
        path = source / f"file {number}"
        path.touch()
        # Equal values are stored once, and referred to from elsewhere.
        values[path.name.encode()] = ((f"user.{number}", b"%d" % number), ("user.shared", b"s" * 300))
        for name, value in values[path.name.encode()]:
            os.setxattr(path, name, value)
    os.setxattr(source / "directory", "user.of a directory", bytes(range(256)))
    tree = read(pack(source, tmp_path / "image"))
    assert tree.pop(b"directory").xattrs == (("user.of a directory", bytes(range(256))),)
    assert {path: facts.xattrs for path, facts in tree.items()} == {
        path: tuple(sorted(pairs)) for path, pairs in values.items()
    }


def test_what_is_refused(tmp_path: Path, source: Path) -> None:
    content = bytearray(pack(source / "many", tmp_path / "image").read_bytes())
    with pytest.raises(OpenError, match="only read"):
        squashfs.open_filesystem(MemoryDevice(content), writable=True)
    with pytest.raises(FormatError, match="cut off"):
        squashfs.open_filesystem(MemoryDevice(content[: len(content) // 2]), writable=False)
    content[20] = 3
    assert not squashfs.examine(MemoryDevice(content)).readable
    with pytest.raises(Unsupported, match="LZO"):
        squashfs.open_filesystem(MemoryDevice(content), writable=False)
    content[28] = 3
    with pytest.raises(Unsupported, match="version"):
        squashfs.open_filesystem(MemoryDevice(content), writable=False)
    assert "superblock" in squashfs.examine(MemoryDevice(bytearray(4096))).remark
