"""libext2fs.so.2 through cffi: what we call of it, and an I/O manager whose callbacks stand on a block device.

What it keeps: no exception leaves a callback into C. A callback that fails keeps its exception, returns an error code,
and whoever called the library raises the exception again, even where the library swallowed the code.

The declarations follow the public headers ext2_io.h and ext2fs.h (unchanged where we look since 1.42); the library is
under the LGPL and only loaded at run time, when a file system is to be written. It is not thread-safe.
"""

from __future__ import annotations

import errno
from functools import cache
from typing import Any

from fusemount.filesystems.base import error
from nbdserve.block.device import BlockDevice
from nbdserve.errors import FormatError, OpenError

NAME = "libext2fs.so.2"
MISSING = f"{NAME} is missing, without which ext file systems can only be read (Debian, Ubuntu: apt install libext2fs2)"

_DECLARATIONS = """
typedef long errcode_t;
typedef struct struct_io_channel *io_channel;
typedef struct struct_io_manager *io_manager;
typedef void *ext2_extent_handle_t;

struct struct_io_channel {
    errcode_t magic;
    io_manager manager;
    char *name;
    int block_size;
    void *read_error;
    void *write_error;
    int refcount;
    int flags;
    long reserved[14];
    void *private_data;
    void *app_data;
    int align;
};

struct struct_io_manager {
    errcode_t magic;
    const char *name;
    errcode_t (*open)(const char *, int, io_channel *);
    errcode_t (*close)(io_channel);
    errcode_t (*set_blksize)(io_channel, int);
    errcode_t (*read_blk)(io_channel, unsigned long, int, void *);
    errcode_t (*write_blk)(io_channel, unsigned long, int, const void *);
    errcode_t (*flush)(io_channel);
    errcode_t (*write_byte)(io_channel, unsigned long, int, const void *);
    errcode_t (*set_option)(io_channel, const char *, const char *);
    errcode_t (*get_stats)(io_channel, void **);
    errcode_t (*read_blk64)(io_channel, unsigned long long, int, void *);
    errcode_t (*write_blk64)(io_channel, unsigned long long, int, const void *);
    errcode_t (*discard)(io_channel, unsigned long long, unsigned long long);
    errcode_t (*cache_readahead)(io_channel, unsigned long long, unsigned long long);
    errcode_t (*zeroout)(io_channel, unsigned long long, unsigned long long);
    long reserved[14];
};

struct struct_ext2_filsys {
    errcode_t magic;
    io_channel io;
    int flags;
    char *device_name;
    void *super;
    unsigned int blocksize;
    int fragsize;
    uint32_t group_desc_count;
    unsigned long desc_blocks;
    void *group_desc;
    unsigned int inode_blocks_per_group;
    void *inode_map;
    void *block_map;
};
typedef struct struct_ext2_filsys *ext2_filsys;

struct ext2fs_extent {
    uint64_t e_pblk;
    uint64_t e_lblk;
    uint32_t e_len;
    uint32_t e_flags;
};

errcode_t ext2fs_dirhash(int, const char *, int, const uint32_t *, uint32_t *, uint32_t *);

errcode_t ext2fs_open2(const char *, const char *, int, int, unsigned int, io_manager, ext2_filsys *);
errcode_t ext2fs_read_bitmaps(ext2_filsys);
errcode_t ext2fs_flush2(ext2_filsys, int);
errcode_t ext2fs_flush_icache(ext2_filsys);
void ext2fs_free(ext2_filsys);
void ext2fs_mark_super_dirty(ext2_filsys);
int ext2fs_group_desc_csum_verify(ext2_filsys, uint32_t);
uint32_t ext2fs_bg_free_blocks_count(ext2_filsys, uint32_t);
uint32_t ext2fs_bg_free_inodes_count(ext2_filsys, uint32_t);

errcode_t ext2fs_new_inode(ext2_filsys, uint32_t, int, void *, uint32_t *);
void ext2fs_inode_alloc_stats2(ext2_filsys, uint32_t, int, int);
int ext2fs_test_inode_bitmap2(void *, uint32_t);
errcode_t ext2fs_write_inode_full(ext2_filsys, uint32_t, void *, int);

uint64_t ext2fs_find_inode_goal(ext2_filsys, uint32_t, void *, uint64_t);
errcode_t ext2fs_new_range(ext2_filsys, int, uint64_t, uint64_t, void *, uint64_t *, uint64_t *);
void ext2fs_block_alloc_stats_range(ext2_filsys, uint64_t, uint32_t, int);
int ext2fs_test_block_bitmap_range2(void *, uint64_t, unsigned int);
void ext2fs_mark_block_bitmap_range2(void *, uint64_t, unsigned int);
void ext2fs_unmark_block_bitmap_range2(void *, uint64_t, unsigned int);
void ext2fs_set_block_alloc_stats_callback(
    ext2_filsys, void (*)(ext2_filsys, uint64_t, int), void (**)(ext2_filsys, uint64_t, int));
errcode_t ext2fs_punch(ext2_filsys, uint32_t, void *, char *, uint64_t, uint64_t);

errcode_t ext2fs_extent_open2(ext2_filsys, uint32_t, void *, ext2_extent_handle_t *);
errcode_t ext2fs_extent_goto(ext2_extent_handle_t, uint64_t);
errcode_t ext2fs_extent_get(ext2_extent_handle_t, int, struct ext2fs_extent *);
errcode_t ext2fs_extent_insert(ext2_extent_handle_t, int, struct ext2fs_extent *);
errcode_t ext2fs_extent_replace(ext2_extent_handle_t, int, struct ext2fs_extent *);
errcode_t ext2fs_extent_delete(ext2_extent_handle_t, int);
errcode_t ext2fs_extent_set_bmap(ext2_extent_handle_t, uint64_t, uint64_t, int);
errcode_t ext2fs_extent_fix_parents(ext2_extent_handle_t);
void ext2fs_extent_free(ext2_extent_handle_t);

errcode_t ext2fs_xattrs_open(ext2_filsys, uint32_t, void **);
errcode_t ext2fs_xattrs_flags(void *, unsigned int *, unsigned int *);
errcode_t ext2fs_xattrs_read(void *);
errcode_t ext2fs_xattr_set(void *, const char *, const void *, size_t);
errcode_t ext2fs_xattr_remove(void *, const char *);
errcode_t ext2fs_xattrs_close(void **);
errcode_t ext2fs_free_ext_attr(ext2_filsys, uint32_t, void *);
"""

