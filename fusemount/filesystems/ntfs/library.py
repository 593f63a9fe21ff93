"""libntfs-3g over a block device: the library opened, declared, and its device operations.

The library is C, and it trusts its input in places; so it is used for changes alone, on volumes whose system files
have been checked, and it sees the device through callbacks that refuse whatever leaves the volume. No exception may
cross a callback: it is kept, the library sees -1 with its errno, and check() raises it when the library returns.

It is asked for inodes one operation at a time and keeps no cache of its own (ntfs_create_lru_caches is never called),
so what it did is on the device when the operation is over, except for the inode of $MFT, which settle() writes.

Declared here are the functions that are called, and of the structures the fields that are used with all those before
them, from the headers of ntfs-3g 2021.8 to 2022.10 (soname 89). Mount checks the layout before anything is written.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from cffi import FFI

from fusemount.filesystems.base import error
from fusemount.filesystems.ntfs.boot import Geometry
from fusemount.filesystems.ntfs.records import Reference, Type
from nbdserve.block import BlockDevice
from nbdserve.errors import OpenError

SONAME = "libntfs-3g.so.89"
_MISSING = f"NTFS: writing needs {SONAME}; install the package libntfs-3g89 (or ntfs-3g). Reading works without it"

_OPEN, _DIRTY = 1 << 0, 1 << 2  # bits of ntfs_device.d_state
MODIFIED, CHANGED = 2, 4
"""Times for ntfs_inode_update_times: that of the data, that of the inode."""

_DECLARATIONS = """
typedef struct _ntfs_attr ntfs_attr;
typedef struct { uint64_t mft_no; } ntfs_inode;

struct ntfs_device {
    struct ntfs_device_operations *d_ops;
    unsigned long d_state;
    char *d_name;
    void *d_private;
    int d_heads;
    int d_sectors_per_track;
};
struct ntfs_device_operations {
    int (*open)(struct ntfs_device *, int);
    int (*close)(struct ntfs_device *);
    int64_t (*seek)(struct ntfs_device *, int64_t, int);
    int64_t (*read)(struct ntfs_device *, void *, int64_t);
    int64_t (*write)(struct ntfs_device *, const void *, int64_t);
    int64_t (*pread)(struct ntfs_device *, void *, int64_t, int64_t);
    int64_t (*pwrite)(struct ntfs_device *, const void *, int64_t, int64_t);
    int (*sync)(struct ntfs_device *);
    int (*stat)(struct ntfs_device *, void *);
    int (*ioctl)(struct ntfs_device *, unsigned long, void *);
};
typedef struct {
    struct ntfs_device *dev;
    char *vol_name;
    unsigned long state;
    ntfs_inode *vol_ni;
    uint8_t major_ver, minor_ver;
    uint16_t flags;
    uint16_t sector_size;
    uint8_t sector_size_bits;
    uint32_t cluster_size, mft_record_size, indx_record_size;
    uint8_t cluster_size_bits, mft_record_size_bits, indx_record_size_bits, mft_zone_multiplier, full_zones;
    int64_t mft_data_pos, mft_zone_start, mft_zone_end, mft_zone_pos, data1_zone_pos, data2_zone_pos, nr_clusters;
    ntfs_inode *lcnbmp_ni;
    ntfs_attr *lcnbmp_na;
    int64_t mft_lcn;
    ntfs_inode *mft_ni;
    ntfs_attr *mft_na, *mftbmp_na;
    ntfs_inode *secure_ni;
    void *secure_xsii, *secure_xsdh;
    int secure_reentry;
    unsigned int secure_flags;
    int mftmirr_size;
    int64_t mftmirr_lcn;
    ntfs_inode *mftmirr_ni;
    ntfs_attr *mftmirr_na;
    uint16_t *upcase;
    uint32_t upcase_len;
    uint16_t *locase;
    void *attrdef;
    int32_t attrdef_len;
    int64_t free_clusters, free_mft_records;
} ntfs_volume;

void ntfs_log_clear_levels(uint32_t);
struct ntfs_device *ntfs_device_alloc(const char *, long, struct ntfs_device_operations *, void *);
int ntfs_device_free(struct ntfs_device *);
ntfs_volume *ntfs_device_mount(struct ntfs_device *, unsigned long);
int ntfs_umount(ntfs_volume *, int);
int ntfs_volume_write_flags(ntfs_volume *, uint16_t);
int ntfs_volume_get_free_space(ntfs_volume *);

