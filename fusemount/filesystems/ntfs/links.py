"""Symbolic links and special files, in the three ways in which NTFS volumes store them.

- Interix (Microsoft's Unix services; what ntfs-3g writes): a file with the system attribute. Its content begins with a
  mark and holds the target or the device number; an empty one is a fifo, one of a single byte a socket.
- Reparse points of Windows (MS-FSCC 2.1.2): symbolic links and junctions, with the targets of Windows.
- Reparse points of the Windows Subsystem for Linux: a link with a target in UTF-8; fifos, sockets and devices.

Other reparse points belong to services of Windows (deduplication, OneDrive, ...); their files are shown as what they
are without them.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from enum import IntEnum, IntFlag

from fusemount.filesystems.base import error
from fusemount.filesystems.ntfs.records import Type
from fusemount.filesystems.ntfs.volume import Node


class FileAttributes(IntFlag):
    """Attributes of a file in the sense of DOS and Windows."""

    READ_ONLY = 0x1
    SYSTEM = 0x4
    REPARSE_POINT = 0x400
    DIRECTORY = 0x10000000  # in the copy that a directory holds


class Tag(IntEnum):
    """Reparse tags."""

    MOUNT_POINT = 0xA0000003
    SYMLINK = 0xA000000C
    DEDUP = 0x80000013
    WOF = 0x80000017
    LX_SYMLINK = 0xA000001D
    AF_UNIX = 0x80000023
    LX_FIFO = 0x80000024
    LX_CHR = 0x80000025
    LX_BLK = 0x80000026


TYPES: dict[int, int] = {
    Tag.MOUNT_POINT: stat.S_IFLNK,
    Tag.SYMLINK: stat.S_IFLNK,
    Tag.LX_SYMLINK: stat.S_IFLNK,
    Tag.AF_UNIX: stat.S_IFSOCK,
    Tag.LX_FIFO: stat.S_IFIFO,
    Tag.LX_CHR: stat.S_IFCHR,
    Tag.LX_BLK: stat.S_IFBLK,
}
_NAMES: dict[int, int] = {Tag.MOUNT_POINT: 16, Tag.SYMLINK: 20}  # where in the reparse point the names begin
ELSEWHERE = frozenset((Tag.DEDUP, Tag.WOF))
"""Tags of files whose content is not in their data stream."""

_LINK = b"IntxLNK\x01"
_CHARACTER, _BLOCK = b"IntxCHR\x00", b"IntxBLK\x00"
_LONGEST_TARGET = 64 << 10


def tag_of(node: Node) -> int:
    """The reparse tag of a file; 0 when it has none."""
    if not node.has(Type.REPARSE_POINT):
        return 0
    head = bytes(node.stream(Type.REPARSE_POINT).read(0, 4))
    return struct.unpack("<I", head)[0] if len(head) == 4 else 0


def type_of(node: Node, flags: int) -> tuple[int, int]:
    """The type bits of a file's mode, and the number of the device where it is one."""
    tag = tag_of(node)
    kind = TYPES.get(tag)
    if kind is not None:
        return kind, _wsl_device(node) if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0
    if node.is_directory:
        return stat.S_IFDIR, 0
    if flags & FileAttributes.SYSTEM and not tag and node.has(Type.DATA):
        return _interix_type(node)
    return stat.S_IFREG, 0


def _interix_type(node: Node) -> tuple[int, int]:
    data = node.stream(Type.DATA)
    if data.size == 0:
        return stat.S_IFIFO, 0
    if data.size == 1:
        return stat.S_IFSOCK, 0
    if data.size <= _LONGEST_TARGET + 8:
        head = bytes(data.read(0, 24))
        if head.startswith(_LINK) and data.size > 8:
            return stat.S_IFLNK, 0
        if len(head) == 24 and head[:8] in (_CHARACTER, _BLOCK):
            major, minor = struct.unpack_from("<QQ", head, 8)
            kind = stat.S_IFCHR if head.startswith(_CHARACTER) else stat.S_IFBLK
            return kind, os.makedev(major & 0xFFFFFFFF, minor & 0xFFFFFFFF)
    return stat.S_IFREG, 0


def _wsl_device(node: Node) -> int:
    """The device number in the extended attribute $LXDEV."""
    if not node.has(Type.EA):
        return 0
    content = node.stream(Type.EA)
    value = bytes(content.read(0, min(content.size, 1 << 16)))
    offset = 0
    while offset + 8 <= len(value):
        step, _, name, length = struct.unpack_from("<IBBH", value, offset)
        start = offset + 8 + name + 1
        if value[offset + 8 : start - 1] == b"$LXDEV" and length == 8 and start + 8 <= len(value):
            return os.makedev(*struct.unpack_from("<II", value, start))
        if step < 8:
            break
        offset += step
    return 0


def target_of(node: Node) -> bytes:
    """Where a symbolic link points: `/` between the parts, as on Unix.

    A target on a drive of Windows keeps its drive letter (C:/Users): resolve() makes a path of the volume of it.

    Raises:
        OSError: EINVAL when the file is no link, EIO when it is damaged.
    """
    tag = tag_of(node)
    if tag:
        content = node.stream(Type.REPARSE_POINT)
        return _reparse_target(tag, bytes(content.read(0, min(content.size, _LONGEST_TARGET))))
    data = node.stream(Type.DATA)
    value = bytes(data.read(0, min(data.size, _LONGEST_TARGET + 8)))
    if not value.startswith(_LINK):
        raise error(errno.EINVAL)
    return _utf8(value[8 : len(value) & ~1])


def _reparse_target(tag: int, value: bytes) -> bytes:
    if tag == Tag.LX_SYMLINK and len(value) > 12:
        return value[12 : 8 + struct.unpack_from("<H", value, 4)[0]].rstrip(b"\0")
    names = _NAMES.get(tag)
    if names is None:
        raise error(errno.EINVAL)
    if len(value) < names:
        raise error(errno.EIO)
    offset, length = struct.unpack_from("<HH", value, 8)
    name = value[names + offset : names + offset + length]
    if len(name) != length or not length or length & 1:
        raise error(errno.EIO)
    target = _utf8(name).rstrip(b"\0").replace(b"\\", b"/")
    return target.removeprefix(b"/??/")


def _utf8(text: bytes) -> bytes:
    return text.decode("utf-16-le", "surrogatepass").encode("utf-8", "surrogatepass")
