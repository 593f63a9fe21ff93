"""One connection to an NBD server, which any number of threads share.

Theory of operation. call() sends a request and returns with its reply; requests of several threads are under way at
the same time. There is no thread of our own: of those that wait, one receives for all, and when its own reply is
complete, it hands that task to another one.

Invariants: requests leave whole, one after the other (`_sending`); at most one thread receives (`_is_receiving`, under
`_changed`), and it alone touches the reader's buffer. Whoever has sent a request and waits for it can become that
thread, so a server that sends before it reads on is always read from. Once anything has gone wrong on the connection,
every call fails: a stream that is out of step is never used again.
"""

from __future__ import annotations

import errno
import socket
import ssl
import threading
from contextlib import suppress
from dataclasses import dataclass, field

from nbdserve.client.uri import NbdUri
from nbdserve.errors import OpenError, ProtocolError
from nbdserve.protocol.constants import Command
from nbdserve.protocol.handshake import HandshakeState
from nbdserve.protocol.handshake_client import ClientHandshake
from nbdserve.protocol.messages import Agreement
from nbdserve.protocol.outstanding import BlockStatusChunk, Done
from nbdserve.protocol.transmission_client import ReplyReader

_CONNECT_SECONDS = 15.0
_SILENCE_MILLISECONDS = 60_000  # unanswered TCP data means by then that the server is gone
_RECEIVE_BYTES = 1 << 16

Extents = tuple[tuple[int, int], ...]


@dataclass(slots=True)
class _Waiting:
    """A request under way: what its reply has brought, per metadata context, and its end."""

    extents: dict[int, Extents] = field(default_factory=dict)
    done: Done | None = None


