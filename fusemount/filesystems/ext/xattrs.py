"""Extended attributes: struct ext4_xattr_entry in inodes and in blocks of their own; POSIX ACLs in both their forms.

What it keeps: every offset and size is checked against the area it points into before it is followed; a broken area is
EIO for its file alone. Source: Documentation/filesystems/ext4/attributes.rst of the kernel; include/linux/posix_acl*.h
for the two forms of an ACL.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from typing import NamedTuple

from fusemount.filesystems.base import error
from fusemount.filesystems.ext.inodes import GOOD_OLD_SIZE, Record

MAGIC = 0xEA020000
BLOCK_HEADER = 32
MAX_VALUE = 65536  # XATTR_SIZE_MAX
ACCESS_ACL, DEFAULT_ACL = b"system.posix_acl_access", b"system.posix_acl_default"
INLINE_DATA = b"system.data"

_ENTRY = struct.Struct("<BBHIII")
_PREFIXES = {
    1: b"user.",
    2: ACCESS_ACL,
    3: DEFAULT_ACL,
    4: b"trusted.",
    6: b"security.",
    7: b"system.",
    8: b"system.richacl",
}
_WHOLE_NAMES = (2, 3, 8)
_ACL_ENTRY = struct.Struct("<HHI")
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 1, 2, 4, 8, 16, 32
_UNDEFINED = 0xFFFFFFFF


class Attribute(NamedTuple):
    """One extended attribute. Its value lies in the inode `value_inode` when that is not 0."""

    name: bytes
    value: bytes
    value_inode: int
    size: int


def in_inode(record: Record) -> Iterator[Attribute]:
    """What is stored in the inode itself, behind its fields."""
    start = GOOD_OLD_SIZE + record.extra_size
    area = record.raw[start:]
    if record.extra_size and len(area) >= 8 and area[:4] == MAGIC.to_bytes(4, "little"):
        yield from _entries(area, 4, 4)


def in_block(block: bytes) -> Iterator[Attribute]:
    """What a block of attributes holds."""
    magic, references, blocks = struct.unpack_from("<III", block)
    if magic != MAGIC or blocks != 1 or not references:
        raise error(errno.EIO)
    yield from _entries(block, BLOCK_HEADER, 0)


def _entries(area: bytes, start: int, base: int) -> Iterator[Attribute]:
    """The entries from `start` on; their values are found from `base` on."""
    offset = start
    while True:
        if offset + 4 > len(area):
            raise error(errno.EIO)
        if area[offset : offset + 4] == bytes(4):
            return
        if offset + _ENTRY.size > len(area):
            raise error(errno.EIO)
        name_length, prefix, place, value_inode, size, _ = _ENTRY.unpack_from(area, offset)
        end = offset + _ENTRY.size + name_length
        if end > len(area) or size > 1 << 24 or (not value_inode and size and base + place + size > len(area)):
            raise error(errno.EIO)
        suffix = area[offset + _ENTRY.size : end]
        if prefix in _PREFIXES and b"\0" not in suffix and not (prefix in _WHOLE_NAMES and suffix):
            value = b"" if value_inode else area[base + place : base + place + size]
            yield Attribute(_PREFIXES[prefix] + suffix, value, value_inode, size)
        offset = (end + 3) & ~3


def is_settable(name: bytes) -> bool:
    """Whether an attribute with this name can be stored."""
    prefixes = (b"user.", b"trusted.", b"security.")
    return name in (ACCESS_ACL, DEFAULT_ACL) or any(name.startswith(prefix) and name != prefix for prefix in prefixes)


def acl_as_shown(stored: bytes) -> bytes:
    """An ACL in the form of setxattr(2), from the form on disk."""
    if len(stored) < 4 or stored[:4] != struct.pack("<I", 1):
        raise error(errno.EIO)
    shown = bytearray(struct.pack("<I", 2))
    offset = 4
    while offset < len(stored):
        if offset + 4 > len(stored):
            raise error(errno.EIO)
        tag, permissions = struct.unpack_from("<HH", stored, offset)
        offset += 4
        number = _UNDEFINED
        if tag in (_USER, _GROUP):
            if offset + 4 > len(stored):
                raise error(errno.EIO)
            (number,) = struct.unpack_from("<I", stored, offset)
            offset += 4
        shown += _ACL_ENTRY.pack(tag, permissions, number)
    return bytes(shown)


def acl_as_stored(shown: bytes) -> bytes:
    """An ACL in the form on disk, from the form of setxattr(2). Raises EINVAL."""
    stored = bytearray(struct.pack("<I", 1))
    for tag, permissions, number in _acl_entries(shown):
        stored += struct.pack("<HH", tag, permissions)
        if tag in (_USER, _GROUP):
            stored += struct.pack("<I", number)
    return bytes(stored)


def acl_mode(shown: bytes) -> tuple[int, bool]:
    """The nine permission bits that an access ACL stands for, and whether they say all that it says."""
    permissions = {tag: bits for tag, bits, _ in _acl_entries(shown) if tag not in (_USER, _GROUP)}
    if not {_USER_OBJ, _GROUP_OBJ, _OTHER} <= permissions.keys():
        raise error(errno.EINVAL)
    group = permissions.get(_MASK, permissions[_GROUP_OBJ])
    mode = (permissions[_USER_OBJ] & 7) << 6 | (group & 7) << 3 | permissions[_OTHER] & 7
    return mode, len(list(_acl_entries(shown))) == 3


def acl_with_mode(shown: bytes, mode: int) -> bytes:
    """An access ACL after chmod(2): owner, mask (or else the owning group) and others get the new bits."""
    entries = list(_acl_entries(shown))
    group = _MASK if any(tag == _MASK for tag, _, _ in entries) else _GROUP_OBJ
    new = {_USER_OBJ: mode >> 6 & 7, group: mode >> 3 & 7, _OTHER: mode & 7}
    changed = b"".join(_ACL_ENTRY.pack(tag, new.get(tag, bits), number) for tag, bits, number in entries)
    return shown[:4] + changed


def _acl_entries(shown: bytes) -> Iterator[tuple[int, int, int]]:
    if len(shown) < 4 or (len(shown) - 4) % _ACL_ENTRY.size or shown[:4] != struct.pack("<I", 2):
        raise error(errno.EINVAL)
    for tag, permissions, number in _ACL_ENTRY.iter_unpack(shown[4:]):
        if tag not in (_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER) or permissions > 7:
            raise error(errno.EINVAL)
        yield tag, permissions, number