# ext2_err.h: the codes count up from this one, which is EXT2_ET_BASE
_BASE = 2133571328
_MAGIC_FILESYSTEM, _MAGIC_CHANNEL, _MAGIC_MANAGER = _BASE + 1, _BASE + 5, _BASE + 7
EXTENT_NOT_FOUND, NO_CURRENT_NODE = _BASE + 132, _BASE + 128
_ERRNOS = {
    _BASE + 21: errno.EROFS,  # RO_FILSYS
    _BASE + 38: errno.ENOSPC,  # DIR_NO_SPACE
    _BASE + 70: errno.ENOMEM,  # NO_MEMORY
    _BASE + 72: errno.ENOSPC,  # BLOCK_ALLOC_FAIL
    _BASE + 73: errno.ENOSPC,  # INODE_ALLOC_FAIL
    _BASE + 82: errno.EFBIG,  # FILE_TOO_BIG
    _BASE + 158: errno.ERANGE,  # EA_BAD_NAME_LEN
    _BASE + 159: errno.E2BIG,  # EA_BAD_VALUE_SIZE
    _BASE + 162: errno.ENODATA,  # EA_KEY_NOT_FOUND
    _BASE + 163: errno.ENOSPC,  # EA_NO_SPACE
}
_FLAG_RW, _FLAG_64BITS, _FLAG_SKIP_MMP, _FLAG_MASTER_SB_ONLY = 0x1, 0x20000, 0x100000, 0x200


@cache
def ffi() -> Any:
    """The cffi object that knows the declarations."""
    from cffi import FFI

    declared = FFI()
    declared.cdef(_DECLARATIONS)
    return declared


@cache
def load() -> Any:
    """The library; None when it, or cffi, is not there."""
    try:
        return ffi().dlopen(NAME)
    except (OSError, ImportError):
        return None


def errno_of(code: int) -> int:
    """The errno that stands for an error code of the library, which has errnos among them."""
    return code if 0 < code < 4096 else _ERRNOS.get(code, errno.EIO)


