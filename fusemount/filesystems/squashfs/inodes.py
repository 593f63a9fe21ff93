"""Inodes of squashfs: fourteen kinds, seven of them short and seven with more room."""

from __future__ import annotations

import errno
import stat
import struct
from dataclasses import dataclass

from fusemount.filesystems.base import error
from fusemount.filesystems.squashfs.metadata import Cursor

_HEADER = struct.Struct("<HHHH II")
_DIRECTORY = struct.Struct("<IIHHI")
_LONG_DIRECTORY = struct.Struct("<IIII HHI")
_FILE = struct.Struct("<IIII")
_LONG_FILE = struct.Struct("<QQQ IIII")
_SYMLINK = struct.Struct("<II")
_DEVICE = struct.Struct("<II")
_OTHER = struct.Struct("<I")
_XATTR = struct.Struct("<I")
_NONE = 0xFFFFFFFF
_LONGEST_TARGET = 65536
_MOST_BLOCKS = 1 << 24
_KINDS = (
    stat.S_IFDIR,
    stat.S_IFREG,
    stat.S_IFLNK,
    stat.S_IFBLK,
    stat.S_IFCHR,
    stat.S_IFIFO,
    stat.S_IFSOCK,
)


@dataclass(slots=True)
class SquashInode:
    """An inode.

    Attributes:
        mode: type and permissions.
        uid, gid: indexes into the table of ids.
        start: of a file, where its blocks begin; of a directory, the block of the directory table.
        offset: of a directory in its block; of the tail of a file in its fragment.
        fragment: the fragment that holds the tail; None when there is none.
        blocks: the sizes of a file's blocks as they are stored.
        xattrs: an index into the table of extended attributes; None when there are none.
    """

    mode: int
    uid: int
    gid: int
    mtime: int
    links: int = 1
    size: int = 0
    start: int = 0
    offset: int = 0
    fragment: int | None = None
    blocks: tuple[int, ...] = ()
    target: bytes = b""
    device: int = 0
    xattrs: int | None = None


def type_of(number: int) -> int:
    """The type bits of a kind of inode. Raises EIO when there is no such kind."""
    if not 1 <= number <= 14:
        raise error(errno.EIO)
    return _KINDS[(number - 1) % 7]


def parse_inode(cursor: Cursor, block: int) -> SquashInode:
    """The inode at the cursor. Raises EIO when it is damaged."""
    number, mode, uid, gid, mtime, _ = cursor.unpack(_HEADER)
    kind = type_of(number)
    inode = SquashInode(kind | mode & 0o7777, uid, gid, mtime)
    is_long = number > 7
    xattrs = _NONE
    match kind:
        case stat.S_IFDIR if is_long:
            inode.links, inode.size, inode.start, _, _, inode.offset, xattrs = cursor.unpack(_LONG_DIRECTORY)
        case stat.S_IFDIR:
            inode.start, inode.links, inode.size, inode.offset, _ = cursor.unpack(_DIRECTORY)
        case stat.S_IFREG:
            xattrs = _parse_file(inode, cursor, is_long, block)
        case stat.S_IFLNK:
            inode.links, inode.size = cursor.unpack(_SYMLINK)
            if inode.size > _LONGEST_TARGET:
                raise error(errno.EIO)
            inode.target = cursor.take(inode.size)
        case stat.S_IFBLK | stat.S_IFCHR:
            inode.links, inode.device = cursor.unpack(_DEVICE)
        case _:
            (inode.links,) = cursor.unpack(_OTHER)
    if is_long and kind not in (stat.S_IFDIR, stat.S_IFREG):
        (xattrs,) = cursor.unpack(_XATTR)
    inode.xattrs = None if xattrs == _NONE else xattrs
    return inode


def _parse_file(inode: SquashInode, cursor: Cursor, is_long: bool, block: int) -> int:
    xattrs = _NONE
    if is_long:
        inode.start, inode.size, _, inode.links, fragment, inode.offset, xattrs = cursor.unpack(_LONG_FILE)
    else:
        inode.start, fragment, inode.offset, inode.size = cursor.unpack(_FILE)
    inode.fragment = None if fragment == _NONE else fragment
    count = inode.size // block if inode.fragment is not None else -(-inode.size // block)
    if count > _MOST_BLOCKS:
        raise error(errno.EIO)
    inode.blocks = struct.unpack(f"<{count}I", cursor.take(4 * count))
    return xattrs
