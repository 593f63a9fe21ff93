"""What a writable ext file system has to keep besides the contract: large directories, crashes, errors, no waiting."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest

from fusemount.filesystems import ext
from fusemount.filesystems.base import FileSystem, Inode
from fusemount.filesystems.ext import library
from nbdserve.block import BlockDevice, MemoryDevice, Window
from nbdserve.block.file import ReadBuffer, WriteBuffer
from nbdserve.errors import OpenError
from tests.fusemount.ext_images import (
    TOOLS,
    adapter_tree,
    assert_clean,
    assert_same,
    device,
    kernel_tree,
    mkfs,
    mounted,
    needs_kernel,
)
from tests.reference import run

pytestmark = pytest.mark.needs(*TOOLS)

REGULAR = stat.S_IFREG | 0o644


def opened(image: Path) -> FileSystem:
    return ext.open_filesystem(device(image, writable=True), writable=True)


def names(fs: FileSystem, directory: Inode) -> list[bytes]:
    return [entry.name for entry in fs.entries(directory)]


@needs_kernel
@pytest.mark.parametrize("options", [("-b", "1024"), ("-b", "4096", "-O", "^metadata_csum"), ("-O", "^dir_index")])
def test_a_large_directory(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Thousands of names, in an index of two levels where there is one; the kernel finds each of them."""
    image = mkfs(tmp_path / "image", "48M", "-N", "4096", *options)
    count = 2500
    fs = opened(image)
    directory = fs.make_directory(fs.root, b"large", 0o755, 0, 0)
    target = fs.create(fs.root, b"target", REGULAR, 0, 0)
    started = time.process_time()
    for index in range(count):
        fs.link(target, directory, b"%d of many names" % index)
    for index in range(0, count, 3):
        fs.unlink(directory, b"%d of many names" % index)
    assert time.process_time() - started < 20
    left = {b"%d of many names" % index for index in range(count) if index % 3}
    found = names(fs, directory)
    assert len(found) == len(left) and set(found) == left
    with pytest.raises(FileNotFoundError):
        fs.lookup(directory, b"0 of many names")
    assert fs.lookup(directory, b"1 of many names") == target
    fs.close()
    assert_clean(image)
    with mounted(image) as top:
        large = os.path.join(top, b"large")
        assert set(os.listdir(large)) == left
        assert all(os.path.exists(os.path.join(large, name)) for name in left)
        for index in range(200):
            os.symlink(b"x", os.path.join(large, b"by the kernel %d" % index))
    assert_clean(image)


@pytest.mark.parametrize("options", [(), ("-O", "inline_data"), ("-O", "^dir_index")])
def test_a_listing_survives_the_making_of_the_index(tmp_path: Path, options: tuple[str, ...]) -> None:
    fs = opened(mkfs(tmp_path / "image", "16M", "-b", "1024", *options))
    directory = fs.make_directory(fs.root, b"dir", 0o755, 0, 0)
    for index in range(20):
        fs.create(directory, b"early %d" % index, REGULAR, 0, 0)
    seen = [entry for entry, _ in zip(fs.entries(directory), range(8), strict=False)]
    for index in range(300):
        fs.create(directory, b"late %d" % index, REGULAR, 0, 0)
    while piece := [entry for entry, _ in zip(fs.entries(directory, seen[-1].position), range(7), strict=False)]:
        seen += piece
        for entry in piece[:1]:
            if entry.name.startswith(b"late"):
                fs.unlink(directory, entry.name)
                fs.create(directory, b"instead of " + entry.name[5:], REGULAR, 0, 0)
    shown = [entry.name for entry in seen]
    assert sorted(name for name in shown if name.startswith(b"early")) == sorted(b"early %d" % i for i in range(20))
    assert len(set(shown)) == len(shown)


def test_numbers_of_removed_files_stay_their_own(tmp_path: Path) -> None:
    image = mkfs(tmp_path / "image", "16M")
    fs = opened(image)
    free = fs.space()
    first = fs.create(fs.root, b"first", REGULAR, 0, 0)
    fs.write(first, 0, b"held" * 10_000)
    fs.hold(first)
    fs.unlink(fs.root, b"first")
    fs.forget(first)
    others = {fs.create(fs.root, b"other%d" % index, REGULAR, 0, 0) for index in range(50)}
    assert first not in others
    assert fs.read(first, 0, 4) == b"held"
    assert fs.attributes(first).links == 0
    fs.let_go(first)
    assert fs.create(fs.root, b"second", REGULAR, 0, 0) == first
    with pytest.raises(OSError, match=os.strerror(errno.ENOENT)):
        fs.lookup(fs.root, b"first")
    fs.unlink(fs.root, b"second")
    assert fs.create(fs.root, b"third", REGULAR, 0, 0) != first
    for name in names(fs, fs.root):
        if name != b"lost+found":
            fs.unlink(fs.root, name)
    fs.close()
    assert_clean(image)
    fs = opened(image)
    assert fs.space() == free
    fs.close()


