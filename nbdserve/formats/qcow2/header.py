"""The qcow2 header and its extensions (QEMU, docs/interop/qcow2, sections "Header" and "Header extensions").

Everything is checked here, once, against the file's length and the caps; who holds a Header need not look again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from construct import Bytes, Const, If, Int8ub, Int32ub, Int64ub, Struct, this

from nbdserve.block.file import HostFile
from nbdserve.errors import FormatError, Unsupported

MAGIC = b"QFI\xfb"
V2_LENGTH = 72
V3_LENGTH = 104
REFCOUNT_TABLE_POINTER = 48  # where the header keeps the table's offset (64 bits) and its clusters (32 bits)
AUTOCLEAR = 88  # and the autoclear features (64 bits)

MAXIMUM_L1_BYTES = 32 << 20
MAXIMUM_REFCOUNT_TABLE_BYTES = 8 << 20
MAXIMUM_SNAPSHOTS = 65536
_MAXIMUM_BACKING_NAME = 1023
_MAXIMUM_EXTENSION = 1 << 20

DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = (1 << bit for bit in range(5))
_INCOMPATIBLE_NAMES = {DATA_FILE: "external data file", EXTENDED_L2: "extended L2 entries"}

_END, _BACKING_FORMAT, _FEATURE_NAMES = 0, 0xE2792ACA, 0x6803F857

ZLIB, ZSTD = 0, 1

_V3_FIELDS = Struct(
    "incompatible" / Int64ub,
    "compatible" / Int64ub,
    "autoclear" / Int64ub,
    "refcount_order" / Int32ub,
    "header_length" / Int32ub,
)

_HEADER = Struct(
    "magic" / Const(MAGIC),
    "version" / Int32ub,
    "backing_name_offset" / Int64ub,
    "backing_name_size" / Int32ub,
    "cluster_bits" / Int32ub,
    "size" / Int64ub,
    "encryption" / Int32ub,
    "l1_size" / Int32ub,
    "l1_offset" / Int64ub,
    "refcount_table_offset" / Int64ub,
    "refcount_table_clusters" / Int32ub,
    "snapshots" / Int32ub,
    "snapshots_offset" / Int64ub,
    "v3" / If(this.version >= 3, _V3_FIELDS),
)

_EXTENSION = Struct("type" / Int32ub, "length" / Int32ub)
_FEATURE_NAME = Struct("kind" / Int8ub, "bit" / Int8ub, "name" / Bytes(46))


@dataclass(frozen=True, slots=True)
class Header:
    """What the header says. Offsets and sizes are in bytes, and lie inside the file.

    Attributes:
        l1_entries: entries of the L1 table, enough for the whole disk.
        refcount_order: refcounts are 1 << refcount_order bits wide.
        autoclear: feature bits that a writer which does not know them has to clear.
    """

    version: int
    cluster_bits: int
    size: int
    l1_offset: int
    l1_entries: int
    refcount_table_offset: int
    refcount_table_clusters: int
    refcount_order: int
    snapshots: int
    snapshots_offset: int
    incompatible: int = 0
    autoclear: int = 0
    compression: int = ZLIB
    backing_name: str | None = None
    backing_format: str | None = None
    feature_names: dict[tuple[int, int], str] = field(default_factory=dict)

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits


def l1_entries_for(size: int, cluster_bits: int) -> int:
    """How many L1 entries a disk of `size` bytes needs."""
    covered = cluster_bits + cluster_bits - 3  # one L2 table maps a cluster's worth of 8-byte entries
    return -(-size >> covered)


def read_header(file: HostFile) -> Header:
    """Read and check the header.

    Raises:
        FormatError: it is damaged, or does not fit the file.
        Unsupported: it uses a feature that is not handled here; the message names it.
    """
    name, length = file.name, file.size
    if length < V2_LENGTH:
        raise FormatError(f"{name}: too short for a qcow2 image ({length} bytes); the file is truncated")
    raw = bytes(file.read(0, V3_LENGTH + 8))
    if not raw.startswith(MAGIC):
        raise FormatError(f"{name}: not a qcow2 image; check the format you gave")
    fields = _HEADER.parse(raw)
    if fields.version not in (2, 3):
        raise Unsupported(f"{name}: qcow2 version {fields.version} is not handled; 2 and 3 are")
    if not 9 <= fields.cluster_bits <= 21:
        raise FormatError(f"{name}: cluster size 2^{fields.cluster_bits} is out of range; the header is damaged")
    v3 = fields.v3
    header_length = v3.header_length if v3 else V2_LENGTH
    cluster_size = 1 << fields.cluster_bits
    if v3 and not (V3_LENGTH <= header_length <= cluster_size and header_length % 8 == 0):
        raise FormatError(f"{name}: header length {header_length} is out of range; the header is damaged")
    if v3 and v3.refcount_order > 6:
        raise FormatError(f"{name}: refcounts of 2^{v3.refcount_order} bits; the header is damaged")
    backing_format, feature_names = _read_extensions(file, header_length, cluster_size)
    if fields.encryption:
        raise Unsupported(f"{name}: encrypted qcow2 images are not handled; decrypt it with qemu-img convert first")
    compression = raw[V3_LENGTH] if v3 and header_length > V3_LENGTH else ZLIB
    header = Header(
        version=fields.version,
        cluster_bits=fields.cluster_bits,
        size=fields.size,
        l1_offset=fields.l1_offset,
        l1_entries=fields.l1_size,
        refcount_table_offset=fields.refcount_table_offset,
        refcount_table_clusters=fields.refcount_table_clusters,
        refcount_order=v3.refcount_order if v3 else 4,
        snapshots=fields.snapshots,
        snapshots_offset=fields.snapshots_offset,
        incompatible=v3.incompatible if v3 else 0,
        autoclear=v3.autoclear if v3 else 0,
        compression=compression,
        backing_name=_read_backing_name(file, fields.backing_name_offset, fields.backing_name_size, cluster_size),
        backing_format=backing_format,
        feature_names=feature_names,
    )
    _check_features(header, name)
    _check_places(header, name, length)
    return header


def _read_extensions(file: HostFile, position: int, end: int) -> tuple[str | None, dict[tuple[int, int], str]]:
    backing_format, feature_names = None, {}
    while position + _EXTENSION.sizeof() <= end:
        extension = _EXTENSION.parse(bytes(file.read(position, 8)))
        position += 8
        if extension.type == _END:
            break
        if extension.length > min(end - position, _MAXIMUM_EXTENSION):
            raise FormatError(f"{file.name}: a header extension reaches past the first cluster; the header is damaged")
        content = bytes(file.read(position, extension.length))
        if extension.type == _BACKING_FORMAT:
            backing_format = content.decode("utf-8", "replace")
        elif extension.type == _FEATURE_NAMES:
            for at in range(0, len(content) - 47, 48):
                feature = _FEATURE_NAME.parse(content[at : at + 48])
                text = feature.name.rstrip(b"\0").decode("ascii", "replace")
                feature_names[feature.kind, feature.bit] = "".join(c for c in text if c.isprintable())
        position += -(-extension.length // 8) * 8
    return backing_format, feature_names


def _read_backing_name(file: HostFile, offset: int, size: int, cluster_size: int) -> str | None:
    if size > _MAXIMUM_BACKING_NAME or offset + size > cluster_size:
        raise FormatError(f"{file.name}: the backing file's name lies outside the header; the header is damaged")
    name = bytes(file.read(offset, size)) if offset else b""
    return name.decode("utf-8", "surrogateescape") or None


def _check_features(header: Header, name: str) -> None:
    unknown = header.incompatible & ~(DIRTY | CORRUPT | COMPRESSION)
    for bit in range(64):
        if unknown >> bit & 1:
            feature = header.feature_names.get((0, bit)) or _INCOMPATIBLE_NAMES.get(1 << bit) or f"feature bit {bit}"
            raise Unsupported(f"{name}: uses {feature}, which is not handled here; convert it with qemu-img first")
    if header.compression not in (ZLIB, ZSTD):
        raise Unsupported(f"{name}: compression type {header.compression} is not handled; zlib (0) and zstd (1) are")
    if header.compression != ZLIB and not header.incompatible & COMPRESSION:
        raise FormatError(f"{name}: the compression type is set without its feature bit; the header is damaged")


def _check_places(header: Header, name: str, length: int) -> None:
    """The tables lie inside the file, on cluster boundaries, and are neither too large nor too small."""
    mask = header.cluster_size - 1
    if header.l1_entries * 8 > MAXIMUM_L1_BYTES:
        raise FormatError(f"{name}: the L1 table has {header.l1_entries} entries; the header is damaged")
    if header.l1_entries < l1_entries_for(header.size, header.cluster_bits):
        raise FormatError(f"{name}: the L1 table is too small for a disk of {header.size} bytes; the header is damaged")
    if header.l1_entries and not header.l1_offset:
        raise FormatError(f"{name}: the L1 table lies on the header; the header is damaged")
    if header.l1_offset & mask or header.l1_offset + 8 * header.l1_entries > length:
        raise FormatError(f"{name}: the L1 table at {header.l1_offset} does not lie inside the file; it is truncated")
    table_bytes = header.refcount_table_clusters << header.cluster_bits
    if not 0 < table_bytes <= MAXIMUM_REFCOUNT_TABLE_BYTES:
        raise FormatError(f"{name}: a refcount table of {table_bytes} bytes; the header is damaged")
    if header.refcount_table_offset & mask or header.refcount_table_offset + table_bytes > length + mask:
        raise FormatError(
            f"{name}: the refcount table at {header.refcount_table_offset} lies outside the file; it is truncated"
        )
    if header.snapshots > MAXIMUM_SNAPSHOTS:
        raise FormatError(f"{name}: {header.snapshots} snapshots; the header is damaged")
    if header.snapshots and (header.snapshots_offset & mask or header.snapshots_offset >= length):
        raise FormatError(f"{name}: the snapshot table does not lie inside the file; it is truncated")
