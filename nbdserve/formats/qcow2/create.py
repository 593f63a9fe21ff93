"""New, empty qcow2 images."""

from __future__ import annotations

import os

from nbdserve.errors import OpenError
from nbdserve.formats.qcow2.header import MAGIC, MAXIMUM_L1_BYTES, V3_LENGTH, l1_entries_for

_BACKING_FORMAT = 0xE2792ACA


def create_image(
    path: str | os.PathLike[str],
    size: int,
    *,
    cluster_size: int = 65536,
    backing: str | None = None,
    backing_format: str | None = None,
) -> None:
    """Create a version 3 image whose disk has `size` bytes and reads as zeros, or as its backing file.

    An existing file is never overwritten.

    Args:
        cluster_size: bytes, a power of two from 512 to 2 MiB.
        backing: the name to record, as the image is to find it.

    Raises:
        OpenError: the size is too large for such clusters.
        FileExistsError: there is such a file.
    """
    bits = cluster_size.bit_length() - 1
    assert cluster_size == 1 << bits and 9 <= bits <= 21
    l1_entries = l1_entries_for(size, bits)
    if l1_entries * 8 > MAXIMUM_L1_BYTES:
        raise OpenError(
            f"{os.fspath(path)}: {size} bytes are too many for clusters of {cluster_size}; take larger ones"
        )
    l1_clusters = -(-max(1, l1_entries) * 8 // cluster_size)
    content = _layout(size, bits, l1_entries, l1_clusters, backing, backing_format)
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _layout(size: int, bits: int, l1_entries: int, l1_clusters: int, backing: str | None, format: str | None) -> bytes:
    """The file: the header's cluster, the refcount table's, its blocks, then the L1 table."""
    cluster_size = 1 << bits
    per_block = cluster_size // 2
    blocks = 1
    while blocks * per_block < 1 + -(-blocks * 8 // cluster_size) + blocks + l1_clusters:
        blocks += 1
    table_clusters = -(-blocks * 8 // cluster_size)
    used = 1 + table_clusters + blocks + l1_clusters
    l1_at = (used - l1_clusters) * cluster_size
    table = b"".join(((1 + table_clusters + each) * cluster_size).to_bytes(8, "big") for each in range(blocks))
    return (
        _header(size, bits, l1_entries, l1_at, table_clusters, backing, format).ljust(cluster_size, b"\0")
        + table.ljust(table_clusters * cluster_size, b"\0")
        + (b"\0\1" * used).ljust(blocks * cluster_size, b"\0")
        + bytes(l1_clusters * cluster_size)
    )


def _header(
    size: int, bits: int, l1_entries: int, l1_at: int, table_clusters: int, backing: str | None, format: str | None
) -> bytes:
    extensions = b""
    if format is not None:
        encoded = format.encode()
        extensions = _BACKING_FORMAT.to_bytes(4, "big") + len(encoded).to_bytes(4, "big")
        extensions += encoded.ljust(-(-len(encoded) // 8) * 8, b"\0")
    extensions += bytes(8)
    length = V3_LENGTH + 8
    name = os.fsencode(backing) if backing else b""
    name_at = length + len(extensions) if name else 0
    header = b"".join(
        number.to_bytes(width, "big")
        for number, width in (
            *((3, 4), (name_at, 8), (len(name), 4), (bits, 4), (size, 8), (0, 4)),
            *((l1_entries, 4), (l1_at, 8), (1 << bits, 8), (table_clusters, 4), (0, 4), (0, 8)),
            *((0, 8), (0, 8), (0, 8), (4, 4), (length, 4), (0, 8)),
        )
    )
    return MAGIC + header + extensions + name
