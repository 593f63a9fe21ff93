"""Compressed clusters -> guest bytes (QEMU, docs/interop/qcow2, section "Compressed clusters")."""

from __future__ import annotations

import errno
import sys
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable

from nbdserve.block.file import HostFile
from nbdserve.formats.qcow2.entries import compressed_place
from nbdserve.formats.qcow2.header import ZSTD

_REMEMBERED_BYTES = (
    4 << 20
)  # so that small sequential reads inflate a cluster once, and parallel readers do not compete


def _inflate(data: bytes, size: int) -> bytes:
    return zlib.decompressobj(-15).decompress(data, size)


def _unpack_zstd(data: bytes, size: int) -> bytes:
    if sys.version_info >= (3, 14):
        from compression.zstd import ZstdDecompressor
    else:
        from backports.zstd import ZstdDecompressor

    return bytes(ZstdDecompressor().decompress(data, size))


class ClusterReader:
    """Reads compressed clusters of one image, and remembers the latest."""

    def __init__(self, file: HostFile, cluster_bits: int, compression: int) -> None:
        self._file = file
        self._cluster_bits = cluster_bits
        self._unpack: Callable[[bytes, int], bytes] = _unpack_zstd if compression == ZSTD else _inflate
        self._lock = threading.Lock()
        self._recent: OrderedDict[int, bytes] = OrderedDict()
        self._most = max(2, _REMEMBERED_BYTES >> cluster_bits)

    def read(self, entry: int) -> bytes:
        """The guest bytes of the cluster that a compressed L2 entry points to.

        Raises:
            OSError: EIO, the data is damaged or lies outside the file.
        """
        with self._lock:
            known = self._recent.get(entry)
            if known is not None:
                self._recent.move_to_end(entry)
                return known
        content = self._read(entry)
        with self._lock:
            self._recent[entry] = content
            while len(self._recent) > self._most:
                self._recent.popitem(last=False)
        return content

    def _read(self, entry: int) -> bytes:
        offset, length = compressed_place(entry, self._cluster_bits)
        size = 1 << self._cluster_bits
        if offset < self._file.size:
            try:
                content = self._unpack(bytes(self._file.read(offset, length)), size)
            except OSError:
                raise
            except Exception:  # each library has its own classes for damaged data
                content = b""
            if len(content) == size:
                return content
        raise OSError(errno.EIO, f"the compressed cluster at {offset} is damaged", self._file.name)
