"""NTFS, written: sound for ntfsfix and ntfsresize, and ntfs-3g reads back what was written."""

from __future__ import annotations

import errno
import os
import stat
import struct
from pathlib import Path

import pytest

from fusemount.filesystems import ntfs
from fusemount.filesystems.base import Changes, FileSystem
from nbdserve.block import BlockDevice, Window
from nbdserve.block.file import ReadBuffer
from tests.fusemount.ntfs_images import judge, make_ntfs, mounted
from tests.fusemount.trees import device_of, host_tree_of, tree_of, without_owners

pytestmark = pytest.mark.needs("mkfs.ntfs", "ntfs-3g", "ntfsfix", "ntfsresize")

FILE, DIRECTORY = stat.S_IFREG | 0o644, 0o755


def write_all_kinds(filesystem: FileSystem) -> None:
    root = filesystem.root
    large = filesystem.create(root, b"large", FILE, 0, 0)
    for number in range(100):
        filesystem.write(large, number * 60_000, bytes([number]) * 60_000)
    directory = filesystem.make_directory(root, "größe 😀".encode(), DIRECTORY, 0, 0)
    for number in range(1200):
        inode = filesystem.create(directory, b"a name that takes some room %d" % number, FILE, 0, 0)
        if number % 3 == 0:
            filesystem.write(inode, number, b"text" * number)
    for number in range(0, 1200, 7):
        filesystem.unlink(directory, b"a name that takes some room %d" % number)
    filesystem.link(large, directory, b"hard link")
    filesystem.make_symlink(directory, b"symlink", "../größe 😀".encode(), 0, 0)
    filesystem.create(directory, b"fifo", stat.S_IFIFO, 0, 0)
    filesystem.create(directory, b"null", stat.S_IFCHR, 0, 0, os.makedev(1, 3))
    sparse = filesystem.create(root, b"sparse", FILE, 0, 0)
    filesystem.write(sparse, 20_000_000, b"end")
    filesystem.truncate(sparse, 25_000_000)
    filesystem.set_xattr(sparse, b"user.small", b"value")
    filesystem.set_xattr(directory, b"user.large", bytes(range(256)) * 200)
    filesystem.change(sparse, Changes(mtime_ns=1_234_567_890_123_456_700))
    filesystem.create(root, "漢".encode() * 255, FILE, 0, 0)
    filesystem.rename(root, b"sparse", directory, b"moved")
    filesystem.rename(root, "größe 😀".encode(), root, b"directory")


@pytest.mark.parametrize("cluster", ["512", "4096", "65536"])
def test_ntfs3g_reads_what_was_written(tmp_path: Path, cluster: str) -> None:
    image = make_ntfs(tmp_path / "image", 64 << 20, "-c", cluster)
    with device_of(image, writable=True) as device:
        filesystem = ntfs.open_filesystem(device, writable=True)
        write_all_kinds(filesystem)
        ours, space = without_owners(tree_of(filesystem)), filesystem.space()
        filesystem.close()
    judge(image)
    with mounted(image, tmp_path / "mnt", "-o", "ro") as root:
        theirs = without_owners(host_tree_of(root))
        assert os.statvfs(root).f_bfree == space.free_blocks
    theirs.pop(b"directory/null")
    assert ours.pop(b"directory/null").device == os.makedev(1, 3)
    assert ours == theirs


