"""A connected socket as the transmission loop wants it: receive without waiting, send everything, plain or encrypted.

Receiving never awaits: it raises BlockingIOError when the kernel has nothing, so that the loop awaits only when there
is nothing to do. Sending awaits only when the kernel takes no more.
"""

from __future__ import annotations

import fcntl
import os
import socket
import ssl
import termios
from collections.abc import Iterable
from contextlib import suppress
from typing import Protocol

import trio

from nbdserve.block import HostFile
from nbdserve.server.placement import client_locator, keep_apart

_BUFFER_BYTES = 4 << 20
_MANY_RECORDS = 64 << 10  # bytes from which on TLS records are worth holding back until a segment is full
_ALERTED_BYTES = 1 << 16
_DELIVERY_SECONDS = 5.0

Buffer = bytes | bytearray | memoryview


class Transport(Protocol):
    """One connection's bytes.

    Attributes:
        sends_files: whether send_file() is there.
    """

    sends_files: bool

    def receive_nowait(self, buffer: memoryview) -> int:
        """Receive into the buffer; 0 at the end of the stream. Raises BlockingIOError when there is nothing yet."""
        ...

    async def wait_readable(self) -> None:
        """Return when receive_nowait() is worth another try."""
        ...

    def send_nowait(self, data: memoryview, *, more: bool = False) -> int:
        """Send what the kernel takes at once; the number of bytes, 0 when send() has to do it all."""
        ...

    async def send(self, buffers: Iterable[Buffer], *, more: bool = False) -> None:
        """Send all bytes; `more` tells that others follow at once."""
        ...

    def send_file_nowait(self, file: HostFile, offset: int, length: int) -> int:
        """Send what the kernel takes at once of a file's bytes, without copying them; the number of bytes."""
        ...

    async def send_file(self, file: HostFile, offset: int, length: int) -> None:
        """Send bytes of a file without copying them."""
        ...

    def keep_apart(self) -> None:
        """Leave the processor that the client runs on, if it runs on this host."""
        ...

    async def delivered(self) -> None:
        """Return when the client's host has all that was sent, or after a while: closing earlier could take it back."""
        ...

    async def close(self) -> None:
        """End the connection, politely where that needs no waiting."""
        ...


class PlainTransport:
    """Bytes as they are."""

    sends_files = True

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family == socket.AF_UNIX:
            _enlarge(sock)
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.sock = sock
        self.locate_client = client_locator(sock)
        self.receive_nowait = sock.recv_into

    async def wait_readable(self) -> None:
        await trio.lowlevel.wait_readable(self.sock)

    def send_nowait(self, data: memoryview, *, more: bool = False) -> int:
        try:
            return self.sock.send(data, socket.MSG_MORE if more else 0)
        except BlockingIOError:
            return 0

    def send_file_nowait(self, file: HostFile, offset: int, length: int) -> int:
        try:
            return os.sendfile(self.sock.fileno(), file.fd, offset, length)
        except BlockingIOError:
            return 0

    async def send(self, buffers: Iterable[Buffer], *, more: bool = False) -> None:
        flags = socket.MSG_MORE if more else 0
        for buffer in buffers:
            view = memoryview(buffer)
            while view:
                try:
                    view = view[self.sock.send(view, flags) :]
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self.sock)

    async def send_file(self, file: HostFile, offset: int, length: int) -> None:
        while length:
            try:
                sent = os.sendfile(self.sock.fileno(), file.fd, offset, length)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.sock)
                continue
            if not sent:  # past the end of the file: the rest is zeros
                await self.send([bytes(length)])
                return
            offset += sent
            length -= sent

    def keep_apart(self) -> None:
        if self.locate_client is not None:
            keep_apart(self.locate_client)

    async def delivered(self) -> None:
        await wait_until_delivered(self.sock)

    async def close(self) -> None:
        self.sock.close()


class TlsTransport:
    """The same through TLS.

    Takes the socket of a plain transport over, which must not be used any more, but by close().
    """

    sends_files = False

    def __init__(self, plain: PlainTransport, context: ssl.SSLContext) -> None:
        self._locate_client = plain.locate_client
        self._is_tcp = plain.sock.family != socket.AF_UNIX
        plain.sock = self._sock = context.wrap_socket(plain.sock, server_side=True, do_handshake_on_connect=False)

    async def handshake(self) -> None:
        """Agree on keys; raises ssl.SSLError or ConnectionError."""
        while True:
            try:
                self._sock.do_handshake()
            except ssl.SSLWantReadError:
                await self.wait_readable()
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(self._sock)
            except ssl.SSLError:
                with suppress(OSError):
                    # Bytes that nobody reads would make TCP take back the alert that tells the client why.
                    socket.socket.recv(self._sock, _ALERTED_BYTES)
                raise
            else:
                return

    def receive_nowait(self, buffer: memoryview) -> int:
        received = 0
        # One call gives one record, of at most 16 KiB.
        while received < len(buffer):
            try:
                count = self._sock.recv_into(buffer[received:])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                if received:
                    break
                raise BlockingIOError from None
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                break
            if not count:
                break
            received += count
        return received

    async def wait_readable(self) -> None:
        await trio.lowlevel.wait_readable(self._sock)

    def send_nowait(self, data: memoryview, *, more: bool = False) -> int:
        # What is not taken is to be sent next, from its beginning: a part of it may be encrypted already.
        corked = self._is_tcp and len(data) >= _MANY_RECORDS
        if corked:
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        try:
            return self._sock.send(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0
        finally:
            if corked:
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)

    async def send(self, buffers: Iterable[Buffer], *, more: bool = False) -> None:
        for buffer in buffers:
            view = memoryview(buffer)
            while view:
                sent = self.send_nowait(view)
                if not sent:
                    await trio.lowlevel.wait_writable(self._sock)
                view = view[sent:]

    def send_file_nowait(self, file: HostFile, offset: int, length: int) -> int:
        raise AssertionError("TLS has to see the bytes it encrypts")

    async def send_file(self, file: HostFile, offset: int, length: int) -> None:
        raise AssertionError("TLS has to see the bytes it encrypts")

    def keep_apart(self) -> None:
        if self._locate_client is not None:
            keep_apart(self._locate_client)

    async def delivered(self) -> None:
        await wait_until_delivered(self._sock)

    async def close(self) -> None:
        with suppress(ssl.SSLError, OSError, ValueError):
            self._sock.unwrap()  # says goodbye; the answer need not be waited for
        self._sock.close()


async def wait_until_delivered(sock: socket.socket) -> None:
    """What Transport.delivered() promises, for the socket itself."""
    if sock.family == socket.AF_UNIX:
        return
    # TCP answers a close with unread bytes by a reset, and forgets what it has not sent: see tcp_close() in Linux.
    with trio.move_on_after(_DELIVERY_SECONDS), suppress(OSError):
        while any(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4))):
            await trio.sleep(0.002)


def _enlarge(sock: socket.socket) -> None:
    """Let a unix socket hold several large replies; beyond the system's limit only where we are allowed to."""
    force = {socket.SO_SNDBUF: 32, socket.SO_RCVBUF: 33}  # SO_SNDBUFFORCE, SO_RCVBUFFORCE (asm-generic/socket.h)
    for option, forced in force.items():
        try:
            sock.setsockopt(socket.SOL_SOCKET, forced, _BUFFER_BYTES)
        except OSError:
            sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
