"""NTFS, read: equal to what ntfs-3g shows of volumes that ntfs-3g has filled."""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from fusemount.filesystems import ntfs
from fusemount.filesystems.base import FileSystem, Inode
from tests.fusemount.ntfs_images import make_ntfs, mounted
from tests.fusemount.trees import device_of, host_tree_of, tree_of, without_owners

pytestmark = pytest.mark.needs("mkfs.ntfs", "ntfs-3g")


def pattern(length: int) -> bytes:
    """Bytes that compress to about a half, and not at all in places."""
    text = b"".join(b"%d squared is %d\n" % (i, i * i) for i in range(length // 16))
    noise = os.urandom(length // 8)
    return (text[: length // 2] + noise + bytes(length // 8) + text)[:length]


def fill(root: Path) -> None:
    """Files of every kind that ntfs-3g can make."""
    (root / "small").write_bytes(b"lies in the record")
    (root / "large").write_bytes(os.urandom(3_000_000))
    (root / "empty").touch()
    (root / "deep/er/and/deeper").mkdir(parents=True)
    (root / "deep/er/file").write_bytes(pattern(10_000))
    os.link(root / "large", root / "deep/hard link")
    os.symlink("../large", root / "deep/symlink")
    os.symlink("/nowhere/at all", root / "absolute")
    os.mkfifo(root / "fifo")
    os.mknod(root / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod(root / "disk", stat.S_IFBLK | 0o600, os.makedev(8, 300))
    for name in ("naïve 目录 😀", "n" * 255, "漢" * 255, "a:b*c?", "back\\slash", " lead", "UPPER", "upper"):
        (root / name).write_text(name)
    many = root / "many"
    many.mkdir()
    for number in range(1000):
        (many / f"file number {number}").write_text(str(number))
    with (root / "sparse").open("wb") as file:
        file.truncate(30_000_000)
        os.pwrite(file.fileno(), b"middle", 10_000_001)
    os.setxattr(root / "small", "user.stream", b"an alternate data stream")
    os.setxattr(root / "small", "user.größer", b"x" * 30_000)
    os.setxattr(root / "deep", "user.on a directory", b"y")
    os.utime(root / "small", ns=(-(10**18), 10**18 + 123_456_700))
    fragmented(root / "fragmented one", root / "fragmented two")


def fragmented(one: Path, two: Path) -> None:
    """Two files whose clusters alternate, so that one MFT record cannot hold the map of either."""
    with one.open("wb", buffering=0) as first, two.open("wb", buffering=0) as second:
        for number in range(700):
            os.pwrite(first.fileno(), b"%06d" % number * 683, number * 8192)
            os.pwrite(second.fileno(), b"%05d!" % number * 683, number * 8192)


@pytest.mark.parametrize("options", [(), ("-c", "512"), ("-c", "65536"), ("-s", "4096", "-c", "4096")], ids=str)
def test_reads_what_ntfs3g_wrote(tmp_path: Path, options: tuple[str, ...]) -> None:
    image = make_ntfs(tmp_path / "image", 96 << 20, *options)
    with mounted(image, tmp_path / "mnt") as root:
        fill(root)
    before = image.read_bytes()
    with device_of(image) as device:
        filesystem = ntfs.open_filesystem(device, writable=False)
        assert filesystem.read_only and not filesystem.has_owners
        ours = without_owners(tree_of(filesystem))
        space = filesystem.space()
    with mounted(image, tmp_path / "mnt", "-o", "ro") as root:
        theirs = without_owners(host_tree_of(root))
        statistics = os.statvfs(root)
    for name in (b"null", b"disk"):
        theirs[name] = replace(theirs[name], size=0)  # ntfs-3g shows the size of the place that holds the number
    assert ours == theirs
    assert (space.blocks, space.free_blocks) == (statistics.f_blocks, statistics.f_bfree)
    assert image.read_bytes() == before


def test_reads_compressed_files(tmp_path: Path) -> None:
    image = make_ntfs(tmp_path / "image", 64 << 20)
    with mounted(image, tmp_path / "mnt", "-o", "compression") as root:
        os.setxattr(root, "system.ntfs_attrib_be", struct.pack(">I", 0x800))
        for length in (1, 4095, 65536, 65537, 900_000):
            (root / str(length)).write_bytes(pattern(length))
        (root / "zeros").write_bytes(bytes(500_000))
        (root / "random").write_bytes(os.urandom(500_000))
        (root / "binary").write_bytes(Path(os.__file__).read_bytes() * 5)
        with (root / "sparse").open("wb") as file:
            file.truncate(1_000_000)
            os.pwrite(file.fileno(), pattern(100_000), 300_000)
        theirs = without_owners(host_tree_of(root))
        assert os.lstat(root / "900000").st_blocks * 512 < 800_000, "ntfs-3g did not compress"
    with device_of(image) as device:
        assert without_owners(tree_of(ntfs.open_filesystem(device, writable=False))) == theirs


def reparse(tag: int, data: bytes) -> bytes:
    """A reparse point."""
    return struct.pack("<IHH", tag, len(data), 0) + data


def windows_link(tag: int, target: str, *flags: int) -> bytes:
    name = target.encode("utf-16-le")
    head = struct.pack("<HHHH", 0, len(name), len(name) + 2, 0) + b"".join(struct.pack("<I", flag) for flag in flags)
    return reparse(tag, head + name + b"\0\0\0\0")


MOUNT_POINT, SYMLINK, LX_SYMLINK, WOF, CLOUD = 0xA0000003, 0xA000000C, 0xA000001D, 0x80000017, 0x9000001A


@pytest.fixture
def reparse_points(tmp_path: Path) -> Path:
    image = make_ntfs(tmp_path / "image", 16 << 20)
    points = {
        "junction/": windows_link(MOUNT_POINT, "\\??\\C:\\dir\\INSIDE"),
        "volume/": windows_link(MOUNT_POINT, "\\??\\Volume{01234567-89ab-cdef-0123-456789abcdef}\\"),
        "absolute": windows_link(SYMLINK, "\\??\\c:\\DIR\\Inside", 0),
        "elsewhere": windows_link(SYMLINK, "\\??\\D:\\films", 0),
        "rooted": windows_link(SYMLINK, "\\dir", 1),
        "dir/relative": windows_link(SYMLINK, "..\\DIR\\inside\\leaf", 1),
        "wsl": reparse(LX_SYMLINK, struct.pack("<I", 2) + "größe/ziel".encode()),
        "compact": reparse(WOF, struct.pack("<IIII", 1, 2, 1, 0)),
        "cloud": reparse(CLOUD, b"12345678"),
    }
    with mounted(image, tmp_path / "mnt") as root:
        (root / "dir/Inside").mkdir(parents=True)
        (root / "dir/Inside/Leaf").touch()
        for name, value in points.items():
            if name.endswith("/"):
                (root / name).mkdir()
            else:
                (root / name).write_bytes(b"")
            os.setxattr(root / name.rstrip("/"), "system.ntfs_reparse_data", value)
    return image


def resolve(filesystem: FileSystem, path: bytes) -> Inode:
    inode = filesystem.root
    for part in path.split(b"/"):
        inode = filesystem.lookup(inode, part)
    return inode


def test_reads_reparse_points(reparse_points: Path) -> None:
    with device_of(reparse_points) as device:
        filesystem = ntfs.open_filesystem(device, writable=False)
        targets = {
            b"junction": b"/dir/Inside",
            b"volume": b"Volume{01234567-89ab-cdef-0123-456789abcdef}/",
            b"absolute": b"/dir/Inside",
            b"elsewhere": b"D:/films",
            b"rooted": b"/dir",
            b"dir/relative": b"../dir/Inside/Leaf",
            b"wsl": "größe/ziel".encode(),
        }
        for path, target in targets.items():
            inode = resolve(filesystem, path)
            assert filesystem.read_link(inode) == target
            found = filesystem.attributes(inode)
            assert stat.S_ISLNK(found.mode) and found.size == len(target)
        assert stat.S_ISREG(filesystem.attributes(resolve(filesystem, b"cloud")).mode)
        types = {entry.name: entry.type for entry in filesystem.entries(filesystem.root)}
        assert types[b"junction"] == types[b"wsl"] == stat.S_IFLNK
        with pytest.raises(OSError, match="not supported"):
            filesystem.read(resolve(filesystem, b"compact"), 0, 10)
        with pytest.raises(NotADirectoryError):
            filesystem.lookup(resolve(filesystem, b"junction"), b"Leaf")


def test_reads_special_files_of_wsl(tmp_path: Path) -> None:
    image = make_ntfs(tmp_path / "image", 16 << 20)
    with mounted(image, tmp_path / "mnt", "-o", "special_files=wsl") as root:
        os.symlink("some/target", root / "symlink")
        os.mkfifo(root / "fifo")
        os.mknod(root / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        os.mknod(root / "disk", stat.S_IFBLK | 0o600, os.makedev(8, 300))
        os.mknod(root / "socket", stat.S_IFSOCK | 0o600)
        theirs = without_owners(host_tree_of(root))
    with device_of(image) as device:
        assert without_owners(tree_of(ntfs.open_filesystem(device, writable=False))) == theirs


def test_system_files_are_hidden(tmp_path: Path) -> None:
    image = make_ntfs(tmp_path / "image", 8 << 20)
    with device_of(image) as device:
        filesystem = ntfs.open_filesystem(device, writable=False)
        assert list(filesystem.entries(filesystem.root)) == []
        with pytest.raises(FileNotFoundError):
            filesystem.lookup(filesystem.root, b"$MFT")