class Engine:
    """A file system opened by libext2fs for writing, on a block device.

    Attributes:
        lib, fs: the library and its handle, for calls; check() what they return.
        failed: whether the device has ever failed the library.
        parked: ranges of blocks that are free, but not used again before flush(): see order.
    """

    def __init__(self, device: BlockDevice, block_size: int, groups: int) -> None:
        lib = load()
        if lib is None:
            raise OpenError(MISSING)
        self.lib = lib
        self.ffi = ffi()
        self._device = device
        self._failure: BaseException | None = None
        self.failed = False
        self.parked: list[tuple[int, int]] = []
        self._channel = self.ffi.new("struct struct_io_channel *")
        self._name = self.ffi.new("char[]", b"fusemount")
        self._manager = self._make_manager()
        handle = self.ffi.new("ext2_filsys *")
        self.fs: Any = None
        flags = _FLAG_RW | _FLAG_64BITS | _FLAG_SKIP_MMP
        self.check(lib.ext2fs_open2(self._name, self.ffi.NULL, flags, 0, 0, self._manager, handle))
        fs = handle[0]
        if (
            fs.magic != _MAGIC_FILESYSTEM
            or fs.io != self._channel
            or fs.blocksize != block_size
            or fs.group_desc_count != groups
            or bytes(self.ffi.buffer(fs.super, 1024)[56:58]) != b"\x53\xef"
        ):
            raise OpenError(f"this version of {NAME} has another layout than the ones known here; read-only works")
        self.fs = fs
        try:
            self._prepare(groups)
        except BaseException:
            self.free()
            raise

    def _prepare(self, groups: int) -> None:
        self.fs.flags |= _FLAG_MASTER_SB_ONLY
        for group in range(groups):
            if not self.lib.ext2fs_group_desc_csum_verify(self.fs, group):
                raise FormatError("the checksum of an ext group descriptor is wrong; run e2fsck on it to write")
        self.check(self.lib.ext2fs_read_bitmaps(self.fs))
        freed = self.ffi.callback("void(ext2_filsys, uint64_t, int)", self._block_freed)
        self._callbacks["block_alloc_stats"] = freed
        self.lib.ext2fs_set_block_alloc_stats_callback(self.fs, freed, self.ffi.NULL)

    def _block_freed(self, _: Any, block: int, in_use: int) -> None:
        """The library has changed the state of one block."""
        if in_use < 0:
            self.park(block, 1)

    def park(self, block: int, count: int) -> None:
        """Blocks that were just freed: counted as free, but not to be found by who looks for free ones."""
        self.lib.ext2fs_mark_block_bitmap_range2(self.fs.block_map, block, count)
        self.parked.append((block, count))

    def check(self, code: int) -> None:
        """Raise what a callback raised since the last check, or the OSError for an error code that is not 0."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        if code:
            raise error(errno_of(code))

    @property
    def superblock(self) -> Any:
        """The 1024 bytes of the superblock in the library's memory, writable."""
        return self.ffi.buffer(self.fs.super, 1024)

    def mark_super(self) -> None:
        """The superblock's bytes were changed."""
        self.lib.ext2fs_mark_super_dirty(self.fs)

    def flush(self) -> None:
        """Write bitmaps, group descriptors and superblock to the device, which is not flushed.

        Parked blocks are free from then on.
        """
        for block, count in self.parked:
            self.lib.ext2fs_unmark_block_bitmap_range2(self.fs.block_map, block, count)
        self.parked.clear()
        self.check(self.lib.ext2fs_flush2(self.fs, 1))

    def free(self) -> None:
        """Let go of the library's memory. Nothing may be called afterwards."""
        if self.fs is not None:
            self.lib.ext2fs_free(self.fs)
            self.fs = None

    def _make_manager(self) -> Any:
        """An I/O manager: the channel it opens is ours, its blocks are the device's."""
        declared, channel = self.ffi, self._channel

        def read(_: Any, block: int, count: int, data: Any) -> int:
            try:
                length = count * channel.block_size if count >= 0 else -count
                offset = block * channel.block_size
                if offset + length > self._device.size:
                    return errno.EIO
                self._device.read_into(offset, declared.buffer(data, length))
            except BaseException as problem:
                return self._keep(problem)
            return 0

        def write(_: Any, block: int, count: int, data: Any) -> int:
            length = count * channel.block_size if count >= 0 else -count
            return write_at(block * channel.block_size, length, data)

        def write_byte(_: Any, offset: int, count: int, data: Any) -> int:
            return write_at(offset, count, data)

        def write_at(offset: int, length: int, data: Any) -> int:
            try:
                if offset + length > self._device.size:
                    return errno.EIO
                self._device.write(offset, bytes(declared.buffer(data, length)))
            except BaseException as problem:
                return self._keep(problem)
            return 0

        def open_channel(_: Any, __: int, opened: Any) -> int:
            opened[0] = channel
            return 0

        def set_block_size(_: Any, size: int) -> int:
            channel.block_size = size
            return 0

        def nothing(*_: Any) -> int:
            return 0

        manager = declared.new("struct struct_io_manager *")
        manager.magic = _MAGIC_MANAGER
        manager.name = self._name
        channel.magic = _MAGIC_CHANNEL
        channel.manager = manager
        channel.name = self._name
        channel.block_size = 1024
        channel.refcount = 1
        functions = {
            "open": open_channel,
            "close": nothing,
            "set_blksize": set_block_size,
            "read_blk": read,
            "write_blk": write,
            "flush": nothing,  # we flush the device ourselves, when all is written
            "write_byte": write_byte,
            "read_blk64": read,
            "write_blk64": write,
        }
        fields = dict(declared.typeof("struct struct_io_manager").fields)
        self._callbacks = {
            name: declared.callback(fields[name].type, function, error=errno.EIO)
            for name, function in functions.items()
        }
        for name, callback in self._callbacks.items():
            setattr(manager, name, callback)
        return manager

    def _keep(self, problem: BaseException) -> int:
        self._failure = problem
        self.failed = True
        return problem.errno or errno.EIO if isinstance(problem, OSError) else errno.EIO