def test_changes_what_ntfs3g_wrote(tmp_path: Path) -> None:
    """Compressed files grow, shrink and are overwritten; names of Windows go together with their short names."""
    image = make_ntfs(tmp_path / "image", 64 << 20)
    text = b"".join(b"line %d\n" % number for number in range(60_000))
    with mounted(image, tmp_path / "mnt", "-o", "compression") as root:
        (root / "compressed").mkdir()
        os.setxattr(root / "compressed", "system.ntfs_attrib_be", struct.pack(">I", 0x800))
        for name in ("overwritten", "appended", "cut", "grown"):
            (root / "compressed" / name).write_bytes(text)
        for name in ("long name with an alias", "another with an alias"):
            (root / name).write_text(name)
            os.setxattr(root / name, "system.ntfs_dos_name", f"{name[:4]}~1".upper().encode())
    with device_of(image, writable=True) as device:
        filesystem = ntfs.open_filesystem(device, writable=True)
        directory = filesystem.lookup(filesystem.root, b"compressed")
        expected = {}
        for name, offset, data in ((b"overwritten", 100_000, b"!" * 5000), (b"appended", len(text), text[:99_999])):
            filesystem.write(filesystem.lookup(directory, name), offset, data)
            expected[name] = text[:offset] + data + text[offset + len(data) :]
        for name, size in ((b"cut", 200_001), (b"grown", 900_000)):
            filesystem.truncate(filesystem.lookup(directory, name), size)
            expected[name] = text[:size] + bytes(max(0, size - len(text)))
        alias = filesystem.lookup(filesystem.root, b"long name with an alias")
        assert filesystem.attributes(alias).links == 1
        filesystem.hold(alias)
        filesystem.rename(filesystem.root, b"another with an alias", filesystem.root, b"long name with an alias")
        assert bytes(filesystem.read(alias, 0, 100)) == b"long name with an alias"
        filesystem.let_go(alias)
        for name, content in expected.items():
            assert filesystem.read(filesystem.lookup(directory, name), 0, 1 << 20) == content
        filesystem.close()
    judge(image)
    with mounted(image, tmp_path / "mnt", "-o", "ro") as root:
        assert {name: (root / "compressed" / name.decode()).read_bytes() for name in expected} == expected
        assert sorted(os.listdir(root)) == ["compressed", "long name with an alias"]
        assert (root / "long name with an alias").read_text() == "another with an alias"


def test_a_held_file_survives_a_crash_aside(tmp_path: Path) -> None:
    image, copy = make_ntfs(tmp_path / "image", 16 << 20), tmp_path / "copy"
    with device_of(image, writable=True) as device:
        filesystem = ntfs.open_filesystem(device, writable=True)
        inode = filesystem.create(filesystem.root, b"file", FILE, 0, 0)
        filesystem.write(inode, 0, b"content")
        filesystem.hold(inode)
        filesystem.unlink(filesystem.root, b"file")
        assert list(filesystem.entries(filesystem.root)) == []
        filesystem.sync()
        copy.write_bytes(image.read_bytes())
        filesystem.close()
        assert tree_of(ntfs.open_filesystem(device, writable=False)) == {}
    judge(image)
    with mounted(copy, tmp_path / "mnt", "-o", "ro") as root:
        (left,) = os.listdir(root)
        assert left.startswith(".fusemount-removed-") and (root / left).read_bytes() == b"content"


class Failing(Window):
    """A device that fails from some write on."""

    def __init__(self, whole: BlockDevice, error: OSError) -> None:
        super().__init__(whole, 0, whole.size)
        self.error = error
        self.left = 1 << 60

    def write(self, offset: int, data: ReadBuffer) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error
        super().write(offset, data)


def test_failures_of_the_device_keep_their_errno(tmp_path: Path) -> None:
    image = make_ntfs(tmp_path / "image", 16 << 20)
    with device_of(image, writable=True) as raw:
        device = Failing(raw, OSError(errno.EDQUOT, "no more"))
        filesystem = ntfs.open_filesystem(device, writable=True)
        inode = filesystem.create(filesystem.root, b"file", FILE, 0, 0)
        device.left = 0
        with pytest.raises(OSError, match="no more"):
            filesystem.write(inode, 0, b"x" * 100_000)
        device.left = 1 << 60
        assert filesystem.attributes(inode).links == 1
        filesystem.create(filesystem.root, b"other", FILE, 0, 0)
        filesystem.close()
        assert ntfs.examine(raw).dirty, "what failed half-way asks for a check"
        assert {b"file", b"other"} <= tree_of(ntfs.open_filesystem(raw, writable=False)).keys()
