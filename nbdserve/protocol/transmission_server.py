"""The server's side of the transmission phase: reading requests (specification, "Transmission").

Theory of operation
-------------------
The owner of the socket lets the kernel write straight into the reader, then takes every whole request there is:

    size = socket.recv_into(reader.space())
    reader.received(size)
    for flags, command, cookie, offset, length, payload in reader.requests():
        ...

This is the hot path of the server (hundreds of thousands of requests a second), so a request is a tuple of plain ints,
made by one unpack_from, and no object besides. Numbers are handed on unchecked but for the magic: what a command, a
flag or an offset means, and which error answers a bad one, is the consumer's business.

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

from collections.abc import Iterator
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
        """Where the next bytes have to go; never empty if requests() was exhausted. Ends all borrowed payloads."""
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
        assert self._end < self._capacity, "requests() has to be exhausted before more is received"
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

    def requests(self) -> Iterator[Request]:
        """Every whole request that was received, in order.

        The iteration may be left early and taken up again by a new call, but not held across a call of space().

        Raises:
            ProtocolError: the stream is out of step; all whole requests before that point were yielded.
        """
        if self._unfinished is not None:
            if not self._has_finished():
                return
            request = (*self._unfinished, self._owned)
            self._unfinished = self._owned = None
            yield request
        buffer, view, received, maximum = self._buffer, self._view, self._end, self._maximum_payload
        unpack, position = _REQUEST.unpack_from, self._start
        while (waiting := received - position) >= _REQUEST.size:
            magic, flags, command, cookie, offset, length = unpack(buffer, position)
            if magic != REQUEST_MAGIC:
                raise _out_of_step(magic)
            if command == _WRITE:
                begin = position + _REQUEST.size
                position = begin + length
                if position > received:
                    self._set_aside((flags, command, cookie, offset, length), begin)
                    return
                self._start = position
                yield flags, command, cookie, offset, length, view[begin:position] if length <= maximum else None
                continue
            # Requests without payload lie in a row, and one iterator over it is a third faster than single unpacking.
            row = view[position : position + waiting - waiting % _REQUEST.size]
            for magic, flags, command, cookie, offset, length in _REQUEST.iter_unpack(row):
                if magic != REQUEST_MAGIC:
                    raise _out_of_step(magic)
                if command == _WRITE:
                    break
                position += _REQUEST.size
                self._start = position
                yield flags, command, cookie, offset, length, None

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


def _out_of_step(magic: int) -> ProtocolError:
    return ProtocolError(f"a request begins with {magic:#010x} instead of {REQUEST_MAGIC:#010x}")
