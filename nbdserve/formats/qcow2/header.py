"""The first cluster of an image: header, extensions, backing file's name (QEMU, docs/interop/qcow2, "Header").

Everything is checked here, once; who holds a Header need not look again. Where the tables lie is checked against the
file's length; what stands in them is not.

A header is changed field by field, each change inside one sector, so that a crash leaves the old or the new fields and
everything that is not known here stays as it is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from types import SimpleNamespace

from nbdserve.block.file import HostFile
from nbdserve.errors import FormatError, Unsupported
from nbdserve.formats.qcow2.entries import ENTRY_SIZE, Geometry
from nbdserve.formats.qcow2.extensions import Extension, feature_name, read_extensions
from nbdserve.formats.record import Record

MAGIC = b"QFI\xfb"
MAXIMUM_L1 = 32 << 20  # bytes; this and the following limits are QEMU's
MAXIMUM_REFCOUNT_TABLE = 8 << 20  # bytes
MAXIMUM_SNAPSHOTS = 65536
_MAXIMUM_NAME = 1023  # bytes
_MAXIMUM_FORMAT_NAME = 255  # bytes
_SECTOR = 512
_SMALLEST_EXTENDED = 14  # cluster bits; a subcluster is not smaller than a sector

FIRST_HEADER = Record(
    ">",
    magic="4s",
    version="I",
    backing_file_offset="Q",
    backing_file_size="I",
    cluster_bits="I",
    size="Q",
    crypt_method="I",
    l1_size="I",
    l1_table_offset="Q",
    refcount_table_offset="Q",
    refcount_table_clusters="I",
    nb_snapshots="I",
    snapshots_offset="Q",
)
SECOND_HEADER = Record(
    ">",
    incompatible_features="Q",
    compatible_features="Q",
    autoclear_features="Q",
    refcount_order="I",
    header_length="I",
)

FIRST_SIZE = FIRST_HEADER.size
FULL_SIZE = FIRST_SIZE + SECOND_HEADER.size

# Where the fields lie that are changed.
BACKING_FIELDS = 8  # offset of the name (8 bytes), its length (4)
DISK_FIELDS = 24  # size (8 bytes), encryption (4), L1 entries (4), L1 offset (8)
REFCOUNT_TABLE_FIELDS = 48  # offset (8), clusters (4)
SNAPSHOT_FIELDS = 60  # count (4), offset (8)
INCOMPATIBLE_FIELD = 72  # 8 bytes
COMPATIBLE_FIELD = 80  # 8 bytes
AUTOCLEAR_FIELD = 88  # 8 bytes
REFCOUNT_ORDER_FIELD = 96  # 4 bytes
HEADER_LENGTH_FIELD = 100  # 4 bytes


class Incompatible(IntFlag):
    """Features without which an image cannot be understood."""

    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    EXTERNAL_DATA = 1 << 2
    COMPRESSION_TYPE = 1 << 3
    EXTENDED_L2 = 1 << 4


class Autoclear(IntFlag):
    """Features that a writer who does not know them has to clear."""

    BITMAPS = 1 << 0
    RAW_DATA = 1 << 1


LAZY_REFCOUNTS = 1  # a compatible feature

_HANDLED = sum(Incompatible)


class CompressionType(IntEnum):
    """How compressed clusters are compressed."""

    ZLIB = 0
    ZSTD = 1


class Encryption(IntEnum):
    """How guest clusters are encrypted."""

    NONE = 0
    AES = 1
    LUKS = 2


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header; offsets and sizes in bytes, tables in entries.

    Attributes:
        size: length of the disk.
        incompatible: the feature bits that are set, all of them handled.
        compatible: feature bits that may be ignored.
        autoclear: features that must be cleared before the image is changed, unless they are kept right.
        backing_name, backing_format: as the image says; None when it has no backing file, or does not say.
        data_name: the external data file; None when the image has none, or does not say.
        bitmaps: the extension that leads to persistent bitmaps, or None.
        encryption_place: offset and length of the LUKS header, or None.
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
    compatible: int
    autoclear: int
    compression: CompressionType
    encryption: Encryption
    backing_name: str | None
    backing_format: str | None
    data_name: str | None
    bitmaps: bytes | None
    encryption_place: tuple[int, int] | None

    @property
    def has_raw_data_file(self) -> bool:
        """Whether the external data file by itself shows what the guest sees."""
        return bool(self.incompatible & Incompatible.EXTERNAL_DATA and self.autoclear & Autoclear.RAW_DATA)

    @classmethod
    def read(cls, file: HostFile) -> Header:
        """Read and check the header of a file.

        Raises:
            FormatError: it is damaged, or the file is too short for it.
            Unsupported: it uses a feature that is not handled.
        """
        start = bytes(file.read(0, min(file.size, FULL_SIZE + 8)))
        if not start.startswith(MAGIC):
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
        self.cluster_size = 1 << self.first.cluster_bits
        self.second = self._second_header(start)
        self.content = bytes(file.read(0, self.cluster_size))
        end = min(self.first.backing_file_offset or self.cluster_size, self.cluster_size)
        try:
            self.extensions = read_extensions(self.content[:end], self.second.header_length)
        except ValueError as error:
            raise self.wrong(str(error)) from None
        self.incompatible = self._incompatible()
        self.geometry = Geometry.of(
            self.first.cluster_bits,
            self.first.version,
            extended=bool(self.incompatible & Incompatible.EXTENDED_L2),
            external=bool(self.incompatible & Incompatible.EXTERNAL_DATA),
        )

    def wrong(self, what: str) -> FormatError:
        return FormatError(f"{self.file.name}: the qcow2 header {what}; the image is damaged")

    def _second_header(self, start: bytes) -> SimpleNamespace:
        if self.first.version == 2:
            start = start[:FIRST_SIZE] + bytes(24) + (4).to_bytes(4, "big") + FIRST_SIZE.to_bytes(4, "big")
        elif len(start) < FULL_SIZE:
            raise FormatError(f"{self.file.name}: the file ends in the middle of the qcow2 header; it is truncated")
        second = SECOND_HEADER.parse(start, FIRST_SIZE)
        length = second.header_length
        if self.first.version >= 3 and (not FULL_SIZE <= length <= self.cluster_size or length % 8):
            raise self.wrong(f"says that it is {length} bytes long, which is not between {FULL_SIZE} and a cluster")
        return second

    def header(self) -> Header:
        first = self.first
        if self.second.refcount_order > 6:
            raise self.wrong(f"announces refcounts of 2^{self.second.refcount_order} bits; 64 are the most")
        if self.geometry.words > 1 and first.cluster_bits < _SMALLEST_EXTENDED:
            raise self.wrong(f"announces subclusters of clusters of 2^{first.cluster_bits} bytes, which are too small")
        if self.geometry.is_external and first.nb_snapshots:
            raise self.wrong("announces snapshots together with an external data file")
        self._check_tables()
        data_name = self._text(Extension.DATA_FILE, _MAXIMUM_NAME)
        return Header(
            version=first.version,
            geometry=self.geometry,
            size=first.size // _SECTOR * _SECTOR,  # what lies behind the last whole sector QEMU does not show either
            l1_offset=first.l1_table_offset,
            l1_entries=first.l1_size,
            refcount_table_offset=first.refcount_table_offset,
            refcount_table_clusters=first.refcount_table_clusters,
            refcount_width=1 << self.second.refcount_order,
            snapshots=first.nb_snapshots,
            snapshots_offset=first.snapshots_offset,
            incompatible=self.incompatible,
            compatible=self.second.compatible_features,
            autoclear=self.second.autoclear_features,
            compression=self._compression(),
            encryption=self._encryption(),
            backing_name=self._backing_name(),
            backing_format=self._text(Extension.BACKING_FORMAT, _MAXIMUM_FORMAT_NAME),
            data_name=data_name if self.geometry.is_external else None,
            bitmaps=self.extensions.get(Extension.BITMAPS),
            encryption_place=self._encryption_place(),
        )

    def _incompatible(self) -> Incompatible:
        features = self.second.incompatible_features
        for bit in range(64):
            if features >> bit & 1 and not _HANDLED >> bit & 1:
                name = feature_name(self.extensions.get(Extension.FEATURE_NAMES, b""), bit) or f"unknown feature {bit}"
                raise Unsupported(f"{self.file.name}: the image uses {name} (incompatible bit {bit}), not handled here")
        return Incompatible(features)

    def _compression(self) -> CompressionType:
        has_field = self.second.header_length > FULL_SIZE
        method = self.content[FULL_SIZE] if has_field else 0
        if bool(method) != bool(self.incompatible & Incompatible.COMPRESSION_TYPE):
            raise self.wrong(f"names compression type {method}, which contradicts its feature bits")
        if method not in tuple(CompressionType):
            raise Unsupported(f"{self.file.name}: compression type {method} is not handled; zlib and zstd are")
        return CompressionType(method)

    def _encryption(self) -> Encryption:
        method = self.first.crypt_method
        if method not in tuple(Encryption):
            raise Unsupported(f"{self.file.name}: the image is encrypted by method {method}, which is not handled")
        return Encryption(method)

    def _encryption_place(self) -> tuple[int, int] | None:
        place = self.extensions.get(Extension.ENCRYPTION)
        if self.first.crypt_method != Encryption.LUKS:
            return None
        if place is None or len(place) != 16:
            raise self.wrong("does not say where the LUKS header lies")
        offset, length = int.from_bytes(place[:8], "big"), int.from_bytes(place[8:], "big")
        self._check_table("LUKS header", offset, length, MAXIMUM_L1)
        return offset, length

    def _backing_name(self) -> str | None:
        offset, length = self.first.backing_file_offset, self.first.backing_file_size
        if not offset and length <= _MAXIMUM_NAME:
            return None
        if not offset or not length or length > _MAXIMUM_NAME or offset + length > self.cluster_size:
            raise self.wrong(f"puts a backing file name of {length} bytes at {offset}, outside the first cluster")
        name = self.content[offset : offset + length]
        if b"\0" in name:
            raise self.wrong("has a backing file name with a zero byte in it")
        return os.fsdecode(name)

    def _text(self, kind: Extension, most: int) -> str | None:
        text = self.extensions.get(kind)
        if text is None:
            return None
        if len(text) > most:
            raise self.wrong(f"has a name of {len(text)} bytes in extension {kind:#x}")
        return os.fsdecode(text.rstrip(b"\0")) or None

    def _check_tables(self) -> None:
        first = self.first
        if first.size >= 1 << 63 or first.l1_size < self.geometry.l1_entries(first.size):
            raise self.wrong(f"announces a disk of {first.size} bytes but an L1 table of {first.l1_size} entries")
        self._check_table("L1 table", first.l1_table_offset, first.l1_size * ENTRY_SIZE, MAXIMUM_L1)
        length = first.refcount_table_clusters << first.cluster_bits
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
