"""The ext adapter and the kernel see the same, whoever wrote it, in every mix of features."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fusemount.filesystems import ext
from fusemount.filesystems.base import Changes, FileSystem
from tests.fusemount.ext_images import (
    ACL,
    TOOLS,
    adapter_tree,
    assert_clean,
    assert_same,
    device,
    fill,
    kernel_tree,
    mkfs,
    mounted,
    needs_kernel,
)

MIXES = {
    "ext2": ("-t", "ext2"),
    "ext2-old": ("-t", "ext2", "-b", "1024", "-I", "128", "-O", "^dir_index,^resize_inode,^filetype"),
    "ext3": ("-t", "ext3"),
    "ext3-1k": ("-t", "ext3", "-b", "1024", "-O", "^large_file"),
    "ext4": ("-b", "4096"),
    "ext4-1k": ("-b", "1024"),
    "ext4-2k-no-csum": ("-b", "2048", "-O", "^metadata_csum"),
    "ext4-no-csum-at-all": ("-O", "^metadata_csum,^uninit_bg,^64bit"),
    "ext4-no-extents": ("-O", "^extents,^64bit"),
    "ext4-128-byte-inodes": ("-I", "128"),
    "ext4-1k-inodes": ("-I", "1024", "-b", "4096"),
    "inline-data": ("-O", "inline_data"),
    "bigalloc": ("-b", "4096", "-O", "bigalloc", "-C", "16384"),
    "ea-inode": ("-O", "ea_inode,large_dir"),
    "meta-bg": ("-b", "1024", "-O", "meta_bg,^resize_inode,^flex_bg", "-g", "1024"),
    "no-journal": ("-O", "^has_journal,sparse_super2"),
    "orphan-file": ("-O", "orphan_file,metadata_csum_seed"),
}


def has_small_inodes(mix: str) -> bool:
    return mix in ("ext2-old", "ext4-128-byte-inodes")


@contextmanager
def opened(image: Path, *, writable: bool = False) -> Iterator[FileSystem]:
    disk = device(image, writable=writable)
    filesystem = ext.open_filesystem(disk, writable=writable)
    try:
        yield filesystem
    finally:
        filesystem.close()
        disk.close()


@needs_kernel
@pytest.mark.needs(*TOOLS)
@pytest.mark.parametrize("mix", MIXES)
def test_both_ways(tmp_path: Path, mix: str) -> None:
    image = mkfs(tmp_path / "image", "32M", *MIXES[mix])
    with mounted(image) as top:
        fill(top, xattrs=not has_small_inodes(mix), big_xattrs=mix == "ea-inode")
    expected = kernel_tree(image)
    before = hashlib.sha256(image.read_bytes()).digest()
    with opened(image) as filesystem:
        assert_same(adapter_tree(filesystem), expected)
        assert filesystem.space().free_blocks == kernel_free(image)
        with pytest.raises(OSError, match="Read-only"):
            filesystem.create(filesystem.root, b"new", stat.S_IFREG, 0, 0)
    assert hashlib.sha256(image.read_bytes()).digest() == before

    with opened(image, writable=True) as filesystem:
        change_everything(filesystem, xattrs=not has_small_inodes(mix))
        written = adapter_tree(filesystem)
    assert_clean(image)
    assert_same(kernel_tree(image), written)
    with opened(image) as filesystem:
        assert_same(adapter_tree(filesystem), written)
    with mounted(image) as top:
        for directory, _, files in os.walk(top):
            for name in files:
                os.unlink(os.path.join(directory, name))
    assert_clean(image)


def kernel_free(image: Path) -> int:
    with mounted(image, "ro") as top:
        found = os.statvfs(top)
        return found.f_bfree


def change_everything(fs: FileSystem, *, xattrs: bool) -> None:
    """Change what the kernel made by fill(), in every way there is."""
    root = fs.root
    look = fs.lookup
    for name in (b"file0", b"file10", b"file59", b"file160", b"file100000", b"sparse", b"crumbs"):
        inode = look(root, name)
        fs.write(inode, 3000, b"in the middle" * 100)
        fs.write(inode, fs.attributes(inode).size + 12_345, b"behind the end")
    fs.truncate(look(root, b"large"), 1_034_567)
    fs.truncate(look(root, b"file5000"), 100)
    fs.truncate(look(root, b"file5000"), 9000)
    fs.truncate(look(root, b"file61"), 7)
    fs.truncate(look(root, b"crumbs"), 2_000_001)
    if xattrs:
        preallocated = look(root, b"preallocated")
        fs.write(preallocated, 4096 * 3, b"p" * 8192)
        fs.write(preallocated, 50_001, b"q" * 10)
    many = look(root, b"many")
    for index in range(1, 300, 7):
        fs.unlink(many, b"a name of some length %04d" % index)
    for index in range(150):
        fs.create(many, b"new %d " % index + b"n" * (index % 240), stat.S_IFREG | 0o600, 5, 6)
    for index in range(2, 300, 7):
        fs.rename(many, b"a name of some length %04d" % index, many, b"renamed %d" % index)
    tiny = look(root, b"tiny")
    for index in range(100):
        fs.make_symlink(tiny, b"link %d" % index, b"target" * (index % 30 + 1), 7, 8)
    fs.unlink(root, b"link1000")
    fs.unlink(root, b"link200")
    fs.unlink(root, b"null")
    fs.create(root, b"node", stat.S_IFBLK | 0o600, 0, 0, os.makedev(8, 300))
    fs.create(root, b"old node", stat.S_IFCHR | 0o600, 0, 0, os.makedev(4, 64))
    fs.create(root, b"pipe", stat.S_IFIFO | 0o600, 0, 0)
    deep = look(root, b"deep")
    fs.rename(deep, b"er", root, b"higher")
    fs.rename(root, b"higher", tiny, b"lower")
    fs.rename(deep, b"hard0", deep, b"hard1")
    fs.rename(root, b"file60", deep, b"hard2")
    new = fs.make_directory(deep, b"new", 0o2775, 70_001, 3_000_000_000)
    child = fs.create(new, b"child", stat.S_IFREG | 0o4711, 1, 2)
    assert fs.attributes(child).gid == 3_000_000_000
    fs.remove_directory(look(look(look(root, b"tiny"), b"lower"), b"and"), b"deeper")
    fs.link(child, root, b"another name")
    fs.change(child, Changes(mode=0o640, uid=70_002, gid=5, atime_ns=10**18 + 1, mtime_ns=-(10**9) + 5))
    written = fs.create(root, b"written", stat.S_IFREG | 0o644, 0, 0)
    for index in range(40):
        fs.write(written, index * 100_000, bytes([index]) * 100_000)
    fs.write(written, 6 << 20, b"far")
    if xattrs:
        set_xattrs(fs)


def set_xattrs(fs: FileSystem) -> None:
    root = fs.root
    deep, written, old = fs.lookup(root, b"deep"), fs.lookup(root, b"written"), fs.lookup(root, b"file160")
    fs.set_xattr(written, b"user.new", b"new")
    fs.set_xattr(written, b"user.block", b"b" * 600)
    fs.set_xattr(written, b"trusted.t", b"")
    fs.set_xattr(written, b"system.posix_acl_access", ACL)
    assert stat.S_IMODE(fs.attributes(written).mode) == 0o664
    fs.change(written, Changes(mode=0o604))
    fs.set_xattr(old, b"user.short", b"another value")
    fs.remove_xattr(old, b"security.other")
    fs.remove_xattr(deep, b"system.posix_acl_default")
    fs.set_xattr(fs.lookup(root, b"link59"), b"security.x", b"on a link")
    for name, flags, expected in (
        (b"user.short", 1, errno.EEXIST),
        (b"user.none", 2, errno.ENODATA),
        (b"other.x", 0, errno.ENOTSUP),
        (b"system.data", 0, errno.ENOTSUP),
    ):
        with pytest.raises(OSError, match=os.strerror(expected)):
            fs.set_xattr(old, name, b"", flags)
