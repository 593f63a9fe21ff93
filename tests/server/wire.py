"""A client that says on the wire just what it is told, right or wrong.

It packs and unpacks by hand, from the specification, so that a mistake in nbdserve.protocol cannot hide itself.
"""

from __future__ import annotations

import itertools
import socket
import ssl
from dataclasses import dataclass, field
from struct import calcsize, pack, unpack, unpack_from

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = (1 << bit for bit in range(5))
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED_REPLY, LIST_META_CONTEXT, SET_META_CONTEXT = (
    1, 2, 3, 5, 6, 7, 8, 9, 10,
)  # fmt: skip
ACK, SERVER, INFO_REPLY, META_CONTEXT = 1, 2, 3, 4
ERROR_BIT = 1 << 31
ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_PLATFORM, ERR_TLS_REQD, ERR_UNKNOWN, ERR_SHUTDOWN = (
    ERROR_BIT + number for number in range(1, 8)
)
OFFSET_DATA, OFFSET_HOLE, STATUS = 1, 2, 5
EPERM, EIO, ENOMEM, EINVAL, ENOSPC, ENOTSUP = 1, 5, 12, 22, 28, 95


@dataclass(frozen=True, slots=True)
class Reply:
    """One whole reply.

    Attributes:
        error: 0 for success.
        text: the server's words about an error.
        data: what a read has brought, holes filled in.
        chunks: (type, length of what it describes) of each content chunk of a read.
        extents: (length, flags) of a block status.
    """

    cookie: int
    error: int = 0
    text: str = ""
    data: bytes = b""
    chunks: tuple[tuple[int, int], ...] = ()
    extents: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)
class _Unfinished:
    """A structured reply of which chunks are still to come; offset and length are those of a read, else 0."""

    cookie: int
    offset: int
    length: int
    covered: int = 0
    error: int = 0
    text: str = ""
    data: bytearray = field(default_factory=bytearray)
    chunks: list[tuple[int, int]] = field(default_factory=list)
    extents: list[tuple[int, int]] = field(default_factory=list)

    def take(self, kind: int, payload: bytes) -> None:
        if kind == OFFSET_DATA:
            (start,) = unpack_from(">Q", payload)
            self.data = self.data or bytearray(self.length)
            self.data[start - self.offset : start - self.offset + len(payload) - 8] = payload[8:]
            self._count(kind, len(payload) - 8)
        elif kind == OFFSET_HOLE:
            self._count(kind, unpack(">QI", payload)[1])
        elif kind == STATUS:
            numbers = unpack(f">{(len(payload) - 4) // 4}I", payload[4:])
            self.extents = list(zip(numbers[::2], numbers[1::2], strict=True))
        elif kind >= 1 << 15:
            self.error, words = unpack_from(">IH", payload)
            self.text = payload[6 : 6 + words].decode()

    def _count(self, kind: int, length: int) -> None:
        self.chunks.append((kind, length))
        self.covered += length

    def finish(self) -> Reply:
        assert self.error or self.covered == self.length
        content = b"" if self.error else bytes(self.data) or bytes(self.length)
        return Reply(self.cookie, self.error, self.text, content, tuple(self.chunks), tuple(self.extents))


class Wire:
    """One connection, from the greeting on."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._cookies = itertools.count(0x1122334455667788)
        self._reads: dict[int, tuple[int, int]] = {}  # cookie -> offset and length of a read under way
        self._unfinished: dict[int, _Unfinished] = {}
        self.size = 0
        self.flags = 0

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    # Bytes

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def receive(self, count: int) -> bytes:
        """Exactly so many bytes."""
        data = bytearray()
        while len(data) < count:
            piece = self.sock.recv(count - len(data))
            if not piece:
                raise EOFError(f"the server hung up after {len(data)} of {count} bytes")
            data += piece
        return bytes(data)

    def unpack(self, layout: str) -> tuple[int, ...]:
        return unpack(layout, self.receive(calcsize(layout)))

    def is_closed(self) -> bool:
        """Wait for the server to hang up; False if it says something instead."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    # Handshake

    def greet(self) -> None:
        magic, option_magic, flags = self.unpack(">8s8sH")
        assert (magic, option_magic, flags) == (b"NBDMAGIC", b"IHAVEOPT", 3)
        self.send(pack(">I", 3))

    def option(self, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; all replies to it, as (type, data)."""
        self.send(pack(">8sII", b"IHAVEOPT", number, len(data)) + data)
        return self.option_replies(number)

    def option_replies(self, number: int) -> list[tuple[int, bytes]]:
        replies = []
        while True:
            magic, answered, kind, length = self.unpack(">QIII")
            assert (magic, answered) == (0x3E889045565A9, number)
            replies.append((kind, self.receive(length)))
            if kind == ACK or kind & ERROR_BIT:
                return replies

    def start_tls(self, context: ssl.SSLContext, host: str = "localhost") -> None:
        assert self.option(STARTTLS) == [(ACK, b"")]
        self.sock = context.wrap_socket(self.sock, server_hostname=host)

    def go(self, name: str = "", *, structured: bool = True, contexts: bool = True) -> Wire:
        """Choose an export and enter the transmission phase."""
        encoded = pack(">I", len(name.encode())) + name.encode()
        if structured:
            assert self.option(STRUCTURED_REPLY)[-1][0] == ACK
            if contexts:
                query = pack(">II", 1, 15) + b"base:allocation"
                assert self.option(SET_META_CONTEXT, encoded + query)[-1][0] == ACK
        replies = self.option(GO, encoded + pack(">H", 0))
        assert replies[-1][0] == ACK, replies
        for kind, data in replies[:-1]:
            if kind == INFO_REPLY and unpack_from(">H", data) == (0,):
                self.size, self.flags = unpack_from(">QH", data, 2)
        return self

    # Transmission

    def request(
        self, command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b""
    ) -> tuple[int, bytes]:
        """A request's cookie and bytes, not yet sent."""
        cookie = next(self._cookies)
        if command == READ:
            self._reads[cookie] = offset, length
        return cookie, pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length) + payload

    def ask(self, command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> Reply:
        """Send one request and take its reply, which has to be the next one."""
        cookie, data = self.request(command, offset, length, flags, payload)
        self.send(data)
        reply = self.reply()
        assert reply.cookie == cookie
        return reply

    def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        reply = self.ask(READ, offset, length, flags)
        assert reply.error == 0, reply
        return reply.data

    def write(self, offset: int, data: bytes, flags: int = 0) -> int:
        """The error number, 0 for success."""
        return self.ask(WRITE, offset, len(data), flags, data).error

    def reply(self) -> Reply:
        """The next reply that is whole, put together from its chunks, between which those of others may lie."""
        while True:
            (magic,) = self.unpack(">I")
            if magic == 0x67446698:
                error, cookie = self.unpack(">IQ")
                _, length = self._reads.pop(cookie, (0, 0))
                return Reply(cookie, error, data=b"" if error else self.receive(length))
            assert magic == 0x668E33EF, hex(magic)
            flags, kind, cookie, length = self.unpack(">HHQI")
            if cookie not in self._unfinished:
                self._unfinished[cookie] = _Unfinished(cookie, *self._reads.pop(cookie, (0, 0)))
            self._unfinished[cookie].take(kind, self.receive(length))
            if flags & 1:
                return self._unfinished.pop(cookie).finish()
