"""The compressors of squashfs; each gives at most as many bytes as asked for, however crafted its input is."""

from __future__ import annotations

import errno
import lzma
import sys
import zlib
from collections.abc import Callable
from enum import IntEnum

from fusemount.filesystems.base import error
from nbdserve.errors import Unsupported

Decompress = Callable[[bytes, int], bytes]
"""(data, most) -> the content, of at most `most` bytes. Raises EIO when it is damaged, or longer."""

_MEMORY = 256 << 20  # bytes that xz may use; a dictionary is never larger than a block


class Compressor(IntEnum):
    """Numbers in the superblock."""

    ZLIB = 1
    LZMA = 2
    LZO = 3
    XZ = 4
    LZ4 = 5
    ZSTD = 6


def decompressor(number: int) -> Decompress:
    """The function that undoes a compressor. Raises Unsupported for one that is not known."""
    match number:
        case Compressor.ZLIB:
            return _guard(_zlib, zlib.error)
        case Compressor.LZMA:
            return _guard(_lzma, lzma.LZMAError)
        case Compressor.XZ:
            return _guard(_xz, lzma.LZMAError)
        case Compressor.LZ4:
            return _guard(_lz4, IndexError)
        case Compressor.ZSTD:
            return _zstd()
    name = "LZO" if number == Compressor.LZO else f"number {number}"
    raise Unsupported(f"squashfs: the compressor {name} is not known here; unpack the image with unsquashfs")


def _guard(decompress: Decompress, *failures: type[Exception]) -> Decompress:
    def guarded(data: bytes, most: int) -> bytes:
        try:
            content = decompress(data, most + 1)
        except failures:
            raise error(errno.EIO) from None
        if len(content) > most:
            raise error(errno.EIO)
        return content

    return guarded


def _zlib(data: bytes, most: int) -> bytes:
    return zlib.decompressobj().decompress(data, most)


def _lzma(data: bytes, most: int) -> bytes:
    return lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_MEMORY).decompress(data, most)


def _xz(data: bytes, most: int) -> bytes:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY).decompress(data, most)


def _zstd() -> Decompress:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd

    def decompress(data: bytes, most: int) -> bytes:
        return zstd.ZstdDecompressor().decompress(data, most)

    return _guard(decompress, zstd.ZstdError)


def _lz4(data: bytes, most: int) -> bytes:
    """The block format of LZ4: literals and copies in turns. (lz4_Block_format.md)"""
    out = bytearray()
    position = 0
    while len(out) < most:
        token = data[position]
        position += 1
        count = token >> 4
        if count == 15:
            count, position = _more(data, position, count)
        if position + count > len(data):
            raise IndexError
        out += data[position : position + count]
        position += count
        if position == len(data):
            break
        distance = data[position] | data[position + 1] << 8
        position += 2
        count = token & 15
        if count == 15:
            count, position = _more(data, position, count)
        count += 4
        start = len(out) - distance
        if start < 0 or not distance:
            raise IndexError
        if count <= distance:
            out += out[start : start + count]
        else:
            pattern = out[start:]
            out += (pattern * (min(count, most) // distance + 1))[:count]
    return bytes(out)


def _more(data: bytes, position: int, count: int) -> tuple[int, int]:
    """A length that goes on in further bytes, as long as these are 255."""
    while True:
        byte = data[position]
        position += 1
        count += byte
        if byte != 255:
            return count, position
