"""A running server: accepting clients up to a limit, and the orderly end.

The end: stop accepting, let every connection finish the requests it has taken (for at most DRAIN_SECONDS, so that a
client that does not read its replies cannot keep us), flush every device, return. Closing the devices is the caller's
business, as opening them was.
"""

from __future__ import annotations

import errno
import signal
import socket
from collections.abc import Callable

import trio

from nbdserve.server.connection import Connection, Policy

DRAIN_SECONDS = 10.0
DEFAULT_CONNECTIONS = 100
WORKER_THREADS = 32

_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Server:
    """Serves clients on listening sockets until told to stop.

    Args:
        listeners: listening stream sockets; run() closes them.
        policy: what every connection gets.
        connections: how many clients may be connected at once; others are turned away.
    """

    def __init__(self, listeners: list[socket.socket], policy: Policy, connections: int = DEFAULT_CONNECTIONS) -> None:
        self._listeners = listeners
        self._policy = policy
        self._maximum = connections
        self._connections: set[Connection] = set()
        self._stop = trio.Event()

    def stop(self) -> None:
        """Begin the orderly end."""
        self._stop.set()

    async def run(self, ready: Callable[[], None]) -> None:
        """Accept and serve until stop(), SIGTERM or SIGINT.

        Args:
            ready: called once clients can connect; what it raises ends the run.

        Raises:
            OSError: a device could not be flushed at the end.
        """
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            ready()  # the kernel queues clients already; inside the nurseries a failure would come out in groups
            async with trio.open_nursery() as clients:
                async with trio.open_nursery() as nursery:
                    for listener in self._listeners:
                        nursery.start_soon(self._accept, listener, clients)
                    nursery.start_soon(self._wait_for_signal, signals)
                    await self._stop.wait()
                    nursery.cancel_scope.cancel()
                for listener in self._listeners:
                    listener.close()
                clients.start_soon(self._drain, clients.cancel_scope)
        for device in self._policy.exports.devices():
            await trio.to_thread.run_sync(device.flush)

    async def _wait_for_signal(self, signals: object) -> None:
        async for _ in signals:  # type: ignore[attr-defined]
            self.stop()
            return

    async def _drain(self, clients: trio.CancelScope) -> None:
        for connection in list(self._connections):
            connection.stop()
        with trio.move_on_after(DRAIN_SECONDS):
            while self._connections:
                await trio.sleep(0.005)
        clients.cancel()

    async def _accept(self, listener: socket.socket, clients: trio.Nursery) -> None:
        listener.setblocking(False)
        while True:
            await trio.lowlevel.wait_readable(listener)
            try:
                sock, address = listener.accept()
            except OSError as error:
                if error.errno in _OUT_OF_RESOURCES:
                    self._policy.report(f"cannot accept a client: {error.strerror}; waiting for others to leave")
                    await trio.sleep(0.1)
                continue  # the client has gone before we could greet it
            peer = f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "unix client"
            if len(self._connections) >= self._maximum:
                self._policy.report(f"{peer}: turned away, {self._maximum} clients are connected (see --shared)")
                sock.close()
                continue
            connection = Connection(sock, peer, self._policy)
            self._connections.add(connection)
            clients.start_soon(self._serve, connection)

    async def _serve(self, connection: Connection) -> None:
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)
