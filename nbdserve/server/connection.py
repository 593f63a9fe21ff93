"""One client from its first byte to its last: the handshake with its deadline, then the transmission loop."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass

import trio

from nbdserve.errors import NbdserveError, ProtocolError
from nbdserve.protocol.handshake import HandshakeState
from nbdserve.protocol.handshake_server import ServerHandshake, TlsMode
from nbdserve.server.exports import ExportTable
from nbdserve.server.transmission import Transmission
from nbdserve.server.transport import PlainTransport, TlsTransport, Transport

HANDSHAKE_SECONDS = 10.0
_RECEIVE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Policy:
    """What holds for every connection of a server.

    Attributes:
        exports: what is offered.
        tls: whether TLS is offered or demanded.
        tls_context: keys for it; there unless tls is OFF.
        workers: limits how many worker threads the whole server uses.
        report: told, in one line, of failures worth the server's user's attention.
        debug: told, in one line, of clients that come and go.
    """

    exports: ExportTable
    tls: TlsMode
    tls_context: ssl.SSLContext | None
    workers: trio.CapacityLimiter
    report: Callable[[str], None]
    debug: Callable[[str], None]


class Connection:
    """Serves one client. Whatever that client does ends here, with a line for the log, and hurts nobody else."""

    def __init__(self, sock: socket.socket, peer: str, policy: Policy) -> None:
        self._plain = PlainTransport(sock)
        self._transport: Transport = self._plain
        self._peer = peer
        self._policy = policy
        self._transmission: Transmission | None = None
        self._handshake = ServerHandshake(policy.exports.find, policy.exports.infos, policy.tls)
        self._scope = trio.CancelScope()

    def stop(self) -> None:
        """Let requests in flight finish, then end; a client that still negotiates is left at once."""
        if self._transmission is None:
            self._scope.cancel()
        else:
            self._transmission.stop()

    async def run(self) -> None:
        """Serve until the client leaves, misbehaves, or stop() is called."""
        debug = self._policy.debug
        debug(f"{self._peer}: connected")
        try:
            with self._scope:
                await self._serve()
        except* trio.TooSlowError:
            debug(f"{self._peer}: dropped, no handshake within {HANDSHAKE_SECONDS:.0f} s")
        except* ssl.SSLError as group:
            debug(f"{self._peer}: TLS failed: {_why(group)}")
        except* ProtocolError as group:
            debug(f"{self._peer}: dropped, {group.exceptions[0]}")
        except* NbdserveError as group:
            self._policy.report(f"{self._peer}: dropped, {group.exceptions[0]}")
        except* OSError as group:
            debug(f"{self._peer}: connection lost: {group.exceptions[0]}")
        finally:
            with trio.CancelScope(shield=True):
                await self._transport.close()
            debug(f"{self._peer}: gone")

    async def _serve(self) -> None:
        with trio.fail_after(HANDSHAKE_SECONDS):
            agreed = await self._negotiate()
        if agreed:
            agreement = self._handshake.agreement
            device = self._policy.exports[agreement.export.name].device
            policy = self._policy
            self._transmission = Transmission(self._transport, device, agreement, policy.workers, policy.report)
            await self._transmission.run(self._handshake.trailing_data())
            await self._transport.delivered()

    async def _negotiate(self) -> bool:
        """Run the handshake; False when the client ended it."""
        handshake = self._handshake
        buffer = memoryview(bytearray(_RECEIVE_BYTES))
        while True:
            await self._transport.send([handshake.data_to_send()])
            if handshake.state is HandshakeState.TRANSMISSION:
                return True
            if handshake.state is HandshakeState.CLOSED:
                return False
            if handshake.state is HandshakeState.STARTING_TLS:
                await self._start_tls()
                continue
            try:
                count = self._transport.receive_nowait(buffer)
            except BlockingIOError:
                await self._transport.wait_readable()
                continue
            if not count:
                return False
            await self._receive(buffer[:count])

    async def _receive(self, data: memoryview) -> None:
        try:
            self._handshake.receive(data)
        except ProtocolError:
            await self._transport.send([self._handshake.data_to_send()])
            raise

    async def _start_tls(self) -> None:
        assert self._policy.tls_context is not None
        encrypted = TlsTransport(self._plain, self._policy.tls_context)
        await encrypted.handshake()
        self._transport = encrypted
        self._handshake.tls_established()


def _why(group: ExceptionGroup[ssl.SSLError]) -> str:
    from nbdserve.tls import why_tls_failed

    error = group.exceptions[0]
    assert isinstance(error, ssl.SSLError)
    return why_tls_failed(error, "client")
