"""The server's side of the transmission phase: reading requests (specification, "Transmission").

Theory of operation
-------------------
The owner of the socket lets the kernel write straight into the reader, then takes every whole request there is:

    size = socket.recv_into(reader.space())
    reader.received(size)
    while (request := reader.next_request()) is not None:
        flags, command, cookie, offset, length, payload = request
        ...

A request is a tuple of plain ints. Numbers are handed on unchecked but for the magic: what a command, a flag or an
offset means, and which error answers a bad one, is the consumer's business.

Of the requests that come hundreds of thousands of times a second, reads and writes without flags, a consumer may take
as many as it can answer at once by itself: it looks at what pending() shows with HEADER, compares the first of its
numbers with PLAIN_READ and PLAIN_WRITE (one comparison for magic, flags and command) and says with skip_to() how far
it came. All others come out of next_request().

A write's payload comes in one of two kinds of memory, and `is_borrowed` tells them apart:
- borrowed: a view into the reader's buffer. It is valid until the next call of space(); copy it to keep it.
- owned: memory of exactly the payload's length that nobody else will touch. A payload of LARGE_PAYLOAD bytes or more
  that does not fit into what is left of the buffer gets it: the part that is here is copied there once, and space()
  then returns the rest of it, so that the remainder arrives in place. Behind such a payload another one is likely,
  so the next space() is small once, to let only the beginning of that one into the buffer.

Invariants
----------
- The stream stays in step whatever a client claims: a payload over `maximum_payload` is received and dropped to its
  last byte, in the buffer itself, and its request is then yielded with payload None, to be answered with an error.
- Memory: the buffer, and at most one owned payload (of at most maximum_payload bytes) that is still incomplete.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from nbdserve.errors import ProtocolError
from nbdserve.protocol.constants import DEFAULT_MAXIMUM_BLOCK, REQUEST_MAGIC, Command

Request = tuple[int, int, int, int, int, memoryview | None]
"""Flags, command, cookie, offset, length, payload. The payload of a WRITE is None if it was too long to keep; no
other command has one."""

LARGE_PAYLOAD: Final = 64 << 10
"""Bytes; a smaller payload that does not fit is moved to the front of the buffer, which is cheaper than memory of
its own."""

DEFAULT_CAPACITY: Final = 1 << 20

HEADER: Final = Struct(">QQQI")
"""Magic, flags and command in one number; cookie; offset; length."""

PLAIN_READ: Final = REQUEST_MAGIC << 32 | Command.READ
PLAIN_WRITE: Final = REQUEST_MAGIC << 32 | Command.WRITE

_REQUEST: Final = Struct(">IHHQQI")  # magic, flags, command, cookie, offset, length
_ROOM: Final = _REQUEST.size + LARGE_PAYLOAD  # bytes; holds any request that gets no memory of its own
_WRITE: Final = int(Command.WRITE)

_Header = tuple[int, int, int, int, int]  # flags, command, cookie, offset, length


class RequestReader:
    """Cuts what a client sends into requests.

    Args:
        maximum_payload: bytes; longer writes are dropped and reported.
        capacity: bytes of the buffer, i.e. how much one receive may bring.
    """

    def __init__(self, maximum_payload: int = DEFAULT_MAXIMUM_BLOCK, capacity: int = DEFAULT_CAPACITY) -> None:
        if capacity < _ROOM:
            raise ValueError(f"a capacity of {capacity} bytes is too small, {_ROOM} are needed")
        self._maximum_payload = maximum_payload
        self._capacity = capacity
        self._buffer = bytearray(capacity)
        self._view = memoryview(self._buffer)
        self._start = 0  # buffer[start:end] was received and not yet consumed
        self._end = 0
        self._unfinished: _Header | None = None  # the write that has _owned or _to_drop
        self._owned: memoryview | None = None
        self._filled = 0  # bytes of _owned
        self._to_drop = 0
        self._large_is_likely = False

    def space(self) -> memoryview:
        """Where the next bytes have to go; never empty if all requests were taken. Ends all borrowed payloads."""
        if self._owned is not None:
            return self._owned[self._filled :]
        if self._start == self._end:
            self._start = self._end = 0
            if self._large_is_likely:
                return self._view[:_ROOM]
        elif self._capacity - self._end < _ROOM:
            waiting = self._end - self._start
            self._view[:waiting] = self._view[self._start : self._end]
            self._start, self._end = 0, waiting
        assert self._end < self._capacity, "all requests have to be taken before more is received"
        return self._view[self._end :]

    def received(self, size: int) -> None:
        """`size` bytes were written to the beginning of space()."""
        if self._owned is not None:
            self._filled += size
        else:
            self._end += size
            self._large_is_likely = False

    def is_borrowed(self, payload: memoryview) -> bool:
        """Whether a payload has to be copied before it is kept beyond the next call of space()."""
        return payload.obj is self._buffer

    def pending(self) -> tuple[memoryview, int, int]:
        """The buffer, and from where to where it holds bytes that begin with a header and are not yet consumed."""
        if self._unfinished is not None:
            return self._view, self._start, self._start
        return self._view, self._start, self._end

    def skip_to(self, position: int) -> None:
        """Whole requests up to this position of the buffer have been taken by the caller."""
        self._start = position

    def next_request(self) -> Request | None:
        """The next whole request that was received; None when there is none, and more has to be received.

        Raises:
            ProtocolError: the stream is out of step.
        """
        if self._unfinished is not None:
            if not self._has_finished():
                return None
            request = (*self._unfinished, self._owned)
            self._unfinished = self._owned = None
            return request
        begin = self._start + _REQUEST.size
        if begin > self._end:
            return None
        magic, flags, command, cookie, offset, length = _REQUEST.unpack_from(self._buffer, self._start)
        if magic != REQUEST_MAGIC:
            raise ProtocolError(f"a request begins with {magic:#010x} instead of {REQUEST_MAGIC:#010x}")
        if command != _WRITE:
            self._start = begin
            return flags, command, cookie, offset, length, None
        end = begin + length
        if end > self._end:
            self._set_aside((flags, command, cookie, offset, length), begin)
            return None
        self._start = end
        return (
            flags,
            command,
            cookie,
            offset,
            length,
            self._view[begin:end] if length <= self._maximum_payload else None,
        )

    def _set_aside(self, request: _Header, begin: int) -> None:
        """Begin to drop a write's payload or to receive it into its own memory, unless it just has to wait."""
        length = request[4]
        arrived = self._end - begin
        if length > self._maximum_payload:
            self._to_drop = length - arrived
        elif length >= LARGE_PAYLOAD and begin + length > self._capacity:
            self._owned = memoryview(bytearray(length))
            self._owned[:arrived] = self._view[begin : self._end]
            self._filled = arrived
        else:
            return
        self._start = self._end
        self._unfinished = request

    def _has_finished(self) -> bool:
        """Whether the last byte of the payload that was set aside has come; drops what is there to be dropped."""
        if self._owned is not None:
            self._large_is_likely = True
            return self._filled == len(self._owned)
        dropped = min(self._to_drop, self._end - self._start)
        self._start += dropped
        self._to_drop -= dropped
        return not self._to_drop
