"""Dirty file systems: shown untouched as the kernel shows them after a replay, mended when written."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from fusemount.filesystems import ext
from fusemount.filesystems.ext import recovery
from fusemount.filesystems.ext.checksum import crc32_be, crc32c, slow_crc32c
from nbdserve.block import BlockDevice
from nbdserve.errors import OpenError
from tests.fusemount import ext_dirty
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

pytestmark = [needs_kernel, pytest.mark.needs(*TOOLS)]

VARIANTS: dict[str, tuple[tuple[str, ...], Callable[[bytes], None], str]] = {
    "ext3-ordered": (("-t", "ext3"), ext_dirty.work, "rw"),
    "ext4-csum-64bit": (("-b", "4096", "-J", "size=8"), ext_dirty.work, "rw"),
    "ext4-no-csum": (("-b", "2048", "-O", "^metadata_csum,^64bit"), ext_dirty.work, "rw"),
    "ext4-1k": (
        (
            "-b",
            "1024",
        ),
        ext_dirty.work,
        "rw",
    ),
    "old-checksums": (("-b", "4096", "-J", "size=8", "-O", "^metadata_csum"), ext_dirty.work, "journal_checksum"),
    "data-in-the-log": (
        (
            "-b",
            "1024",
        ),
        ext_dirty.work,
        "data=journal",
    ),
    "wrap": (("-b", "1024", "-J", "size=1"), ext_dirty.wrap, "rw"),
    "orphan-list": (
        (
            "-b",
            "1024",
        ),
        ext_dirty.leave_orphans,
        "rw",
    ),
    "orphan-file": (("-b", "1024", "-O", "orphan_file"), ext_dirty.leave_orphans, "rw"),
}


def crashed(directory: Path, variant: str) -> Path:
    options, work, mount_options = VARIANTS[variant]
    return ext_dirty.crashed(directory, options, work, mount_options=mount_options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_dirty_log(tmp_path: Path, variant: str) -> None:
    image = crashed(tmp_path, variant)
    kernels, ours = tmp_path / "kernels", tmp_path / "ours"
    shutil.copyfile(image, kernels)
    shutil.copyfile(image, ours)
    with mounted(kernels) as top:
        free = os.statvfs(top)
    assert_clean(kernels)
    expected = kernel_tree(kernels)

    before = hashlib.sha256(image.read_bytes()).digest()
    disk = device(image)
    condition = ext.examine(disk)
    assert condition.readable and condition.dirty, condition
    check_that_it_is_worth_testing(variant, disk, image)
    filesystem = ext.open_filesystem(disk, writable=False)
    assert_same(adapter_tree(filesystem), expected)
    space = filesystem.space()
    assert (space.free_blocks, space.free_inodes) == (free.f_bfree, free.f_ffree)
    filesystem.close()
    assert hashlib.sha256(image.read_bytes()).digest() == before

    disk = device(ours, writable=True)
    assert ext.examine(disk).writable
    filesystem = ext.open_filesystem(disk, writable=True)
    assert_same(adapter_tree(filesystem), expected)
    new = filesystem.create(filesystem.root, b"after the crash", stat.S_IFREG | 0o600, 0, 0)
    filesystem.write(new, 0, b"written")
    filesystem.close()
    assert_clean(ours)
    assert not ext.examine(disk).dirty
    seen = kernel_tree(ours)
    del seen[b"/after the crash"], seen[b""], expected[b""]
    assert_same(seen, expected)


def check_that_it_is_worth_testing(variant: str, disk: BlockDevice, image: Path) -> None:
    """What the variant is there for did happen."""
    found = recovery.find(disk)
    assert found.log is not None and found.journal is not None
    assert found.log.moved
    if variant == "data-in-the-log":
        assert found.log.escaped
    elif variant == "wrap":
        places = list(found.log.moved.values())
        start = found.journal._place(found.journal._start)
        assert min(places) < start < max(places)
    elif variant.startswith("orphan"):
        assert len(list(recovery.orphans(recovery.view(found)))) == 9
    else:
        assert (ext_dirty.JOURNAL_MAGIC + struct.pack(">I", 5)) in image.read_bytes()  # a revoke block
    if variant == "old-checksums":
        assert found.journal._old_checksums and not found.journal._checksums


def log_blocks(image: Path, kind: int) -> list[int]:
    """Where the blocks of a kind (1: descriptor, 2: commit) lie in an image with blocks of 1 KiB."""
    content = image.read_bytes()
    magic = ext_dirty.JOURNAL_MAGIC + struct.pack(">I", kind)
    return [offset for offset in range(0, len(content), 1024) if content.startswith(magic, offset)]


def test_a_log_with_a_wrong_checksum_is_not_written(tmp_path: Path) -> None:
    image = crashed(tmp_path, "ext4-1k")
    with image.open("r+b") as file:
        file.seek(log_blocks(image, 2)[-1] + 500)
        file.write(b"\xff")
    condition = ext.examine(device(image, writable=True))
    assert condition.readable and condition.dirty and not condition.writable
    assert "checksum" in condition.remark and "can be read" in condition.remark and "\n" not in condition.remark
    with pytest.raises(OpenError, match="wrong checksum"):
        ext.open_filesystem(device(image, writable=True), writable=True)
    assert adapter_tree(ext.open_filesystem(device(image), writable=False))


def test_fast_commits_are_left_to_the_kernel(tmp_path: Path) -> None:
    def work(top: bytes) -> None:
        ext_dirty.commit(top)
        for index in range(5):
            path = os.path.join(top, b"old%d" % index)
            with open(path, "r+b") as file:
                file.write(b"more")
                file.flush()
                os.fsync(file.fileno())

    image = ext_dirty.crashed(tmp_path, ("-O", "fast_commit", "-b", "1024", "-J", "fast_commit_size=256"), work)
    condition = ext.examine(device(image, writable=True))
    assert condition.readable and condition.dirty and not condition.writable
    assert "fast commits" in condition.remark
    with pytest.raises(OpenError, match="fast commits"):
        ext.open_filesystem(device(image, writable=True), writable=True)


def test_what_must_not_be_written(tmp_path: Path) -> None:
    """Each of these can be read, and says so in one line."""
    cases = {
        "quota": (("-O", "quota"), "quotas"),
        "mmp": (("-O", "mmp"), "mmp"),
        "casefold": (("-O", "casefold", "-E", "encoding=utf8"), "casefold"),
    }
    for name, (options, word) in cases.items():
        image = mkfs(tmp_path / name, "16M", *options)
        condition = ext.examine(device(image, writable=True))
        assert condition.readable and not condition.writable and word in condition.remark, condition
        assert "can be read" in condition.remark
        with pytest.raises(OpenError, match=word):
            ext.open_filesystem(device(image, writable=True), writable=True)
        assert b"/lost+found" in adapter_tree(ext.open_filesystem(device(image), writable=False))
    for state, word in ((0, "not unmounted cleanly"), (3, "errors")):
        image = mkfs(tmp_path / f"state{state}", "16M", "-t", "ext2")
        run("debugfs", "-w", "-R", f"set_super_value state {state}", image)
        condition = ext.examine(device(image, writable=True))
        assert condition.readable and not condition.writable and word in condition.remark
    assert not ext.examine(device(image)).writable


def test_checksums() -> None:
    assert crc32c(b"123456789", 0xFFFFFFFF) ^ 0xFFFFFFFF == 0xE3069283
    assert slow_crc32c(0xFFFFFFFF, b"123456789") ^ 0xFFFFFFFF == 0xE3069283
    assert crc32_be(b"123456789", 0xFFFFFFFF) == 0x0376E6E7  # CRC-32/MPEG-2
    assert crc32_be(b"", 17) == 17
    assert zlib.crc32(b"123456789") == 0xCBF43926