class Session:
    """A negotiated connection.

    Attributes:
        agreement: what was settled with the server.
    """

    def __init__(self, uri: NbdUri) -> None:
        """Connect and negotiate.

        Raises:
            OpenError: the server is not there, or refuses.
        """
        self._uri = uri
        try:
            self._socket: socket.socket | ssl.SSLSocket = _connected(uri)
        except OSError as error:
            raise OpenError(f"{uri.text}: {error.strerror or error}; is the server running there?") from None
        try:
            self.agreement, trailing = self._negotiate()
        except BaseException:
            self._socket.close()
            raise
        self._socket.settimeout(None)
        self._reader = ReplyReader(self.agreement.structured, self.agreement.contexts)
        self._waiting: dict[int, _Waiting] = {}
        self._cookie = 0
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._is_receiving = False
        self._failure: str | None = None
        if trailing:
            self._fail("the server sent data that nobody asked for")

    def call(
        self,
        command: Command,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes | bytearray | memoryview = b"",
        into: memoryview | None = None,
    ) -> dict[int, Extents]:
        """Send a request and wait for its reply.

        Args:
            into: where a read's data goes.

        Returns:
            The extents, (bytes, flags), by the number of their metadata context: what BLOCK_STATUS asks for.

        Raises:
            OSError: the server reports an error, or the connection is lost.
        """
        waiting = _Waiting()
        with self._sending:
            self._raise_failure()
            self._cookie += 1
            cookie = self._cookie
            self._waiting[cookie] = waiting
            try:
                self._send(self._reader.request(command, cookie, offset, length, flags, into), payload)
            except OSError as error:
                self._fail(error.strerror or str(error))
        done = self._wait_for(waiting)
        if done.error is not None:
            raise OSError(int(done.error), done.text or f"the server failed to {command.name}", self._uri.text)
        return waiting.extents

    def close(self) -> None:
        """Say goodbye and hang up."""
        with self._sending:
            if self._failure is None:
                with suppress(OSError):  # hanging up without a word is allowed as well
                    self._send(self._reader.request(Command.DISC, 0), b"")
                self._fail("the connection was closed")
            self._socket.close()

    def _send(self, header: bytes, payload: bytes | bytearray | memoryview) -> None:
        if len(payload) > _RECEIVE_BYTES:
            self._socket.sendall(header)
            self._socket.sendall(payload)
        else:
            self._socket.sendall(header + payload if payload else header)

    def _wait_for(self, waiting: _Waiting) -> Done:
        while True:
            with self._changed:
                while waiting.done is None and self._failure is None and self._is_receiving:
                    self._changed.wait()
                if waiting.done is not None:
                    return waiting.done
                self._raise_failure()
                self._is_receiving = True
            try:
                self._receive(waiting)
            finally:
                with self._changed:
                    self._is_receiving = False
                    self._changed.notify_all()

    def _receive(self, own: _Waiting) -> None:
        """Receive for everyone until the own reply is complete or the connection fails."""
        reader = self._reader
        try:
            while own.done is None and self._failure is None:
                count = self._socket.recv_into(reader.space())
                if not count:
                    self._fail("the server hung up")
                    return
                reader.received(count)
                others = False
                for event in reader.events():
                    if isinstance(event, BlockStatusChunk):
                        self._waiting[event.cookie].extents[event.context] = event.extents
                    elif isinstance(event, Done):
                        finished = self._waiting.pop(event.cookie)
                        finished.done = event
                        others = others or finished is not own
                if others:
                    with self._changed:
                        self._changed.notify_all()
        except (OSError, ProtocolError) as error:
            self._fail(str(error))

    def _fail(self, why: str) -> None:
        """The connection is of no more use."""
        if self._failure is None:
            self._failure = why
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that receives
        with self._changed:
            self._changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise OSError(errno.EIO, f"the connection is lost: {self._failure}", self._uri.text)

    # The handshake

    def _negotiate(self) -> tuple[Agreement, bytes]:
        uri = self._uri
        is_on_trial = False  # whether we have shown our certificate, and heard nothing since
        try:
            handshake = ClientHandshake(uri.export, tls=uri.tls)
            while True:
                self._socket.sendall(handshake.data_to_send())
                match handshake.state:
                    case HandshakeState.TRANSMISSION:
                        return handshake.agreement, handshake.trailing_data()
                    case HandshakeState.STARTING_TLS:
                        self._start_tls()
                        handshake.tls_established()
                        is_on_trial = True
                    case _:
                        data = self._socket.recv(_RECEIVE_BYTES)
                        if not data and is_on_trial:
                            raise ssl.SSLEOFError
                        if not data:
                            handshake.connection_lost()
                        handshake.receive(data)
                        is_on_trial = False
        except OSError as error:  # before ValueError, which one kind of it is as well
            raise OpenError(f"{uri.text}: {_why_no_agreement(error, is_on_trial)}") from None
        except (ProtocolError, ValueError) as error:
            raise OpenError(f"{uri.text}: {error}") from None

    def _start_tls(self) -> None:
        from nbdserve.tls import client_context

        context = client_context(self._uri.certificates)
        self._socket = context.wrap_socket(self._socket, server_hostname=self._uri.hostname)


def _why_no_agreement(error: OSError, is_on_trial: bool) -> str:
    """In words. With TLS 1.3 a server looks at our certificate when we take the handshake for finished."""
    if isinstance(error, ssl.SSLError) or (is_on_trial and isinstance(error, ConnectionError)):
        from nbdserve.tls import why_tls_failed

        return (
            f"TLS failed: {why_tls_failed(error if isinstance(error, ssl.SSLError) else ssl.SSLEOFError(), 'server')}"
        )
    return f"{error.strerror or error}, during the negotiation"


def _connected(uri: NbdUri) -> socket.socket:
    if uri.socket is not None:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(_CONNECT_SECONDS)
        try:
            connection.connect(uri.socket)
        except OSError:
            connection.close()
            raise
        return connection
    connection = socket.create_connection((uri.host, uri.port), _CONNECT_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENCE_MILLISECONDS)
    return connection
