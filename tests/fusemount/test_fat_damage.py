"""Damaged FAT volumes: what is hit fails with EIO, all else goes on, and nothing hangs."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from fusemount.filesystems.base import FileSystem
from fusemount.filesystems.fat import examine, open_filesystem
from nbdserve.block import MemoryDevice
from nbdserve.errors import FormatError, OpenError, Unsupported
from tests.fusemount.fat_images import FAT12, FAT16, FAT32, Shape, fsck
from tests.fusemount.model import pattern
from tests.fusemount.small_images import make_fat
from tests.reference import needs

pytestmark = needs("mkfs.fat", "fsck.vfat")


def filled(shape: Shape, directory: Path) -> bytearray:
    """A volume with some files on it, cleanly unmounted."""
    return bytearray(make_fat(directory / "filled", shape).read_bytes())


# The boot sector


@pytest.mark.parametrize(
    ("offset", "value", "error"),
    [
        (11, b"\0\0", "sectors of 0 bytes"),
        (11, b"\0\x20", "sectors of 8192 bytes"),
        (13, b"\0", "clusters of 0 sectors"),
        (13, b"\x03", "clusters of 3 sectors"),
        (14, b"\0\0", "no allocation table"),
        (16, b"\0", "no allocation table"),
        (21, b"\x12", "no allocation table"),
        (17, b"\x01\0", "does not fill whole sectors"),
        (36, b"\0\0\0\0", "cannot have"),
        (36, b"\xff\xff\xff\x7f", "cannot have"),
        (42, b"\x01\0", "version 0.1"),
        (44, b"\0\0\0\0", "begins in cluster 0"),
        (44, b"\xff\xff\xff\x0f", "begins in cluster"),
        (40, b"\x8f", "table 15"),
        (19, b"\x01\0", "cannot have"),
    ],
)
def test_a_boot_sector_that_cannot_be(tmp_path: Path, offset: int, value: bytes, error: str) -> None:
    content = bytearray(FAT32.make(tmp_path).read_bytes())
    content[offset : offset + len(value)] = value
    with pytest.raises((FormatError, Unsupported), match=error) as caught:
        open_filesystem(MemoryDevice(content), writable=False)
    assert "\n" not in str(caught.value)
    with pytest.raises((FormatError, Unsupported), match=error):
        examine(MemoryDevice(content))


@pytest.mark.parametrize("size", [0, 1, 511, 512, 4096])
def test_devices_that_are_too_small(tmp_path: Path, size: int) -> None:
    content = bytearray(FAT16.make(tmp_path).read_bytes())[:size]
    with pytest.raises(FormatError):
        open_filesystem(MemoryDevice(content), writable=False)


def test_a_truncated_volume_can_be_read_as_far_as_it_goes(tmp_path: Path) -> None:
    content = filled(FAT16, tmp_path)
    last = content.rindex(pattern(2, 3000)[-500:])
    device = MemoryDevice(content[: last - 20_000])
    condition = examine(device)
    assert condition.readable and not condition.writable and "past the end" in condition.remark
    with pytest.raises(OpenError, match="past the end"):
        open_filesystem(device, writable=True)
    fs = open_filesystem(device, writable=False)
    outcomes = {read_all(fs, path) for path in files(fs)}
    assert outcomes == {"right", "EIO"}


def files(fs: FileSystem) -> list[tuple[int, int]]:
    return [(i, j) for i in range(3) for j in range(12)]


def read_all(fs: FileSystem, which: tuple[int, int]) -> str:
    """What becomes of reading a file of filled()."""
    directory = fs.lookup(fs.root, b"directory %d" % which[0])
    inode = fs.lookup(directory, b"a file with a long name %d" % which[1])
    try:
        content = fs.read(inode, 0, 1 << 20)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "right" if content == pattern(which[0], which[1] * 3000) else "wrong"


# The allocation table


@pytest.mark.parametrize("value", ["free", "one", "bad", "too large", "itself", "first"])
@pytest.mark.parametrize("shape", [FAT12, FAT16, FAT32], ids=str)
def test_a_broken_chain_is_an_error_of_that_file_alone(tmp_path: Path, shape: Shape, value: str) -> None:
    device = MemoryDevice(filled(shape, tmp_path))
    fs = open_filesystem(device, writable=True)
    directory = fs.lookup(fs.root, b"directory 1")
    inode = fs.lookup(directory, b"a file with a long name 11")
    table = fs.volume.table
    first = fs.inodes[inode].entry.first
    second = table[first]
    table[second] = {
        "free": 0,
        "one": 1,
        "bad": table.end_of_chain - 8,
        "too large": table.end_of_chain - 9,
        "itself": second,
        "first": first,
    }[value]
    table.flush()
    fs = open_filesystem(device, writable=True)
    assert [read_all(fs, which) for which in files(fs)].count("right") == 35
    assert read_all(fs, (1, 11)) == "EIO"
    directory = fs.lookup(fs.root, b"directory 1")
    inode = fs.lookup(directory, b"a file with a long name 11")
    assert fs.read(inode, 0, 512) == pattern(1, 512)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        fs.write(inode, 33_000, b"x")
    # It can be cut back to what is left, or removed; nobody else loses a cluster.
    fs.truncate(inode, 700)
    assert fs.read(inode, 0, 1000) == pattern(1, 700)
    fs.write(inode, 700, pattern(9, 20_000))
    fs.sync()
    fs.write(fs.create(directory, b"new", stat.S_IFREG | 0o644, 0, 0), 0, pattern(8, 100_000))
    assert fs.read(inode, 700, 20_000) == pattern(9, 20_000)
    assert [read_all(fs, which) for which in files(fs)].count("right") == 35
    fs.close()


def test_a_directory_in_a_circle(tmp_path: Path) -> None:
    device = MemoryDevice(filled(FAT12, tmp_path))
    fs = open_filesystem(device, writable=True)
    directory = fs.lookup(fs.root, b"directory 1")
    first = fs.inodes[directory].entry.first
    fs.volume.begin_change()
    fs.volume.table[first] = first
    fs.volume.table.flush()
    fs = open_filesystem(device, writable=True)
    assert examine(device).dirty
    directory = fs.lookup(fs.root, b"directory 1")
    for act in (
        lambda: list(fs.entries(directory)),
        lambda: fs.lookup(directory, b"below"),
        lambda: fs.create(directory, b"new", stat.S_IFREG | 0o644, 0, 0),
        lambda: fs.remove_directory(fs.root, b"directory 1"),
    ):
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            act()
    assert len(list(fs.entries(fs.root))) == 3
    assert fs.attributes(directory).mode == stat.S_IFDIR | 0o755


def test_what_lies_behind_the_end_of_a_directory_stays_dead(tmp_path: Path) -> None:
    """The first free entry ends a directory, whatever follows; filling it must not bring the rest to life."""
    device = MemoryDevice(bytearray(FAT16.make(tmp_path).read_bytes()))
    fs = open_filesystem(device, writable=True)
    for name in (b"A", b"B", b"C", b"D"):
        fs.create(fs.root, name, stat.S_IFREG | 0o644, 0, 0)
    root = fs.volume.geometry.root_offset
    fs.close()
    device.content[root + 32] = 0
    fs = open_filesystem(device, writable=True)
    assert [entry.name for entry in fs.entries(fs.root)] == [b"A"]
    fs.create(fs.root, b"NEW", stat.S_IFREG | 0o644, 0, 0)
    fs.close()
    fs = open_filesystem(device, writable=False)
    assert [entry.name for entry in fs.entries(fs.root)] == [b"A", b"NEW"]


# Anything at all


def test_fsck_finds_what_a_crash_left_and_no_more(tmp_path: Path) -> None:
    """An unlinked file that was held is clusters without owner; fsck.vfat frees them."""
    image = FAT16.make(tmp_path)
    device = MemoryDevice(bytearray(image.read_bytes()))
    fs = open_filesystem(device, writable=True)
    inode = fs.create(fs.root, b"file", stat.S_IFREG | 0o644, 0, 0)
    fs.write(inode, 0, pattern(1, 50_000))
    fs.hold(inode)
    fs.unlink(fs.root, b"file")
    fs.sync()
    image.write_bytes(device.content)
    assert "Reclaimed 25 unused clusters" in fsck(image, "-a").stdout
    assert fsck(image, "-n").returncode == 0
