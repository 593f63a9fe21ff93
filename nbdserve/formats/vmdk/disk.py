"""A VMDK disk: its extents one behind the other, and the content ID that tells whether they have changed.

What is kept here: before the first change after opening, a new content ID is brought to the disk, so that a disk that
stands on this one is known to be stale even if we crash (VDF, "The Descriptor File", CID). Its digits are replaced in
place, by as many, so that nothing else in the descriptor moves.
"""

from __future__ import annotations

import errno
import secrets
import threading
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import accumulate

from nbdserve.block.device import BlockDevice
from nbdserve.block.extents import Extent, HostOffset, Zero
from nbdserve.block.file import HostFile, ReadBuffer, WriteBuffer
from nbdserve.errors import ReadOnly
from nbdserve.formats.vmdk.descriptor import NO_PARENT


class ZeroExtent(BlockDevice):
    """An extent without a file: it reads as zeros, and can hold nothing else."""

    def __init__(self, size: int) -> None:
        super().__init__(size, read_only=True)

    def map(self, offset: int, length: int) -> Extent:
        return Zero(length, allocated=False)

    def map_nowait(self, offset: int, length: int) -> Extent | None:
        return self.map(offset, length)

    def write(self, offset: int, data: ReadBuffer) -> None:
        if bytes(data).strip(b"\0"):
            raise ReadOnly("this part of the disk is a ZERO extent, which holds nothing but zeros")

    def zero(self, offset: int, length: int, *, unmap: bool = True) -> None:
        return

    def discard(self, offset: int, length: int) -> None:
        return


class NoExtent(BlockDevice):
    """An extent that the descriptor gives nobody access to: every read of it is an error."""

    def __init__(self, size: int, name: str) -> None:
        super().__init__(size, read_only=True)
        self._name = name

    def map(self, offset: int, length: int) -> Extent:
        raise OSError(errno.EIO, "this part of the disk is an extent without access (NOACCESS)", self._name)


class VmdkDisk(BlockDevice):
    """The extents as one disk; closing it closes them, and the parent disk, which they may all share.

    Attributes:
        cid: the content ID that the descriptor had when the disk was opened.
    """

    def __init__(
        self,
        file: HostFile,
        extents: list[BlockDevice],
        cid: int,
        cid_span: tuple[int, int],
        parent: BlockDevice | None,
        *,
        read_only: bool,
    ) -> None:
        """`file` holds the descriptor, with the digits of the CID at the offsets of `cid_span`."""
        ends = list(accumulate(extent.size for extent in extents))
        super().__init__(ends[-1], read_only=read_only)
        self.cid = cid
        self._file = file
        self._extents = extents
        self._starts = [0, *ends[:-1]]
        self._cid_span = cid_span
        self._parent = parent
        self._announced = False
        self._announcing = threading.Lock()
        self.preferred_block = max(extent.preferred_block for extent in extents)
        self.zeroes_fast = not read_only and all(extent.zeroes_fast for extent in extents)

    def extent_at(self, offset: int) -> tuple[BlockDevice, int]:
        """The extent that an offset lies in, and the offset inside it."""
        number = bisect_right(self._starts, offset) - 1
        return self._extents[number], offset - self._starts[number]

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[BlockDevice, int, int]]:
        """The range as (extent, offset inside it, length)."""
        while length:
            extent, inside = self.extent_at(offset)
            size = min(length, extent.size - inside)
            yield extent, inside, size
            offset += size
            length -= size

    # Reading

    def map(self, offset: int, length: int) -> Extent:
        extent, inside = self.extent_at(offset)
        return extent.map(inside, min(length, extent.size - inside))

    def map_nowait(self, offset: int, length: int) -> Extent | None:
        extent, inside = self.extent_at(offset)
        return extent.map_nowait(inside, min(length, extent.size - inside))

    def locate(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        number = bisect_right(self._starts, offset) - 1
        extent, inside = self._extents[number], offset - self._starts[number]
        return extent.locate(inside, length) if inside + length <= extent.size else None

    def locate_writable(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        number = bisect_right(self._starts, offset) - 1
        extent, inside = self._extents[number], offset - self._starts[number]
        if not self._announced or inside + length > extent.size:
            return None
        return extent.locate_writable(inside, length)

    def read_computed(self, offset: int, buffer: WriteBuffer) -> None:
        view = memoryview(buffer)
        for extent, inside, size in self._pieces(offset, len(view)):
            extent.read_computed(inside, view[:size])
            view = view[size:]

    # Writing

    def _announce(self) -> None:
        """Let the disk have another content ID before anything in it changes."""
        if self.read_only:
            raise self._refusal()
        if self._announced:
            return
        with self._announcing:
            if not self._announced:
                start, end = self._cid_span
                self._file.write(start, _another(self.cid, end - start))
                self._file.sync()
                self._announced = True

    def write(self, offset: int, data: ReadBuffer) -> None:
        self._announce()
        view = memoryview(data)
        for extent, inside, size in self._pieces(offset, len(view)):
            extent.write(inside, view[:size])
            view = view[size:]

    def zero(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self._announce()
        for extent, inside, size in self._pieces(offset, length):
            extent.zero(inside, size, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        self._announce()
        for extent, inside, size in self._pieces(offset, length):
            if not extent.read_only:
                extent.discard(inside, size)

    def flush(self) -> None:
        for extent in self._extents:
            extent.flush()

    def close(self) -> None:
        with ExitStack() as stack:  # closes them all, whichever fails
            if self._parent is not None:
                stack.callback(self._parent.close)
            stack.callback(self._file.close)
            for extent in self._extents:
                stack.callback(extent.close)


def _another(cid: int, digits: int) -> bytes:
    """A content ID of so many digits, that is neither the present one nor has a meaning of its own."""
    while True:
        number = secrets.randbelow(16**digits)
        if number not in (cid, NO_PARENT, NO_PARENT - 1):
            return b"%0*x" % (digits, number)
