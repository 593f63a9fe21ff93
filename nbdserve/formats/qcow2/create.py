"""New, empty qcow2 images.

The file is complete, and on stable storage, before anybody can open it: header, refcount table, refcount blocks, L1
table and, if there is one, LUKS header, in this order.
"""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass
from typing import Literal

from nbdserve.errors import OpenError
from nbdserve.formats.qcow2.entries import ENTRY_SIZE, Geometry
from nbdserve.formats.qcow2.extensions import Extension, build_extension, build_feature_names
from nbdserve.formats.qcow2.header import (
    FIRST_HEADER,
    FIRST_SIZE,
    FULL_SIZE,
    LAZY_REFCOUNTS,
    MAGIC,
    MAXIMUM_L1,
    MAXIMUM_REFCOUNT_TABLE,
    SECOND_HEADER,
    Autoclear,
    CompressionType,
    Encryption,
    Incompatible,
)
from nbdserve.formats.qcow2.packing import empty_block, pack_block

_SECTOR = 512
_MAXIMUM_NAME = 1023  # bytes

Preallocation = Literal["off", "metadata", "falloc", "full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateOptions:
    """What a new image is to be like.

    Attributes:
        cluster_size: bytes, a power of two from 512 (16384 with subclusters) to 2 MiB.
        version: 2 or 3 (which qemu-img calls compat 0.10 and 1.1).
        refcount_bits: a power of two from 1 to 64.
        lazy_refcounts: QEMU may put off writing refcounts.
        extended_l2: clusters have 32 subclusters.
        compression: how compressed clusters are compressed.
        preallocation: metadata: every cluster has a place; falloc: and host space is set aside; full: and written.
        backing, backing_format: the backing file, by the name with which the image is to find it.
        data_file: the file for the guest's data, by the name with which the image is to find it; it is created.
        data_file_raw: the data file by itself shows what the guest sees.
        luks_header: encrypts the guest's data; as luks.create.build_header() makes it.
    """

    cluster_size: int = 65536
    version: int = 3
    refcount_bits: int = 16
    lazy_refcounts: bool = False
    extended_l2: bool = False
    compression: CompressionType = CompressionType.ZLIB
    preallocation: Preallocation = "off"
    backing: str | None = None
    backing_format: str | None = None
    data_file: str | None = None
    data_file_raw: bool = False
    luks_header: bytes | None = None

    def check(self, name: str) -> None:
        """Refuse what does not go together.

        Raises:
            OpenError: in one line.
        """
        smallest = 16384 if self.extended_l2 else 512
        needs_3 = self.lazy_refcounts or self.extended_l2 or self.compression or self.data_file is not None
        for is_wrong, what in (
            (self.version not in (2, 3), f"there is no qcow2 version {self.version}; choose 2 or 3"),
            (
                not smallest <= self.cluster_size <= 2 << 20 or self.cluster_size & self.cluster_size - 1,
                f"clusters of {self.cluster_size} bytes do not exist; choose a power of two from {smallest} to 2 MiB",
            ),
            (
                self.refcount_bits not in (1, 2, 4, 8, 16, 32, 64),
                f"refcounts of {self.refcount_bits} bits do not exist; choose a power of two up to 64",
            ),
            (
                self.version == 2 and (needs_3 or self.refcount_bits != 16),
                "lazy refcounts, subclusters, zstd, data files and other refcounts than of 16 bits need version 3",
            ),
            (
                self.data_file_raw and self.data_file is None,
                "a raw data file needs a data file; name one",
            ),
            (
                self.luks_header is not None and (self.preallocation != "off" or self.data_file_raw),
                "encryption and preallocation or a raw data file exclude each other; leave one of them out",
            ),
            (
                self.backing is not None and (self.preallocation != "off" or self.data_file_raw),
                "a backing file and preallocation or a raw data file exclude each other; leave one of them out",
            ),
        ):
            if is_wrong:
                raise OpenError(f"{name}: {what}")


def create_image(
    path: str | os.PathLike[str], size: int, options: CreateOptions | None = None, *, durable: bool = True
) -> None:
    """Create an image whose disk reads as zeros, or as its backing file. An existing file is never overwritten.

    Args:
        size: length of the disk in bytes, rounded up to whole sectors as qemu-img does.
        durable: bring it to stable storage; False where the caller sees to that.

    Raises:
        OpenError: the options contradict each other, or the disk is too large for such clusters.
        FileExistsError: there is such a file.
        OSError: from the host.
    """
    chosen, name = options or CreateOptions(), os.fspath(path)
    chosen.check(name)
    size = -(-size // _SECTOR) * _SECTOR
    content = _Layout(name, size, chosen).build()
    data_path = None
    if chosen.data_file is not None:
        data_path = os.path.join(os.path.dirname(name), chosen.data_file)
        _write_new(data_path, b"", size, durable=durable)
    try:
        _write_new(name, content, len(content), durable=durable)
    except BaseException:
        if data_path is not None:
            os.unlink(data_path)
        raise
    # QEMU reads a raw data file through the tables, too, so they have to show what is put there behind its back.
    wanted = "metadata" if chosen.data_file_raw and chosen.preallocation == "off" else chosen.preallocation
    if wanted != "off":
        from nbdserve.formats.qcow2.preallocation import preallocate

        preallocate(name, data_path, wanted)


def _write_new(path: str, content: bytes, length: int, *, durable: bool) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.truncate(length)
        if durable:
            file.flush()
            os.fsync(file.fileno())


class _Layout:
    """Where the parts of a new image go."""

    def __init__(self, name: str, size: int, options: CreateOptions) -> None:
        self.name, self.size, self.options = name, size, options
        bits = options.cluster_size.bit_length() - 1
        geometry = Geometry.of(bits, options.version, extended=options.extended_l2)
        self.l1_entries = geometry.l1_entries(size)
        if self.l1_entries * ENTRY_SIZE > MAXIMUM_L1:
            raise OpenError(
                f"{name}: {size} bytes are too many for clusters of {options.cluster_size}; take larger ones"
            )
        cluster_size = options.cluster_size
        l1_clusters = -(-self.l1_entries * ENTRY_SIZE // cluster_size)
        luks_clusters = -(-len(options.luks_header or b"") // cluster_size)
        self.per_block = cluster_size * 8 // options.refcount_bits
        self.blocks = 1
        while True:
            self.table_clusters = -(-self.blocks * ENTRY_SIZE // cluster_size)
            self.l1_at = 1 + self.table_clusters + self.blocks
            self.luks_at = self.l1_at + l1_clusters
            self.used = self.luks_at + luks_clusters
            if self.used <= self.blocks * self.per_block:
                break
            self.blocks = -(-self.used // self.per_block)
        if self.table_clusters * cluster_size > MAXIMUM_REFCOUNT_TABLE:
            raise self._too_large()

    def _too_large(self) -> OpenError:
        cluster_size = self.options.cluster_size
        return OpenError(
            f"{self.name}: {self.size} bytes are too many for clusters of {cluster_size}; take larger ones"
        )

    def build(self) -> bytes:
        """The whole file."""
        cluster_size, width = self.options.cluster_size, self.options.refcount_bits
        first_block = 1 + self.table_clusters
        table = b"".join(((first_block + each) * cluster_size).to_bytes(8, "big") for each in range(self.blocks))
        refcounts = empty_block(width, self.per_block * self.blocks)
        refcounts[: self.used] = array(refcounts.typecode, (1,)) * self.used
        content = self._header().ljust(cluster_size, b"\0") + table.ljust(self.table_clusters * cluster_size, b"\0")
        content = (content + pack_block(width, refcounts)).ljust(self.luks_at * cluster_size, b"\0")
        return (content + (self.options.luks_header or b"")).ljust(self.used * cluster_size, b"\0")

    def _header(self) -> bytes:
        options = self.options
        length = FIRST_SIZE if options.version == 2 else FULL_SIZE + 8
        backing = b"" if options.backing is None else os.fsencode(options.backing)
        extensions = self._extensions(options.cluster_size - length - len(backing))
        if len(backing) > _MAXIMUM_NAME or length + len(extensions) + len(backing) > options.cluster_size:
            raise OpenError(f"{self.name}: the names do not fit into the header; use shorter or relative ones")
        header = FIRST_HEADER.build(
            {
                "magic": MAGIC,
                "version": options.version,
                "backing_file_offset": length + len(extensions) if backing else 0,
                "backing_file_size": len(backing),
                "cluster_bits": options.cluster_size.bit_length() - 1,
                "size": self.size,
                "crypt_method": Encryption.NONE if options.luks_header is None else Encryption.LUKS,
                "l1_size": self.l1_entries,
                "l1_table_offset": self.l1_at * options.cluster_size,
                "refcount_table_offset": options.cluster_size,
                "refcount_table_clusters": self.table_clusters,
                "nb_snapshots": 0,
                "snapshots_offset": 0,
            }
        )
        if options.version >= 3:
            header += self._features(length) + options.compression.to_bytes(8, "little")
        return header + extensions + backing

    def _features(self, length: int) -> bytes:
        options = self.options
        incompatible = (
            (options.data_file is not None) * Incompatible.EXTERNAL_DATA
            | (options.compression != CompressionType.ZLIB) * Incompatible.COMPRESSION_TYPE
            | options.extended_l2 * Incompatible.EXTENDED_L2
        )
        return SECOND_HEADER.build(
            {
                "incompatible_features": incompatible,
                "compatible_features": options.lazy_refcounts * LAZY_REFCOUNTS,
                "autoclear_features": options.data_file_raw * Autoclear.RAW_DATA,
                "refcount_order": options.refcount_bits.bit_length() - 1,
                "header_length": length,
            }
        )

    def _extensions(self, room: int) -> bytes:
        options = self.options
        extensions = b""
        if options.backing_format is not None:
            extensions += build_extension(Extension.BACKING_FORMAT, options.backing_format.encode())
        if options.data_file is not None:
            extensions += build_extension(Extension.DATA_FILE, os.fsencode(options.data_file))
        if options.luks_header is not None:
            place = (self.luks_at * options.cluster_size).to_bytes(8, "big")
            extensions += build_extension(Extension.ENCRYPTION, place + len(options.luks_header).to_bytes(8, "big"))
        end = build_extension(Extension.END, b"")
        names = build_extension(Extension.FEATURE_NAMES, build_feature_names())
        if options.version >= 3 and len(extensions) + len(names) + len(end) <= room:
            extensions += names
        return extensions + end
