"""The first cluster of an image: header, extensions and the backing file's name (specification: "Header").

Everything is checked here, once; who holds a Header need not look again. Where the tables lie is checked against the
file's length; what stands in them is not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from construct import Bytes, Const, Int32ub, Int64ub, Struct

from nbdserve.block.file import HostFile
from nbdserve.errors import FormatError, Unsupported
from nbdserve.formats.qcow2.entries import ENTRY_SIZE, Geometry

MAXIMUM_L1 = 32 << 20  # bytes; this and the following limits are QEMU's
MAXIMUM_REFCOUNT_TABLE = 8 << 20  # bytes
MAXIMUM_SNAPSHOTS = 65536
_MAXIMUM_NAME = 1023  # bytes
_MAXIMUM_FORMAT_NAME = 255  # bytes
_SECTOR = 512

FIRST_HEADER = Struct(
    "magic" / Const(b"QFI\xfb"),
    "version" / Int32ub,
    "backing_file_offset" / Int64ub,
    "backing_file_size" / Int32ub,
    "cluster_bits" / Int32ub,
    "size" / Int64ub,
    "crypt_method" / Int32ub,
    "l1_size" / Int32ub,
    "l1_table_offset" / Int64ub,
    "refcount_table_offset" / Int64ub,
    "refcount_table_clusters" / Int32ub,
    "nb_snapshots" / Int32ub,
    "snapshots_offset" / Int64ub,
)
SECOND_HEADER = Struct(  # version 3
    "incompatible_features" / Int64ub,
    "compatible_features" / Int64ub,
    "autoclear_features" / Int64ub,
    "refcount_order" / Int32ub,
    "header_length" / Int32ub,
)
EXTENSION = Struct("type" / Int32ub, "length" / Int32ub)
_FEATURE_NAME = Struct("kind" / Bytes(1), "bit" / Bytes(1), "name" / Bytes(46))

FIRST_SIZE = FIRST_HEADER.sizeof()
FULL_SIZE = FIRST_SIZE + SECOND_HEADER.sizeof()
AUTOCLEAR_OFFSET = 88


class ExtensionType(IntEnum):
    """Header extensions that are looked at."""

    END = 0
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857


class Incompatible(IntFlag):
    """Features without which an image cannot be understood."""

    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    EXTERNAL_DATA = 1 << 2
    COMPRESSION_TYPE = 1 << 3
    EXTENDED_L2 = 1 << 4


_HANDLED = Incompatible.DIRTY | Incompatible.CORRUPT | Incompatible.COMPRESSION_TYPE
_NAMES = {2: "external data file", 4: "extended L2 entries (subclusters)"}


class CompressionType(IntEnum):
    """How compressed clusters are compressed."""

    ZLIB = 0
    ZSTD = 1


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header; offsets and sizes in bytes, tables in entries.

    Attributes:
        size: length of the disk.
        incompatible: the feature bits that are set, all of them handled.
        autoclear: features that must be cleared before the image is changed.
        backing_name, backing_format: as the image says; None when it has no backing file, or does not say.
    """

    version: int
    geometry: Geometry
    size: int
    l1_offset: int
    l1_entries: int
    refcount_table_offset: int
    refcount_table_clusters: int
    refcount_width: int
    snapshots: int
    snapshots_offset: int
    incompatible: Incompatible
    autoclear: int
    compression: CompressionType
    backing_name: str | None
    backing_format: str | None

    @classmethod
    def read(cls, file: HostFile) -> Header:
        """Read and check the header of a file.

        Raises:
            FormatError: it is damaged, or the file is too short for it.
            Unsupported: it uses a feature that is not handled.
        """
        start = bytes(file.read(0, min(file.size, FULL_SIZE + 8)))
        if not start.startswith(b"QFI\xfb"):
            raise FormatError(f"{file.name}: not a qcow2 image: no QFI signature; check the format you gave")
        if len(start) < FIRST_SIZE:
            raise FormatError(f"{file.name}: the file ends in the middle of the qcow2 header; it is truncated")
        return _Reader(file, start).header()


