"""Compressed clusters: finding out what they hold, remembering the last few, and making new ones.

QEMU inflates with a window of 4 KiB, so nothing is deflated with a larger one.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable
from types import ModuleType

from nbdserve.block.file import HostFile
from nbdserve.errors import Unsupported
from nbdserve.formats.qcow2.entries import Geometry
from nbdserve.formats.qcow2.header import CompressionType
from nbdserve.formats.qcow2.space import damaged

_CACHE = 4 << 20  # bytes of decompressed clusters
_MAXIMUM_WINDOW = 23  # log2 of bytes; RFC 8878 recommends that decoders support 8 MiB
_DEFLATE_WINDOW = 12  # log2 of bytes
_of_thread = threading.local()  # its packer: making one for zstd takes as long as compressing a cluster

Inflate = Callable[[bytearray, int], bytes]
"""Compressed data and the most bytes wanted -> what it decompresses to; errors of any class mean damage."""


def _inflate_zlib(data: bytearray, limit: int) -> bytes:
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, limit)


def _zstd() -> ModuleType:
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        from backports import zstd
    module: ModuleType = zstd
    return module


def inflater(compression: CompressionType, name: str) -> Inflate:
    """The decompressor of an image."""
    if compression == CompressionType.ZLIB:
        return _inflate_zlib
    try:
        zstd = _zstd()
    except ImportError:
        raise Unsupported(
            f"{name}: its clusters are compressed with zstd; install the package backports.zstd"
        ) from None
    options = {zstd.DecompressionParameter.window_log_max: _MAXIMUM_WINDOW}

    def inflate(data: bytearray, limit: int) -> bytes:
        content: bytes = zstd.ZstdDecompressor(options=options).decompress(data, limit)
        return content

    return inflate


def pack_cluster(compression: CompressionType, content: bytes) -> bytes:
    """A cluster's content, compressed."""
    if compression == CompressionType.ZLIB:
        packer = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, -_DEFLATE_WINDOW)
        return packer.compress(content) + packer.flush()
    zstd = getattr(_of_thread, "packer", None)
    if zstd is None:
        zstd = _of_thread.packer = _zstd().ZstdCompressor()
    packed: bytes = zstd.compress(content, zstd.FLUSH_FRAME)
    return packed


class CompressedClusters:
    """Reads compressed clusters of one image; any number of threads may."""

    def __init__(self, file: HostFile, geometry: Geometry, inflate: Inflate) -> None:
        self._file = file
        self._geometry = geometry
        self._inflate = inflate
        self._capacity = max(2, min(64, _CACHE // geometry.cluster_size))
        self._recent: dict[int, bytes] = {}  # by L2 entry, the least recently used first
        self._lock = threading.Lock()

    def content(self, entry: int) -> bytes:
        """The cluster that an L2 entry with COMPRESSED describes.

        Raises:
            OSError: EIO, the data is damaged or lies outside the file.
        """
        with self._lock:
            content = self._recent.pop(entry, None)
            if content is not None:
                self._recent[entry] = content
                return content
        content = self._decompress(entry)
        with self._lock:
            if len(self._recent) >= self._capacity:
                self._recent.pop(next(iter(self._recent)))
            self._recent[entry] = content
        return content

    def forget(self, entry: int) -> None:
        """An entry means something new: its place was used again."""
        with self._lock:
            self._recent.pop(entry, None)

    def _decompress(self, entry: int) -> bytes:
        offset, length = self._geometry.compressed_place(entry)
        size = self._geometry.cluster_size
        if offset >= self._file.size:
            raise damaged(self._file.name, f"a compressed cluster is said to lie at {offset}, outside the file")
        try:
            content = self._inflate(self._file.read(offset, length), size)
        except OSError:
            raise
        except Exception as error:  # zlib.error, ZstdError, EOFError
            raise damaged(self._file.name, f"the compressed cluster at {offset} cannot be decompressed") from error
        if len(content) != size:
            raise damaged(self._file.name, f"the compressed cluster at {offset} is cut short")
        return content
