"""The superblock: what an ext2, ext3 or ext4 file system is made of, and where its parts lie.

Layout: struct ext4_super_block and struct ext4_group_desc of the kernel's Documentation/filesystems/ext4. Every number
is checked here, once, against the device's size and the limits that the kernel sets; what holds a Superblock may rely
on it. The places that group descriptors name are checked when they are used, so that one bad group spoils no other.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from fusemount.filesystems.ext.checksum import ALL_ONES, crc32c
from nbdserve.block.device import BlockDevice
from nbdserve.errors import FormatError, Unsupported

OFFSET = 1024
SIZE = 1024
MAGIC = 0xEF53
CHECKSUM_OFFSET = 1020
MAX_GROUPS = 1 << 21  # 256 TiB in groups of 128 MiB; also bounds the memory that descriptors take

_HEAD = struct.Struct("<13I6H4I2H")  # up to s_def_resgid
_DYNAMIC = struct.Struct("<I2H3I16s")  # s_first_ino up to s_uuid, at 84


class Compat(IntEnum):
    """s_feature_compat"""

    HAS_JOURNAL = 0x4
    DIR_INDEX = 0x20
    SPARSE_SUPER2 = 0x200
    FAST_COMMIT = 0x400
    ORPHAN_FILE = 0x1000


class Incompat(IntEnum):
    """s_feature_incompat"""

    COMPRESSION = 0x1
    FILETYPE = 0x2
    RECOVER = 0x4
    JOURNAL_DEV = 0x8
    META_BG = 0x10
    EXTENTS = 0x40
    BIT64 = 0x80
    MMP = 0x100
    FLEX_BG = 0x200
    EA_INODE = 0x400
    DIRDATA = 0x1000
    CSUM_SEED = 0x2000
    LARGEDIR = 0x4000
    INLINE_DATA = 0x8000
    ENCRYPT = 0x10000
    CASEFOLD = 0x20000


class ReadOnlyCompat(IntEnum):
    """s_feature_ro_compat"""

    SPARSE_SUPER = 0x1
    LARGE_FILE = 0x2
    HUGE_FILE = 0x8
    GDT_CSUM = 0x10
    DIR_NLINK = 0x20
    EXTRA_ISIZE = 0x40
    HAS_SNAPSHOT = 0x80
    QUOTA = 0x100
    BIGALLOC = 0x200
    METADATA_CSUM = 0x400
    REPLICA = 0x800
    READONLY = 0x1000
    PROJECT = 0x2000
    SHARED_BLOCKS = 0x4000
    VERITY = 0x8000
    ORPHAN_PRESENT = 0x10000


class State(IntEnum):
    """s_state"""

    VALID = 1
    ERROR = 2
    ORPHANS = 4


_NOT_READABLE = Incompat.COMPRESSION | Incompat.JOURNAL_DEV | Incompat.DIRDATA
_KNOWN_INCOMPAT = sum(Incompat) & ~_NOT_READABLE
_WRITABLE_RO_COMPAT = (
    ReadOnlyCompat.SPARSE_SUPER
    | ReadOnlyCompat.LARGE_FILE
    | ReadOnlyCompat.HUGE_FILE
    | ReadOnlyCompat.GDT_CSUM
    | ReadOnlyCompat.DIR_NLINK
    | ReadOnlyCompat.EXTRA_ISIZE
    | ReadOnlyCompat.BIGALLOC
    | ReadOnlyCompat.METADATA_CSUM
    | ReadOnlyCompat.VERITY
    | ReadOnlyCompat.ORPHAN_PRESENT
)
_READ_ONLY_INCOMPAT = Incompat.MMP | Incompat.ENCRYPT | Incompat.CASEFOLD


@dataclass(frozen=True, slots=True)
class Superblock:
    """A superblock whose numbers have been checked.

    Attributes:
        block_size, cluster_size, inode_size, descriptor_size: bytes.
        blocks, first_block, reserved_gdt: counted in blocks.
        checksum_seed: what checksums of metadata start with; None when it has none.
        unsigned_hash: whether directory hashes take characters as unsigned.
        journal_inode, orphan_list, orphan_file: inode numbers, 0 for none.
    """

    block_size: int
    cluster_size: int
    blocks: int
    first_block: int
    inodes: int
    first_inode: int
    inode_size: int
    want_extra_size: int
    descriptor_size: int
    blocks_per_group: int
    inodes_per_group: int
    groups: int
    compat: int
    incompat: int
    ro_compat: int
    state: int
    creator: int
    first_meta_group: int
    reserved_gdt: int
    backup_groups: tuple[int, int]
    uuid: bytes
    checksum_seed: int | None
    unsigned_hash: bool
    hash_version: int
    hash_seed: tuple[int, int, int, int]
    journal_inode: int
    journal_uuid: bytes
    orphan_list: int
    orphan_file: int

    def has(self, feature: Compat | Incompat | ReadOnlyCompat) -> bool:
        """Whether a feature is on."""
        kind = type(feature)
        word = self.compat if kind is Compat else self.incompat if kind is Incompat else self.ro_compat
        return bool(word & feature)

    @property
    def cluster_blocks(self) -> int:
        """Blocks in the unit of allocation; 1 without bigalloc."""
        return self.cluster_size // self.block_size

    def valid_range(self, block: int, count: int = 1) -> bool:
        """Whether blocks can be used for anything."""
        return self.first_block <= block and block + count <= self.blocks and block > 0

    def has_super(self, group: int) -> bool:
        """Whether a group holds a copy of the superblock."""
        if self.has(Compat.SPARSE_SUPER2):
            return group == 0 or group in self.backup_groups
        if group <= 1 or not self.has(ReadOnlyCompat.SPARSE_SUPER):
            return True
        return any(_is_power(group, base) for base in (3, 5, 7))

    def group_start(self, group: int) -> int:
        """The first block of a group."""
        return self.first_block + group * self.blocks_per_group

    def descriptor_blocks(self) -> Iterator[int]:
        """Where the blocks of the table of group descriptors lie, in order."""
        per_block = self.block_size // self.descriptor_size
        start = OFFSET // self.block_size
        for index in range(-(-self.groups // per_block)):
            if not self.has(Incompat.META_BG) or index < self.first_meta_group:
                yield start + 1 + index
            else:
                group = index * per_block
                # In 1 KiB blocks counted from 0 (bigalloc) the superblock is the second block of group 0.
                late = index == 0 and self.block_size == 1024 and self.first_block == 0
                yield self.group_start(group) + self.has_super(group) + late

    def why_not_writable(self) -> str:
        """One line on why we must not write to it; "" when we may. Says nothing of its journal."""
        if self.state & State.ERROR:
            return "it is marked as having errors; run e2fsck on it to write, it can be read"
        if not self.state & State.VALID:
            return "it was not unmounted cleanly and its journal cannot mend that; run e2fsck on it to write"
        unknown = self.ro_compat & ~_WRITABLE_RO_COMPAT
        if unknown & (ReadOnlyCompat.QUOTA | ReadOnlyCompat.PROJECT):
            return "it keeps quotas, which would become wrong; it can be read"
        names = _names(ReadOnlyCompat, unknown) + _names(Incompat, self.incompat & _READ_ONLY_INCOMPAT)
        if names:
            return f"it uses {', '.join(names)}, which cannot be written here; it can be read"
        if self.creator == 1:
            return "it belongs to the Hurd; it can be read"
        return ""


def read_superblock(device: BlockDevice) -> Superblock:
    """Read and check the superblock.

    Raises:
        FormatError: this is no ext file system, or its superblock is damaged.
        Unsupported: it uses what cannot even be read here.
    """
    if device.size < OFFSET + SIZE:
        raise FormatError("too small for an ext2, ext3 or ext4 file system")
    return parse(bytes(device.read(OFFSET, SIZE)), device.size)


def parse(raw: bytes, device_size: int) -> Superblock:
    """Check the 1024 bytes of a superblock; see read_superblock()."""
    (
        inodes, blocks, _, _, _, first_block, log_block, log_cluster, blocks_per_group, _, inodes_per_group, _, _,
        _, _, magic, state, _, _, _, _, creator, revision, _, _,
    ) = _HEAD.unpack_from(raw)  # fmt: skip
    if magic != MAGIC:
        raise FormatError("no ext2, ext3 or ext4 file system: its magic number is missing")
    first_inode, inode_size, _, compat, incompat, ro_compat, uuid = _DYNAMIC.unpack_from(raw, 84)
    if revision == 0:
        first_inode, inode_size, compat, incompat, ro_compat = 11, 128, 0, 0, 0
    if incompat & ~_KNOWN_INCOMPAT:
        names = ", ".join(_names(Incompat, incompat & ~_KNOWN_INCOMPAT))
        raise Unsupported(f"this ext file system uses {names}, which is not supported")
    descriptor_size = 32
    if incompat & Incompat.BIT64:
        blocks |= _u32(raw, 0x150) << 32
        descriptor_size = _u16(raw, 0xFE)
    _check(log_block <= 6, "block size")
    block_size = 1024 << log_block
    bigalloc = bool(ro_compat & ReadOnlyCompat.BIGALLOC)
    _check(log_block <= log_cluster <= log_block + 16 if bigalloc else True, "cluster size")
    cluster_size = 1024 << log_cluster if bigalloc else block_size
    clusters_per_group = blocks_per_group * block_size // cluster_size
    _check(descriptor_size in (32, 64, 128, 256, 512, 1024), "descriptor size")
    _check(descriptor_size == 32 or bool(incompat & Incompat.BIT64), "descriptor size")
    _check(first_block == (1 if block_size == 1024 and not bigalloc else 0), "first block")
    _check(0 < clusters_per_group <= 8 * block_size, "number of blocks in a group")
    _check(blocks_per_group % (cluster_size // block_size) == 0, "number of blocks in a group")
    _check(inode_size in [128 << power for power in range(10)] and inode_size <= block_size, "inode size")
    _check(0 < inodes_per_group <= 8 * block_size, "number of inodes in a group")
    _check(first_block < blocks, "number of blocks")
    if blocks * block_size > device_size:
        raise FormatError(f"the ext file system is {blocks * block_size} bytes long, its device only {device_size}")
    groups = -(-(blocks - first_block) // blocks_per_group)
    if groups > MAX_GROUPS:
        raise Unsupported(f"this ext file system has {groups} block groups; up to {MAX_GROUPS} are supported")
    _check(inodes == groups * inodes_per_group, "number of inodes")
    _check(11 <= first_inode <= inodes_per_group, "first inode")
    seed = None
    if ro_compat & ReadOnlyCompat.METADATA_CSUM:
        if raw[0x175] != 1:
            raise Unsupported("this ext file system uses a checksum other than CRC-32C, which is not supported")
        if crc32c(raw[:CHECKSUM_OFFSET], ALL_ONES) != _u32(raw, CHECKSUM_OFFSET):
            raise FormatError("the checksum of the ext superblock is wrong; run e2fsck on it")
        seed = _u32(raw, 0x270) if incompat & Incompat.CSUM_SEED else crc32c(uuid, ALL_ONES)
    return Superblock(
        block_size=block_size,
        cluster_size=cluster_size,
        blocks=blocks,
        first_block=first_block,
        inodes=inodes,
        first_inode=first_inode,
        inode_size=inode_size,
        want_extra_size=min(_u16(raw, 0x15E), inode_size - 128) & ~3 if inode_size > 128 else 0,
        descriptor_size=descriptor_size,
        blocks_per_group=blocks_per_group,
        inodes_per_group=inodes_per_group,
        groups=groups,
        compat=compat,
        incompat=incompat,
        ro_compat=ro_compat,
        state=state,
        creator=creator,
        first_meta_group=_u32(raw, 0x104),
        reserved_gdt=_u16(raw, 0xCE),
        backup_groups=(_u32(raw, 0x24C), _u32(raw, 0x250)),
        uuid=uuid,
        checksum_seed=seed,
        unsigned_hash=bool(_u32(raw, 0x160) & 2),
        hash_version=raw[0xFC],
        hash_seed=struct.unpack_from("<4I", raw, 0xEC),
        journal_inode=_u32(raw, 0xE0),
        journal_uuid=raw[0xD0:0xE0],
        orphan_list=_u32(raw, 0xE8),
        orphan_file=_u32(raw, 0x280),
    )


def _check(valid: bool, what: str) -> None:
    if not valid:
        raise FormatError(f"the ext superblock is damaged: impossible {what}; run e2fsck on it")


def _names(kind: type[Incompat] | type[ReadOnlyCompat], bits: int) -> list[str]:
    known = [f"the feature {flag.name.lower()}" for flag in kind if bits & flag and flag.name]
    rest = bits & ~sum(kind)
    return known + ([f"an unknown feature ({rest:#x})"] if rest else [])


def _is_power(number: int, base: int) -> bool:
    while number % base == 0:
        number //= base
    return number == 1


def _u16(raw: bytes, offset: int) -> int:
    return int.from_bytes(raw[offset : offset + 2], "little")


def _u32(raw: bytes, offset: int) -> int:
    return int.from_bytes(raw[offset : offset + 4], "little")
