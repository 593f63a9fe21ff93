"""BlockDevice: the interface of everything that can be read and written like a disk.

Theory of operation. A device answers one question, map(): where do the guest bytes from this offset on live? Reading,
sparse replies, block status and the walk down a backing chain all follow from the answer and are written here, once.
A device adds how to compute what does not lie verbatim (read_computed) and how to change its bytes (write, zero,
discard, flush).

Contract of every device, checked by the conformance suite in tests/conformance.py:

- All methods are synchronous, may block, and may be called from any number of threads at once.
- Ranges lie inside the device: 0 <= offset and offset + length <= size; callers check, devices may assert.
- map() returns an extent of at least 1 and at most `length` bytes; locate() never disagrees with it.
- Requests that overlap in time and range have no defined order, but never harm bytes outside their ranges.
- What is written is seen by every later read at once, and survives a crash once a later flush() has returned.
- Failures of the host's storage are OSError with its errno.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from nbdserve.block.extents import Computed, Data, Extent, HostOffset, Zero
from nbdserve.block.file import HostFile, ReadBuffer, WriteBuffer
from nbdserve.block.pins import Pins
from nbdserve.errors import ReadOnly


class BlockDevice(ABC):
    """A disk of `size` bytes.

    Attributes:
        size: length in bytes.
        read_only: whether write, zero and discard are refused (ReadOnly).
        preferred_block: bytes; requests of a multiple of this, aligned to it, are cheapest. A power of two.
        zeroes_fast: whether zero() of any length takes about as long as writing a table entry.
        useful_writers: how many threads may write at once to good effect; few where writes allocate under one lock.
        pins: hold one (see block.pins) from map() or locate() until done with the host bytes they named.
    """

    def __init__(self, size: int, *, read_only: bool, pins: Pins | None = None) -> None:
        self.size = size
        self.read_only = read_only
        self.preferred_block = 4096
        self.zeroes_fast = False
        self.useful_writers = 64
        self.pins = pins or Pins()

    @abstractmethod
    def map(self, offset: int, length: int) -> Extent:
        """The extent that starts at guest offset `offset`, at most `length` bytes long."""

    def map_nowait(self, offset: int, length: int) -> Extent | None:
        """What map() says, if it can be said without waiting for the disk; else None."""
        return None

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """The extents that cover the whole range, in order."""
        end = offset + length
        while offset < end:
            extent = self.map(offset, end - offset)
            yield extent
            offset += extent.length

    def locate(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        """Where the *whole* range lies verbatim, without building an extent; None when it must be mapped.

        The fast path of small reads. It may say None at any time (a table is not in memory), never block, and never
        say anything that map() would not.
        """
        return None

    def locate_writable(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        """Where the whole range may be overwritten in place without touching any table; None when write() must do it.

        Like locate() it never blocks.
        """
        return None

    def read_computed(self, offset: int, buffer: WriteBuffer) -> None:
        """Work out bytes that map() called Computed; the buffer spans no more than that extent."""
        raise AssertionError(f"{type(self).__name__} maps nothing as Computed")

    def read_into(self, offset: int, buffer: WriteBuffer) -> None:
        """Fill the buffer with the guest bytes from offset on."""
        view = memoryview(buffer)
        with self.pins.held():
            while view:
                extent = self.map(offset, len(view))
                piece = view[: extent.length]
                match extent:
                    case Data():
                        extent.file.read_into(extent.host_offset, piece)
                    case Zero():
                        piece[:] = bytes(len(piece))
                    case Computed():
                        self.read_computed(offset, piece)
                view = view[extent.length :]
                offset += extent.length

    def read_at_hand(self, offset: int, buffer: WriteBuffer) -> bool:
        """read_into(), if that needs nothing slower than the page cache; False, with anything in the buffer, if not."""
        view = memoryview(buffer)
        with self.pins.held():
            place = self.locate(offset, len(view))
            if place is not None:
                return place[0].read_at_hand(place[1], view)
            while view:
                match self.map_nowait(offset, len(view)):
                    case Data(length, file, host_offset) if file.read_at_hand(host_offset, view[:length]):
                        pass
                    case Zero(length):
                        view[:length] = bytes(length)
                    case _:
                        return False
                view = view[length:]
                offset += length
        return True

    def read(self, offset: int, length: int) -> bytearray:
        """The guest bytes of the range."""
        buffer = bytearray(length)
        self.read_into(offset, buffer)
        return buffer

    def write(self, offset: int, data: ReadBuffer) -> None:
        """Change the bytes from offset on."""
        raise self._refusal()

    def write_nowait(self, offset: int, data: ReadBuffer) -> bool:
        """Write if that needs nothing slower than the page cache; False (nothing done) when write() has to do it."""
        place = self.locate_writable(offset, len(data))
        if place is None or not place[0].writes_at_once(place[1], len(data)):
            return False
        place[0].write(place[1], data)
        return True

    def zero(self, offset: int, length: int, *, unmap: bool = True) -> None:
        """Make the range read as zeros.

        Args:
            unmap: host space may be given up; False keeps what is allocated allocated.
        """
        raise self._refusal()

    def discard(self, offset: int, length: int) -> None:
        """Give up the range's host space where that is easy; those parts read as zeros afterwards, others as before."""
        raise self._refusal()

    def flush(self) -> None:
        """Return when every write that returned before this call is on stable storage."""
        return

    def close(self) -> None:
        """Flush if needed and let go of all files; calling it again does nothing. No other call may follow."""
        return

    def __enter__(self) -> BlockDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refusal(self) -> ReadOnly:
        return ReadOnly(f"{type(self).__name__} is read-only")
