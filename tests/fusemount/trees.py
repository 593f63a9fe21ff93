"""Whole trees of files as dictionaries, to hold an adapter's view against that of a mount of the kernel or of FUSE."""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from fusemount.filesystems.base import FileSystem, Inode
from nbdserve.block import HostFile
from nbdserve.formats.raw import RawImage

_PIECE = 1 << 20


@dataclass(frozen=True)
class Facts:
    """What a file is.

    Attributes:
        content: a hash of the content of a regular file, the target of a link.
    """

    mode: int
    links: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    device: int
    content: bytes
    xattrs: tuple[tuple[str, bytes], ...]


Tree = dict[bytes, Facts]


def device_of(path: Path, *, writable: bool = False) -> RawImage:
    """A raw image as a block device."""
    return RawImage(HostFile.open(path, writable=writable), read_only=not writable)


def tree_of(filesystem: FileSystem) -> Tree:
    """Everything in a file system, by path; read in uneven pieces."""
    tree: Tree = {}
    _walk(filesystem, filesystem.root, b"", tree)
    return tree


def _walk(filesystem: FileSystem, directory: Inode, path: bytes, tree: Tree) -> None:
    for entry in filesystem.entries(directory):
        name = path + entry.name
        inode = filesystem.lookup(directory, entry.name)
        assert inode == entry.inode
        tree[name] = facts_of(filesystem, inode)
        assert stat.S_IFMT(tree[name].mode) == entry.type, name
        if entry.type == stat.S_IFDIR:
            _walk(filesystem, inode, name + b"/", tree)


def facts_of(filesystem: FileSystem, inode: Inode) -> Facts:
    """What an adapter says about a file."""
    found = filesystem.attributes(inode)
    assert found.inode == inode
    content = b""
    if stat.S_ISREG(found.mode):
        content = _hash(filesystem, inode, found.size)
    elif stat.S_ISLNK(found.mode):
        content = filesystem.read_link(inode)
    xattrs = tuple((name.decode(), filesystem.xattr(inode, name)) for name in sorted(filesystem.xattr_names(inode)))
    return Facts(
        found.mode, found.links, found.uid, found.gid, found.size, found.mtime_ns, found.device, content, xattrs
    )


def _hash(filesystem: FileSystem, inode: Inode, size: int) -> bytes:
    digest = hashlib.sha1()
    offset = 0
    pieces = (1000, 4096, 70000, _PIECE)
    while offset < size:
        piece = filesystem.read(inode, offset, pieces[min(offset // 5000, len(pieces) - 1)])
        assert piece, f"nothing at {offset} of {size} bytes"
        digest.update(piece)
        offset += len(piece)
    assert bytes(filesystem.read(inode, size, 10)) == b""
    return digest.digest()


def host_tree_of(root: Path) -> Tree:
    """The same of a directory of this machine."""
    tree: Tree = {}
    top = os.fsencode(root)
    for directory, directories, files in os.walk(top):
        for name in directories + files:
            path = os.path.join(directory, name)
            tree[os.path.relpath(path, top)] = _host_facts(path)
    return tree


def _host_facts(path: bytes) -> Facts:
    found = os.lstat(path)
    content = b""
    if stat.S_ISREG(found.st_mode):
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha1").digest()
    elif stat.S_ISLNK(found.st_mode):
        content = os.readlink(path)
    xattrs: tuple[tuple[str, bytes], ...] = ()
    with suppress(OSError):  # there are kernels that offer none
        names = sorted(name for name in os.listxattr(path, follow_symlinks=False) if name.startswith("user."))
        xattrs = tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in names)
    return Facts(
        found.st_mode,
        found.st_nlink,
        found.st_uid,
        found.st_gid,
        found.st_size,
        found.st_mtime_ns,
        found.st_rdev,
        content,
        xattrs,
    )


def without_owners(tree: Tree) -> Tree:
    """A tree as it compares where files have no owners and permissions, and directories no size and link count."""
    return {
        path: replace(
            facts,
            mode=stat.S_IFMT(facts.mode),
            uid=0,
            gid=0,
            links=1 if stat.S_ISDIR(facts.mode) else facts.links,
            size=0 if stat.S_ISDIR(facts.mode) else facts.size,
        )
        for path, facts in tree.items()
    }
