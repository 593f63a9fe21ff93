"""Header extensions, read and built (QEMU, docs/interop/qcow2, "Header extensions")."""

from __future__ import annotations

from enum import IntEnum

from nbdserve.formats.record import Record


class Extension(IntEnum):
    """Types of extensions."""

    END = 0
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    ENCRYPTION = 0x0537BE77
    DATA_FILE = 0x44415441


_HEAD = Record(">", type="I", length="I")
_FEATURE_NAME = Record(">", kind="B", bit="B", name="46s")
FEATURE_NAME_SIZE = _FEATURE_NAME.size  # bytes

_NAMES = (
    (0, 0, b"dirty bit"),
    (0, 1, b"corrupt bit"),
    (0, 2, b"external data file"),
    (0, 3, b"compression type"),
    (0, 4, b"extended L2 entries"),
    (1, 0, b"lazy refcounts"),
    (2, 0, b"bitmaps"),
    (2, 1, b"raw external data"),
)
"""Kind (incompatible, compatible, autoclear), bit and name of every feature."""


def read_extensions(content: bytes, position: int) -> dict[int, bytes]:
    """The extensions from a position on to the end of content.

    Raises:
        ValueError: one is longer than its room.
    """
    found: dict[int, bytes] = {}
    while position + _HEAD.size <= len(content):
        head = _HEAD.parse(content, position)
        position += _HEAD.size
        if head.type == Extension.END:
            break
        if head.length > len(content) - position:
            raise ValueError(f"has an extension {head.type:#010x} that is longer than the room it is in")
        found[head.type] = content[position : position + head.length]
        position += -(-head.length // 8) * 8
    return found


def build_extension(kind: int, data: bytes) -> bytes:
    """An extension as it stands in the header."""
    head = _HEAD.build({"type": kind, "length": len(data)})
    return head + data.ljust(-(-len(data) // 8) * 8, b"\0")


def build_feature_names() -> bytes:
    """The table that tells programs which do not know a feature how to call it."""
    return b"".join(
        _FEATURE_NAME.build({"kind": kind, "bit": bit, "name": name.ljust(46, b"\0")}) for kind, bit, name in _NAMES
    )


def feature_name(names: bytes, bit: int) -> str | None:
    """What the image itself calls an incompatible feature."""
    size = _FEATURE_NAME.size
    for position in range(0, len(names) - size + 1, size):
        entry = _FEATURE_NAME.parse(names, position)
        if entry.kind == 0 and entry.bit == bit:
            text = entry.name.split(b"\0")[0].decode("ascii", "backslashreplace")
            return repr(text) if text else None
    return None
