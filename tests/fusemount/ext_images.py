"""Images of ext file systems made by mkfs and filled by the kernel, and what the kernel and an adapter see in them."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fusemount.filesystems.base import FileSystem, Inode
from nbdserve.block import BlockDevice, HostFile
from nbdserve.formats.raw import RawImage
from tests.reference import run

TOOLS = ("mkfs.ext4", "e2fsck", "mount", "debugfs")
needs_kernel = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount through a loop device")

Seen = dict[str, Any]
Tree = dict[bytes, Seen]

ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, bits, number)
    for tag, bits, number in [
        (1, 6, 0xFFFFFFFF),
        (2, 4, 1234),
        (4, 4, 0xFFFFFFFF),
        (8, 6, 70000),
        (16, 6, 0xFFFFFFFF),
        (32, 4, 0xFFFFFFFF),
    ]
)
"""An access control list that mode bits cannot express, in the form of setxattr(2)."""


def mkfs(image: Path, size: str, *options: str) -> Path:
    """A new image with a file system."""
    with image.open("wb") as file:
        file.truncate(int(size.removesuffix("M")) << 20)
    run("mkfs.ext4", "-q", "-F", *options, image)
    return image


@contextmanager
def mounted(image: Path, options: str = "rw") -> Iterator[bytes]:
    """The image, mounted by the kernel."""
    place = image.with_name(image.name + ".mnt")
    place.mkdir(exist_ok=True)
    run("mount", "-t", "ext4", "-o", f"loop,{options}", image, place)
    try:
        yield os.fsencode(place)
    finally:
        if subprocess.run(["umount", place]).returncode:
            run("umount", "--lazy", place)  # a test that failed left a file open
            raise AssertionError(f"{place} was still in use")
        _wait_until_detached(image)


def _wait_until_detached(image: Path) -> None:
    """Wait until the kernel has let go of the loop device, which the next mount would use with what it has cached."""
    for _ in range(1000):
        if not subprocess.run(["losetup", "-j", image], capture_output=True, check=True).stdout:
            return
        time.sleep(0.01)
    raise AssertionError(f"{image} is still attached to a loop device")


def device(image: Path, *, writable: bool = False) -> BlockDevice:
    """The image as a block device."""
    return RawImage(HostFile.open(image, writable=writable), read_only=not writable)


def assert_clean(image: Path) -> None:
    """e2fsck finds nothing to say."""
    result = subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def kernel_tree(image: Path) -> Tree:
    """All that the kernel shows."""
    with mounted(image, "ro,noatime") as top:
        return kernel_tree_at(top)


def kernel_tree_at(top: bytes) -> Tree:
    """All that the kernel shows below a directory."""
    tree = {b"": _kernel_file(top)}
    for directory, directories, files in os.walk(top):
        for name in directories + files:
            path = os.path.join(directory, name)
            tree[path[len(top) :]] = _kernel_file(path)
    return tree


def _kernel_file(path: bytes) -> Seen:
    found = os.lstat(path)
    content: bytes | None = None
    if stat.S_ISREG(found.st_mode):
        content = Path(os.fsdecode(path)).read_bytes()
    elif stat.S_ISLNK(found.st_mode):
        content = os.readlink(path)
    names = os.listxattr(path, follow_symlinks=False)
    return {
        "mode": found.st_mode,
        "links": found.st_nlink,
        "owner": (found.st_uid, found.st_gid),
        "size": found.st_size,
        "blocks": found.st_blocks,
        "times": (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns),
        "device": found.st_rdev,
        "inode": found.st_ino,
        "content": content,
        "xattrs": {os.fsencode(name): os.getxattr(path, name, follow_symlinks=False) for name in names},
    }


def adapter_tree(filesystem: FileSystem) -> Tree:
    """All that an adapter shows."""
    tree: Tree = {}
    _walk(filesystem, filesystem.root, b"", tree)
    return tree


def _walk(filesystem: FileSystem, inode: Inode, path: bytes, tree: Tree) -> None:
    found = filesystem.attributes(inode)
    content: bytes | None = None
    if stat.S_ISREG(found.mode):
        content = b"".join(bytes(filesystem.read(inode, offset, 1 << 20)) for offset in range(0, found.size, 1 << 20))
    elif stat.S_ISLNK(found.mode):
        content = filesystem.read_link(inode)
    tree[path] = {
        "mode": found.mode,
        "links": found.links,
        "owner": (found.uid, found.gid),
        "size": found.size,
        "blocks": found.blocks,
        "times": (found.atime_ns, found.mtime_ns, found.ctime_ns),
        "device": found.device,
        "inode": found.inode,
        "content": content,
        "xattrs": {name: filesystem.xattr(inode, name) for name in filesystem.xattr_names(inode)},
    }
    if found.is_directory:
        for entry in filesystem.entries(inode):
            child = filesystem.lookup(inode, entry.name)
            assert child == entry.inode
            assert entry.type == stat.S_IFMT(filesystem.attributes(child).mode)
            _walk(filesystem, child, path + b"/" + entry.name, tree)
            filesystem.forget(child)


def assert_same(found: Tree, expected: Tree) -> None:
    """Two trees are equal; says where they are not, without printing files."""
    assert sorted(found) == sorted(expected)
    for path, seen in expected.items():
        different = [key for key, value in seen.items() if found[path][key] != value]
        shown = {key: (found[path][key], seen[key]) for key in different if key != "content"}
        assert not different, f"{path!r} differs in {different}: {shown}"


def fill(top: bytes, *, xattrs: bool = True, big_xattrs: bool = False) -> None:
    """Have the kernel make files of every kind in a mounted file system."""
    join = os.path.join
    for size in (0, 10, 59, 60, 61, 100, 160, 5000, 100_000):
        _write(join(top, b"file%d" % size), os.urandom(size))
    _write(join(top, b"large"), os.urandom(1 << 20) * 2)
    with open(join(top, b"sparse"), "wb") as file:
        for offset in (0, 1 << 20, 5 << 20, (5 << 20) + 5000, 1 << 30):
            file.seek(offset)
            file.write(b"island at %d" % offset)
        file.truncate(6 << 20)
    with open(join(top, b"crumbs"), "wb") as file:
        for index in range(400):
            file.seek(index * 8192)
            file.write(b"crumb %d" % index)
            if index % 200 == 0:
                file.flush()
                os.fsync(file.fileno())
    if xattrs and _can_preallocate(join(top, b"preallocated")):
        with open(join(top, b"preallocated"), "r+b") as file:
            file.seek(100_000)
            file.write(b"written in the middle")
    for length in (1, 58, 59, 60, 61, 200, 1000):
        os.symlink(b"t" * length, join(top, b"link%d" % length))
    os.mknod(join(top, b"null"), stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(join(top, b"disk"), stat.S_IFBLK | 0o660, os.makedev(300, 70000))
    os.mknod(join(top, b"socket"), stat.S_IFSOCK | 0o700)
    os.mkfifo(join(top, b"fifo"), 0o600)
    os.makedirs(join(top, b"deep/er/and/deeper"))
    os.mkdir(join(top, b"tiny"))
    _write(join(top, b"tiny/one"), b"1")
    many = join(top, b"many")
    os.mkdir(many)
    for index in range(300):
        _write(join(many, b"a name of some length %04d" % index), b"")
    for index in range(0, 300, 7):
        os.unlink(join(many, b"a name of some length %04d" % index))
    _write(join(top, "Gr\u00f6\u00dfe \u540d".encode()), b"utf-8")
    _write(join(top, b"\xff\xfe not utf-8"), b"bytes")
    _write(join(top, b"x" * 255), b"long")
    for index in range(3):
        os.link(join(top, b"file5000"), join(top, b"deep/hard%d" % index))
    os.chown(join(top, b"file100"), 70000, 4_000_000_000)
    os.chmod(join(top, b"file10"), 0o6751)
    os.chmod(join(top, b"deep"), 0o1777)
    if xattrs:
        _set_xattrs(top, big_xattrs)
    seconds = (-(2**31), -1, 0, 2**31 - 1, 2**31, 2**32 + 5, 2**33 + 7, 2**34 - 2**31 - 1)
    for index, second in enumerate(seconds):
        _write(join(top, b"time%d" % index), b"")
        nanoseconds = second * 10**9 + (123_456_789 if xattrs else 0)
        os.utime(join(top, b"time%d" % index), ns=(nanoseconds, nanoseconds))


def _set_xattrs(top: bytes, big: bool) -> None:
    for index in range(2):
        path = os.path.join(top, b"file160" if index else b"deep")
        os.setxattr(path, "user.short", b"value")
        os.setxattr(path, "user.empty", b"")
        os.setxattr(path, "trusted.some", b"\0binary\xff" * 10)
        os.setxattr(path, "security.other", b"s" * 100)
        os.setxattr(path, "system.posix_acl_access", ACL)
    os.setxattr(os.path.join(top, b"deep"), "system.posix_acl_default", ACL)
    os.setxattr(os.path.join(top, b"file5000"), "user.longer", os.urandom(700))
    os.setxattr(os.path.join(top, b"link58"), "trusted.link", b"on a link", follow_symlinks=False)
    if big:
        os.setxattr(os.path.join(top, b"large"), "user.huge", os.urandom(20_000))


def _can_preallocate(path: bytes) -> bool:
    with open(path, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, 400_000)
        except OSError:
            return False
    return True


def _write(path: bytes, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)


def fill_small(top: bytes) -> None:
    """A few files of every kind, for images of a few MiB."""
    join = os.path.join
    os.mkdir(join(top, b"directory"))
    for index in range(120):
        _write(join(top, b"directory/some name %d" % index), b"x" * (index * 7 % 90))
    for size in (0, 50, 3000, 30_000, 400_000):
        _write(join(top, b"file%d" % size), b"content " * (size // 8))
    with open(join(top, b"crumbs"), "wb") as file:
        for index in range(100):
            file.seek(index * 3000)
            file.write(b"crumb")
    for length in (10, 100):
        os.symlink(b"t" * length, join(top, b"link%d" % length))
    os.mkfifo(join(top, b"fifo"))
    os.link(join(top, b"file3000"), join(top, b"directory/hard"))
    for name in (b"file50", b"directory", b"file3000"):
        for index, size in enumerate((5, 40, 300)):
            os.setxattr(join(top, name), f"user.x{index}", b"v" * size)
