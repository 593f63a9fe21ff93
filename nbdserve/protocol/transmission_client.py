"""The client's side of the transmission phase (specification, sections "Transmission" and "Structured reply types").

Theory of operation
-------------------
A request is registered and packed in one step, so that a reply to it can be judged; then the socket's owner sends it
(behind a WRITE, its payload) and lets the kernel write what comes back into the reader:

    socket.sendall(reader.request(Command.READ, cookie, offset, length, into=view))
    size = socket.recv_into(reader.space())
    reader.received(size)
    for event in reader.events():
        ...                                    # until Done

A read has a destination (of the caller, or made here), and its data goes there: long data straight from the socket,
because space() then is the rest of the destination. Simple replies and structured ones end in the same events; a
caller that does not care for the pieces waits for Done, which carries the first error and a read's data.

Invariants
----------
- Every length is checked against its request or a bound before memory is given or written.
- A successful read has been filled to its last byte, and none was written twice: chunks that overlap, lie outside
  their request, or leave gaps are a ProtocolError, as the specification allows.
- Cookies are known exactly from request() until the last chunk of the reply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from struct import Struct
from typing import Final

from nbdserve.errors import ProtocolError
from nbdserve.protocol.constants import (
    CHUNK_ERROR_BIT,
    MAXIMUM_STATUS_DESCRIPTORS,
    MAXIMUM_STRING,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    ChunkType,
    Command,
    ErrorCode,
    ReplyFlags,
)
from nbdserve.protocol.outstanding import (
    BlockStatusChunk,
    DataChunk,
    Done,
    ErrorChunk,
    Event,
    HoleChunk,
    Outstanding,
)
from nbdserve.protocol.strings import readable

REQUEST: Final = Struct(">IHHQQI")
"""REQUEST_MAGIC, flags, command, cookie, offset, length."""

DEFAULT_CAPACITY: Final = 256 << 10

_SIMPLE: Final = Struct(">IIQ")  # magic, error, cookie
_CHUNK: Final = Struct(">IHHQI")  # magic, flags, type, cookie, length
_ERROR: Final = Struct(">IH")  # error, length of the text
_HOLE: Final = Struct(">QI")  # offset, length
_U64: Final = Struct(">Q")
_U32: Final = Struct(">I")
_DESCRIPTOR: Final = Struct(">II")  # length, status flags

_STRAIGHT: Final = 16 << 10  # bytes; shorter rests of a payload come through the buffer, with what follows them
_LONGEST_ERROR: Final = 64 << 10  # bytes; room for error chunks of types from the future
_ERROR_CODES: Final = frozenset(ErrorCode)


class ReplyReader:
    """Packs requests and makes events of what the server answers.

    Args:
        structured: structured replies were agreed.
        contexts: the numbers of the metadata contexts that were agreed.
        capacity: bytes of the buffer.
    """

    def __init__(self, structured: bool, contexts: Iterable[int] = (), capacity: int = DEFAULT_CAPACITY) -> None:
        if capacity < 2 * _STRAIGHT:
            raise ValueError(f"a capacity of {capacity} bytes is too small, {2 * _STRAIGHT} are needed")
        self._structured = structured
        self._contexts = frozenset(contexts)
        self._outstanding: dict[int, Outstanding] = {}
        self._view = memoryview(bytearray(capacity))
        self._start = 0  # view[start:end] was received and not yet consumed
        self._end = 0
        self._payload = memoryview(b"")  # of the reply or chunk under way, where it goes
        self._filled = 0  # bytes of _payload
        self._finish: Callable[[], Iterator[Event]] | None = None  # what to make of it
        self._straight = False  # space() is the rest of _payload

    def request(
        self,
        command: int,
        cookie: int,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        into: memoryview | None = None,
    ) -> bytes:
        """Register a request, and pack what goes before its payload, if any.

        Args:
            cookie: any number of 64 bits that no outstanding request has.
            into: for READ, writable memory of exactly `length` bytes; left out, it is made here.
        """
        packed = REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)
        if command == Command.DISC:
            return packed  # it has no reply
        assert cookie not in self._outstanding, "the cookie is in use"
        if command == Command.READ and into is None:
            into = memoryview(bytearray(length))
        assert into is None or len(into) == length
        self._outstanding[cookie] = Outstanding(command, flags, offset, length, into)
        return packed

    @property
    def outstanding(self) -> int:
        """How many requests have not been answered."""
        return len(self._outstanding)

    def space(self) -> memoryview:
        """Where the next bytes have to go; never empty if events() was exhausted."""
        self._straight = len(self._payload) - self._filled >= _STRAIGHT
        if self._straight:
            return self._payload[self._filled :]
        waiting = self._end - self._start
        if self._start:
            self._view[:waiting] = self._view[self._start : self._end]
            self._start, self._end = 0, waiting
        return self._view[waiting:]

    def received(self, size: int) -> None:
        """`size` bytes were written to the beginning of space()."""
        if self._straight:
            self._filled += size
        else:
            self._end += size

    def events(self) -> Iterator[Event]:
        """What the received bytes say. Has to be exhausted before more is received.

        Raises:
            ProtocolError: the server broke the protocol; no further reply can be trusted.
        """
        while self._finish is not None or self._begin():
            self._pour()
            if self._filled < len(self._payload):
                return
            finish, self._finish = self._finish, None
            self._payload, self._filled = memoryview(b""), 0
            assert finish is not None
            yield from finish()

    def _pour(self) -> None:
        """Move what the buffer has of the payload to where it goes."""
        count = min(len(self._payload) - self._filled, self._end - self._start)
        if count:
            self._payload[self._filled : self._filled + count] = self._view[self._start : self._start + count]
            self._filled += count
            self._start += count

    # The beginning of a reply or chunk, up to its payload. False: more bytes are needed to tell.

    def _begin(self) -> bool:
        available = self._end - self._start
        if available < _SIMPLE.size:
            return False
        magic, error, cookie = _SIMPLE.unpack_from(self._view, self._start)
        if magic == SIMPLE_REPLY_MAGIC:
            self._start += _SIMPLE.size
            self._begin_simple(cookie, error)
            return True
        if magic != STRUCTURED_REPLY_MAGIC:
            raise ProtocolError(f"a reply begins with the wrong number {magic:#010x}")
        if not self._structured:
            raise ProtocolError("the server sent a structured reply, which was not agreed")
        if available < _CHUNK.size:
            return False
        _, flags, kind, cookie, length = _CHUNK.unpack_from(self._view, self._start)
        done = bool(flags & ReplyFlags.DONE)
        if kind != ChunkType.OFFSET_DATA:
            self._start += _CHUNK.size
            self._begin_chunk(cookie, kind, length, done)
            return True
        if available < _CHUNK.size + _U64.size:
            return False
        (offset,) = _U64.unpack_from(self._view, self._start + _CHUNK.size)
        self._start += _CHUNK.size + _U64.size
        self._begin_data(cookie, offset, length - _U64.size, done)
        return True

    def _begin_simple(self, cookie: int, error: int) -> None:
        request = self._find(cookie)
        if self._structured and request.command == Command.READ:
            raise ProtocolError("the server sent a simple reply to a read, though structured replies were agreed")
        if error:
            self._finish = partial(self._fail, request, cookie, error, "", None, True)
        elif request.command == Command.READ and request.length:
            self._begin_data(cookie, request.offset, request.length, True)
        else:
            self._finish = partial(self._conclude, request, cookie, True)

    def _begin_data(self, cookie: int, offset: int, length: int, done: bool) -> None:
        request = self._find(cookie)
        request.cover(offset, length)
        self._payload = request.part(offset, length)
        self._finish = partial(self._finish_data, request, cookie, offset, self._payload, done)

    def _begin_chunk(self, cookie: int, kind: int, length: int, done: bool) -> None:
        request = self._find(cookie)
        finish: Callable[[Outstanding, int, memoryview, bool], Iterator[Event]]
        if kind == ChunkType.NONE:
            sound, finish = length == 0 and done, self._finish_none
        elif kind == ChunkType.OFFSET_HOLE:
            sound, finish = length == _HOLE.size, self._finish_hole
        elif kind == ChunkType.BLOCK_STATUS:
            count, rest = divmod(length - _U32.size, _DESCRIPTOR.size)
            sound, finish = 0 < count <= MAXIMUM_STATUS_DESCRIPTORS and not rest, self._finish_status
        elif kind == ChunkType.ERROR_OFFSET:
            least = _ERROR.size + _U64.size
            sound, finish = least <= length <= least + MAXIMUM_STRING, self._finish_error_offset
        elif kind & CHUNK_ERROR_BIT:
            sound, finish = _ERROR.size <= length <= _LONGEST_ERROR, self._finish_error
        else:
            raise ProtocolError(f"the server sent a chunk of the unknown type {kind}")
        if not sound:
            raise ProtocolError(f"the server sent a chunk of type {kind} with a payload of {length} bytes")
        self._payload = memoryview(bytearray(length))
        self._finish = partial(finish, request, cookie, self._payload, done)

    # Its end, when the payload is there

    def _finish_none(self, request: Outstanding, cookie: int, payload: memoryview, done: bool) -> Iterator[Event]:
        return self._conclude(request, cookie, done)

    def _finish_data(
        self, request: Outstanding, cookie: int, offset: int, payload: memoryview, done: bool
    ) -> Iterator[Event]:
        yield DataChunk(cookie, offset, payload)
        yield from self._conclude(request, cookie, done)

    def _finish_hole(self, request: Outstanding, cookie: int, payload: memoryview, done: bool) -> Iterator[Event]:
        offset, length = _HOLE.unpack(payload)
        request.cover(offset, length)
        request.part(offset, length)[:] = bytes(length)
        yield HoleChunk(cookie, offset, length)
        yield from self._conclude(request, cookie, done)

    def _finish_status(self, request: Outstanding, cookie: int, payload: memoryview, done: bool) -> Iterator[Event]:
        (context,) = _U32.unpack_from(payload)
        extents = tuple(_DESCRIPTOR.iter_unpack(payload[_U32.size :]))
        request.describe(context, extents)
        yield BlockStatusChunk(cookie, context, extents)
        yield from self._conclude(request, cookie, done)

    def _finish_error(self, request: Outstanding, cookie: int, payload: memoryview, done: bool) -> Iterator[Event]:
        error, text = _error_and_text(payload)
        return self._fail(request, cookie, error, text, None, done)

    def _finish_error_offset(
        self, request: Outstanding, cookie: int, payload: memoryview, done: bool
    ) -> Iterator[Event]:
        error, text = _error_and_text(payload[: -_U64.size])
        (offset,) = _U64.unpack(payload[-_U64.size :])
        return self._fail(request, cookie, error, text, offset, done)

    def _fail(
        self, request: Outstanding, cookie: int, error: int, text: str, offset: int | None, done: bool
    ) -> Iterator[Event]:
        # "The client SHOULD treat an unexpected error value as if it had been NBD_EINVAL."
        known = ErrorCode(error) if error in _ERROR_CODES else ErrorCode.EINVAL
        event = ErrorChunk(cookie, known, text, offset)
        request.fail(event)
        yield event
        yield from self._conclude(request, cookie, done)

    def _conclude(self, request: Outstanding, cookie: int, done: bool) -> Iterator[Event]:
        """The Done event, if this was the last of the reply."""
        if done:
            del self._outstanding[cookie]
            if request.errors:
                yield Done(cookie, request.errors[0].error, request.errors[0].text, request.destination)
            else:
                request.check_complete(self._contexts)
                yield Done(cookie, None, "", request.destination)

    def _find(self, cookie: int) -> Outstanding:
        request = self._outstanding.get(cookie)
        if request is None:
            raise ProtocolError(f"the server answers a request that is not outstanding (cookie {cookie:#x})")
        return request


def _error_and_text(payload: memoryview) -> tuple[int, str]:
    error, length = _ERROR.unpack_from(payload)
    if not error:
        raise ProtocolError("the server sent an error chunk without an error")
    if length > min(MAXIMUM_STRING, len(payload) - _ERROR.size):
        raise ProtocolError(f"the server sent an error text of {length} bytes in a payload of {len(payload)} bytes")
    return error, readable(bytes(payload[_ERROR.size : _ERROR.size + length]))
