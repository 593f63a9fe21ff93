"""New, empty images."""

from __future__ import annotations

import os
from pathlib import Path

from nbdserve.errors import OpenError
from nbdserve.formats.qcow2.entries import ENTRY_SIZE
from nbdserve.formats.qcow2.header import (
    EXTENSION,
    FIRST_HEADER,
    FIRST_SIZE,
    FULL_SIZE,
    MAXIMUM_L1,
    SECOND_HEADER,
    ExtensionType,
)

_REFCOUNT_ORDER = 4
_SECTOR = 512


def create_image(
    path: str | os.PathLike[str],
    size: int,
    *,
    cluster_size: int = 65536,
    version: int = 3,
    backing: str | None = None,
    backing_format: str | None = None,
) -> None:
    """Write a new image; a file of that name is replaced.

    Args:
        size: length of the disk in bytes, rounded up to whole sectors as qemu-img does.
        cluster_size: bytes, a power of two from 512 to 2 MiB.
        version: 2 or 3.
        backing: the backing file's name as it is to stand in the image (relative to the image's directory).
        backing_format: its format; recommended, for nobody has to guess then.

    Raises:
        OpenError: the disk is too large for clusters of this size, or the names do not fit.
        OSError: from the host.
    """
    assert version in (2, 3) and 512 <= cluster_size <= 2 << 20 and cluster_size & (cluster_size - 1) == 0
    size = -(-size // _SECTOR) * _SECTOR
    l1_entries = -(-size // (cluster_size * (cluster_size // ENTRY_SIZE)))
    if l1_entries * ENTRY_SIZE > MAXIMUM_L1:
        raise OpenError(f"{os.fspath(path)}: {size} bytes are too many for clusters of {cluster_size}; use larger ones")
    l1_clusters = -(-l1_entries * ENTRY_SIZE // cluster_size)
    block_entries = cluster_size * 8 >> _REFCOUNT_ORDER
    used, blocks = _clusters_used(1 + 1 + l1_clusters, block_entries)
    if blocks * ENTRY_SIZE > cluster_size:
        raise OpenError(f"{os.fspath(path)}: {size} bytes are too many for clusters of {cluster_size}; use larger ones")

    # In this order: header, refcount table, refcount blocks, L1 table.
    content = bytearray(used * cluster_size)
    content[:cluster_size] = _first_cluster(
        os.fspath(path), size, cluster_size, version, l1_entries, (2 + blocks) * cluster_size, backing, backing_format
    )
    content = content[: (2 + blocks) * cluster_size]
    for number in range(blocks):
        entry = (2 + number) * cluster_size
        content[cluster_size + number * ENTRY_SIZE : cluster_size + (number + 1) * ENTRY_SIZE] = entry.to_bytes(
            8, "big"
        )
    width = (1 << _REFCOUNT_ORDER) // 8
    content[2 * cluster_size : 2 * cluster_size + used * width] = (1).to_bytes(width, "big") * used
    with Path(path).open("wb") as file:
        file.write(content)
        file.truncate(used * cluster_size)


def _clusters_used(others: int, block_entries: int) -> tuple[int, int]:
    """How many clusters a new image has, and how many of them are the refcount blocks that describe them all."""
    blocks = 1
    while others + blocks > blocks * block_entries:
        blocks += 1
    return others + blocks, blocks


def _first_cluster(
    name: str,
    size: int,
    cluster_size: int,
    version: int,
    l1_entries: int,
    l1_offset: int,
    backing: str | None,
    backing_format: str | None,
) -> bytes:
    extensions = b""
    if backing is not None and backing_format is not None:
        extensions += _extension(ExtensionType.BACKING_FORMAT, backing_format.encode("ascii"))
    extensions += _extension(ExtensionType.END, b"")
    name_offset = (FULL_SIZE if version >= 3 else FIRST_SIZE) + len(extensions)
    backing_name = os.fsencode(backing) if backing is not None else b""
    if len(backing_name) > 1023 or name_offset + len(backing_name) > cluster_size:
        raise OpenError(f"{name}: the backing file's name is too long for the header; use a shorter or relative one")
    header = FIRST_HEADER.build(
        {
            "version": version,
            "backing_file_offset": name_offset if backing_name else 0,
            "backing_file_size": len(backing_name),
            "cluster_bits": cluster_size.bit_length() - 1,
            "size": size,
            "crypt_method": 0,
            "l1_size": l1_entries,
            "l1_table_offset": l1_offset,
            "refcount_table_offset": cluster_size,
            "refcount_table_clusters": 1,
            "nb_snapshots": 0,
            "snapshots_offset": 0,
        }
    )
    if version >= 3:
        header += SECOND_HEADER.build(
            {
                "incompatible_features": 0,
                "compatible_features": 0,
                "autoclear_features": 0,
                "refcount_order": _REFCOUNT_ORDER,
                "header_length": FULL_SIZE,
            }
        )
    return (header + extensions + backing_name).ljust(cluster_size, b"\0")


def _extension(kind: ExtensionType, data: bytes) -> bytes:
    padded = data.ljust(-(-len(data) // 8) * 8, b"\0")
    header: bytes = EXTENSION.build({"type": kind, "length": len(data)})
    return header + padded
