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

_BUFFER_BYTES = 4 << 20
_CIPHERTEXT_BYTES = 1 << 18
_PLAINTEXT_PIECE = 1 << 20  # what TLS encrypts before it is sent
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

    def send_nowait(self, data: memoryview) -> int:
        """Send what the kernel takes at once; the number of bytes, 0 when send() has to do it all."""
        ...

    async def send(self, buffers: Iterable[Buffer], *, more: bool = False) -> None:
        """Send all bytes; `more` tells that others follow at once."""
        ...

    async def send_file(self, file: HostFile, offset: int, length: int) -> None:
        """Send bytes of a file without copying them."""
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
        self.receive_nowait = sock.recv_into

    async def wait_readable(self) -> None:
        await trio.lowlevel.wait_readable(self.sock)

    def send_nowait(self, data: memoryview) -> int:
        try:
            return self.sock.send(data)
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

    async def delivered(self) -> None:
        if self.sock.family == socket.AF_UNIX:
            return
        # TCP answers a close with unread bytes by a reset, and forgets what it has not sent: see tcp_close() in Linux.
        with trio.move_on_after(_DELIVERY_SECONDS), suppress(OSError):
            while any(fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(4))):
                await trio.sleep(0.002)

    async def close(self) -> None:
        self.sock.close()


class TlsTransport:
    """The same through TLS, on top of a connected plain transport.

    ssl works on two memory buffers here: `_incoming` gets what the socket brings, `_outgoing` holds what it must send.
    """

    sends_files = False

    def __init__(self, plain: PlainTransport, context: ssl.SSLContext) -> None:
        self._plain = plain
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._ciphertext = memoryview(bytearray(_CIPHERTEXT_BYTES))

    async def handshake(self) -> None:
        """Agree on keys; raises ssl.SSLError or ConnectionError."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._send_ciphertext()
                await self.wait_readable()
                self._pull()
            except ssl.SSLError:
                with suppress(OSError):
                    await self._send_ciphertext()  # the alert that tells the client why
                raise
            else:
                await self._send_ciphertext()
                return

    def receive_nowait(self, buffer: memoryview) -> int:
        received = 0
        while received < len(buffer):
            try:
                # read() gives one record of at most 16 KiB at a time.
                count: int = self._tls.read(len(buffer) - received, buffer[received:])  # type: ignore[assignment]
            except ssl.SSLWantReadError:
                if received:
                    break
                self._pull()
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                break
            else:
                if not count:
                    break
                received += count
        return received

    def _pull(self) -> None:
        """Move what the socket has into ssl's hands; raises BlockingIOError when it has nothing."""
        count = self._plain.receive_nowait(self._ciphertext)
        if count:
            self._incoming.write(self._ciphertext[:count])
        else:
            self._incoming.write_eof()

    async def wait_readable(self) -> None:
        await self._plain.wait_readable()

    def send_nowait(self, data: memoryview) -> int:
        return 0  # what was encrypted must leave whole, so that the next record can follow

    async def send(self, buffers: Iterable[Buffer], *, more: bool = False) -> None:
        for buffer in buffers:
            view = memoryview(buffer)
            while view:
                view = view[self._tls.write(view[:_PLAINTEXT_PIECE]) :]
                if self._outgoing.pending >= _PLAINTEXT_PIECE:
                    await self._send_ciphertext()
        if not more:
            await self._send_ciphertext()

    async def _send_ciphertext(self) -> None:
        await self._plain.send([self._outgoing.read()])

    async def send_file(self, file: HostFile, offset: int, length: int) -> None:
        raise AssertionError("TLS has to see the bytes it encrypts")

    async def delivered(self) -> None:
        await self._plain.delivered()

    async def close(self) -> None:
        with suppress(ssl.SSLError, OSError):
            self._tls.unwrap()
        with suppress(OSError):
            self._plain.sock.send(self._outgoing.read())
        await self._plain.close()


def _enlarge(sock: socket.socket) -> None:
    """Let a unix socket hold several large replies; beyond the system's limit only where we are allowed to."""
    force = {socket.SO_SNDBUF: 32, socket.SO_RCVBUF: 33}  # SO_SNDBUFFORCE, SO_RCVBUFFORCE (asm-generic/socket.h)
    for option, forced in force.items():
        try:
            sock.setsockopt(socket.SOL_SOCKET, forced, _BUFFER_BYTES)
        except OSError:
            sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
