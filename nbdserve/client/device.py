"""RemoteDevice: an export as a BlockDevice, with reads, holes, zeroes and trims carried by the matching commands.

The server's limits are kept here: requests are cut at its maximum block size, and widened to its minimum one (a read
takes more and drops it, a write reads what stands around it first, under a lock, so that no two of ours mix).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from nbdserve.block import BlockDevice, Computed, Extent, Zero
from nbdserve.block.file import ReadBuffer, WriteBuffer
from nbdserve.client.session import Session
from nbdserve.client.uri import NbdUri
from nbdserve.protocol.constants import BASE_ALLOCATION, AllocationState, Command, CommandFlags, TransmissionFlags

_LONGEST = 1 << 30  # bytes of one request without payload; the wire has 32 bits for it
_LARGEST_PAYLOAD = 4 << 20  # bytes; larger requests gain nothing and make others wait


def connect(uri: str, *, read_only: bool = False) -> RemoteDevice:
    """The device behind an NBD URI.

    Raises:
        OpenError: the URI is wrong, the server is not there, or it refuses.
    """
    return RemoteDevice(Session(NbdUri.parse(uri)), read_only=read_only)


class RemoteDevice(BlockDevice):
    """What a session serves.

    Attributes:
        offered_read_only: whether the server refuses writes.
    """

    def __init__(self, session: Session, *, read_only: bool) -> None:
        export = session.agreement.export
        self._flags = export.flags
        self.offered_read_only = TransmissionFlags.READ_ONLY in export.flags
        super().__init__(export.size, read_only=read_only or self.offered_read_only)
        self._session = session
        self._minimum = export.minimum_block
        self._payload = max(self._minimum, min(export.maximum_block, _LARGEST_PAYLOAD) // self._minimum * self._minimum)
        self.preferred_block = export.preferred_block
        self._allocation = next(
            (number for number, name in session.agreement.contexts.items() if name == BASE_ALLOCATION), None
        )
        self._widening = threading.Lock()

    # Reading

    def map(self, offset: int, length: int) -> Extent:
        return next(self.extents(offset, length))

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        end = offset + length
        while offset < end:
            for run, status in self._status(offset, end):
                run = min(run, end - offset)
                if run > 0:
                    if status & AllocationState.ZERO:
                        yield Zero(run, allocated=not status & AllocationState.HOLE)
                    else:
                        yield Computed(run)
                    offset += run

    def _status(self, offset: int, end: int) -> list[tuple[int, int]]:
        """(bytes, flags of base:allocation) from offset on; not all that was asked, but something."""
        if self._allocation is None:
            return [(end - offset, 0)]
        start = offset - offset % self._minimum
        length = min(_LONGEST, self._rounded_up(end) - start)
        runs = list(self._session.call(Command.BLOCK_STATUS, start, length).get(self._allocation, ()))
        run, status = runs[0]
        return [(run - (offset - start), status), *runs[1:]]

    def read_computed(self, offset: int, buffer: WriteBuffer) -> None:
        self.read_into(offset, buffer)

    def read_into(self, offset: int, buffer: WriteBuffer) -> None:
        view = memoryview(buffer)
        while view:
            start = offset - offset % self._minimum
            count = min(len(view), self._payload - (offset - start))
            stop = self._rounded_up(offset + count)
            piece = view[:count]
            if stop - start == count:
                self._session.call(Command.READ, start, count, into=piece)
            else:
                wider = memoryview(bytearray(stop - start))
                self._session.call(Command.READ, start, len(wider), into=wider)
                piece[:] = wider[offset - start : offset - start + count]
            view = view[count:]
            offset += count

    def _rounded_up(self, offset: int) -> int:
        return -(-offset // self._minimum) * self._minimum

    # Writing

    def write(self, offset: int, data: ReadBuffer) -> None:
        if self.read_only:
            raise self._refusal()
        view = memoryview(data)
        while view:
            start = offset - offset % self._minimum
            count = min(len(view), self._payload - (offset - start))
            self._write_piece(start, offset, view[:count])
            view = view[count:]
            offset += count

    def _write_piece(self, start: int, offset: int, piece: memoryview) -> None:
        stop = self._rounded_up(offset + len(piece))
        if stop - start == len(piece):
            self._session.call(Command.WRITE, start, len(piece), payload=piece)
            return
        with self._widening:
            wider = self.read(start, stop - start)
            wider[offset - start : offset - start + len(piece)] = piece
            self._session.call(Command.WRITE, start, len(wider), payload=wider)

    def zero(self, offset: int, length: int, *, unmap: bool = True) -> None:
        if self.read_only:
            raise self._refusal()
        if TransmissionFlags.SEND_WRITE_ZEROES not in self._flags:
            self._write_zeros(offset, length)
            return
        flags = CommandFlags(0) if unmap else CommandFlags.NO_HOLE
        start, stop = self._rounded_up(offset), (offset + length) // self._minimum * self._minimum
        if start >= stop:
            self._write_zeros(offset, length)
            return
        self._write_zeros(offset, start - offset)
        for position, count in _cut(start, stop):
            self._session.call(Command.WRITE_ZEROES, position, count, flags=flags)
        self._write_zeros(stop, offset + length - stop)

    def _write_zeros(self, offset: int, length: int) -> None:
        for position, count in _cut(offset, offset + length, self._payload):
            self.write(position, bytes(count))

    def discard(self, offset: int, length: int) -> None:
        if self.read_only:
            raise self._refusal()
        if TransmissionFlags.SEND_TRIM not in self._flags:
            return
        for position, count in _cut(self._rounded_up(offset), (offset + length) // self._minimum * self._minimum):
            self._session.call(Command.TRIM, position, count)

    def flush(self) -> None:
        if not self.read_only and TransmissionFlags.SEND_FLUSH in self._flags:
            self._session.call(Command.FLUSH)

    def close(self) -> None:
        self._session.close()


def _cut(start: int, stop: int, longest: int = _LONGEST) -> Iterator[tuple[int, int]]:
    """(offset, length) of pieces of at most `longest` bytes."""
    while start < stop:
        count = min(longest, stop - start)
        yield start, count
        start += count