class _Reader:
    """Takes the first cluster apart."""

    def __init__(self, file: HostFile, start: bytes) -> None:
        self.file = file
        self.first = FIRST_HEADER.parse(start)
        if self.first.version not in (2, 3):
            raise Unsupported(f"{file.name}: qcow2 version {self.first.version} is not handled; 2 and 3 are")
        if not 9 <= self.first.cluster_bits <= 21:
            raise self.wrong(f"announces clusters of 2^{self.first.cluster_bits} bytes; 2^9 to 2^21 are possible")
        self.geometry = Geometry.of(self.first.cluster_bits, self.first.version)
        self.second = self._second_header(start)
        self.content = bytes(file.read(0, self.geometry.cluster_size))

    def wrong(self, what: str) -> FormatError:
        return FormatError(f"{self.file.name}: the qcow2 header {what}; the image is damaged")

    def _second_header(self, start: bytes) -> dict[str, int]:
        if self.first.version == 2:
            start = start[:FIRST_SIZE] + SECOND_HEADER.build(
                {
                    "incompatible_features": 0,
                    "compatible_features": 0,
                    "autoclear_features": 0,
                    "refcount_order": 4,
                    "header_length": FIRST_SIZE,
                }
            )
        elif len(start) < FULL_SIZE:
            raise FormatError(f"{self.file.name}: the file ends in the middle of the qcow2 header; it is truncated")
        second: dict[str, int] = SECOND_HEADER.parse(start[FIRST_SIZE:])
        length = second["header_length"]
        if self.first.version >= 3 and not FULL_SIZE <= length <= self.geometry.cluster_size:
            raise self.wrong(f"says that it is {length} bytes long, which is not between {FULL_SIZE} and a cluster")
        return second

    def header(self) -> Header:
        first = self.first
        extensions = dict(self._extensions())
        incompatible = self._incompatible(extensions.get(ExtensionType.FEATURE_NAMES, b""))
        if first.crypt_method:
            raise Unsupported(f"{self.file.name}: the image is encrypted (method {first.crypt_method}), not handled")
        if self.second["refcount_order"] > 6:
            raise self.wrong(f"announces refcounts of 2^{self.second['refcount_order']} bits; 64 are the most")
        self._check_tables()
        return Header(
            version=first.version,
            geometry=self.geometry,
            size=first.size // _SECTOR * _SECTOR,  # what lies behind the last whole sector QEMU does not show either
            l1_offset=first.l1_table_offset,
            l1_entries=first.l1_size,
            refcount_table_offset=first.refcount_table_offset,
            refcount_table_clusters=first.refcount_table_clusters,
            refcount_width=1 << self.second["refcount_order"],
            snapshots=first.nb_snapshots,
            snapshots_offset=first.snapshots_offset,
            incompatible=incompatible,
            autoclear=self.second["autoclear_features"],
            compression=self._compression(incompatible),
            backing_name=self._backing_name(),
            backing_format=self._backing_format(extensions),
        )

    def _extensions(self) -> Iterator[tuple[int, bytes]]:
        position = self.second["header_length"]
        end = min(self.first.backing_file_offset or self.geometry.cluster_size, self.geometry.cluster_size)
        while position + 8 <= end:
            extension = EXTENSION.parse(self.content[position : position + 8])
            position += 8
            if extension.type == ExtensionType.END:
                return
            if extension.length > end - position:
                raise self.wrong(f"has an extension {extension.type:#010x} that is longer than the room it is in")
            yield extension.type, self.content[position : position + extension.length]
            position += -(-extension.length // 8) * 8

    def _incompatible(self, names: bytes) -> Incompatible:
        features = self.second["incompatible_features"]
        for bit in range(64):
            if features >> bit & 1 and not _HANDLED >> bit & 1:
                name = _NAMES.get(bit) or _feature_name(names, bit) or f"unknown feature {bit}"
                raise Unsupported(f"{self.file.name}: the image uses {name} (incompatible bit {bit}), not handled")
        return Incompatible(features)

    def _compression(self, incompatible: Incompatible) -> CompressionType:
        has_field = self.second["header_length"] > FULL_SIZE
        method = self.content[FULL_SIZE] if has_field else 0
        if bool(method) != bool(incompatible & Incompatible.COMPRESSION_TYPE):
            raise self.wrong(f"names compression type {method}, which contradicts its feature bits")
        if method not in tuple(CompressionType):
            raise Unsupported(f"{self.file.name}: compression type {method} is not handled; zlib and zstd are")
        return CompressionType(method)

    def _backing_name(self) -> str | None:
        offset, length = self.first.backing_file_offset, self.first.backing_file_size
        if not offset:
            return None
        if not length or length > _MAXIMUM_NAME or offset + length > self.geometry.cluster_size:
            raise self.wrong(f"puts a backing file name of {length} bytes at {offset}, outside the first cluster")
        return os.fsdecode(self.content[offset : offset + length])

    def _backing_format(self, extensions: dict[int, bytes]) -> str | None:
        name = extensions.get(ExtensionType.BACKING_FORMAT)
        if name is None:
            return None
        if len(name) > _MAXIMUM_FORMAT_NAME:
            raise self.wrong(f"names the backing file's format in {len(name)} bytes")
        return name.rstrip(b"\0").decode("ascii", "backslashreplace") or None

    def _check_tables(self) -> None:
        first = self.first
        guest_bytes_per_entry = 1 << self.geometry.table_shift
        if first.size >= 1 << 63 or first.l1_size < -(-first.size // guest_bytes_per_entry):
            raise self.wrong(f"announces a disk of {first.size} bytes but an L1 table of {first.l1_size} entries")
        self._check_table("L1 table", first.l1_table_offset, first.l1_size * ENTRY_SIZE, MAXIMUM_L1)
        length = first.refcount_table_clusters << self.geometry.cluster_bits
        self._check_table("refcount table", first.refcount_table_offset, length, MAXIMUM_REFCOUNT_TABLE)
        if not length:
            raise self.wrong("announces no refcount table")
        if first.nb_snapshots > MAXIMUM_SNAPSHOTS:
            raise self.wrong(f"announces {first.nb_snapshots} snapshots; {MAXIMUM_SNAPSHOTS} are the most")
        self._check_table("snapshot table", first.snapshots_offset, first.nb_snapshots, MAXIMUM_SNAPSHOTS)

    def _check_table(self, what: str, offset: int, length: int, limit: int) -> None:
        if length > limit:
            raise self.wrong(f"announces a {what} of {length} bytes; {limit} are the most")
        check_place(self.file, self.geometry, what, offset, length)


def check_place(file: HostFile, geometry: Geometry, what: str, offset: int, length: int) -> None:
    """Refuse a table that does not begin at a cluster behind the header, or reaches past the file's end."""
    if not length:
        return
    if offset & geometry.cluster_size - 1 or not offset:
        raise FormatError(f"{file.name}: the {what} at {offset} does not begin at a cluster; the image is damaged")
    if offset + length > file.size:
        raise FormatError(
            f"{file.name}: the {what} ({length} bytes at {offset}) reaches past the file's {file.size} bytes; "
            "the image is truncated or damaged"
        )


def _feature_name(names: bytes, bit: int) -> str | None:
    """What the image itself calls an incompatible feature ("Feature name table")."""
    size = _FEATURE_NAME.sizeof()
    for position in range(0, len(names) - size + 1, size):
        entry = _FEATURE_NAME.parse(names[position : position + size])
        if entry.kind == b"\0" and entry.bit[0] == bit:
            text = entry.name.split(b"\0")[0].decode("ascii", "backslashreplace")
            return repr(text) if text else None
    return None