ntfs_inode *ntfs_inode_open(ntfs_volume *, uint64_t);
int ntfs_inode_close(ntfs_inode *);
int ntfs_inode_close_in_dir(ntfs_inode *, ntfs_inode *);
void ntfs_inode_mark_dirty(ntfs_inode *);
void ntfs_inode_update_times(ntfs_inode *, int);
int ntfs_inode_set_times(ntfs_inode *, const char *, size_t, int);
int ntfs_inode_sync(ntfs_inode *);
int ntfs_set_ntfs_attrib(ntfs_inode *, const char *, size_t, int);

ntfs_inode *ntfs_create(ntfs_inode *, uint32_t, const uint16_t *, uint8_t, uint32_t);
ntfs_inode *ntfs_create_device(ntfs_inode *, uint32_t, const uint16_t *, uint8_t, uint32_t, uint64_t);
ntfs_inode *ntfs_create_symlink(ntfs_inode *, uint32_t, const uint16_t *, uint8_t, const uint16_t *, int);
int ntfs_link(ntfs_inode *, ntfs_inode *, const uint16_t *, uint8_t);
int ntfs_delete(ntfs_volume *, const char *, ntfs_inode *, ntfs_inode *, const uint16_t *, uint8_t);

ntfs_attr *ntfs_attr_open(ntfs_inode *, uint32_t, uint16_t *, uint32_t);
void ntfs_attr_close(ntfs_attr *);
int64_t ntfs_attr_pwrite(ntfs_attr *, int64_t, int64_t, const void *);
int ntfs_attr_pclose(ntfs_attr *);
int ntfs_attr_truncate(ntfs_attr *, int64_t);
int ntfs_attr_add(ntfs_inode *, uint32_t, uint16_t *, uint8_t, const uint8_t *, int64_t);
int ntfs_attr_remove(ntfs_inode *, uint32_t, uint16_t *, uint32_t);
"""


def missing() -> str:
    """One line when the library is not there, else ""."""
    try:
        _load()
    except OSError:
        return _MISSING
    return ""


@cache
def _load() -> tuple[FFI, Any]:
    ffi = FFI()
    ffi.cdef(_DECLARATIONS)
    library: Any = ffi.dlopen(SONAME)
    library.ntfs_log_clear_levels(0xFFFFFFFF)  # it would write to stderr; errors are reported by those who see them
    return ffi, library


class Mount:
    """A volume opened by the library for writing.

    Attributes:
        calls: the library's functions.
        volume: its ntfs_volume.
        damaged: whether something failed that may have left a change half done.
    """

    def __init__(self, device: BlockDevice, geometry: Geometry) -> None:
        """Open the volume.

        Raises:
            OpenError: the library is missing, or refuses the volume.
        """
        try:
            self.ffi, self.calls = _load()
        except OSError:
            raise OpenError(_MISSING) from None
        self._device = device
        self._position = 0
        self._failure: OSError | None = None
        self.damaged = False
        self._operations = self._make_operations()
        handle = self.calls.ntfs_device_alloc(b"image", 0, self._operations, self.ffi.NULL)
        self.volume: Any = self.calls.ntfs_device_mount(handle, 0) if handle else self.ffi.NULL
        if not self.volume:
            reason = self.failure()
            if handle:
                self.calls.ntfs_device_free(handle)
            raise OpenError(f"NTFS: {SONAME} refuses the volume ({reason.strerror}); open it read-only")
        self._check_layout(handle, geometry)

    def _check_layout(self, handle: Any, geometry: Geometry) -> None:
        volume = self.volume
        seen = (volume.sector_size, volume.cluster_size, volume.nr_clusters, volume.mft_lcn, volume.mft_record_size)
        expected = (geometry.sector, geometry.cluster, geometry.clusters, geometry.mft, geometry.record)
        if volume.dev != handle or seen != expected or not 0 < volume.upcase_len <= 65536:
            raise OpenError(f"NTFS: {SONAME} is not built as expected; open the volume read-only")
        self.check(self.calls.ntfs_volume_get_free_space(volume))

    def unmount(self) -> None:
        """Close the volume; the device stays open."""
        volume, self.volume = self.volume, self.ffi.NULL
        if volume:
            self.check(self.calls.ntfs_umount(volume, 0))

    # What it returns

    def check(self, result: Any) -> Any:
        """The result of a call, unless it stands for a failure (negative, or NULL), which is raised as OSError."""
        if result == self.ffi.NULL if isinstance(result, self.ffi.CData) else result < 0:
            raise self.failure()
        return result

    def failure(self) -> OSError:
        """What made the last call fail: what the device raised, or the library's errno."""
        number = self.ffi.errno or errno.EIO
        self.damaged |= number == errno.EIO
        failure, self._failure = self._failure, None
        return failure if failure is not None and failure.errno == number else error(number)

    @contextmanager
    def inode(self, reference: Reference) -> Iterator[Any]:
        """The library's inode of a file, closed (and so written) at the end."""
        inode = self.check(self.calls.ntfs_inode_open(self.volume, reference.sequence << 48 | reference.number))
        try:
            yield inode
        except BaseException:
            self.calls.ntfs_inode_close(inode)
            raise
        self.check(self.calls.ntfs_inode_close(inode))

    @contextmanager
    def data(self, inode: Any, name: str = "") -> Iterator[Any]:
        """A data stream of a file."""
        text = self.text(name)
        stream = self.check(self.calls.ntfs_attr_open(inode, Type.DATA, text, len(text)))
        try:
            yield stream
        finally:
            self.calls.ntfs_attr_close(stream)

    def text(self, text: str) -> Any:
        """Text as the library takes it, in UTF-16."""
        return self.ffi.new("uint16_t[]", list(memoryview(text.encode("utf-16-le", "surrogatepass")).cast("H")))

    def settle(self) -> None:
        """Write what the library still holds back: the inode of $MFT."""
        self.check(self.calls.ntfs_inode_sync(self.volume.mft_ni))

    # The device, as the library sees it

    def _make_operations(self) -> Any:
        operations = self.ffi.new("struct ntfs_device_operations *")
        kinds = self.ffi.typeof("struct ntfs_device_operations").fields
        self._callbacks = []
        for name, field in kinds:
            callback = self.ffi.callback(field.type, getattr(self, f"_{name}"), error=-1, onerror=self._keep_failure)
            self._callbacks.append(callback)
            setattr(operations, name, callback)
        return operations

    def _keep_failure(self, _: object, failure: BaseException, traceback: object) -> None:
        self.damaged = True
        number = failure.errno if isinstance(failure, OSError) and failure.errno else errno.EIO
        self._failure = failure if isinstance(failure, OSError) else error(number)
        self.ffi.errno = number

    def _open(self, handle: Any, flags: int) -> int:
        handle.d_state |= _OPEN
        return 0

    def _close(self, handle: Any) -> int:
        handle.d_state &= ~_OPEN
        return 0

    def _seek(self, handle: Any, offset: int, whence: int) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._device.size}[whence]
        if base + offset < 0:
            raise error(errno.EINVAL)
        self._position = base + offset
        return self._position

    def _read(self, handle: Any, buffer: Any, count: int) -> int:
        done = self._pread(handle, buffer, count, self._position)
        self._position += done
        return done

    def _write(self, handle: Any, buffer: Any, count: int) -> int:
        done = self._pwrite(handle, buffer, count, self._position)
        self._position += done
        return done

    def _pread(self, handle: Any, buffer: Any, count: int, offset: int) -> int:
        if count < 0 or offset < 0:
            raise error(errno.EINVAL)
        count = max(0, min(count, self._device.size - offset))
        self._device.read_into(offset, memoryview(self.ffi.buffer(buffer, count)))
        return count

    def _pwrite(self, handle: Any, buffer: Any, count: int, offset: int) -> int:
        if count < 0 or offset < 0 or offset + count > self._device.size:
            raise error(errno.EIO)
        handle.d_state |= _DIRTY
        self._device.write(offset, memoryview(self.ffi.buffer(buffer, count)))
        return count

    def _sync(self, handle: Any) -> int:
        self._device.flush()
        handle.d_state &= ~_DIRTY
        return 0

    def _stat(self, handle: Any, buffer: Any) -> int:
        return self._not_offered()

    def _ioctl(self, handle: Any, request: int, argument: Any) -> int:
        return self._not_offered()

    def _not_offered(self) -> int:
        self.ffi.errno = errno.EOPNOTSUPP
        return -1
