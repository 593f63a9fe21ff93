"""Writes stream-optimized VMDKs, for OVF archives and the like (VDF, "Stream-Optimized Compressed Sparse Extents").

The file is one stream, never gone back in: header, descriptor, then grain after grain, each compressed behind a marker,
every grain table behind its grains, and at the end the directory, a footer that says where it is, and the marker of
the end. Grains that are all zeros are left out, and so are tables without grains.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

from nbdserve.block.device import BlockDevice
from nbdserve.block.extents import Zero
from nbdserve.errors import OpenError
from nbdserve.formats.newfile import new_file
from nbdserve.formats.vmdk import SECTOR
from nbdserve.formats.vmdk.compression import GRAIN_MARKER
from nbdserve.formats.vmdk.create import DESCRIPTOR_SECTORS, SLOTS, TABLE_SECTORS, new_cid
from nbdserve.formats.vmdk.descriptor import build_descriptor
from nbdserve.formats.vmdk.header import (
    AT_END,
    COMPRESSED,
    DEFLATE,
    DIRECTORY_MARKER,
    END_OF_STREAM,
    FOOTER_MARKER,
    HEADER,
    LINE_ENDS,
    MAGIC,
    MARKER,
    MARKERS,
    NEWLINE_TEST,
    TABLE_MARKER,
)
from nbdserve.formats.vmdk.layout import MAXIMUM_TABLES

GRAIN = 65536  # bytes; VMware reads no other size in such files
_OVERHEAD = GRAIN // SECTOR
_PIECE = 16 * GRAIN  # read from the source at once


def write_stream_optimized(
    source: BlockDevice,
    path: str | os.PathLike[str],
    *,
    level: int = 6,
    workers: int | None = None,
    adapter_type: str = "ide",
    durable: bool = True,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Write the content of a device as a stream-optimized VMDK, which appears under its name when it is complete.

    Args:
        level: of compression, 1 (fast) to 9.
        workers: threads that compress; None for as many as there are processors, eight at most.
        adapter_type: the controller that a machine is to have for the disk; others than ide: lsilogic, buslogic.
        durable: see formats.newfile.
        progress: told now and then how many bytes of the source have been dealt with.

    Raises:
        OpenError: the source is empty, not of whole sectors, or too large.
        FileExistsError: there is such a file.
    """
    name = os.fspath(path)
    if not source.size or source.size % SECTOR:
        raise OpenError(f"{name}: a VMDK holds whole sectors, at least one, not {source.size} bytes")
    if source.size > MAXIMUM_TABLES * SLOTS * GRAIN:
        raise OpenError(f"{name}: {source.size} bytes are too many for a stream-optimized VMDK")
    workers = workers or min(8, os.cpu_count() or 1)
    with new_file(path, durable=durable) as file, ThreadPoolExecutor(workers) as pool:
        stream = _Stream(file, source.size, os.path.basename(name), adapter_type)
        pending: deque[tuple[int, Future[bytes]]] = deque()

        def write_oldest() -> None:
            offset, compressed = pending.popleft()
            stream.add(offset // GRAIN, compressed.result())
            progress(offset)

        for offset, grain in _grains(source):
            pending.append((offset, pool.submit(zlib.compress, grain, level)))
            if len(pending) > 4 * workers:
                write_oldest()
        while pending:
            write_oldest()
        stream.finish()
        progress(source.size)


def _grains(source: BlockDevice) -> Iterator[tuple[int, bytes]]:
    """The grains that are not all zeros, with their offsets; the last one filled up with zeros."""
    nothing = bytes(GRAIN)
    offset = 0
    while offset < source.size:
        extent = source.map(offset, source.size - offset)
        stop = offset + extent.length
        if isinstance(extent, Zero):
            # The grain that the zeros begin in has been read with what came before, the one they end in may hold data.
            offset = stop
            continue
        start = offset // GRAIN * GRAIN
        stop = min(source.size, -(-stop // GRAIN) * GRAIN)
        for at in range(start, stop, _PIECE):
            piece = memoryview(source.read(at, min(_PIECE, stop - at)))
            for inside in range(0, len(piece), GRAIN):
                grain = bytes(piece[inside : inside + GRAIN]).ljust(GRAIN, b"\0")
                if grain != nothing:
                    yield at + inside, grain
        offset = stop


class _Stream:
    """A stream under way: what has been written, and what the tables have to say."""

    def __init__(self, file: BinaryIO, size: int, name: str, adapter_type: str) -> None:
        self._file = file
        self._name = name
        self._size = size
        self._directory = array("I", bytes(4 * -(-size // (GRAIN * SLOTS))))
        self._table = array("I", bytes(4 * SLOTS))
        self._index = 0  # of the table
        self._sector = 0
        self._write(self._header(AT_END))
        text = build_descriptor("streamOptimized", new_cid(), [(size, "SPARSE", name)], size, adapter_type=adapter_type)
        if len(text) > DESCRIPTOR_SECTORS * SECTOR:
            raise OpenError(f"{name}: the name is too long for a VMDK descriptor")
        self._write(text)
        self._write(bytes((_OVERHEAD - self._sector) * SECTOR))

    def _header(self, directory: int) -> bytes:
        raw: bytes = HEADER.build(
            {
                "magic": MAGIC,
                "version": 3,
                "flags": NEWLINE_TEST | COMPRESSED | MARKERS,
                "capacity": self._size // SECTOR,
                "grain_size": GRAIN // SECTOR,
                "descriptor_offset": 1,
                "descriptor_size": DESCRIPTOR_SECTORS,
                "slots": SLOTS,
                "redundant_offset": 0,
                "directory_offset": directory,
                "overhead": _OVERHEAD,
                "unclean": 0,
                "line_ends": LINE_ENDS,
                "compression": DEFLATE,
            }
        )
        return raw

    def _write(self, data: bytes) -> None:
        """Append data, filled up to whole sectors."""
        self._file.write(data)
        self._file.write(bytes(-len(data) % SECTOR))
        self._sector += -(-len(data) // SECTOR)

    def _mark(self, kind: int, sectors: int) -> None:
        self._write(MARKER.build({"value": sectors, "size": 0, "type": kind}))

    def add(self, grain: int, compressed: bytes) -> None:
        """Append a grain; their numbers must rise."""
        index, slot = divmod(grain, SLOTS)
        if index != self._index:
            self._write_table()
            self._index = index
        if self._sector > 0xFFFFFFFF:
            raise OSError(errno.EFBIG, "the VMDK has reached 2 TiB, where its tables can point no further", self._name)
        self._table[slot] = self._sector
        self._write(GRAIN_MARKER.pack(grain * (GRAIN // SECTOR), len(compressed)) + compressed)

    def _write_table(self) -> None:
        if any(self._table):
            self._mark(TABLE_MARKER, TABLE_SECTORS)
            self._directory[self._index] = self._sector
            self._write(_little_endian(self._table))
            self._table = array("I", bytes(4 * SLOTS))

    def finish(self) -> None:
        """Append everything that follows the grains."""
        self._write_table()
        directory = _little_endian(self._directory)
        self._mark(DIRECTORY_MARKER, -(-len(directory) // SECTOR))
        place = self._sector
        self._write(directory)
        self._mark(FOOTER_MARKER, 1)
        self._write(self._header(place))
        self._mark(END_OF_STREAM, 0)


def _little_endian(numbers: array[int]) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)