@needs_kernel
def test_a_crash_with_files_that_are_held(tmp_path: Path) -> None:
    """After sync() and a crash, e2fsck mends the file system and what was written is there."""
    image = mkfs(tmp_path / "image", "16M")
    fs = opened(image)
    kept = fs.create(fs.root, b"kept", REGULAR, 0, 0)
    fs.write(kept, 0, b"kept" * 5000)
    for index in range(5):
        held = fs.create(fs.root, b"held%d" % index, REGULAR, 0, 0)
        fs.write(held, 0, b"held" * 5000)
        fs.hold(held)
        fs.unlink(fs.root, b"held%d" % index)
    directory = fs.make_directory(fs.root, b"directory", 0o755, 0, 0)
    fs.remove_directory(fs.root, b"directory")
    assert fs.attributes(directory).links == 0
    fs.sync()
    crashed = tmp_path / "crashed"
    shutil.copyfile(image, crashed)
    condition = ext.examine(device(crashed))
    assert condition.dirty and not condition.writable and "e2fsck" in condition.remark
    assert kernel_tree(crashed)[b"/kept"]["content"] == b"kept" * 5000
    assert subprocess.run(["e2fsck", "-fp", crashed], capture_output=True).returncode == 1  # all errors corrected
    assert_clean(crashed)
    assert set(kernel_tree(crashed)) == {b"", b"/kept", b"/lost+found"}
    fs.close()
    assert_clean(image)


class Failing(Window):
    """Fails to read, to write, or to wait."""

    def __init__(self, whole: BlockDevice) -> None:
        super().__init__(whole, 0, whole.size)
        self.trouble = 0

    def read_into(self, offset: int, buffer: WriteBuffer) -> None:
        if self.trouble:
            raise OSError(self.trouble, os.strerror(self.trouble))
        super().read_into(offset, buffer)

    def write(self, offset: int, data: ReadBuffer) -> None:
        if self.trouble:
            raise OSError(self.trouble, os.strerror(self.trouble))
        super().write(offset, data)


def test_the_errno_of_the_device_is_what_the_caller_gets(tmp_path: Path) -> None:
    disk = Failing(MemoryDevice(bytearray(mkfs(tmp_path / "image", "8M").read_bytes())))
    fs = ext.open_filesystem(disk, writable=True)
    file = fs.create(fs.root, b"file", REGULAR, 0, 0)
    fs.write(file, 0, b"x" * 300_000)
    disk.trouble = errno.ENOLINK
    for call in (lambda: fs.read(file, 0, 200_000), lambda: fs.write(file, 0, b"y" * 200_000), fs.sync):
        with pytest.raises(OSError, match=os.strerror(errno.ENOLINK)):
            call()
    disk.trouble = 0
    assert fs.read(file, 0, 300_000) == b"x" * 300_000
    fs.close()
    assert ext.examine(disk).dirty, "something may have been left half done"
    (tmp_path / "after").write_bytes(disk.read(0, disk.size))
    assert_clean(tmp_path / "after")


@needs_kernel
def test_reading_never_waits_where_it_must_not(tmp_path: Path) -> None:
    """Every call that would wait raises BlockingIOError and gives the right answer when it is repeated."""
    image = mkfs(tmp_path / "image", "16M")
    with mounted(image) as top:
        for index in range(300):
            Path(os.fsdecode(top), f"a file with a name {index}").write_bytes(b"content" * index)
    disk = MemoryDevice(bytearray(image.read_bytes()))
    for writable in (False, True):
        fs = ext.open_filesystem(disk, writable=writable)
        refused = 0
        inodes = []
        for index in range(300):
            name = b"a file with a name %d" % index
            try:
                with fs.cache.without_waiting():
                    inode = fs.lookup(fs.root, name)
                    content = fs.read(inode, 0, 100_000)
            except BlockingIOError:
                refused += 1
                inode = fs.lookup(fs.root, name)
                content = fs.read(inode, 0, 100_000)
            assert content == b"content" * index
            inodes.append(inode)
        assert 0 < refused < 300
        assert len(set(inodes)) == 300
        with fs.cache.without_waiting():
            assert len(names(fs, fs.root)) == 301
        fs.close()


def test_without_the_library_one_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = mkfs(tmp_path / "image", "8M")
    monkeypatch.setattr(library, "load", lambda: None)
    condition = ext.examine(device(image, writable=True))
    assert condition.readable and not condition.writable and "libext2fs" in condition.remark
    assert adapter_tree(ext.open_filesystem(device(image), writable=False))
    with pytest.raises(OpenError, match="apt install libext2fs2"):
        ext.open_filesystem(device(image, writable=True), writable=True)


@needs_kernel
def test_while_it_is_written_it_counts_as_not_unmounted(tmp_path: Path) -> None:
    image = mkfs(tmp_path / "image", "8M")
    fs = opened(image)
    assert "not clean" in run("dumpe2fs", "-h", image)
    fs.create(fs.root, b"file", REGULAR, 0, 0)
    expected = adapter_tree(fs)
    fs.close()
    assert "not clean" not in run("dumpe2fs", "-h", image)
    assert_same(kernel_tree(image), expected)


@pytest.mark.needs(*TOOLS)
def test_removing_a_tebibyte_without_content_takes_no_time(tmp_path: Path) -> None:
    fs = opened(mkfs(tmp_path / "image", "8M"))
    inode = fs.create(fs.root, b"sparse", REGULAR, 0, 0)
    fs.truncate(inode, 1 << 40)
    begun = time.process_time()
    fs.unlink(fs.root, b"sparse")
    fs.forget(inode)
    fs.close()
    assert time.process_time() - begun < 5
