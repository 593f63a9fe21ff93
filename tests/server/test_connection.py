"""Deadlines and the orderly end, on a clock that is set by hand: one process, but the real connections."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from nbdserve.block.device import BlockDevice
from nbdserve.block.extents import Extent
from nbdserve.block.file import ReadBuffer
from nbdserve.block.memory import MemoryDevice
from nbdserve.errors import FormatError
from nbdserve.protocol.handshake_server import TlsMode
from nbdserve.server.connection import HANDSHAKE_SECONDS, Connection, Policy
from nbdserve.server.exports import Export, ExportTable
from nbdserve.server.serving import DRAIN_SECONDS, Server
from nbdserve.tls import server_context
from tests.interop.certificates import Certificates
from tests.server import wire
from tests.server.wire import Wire

MIB = 1 << 20


class SlowDevice(MemoryDevice):
    """A disk whose writes and flushes wait until they are released."""

    def __init__(self, size: int) -> None:
        super().__init__(bytearray(size))
        self.begun = threading.Event()
        self.released = threading.Event()
        self.flushes = 0

    def write(self, offset: int, data: ReadBuffer) -> None:
        self.begun.set()
        assert self.released.wait(20)
        super().write(offset, data)

    def flush(self) -> None:
        self.flushes += 1


class Log:
    """What a server says."""

    def __init__(self) -> None:
        self.reports: list[str] = []
        self.debug: list[str] = []

    def policy(self, device: BlockDevice, tls: TlsMode = TlsMode.OFF, context: ssl.SSLContext | None = None) -> Policy:
        exports = ExportTable([Export("", device)])
        return Policy(exports, tls, context, trio.CapacityLimiter(4), self.reports.append, self.debug.append)


def say_nothing(client: Wire) -> None:
    pass


def say_half_an_option(client: Wire) -> None:
    client.greet()
    client.send(b"IHAVEOPT\0\0\0")


def say_one_option(client: Wire) -> None:
    client.greet()
    client.send(b"IHAVEOPT\0\0\0\3\0\0\0\0")


def promise_much(client: Wire) -> None:
    client.greet()
    client.send(b"IHAVEOPT\0\0\0\x63\xff\xff\xff\xff")


def stall_in_tls(client: Wire) -> None:
    client.greet()
    client.send(b"IHAVEOPT\0\0\0\5\0\0\0\0")


@pytest.mark.parametrize("stall", [say_nothing, say_half_an_option, say_one_option, promise_much, stall_in_tls])
async def test_who_stalls_in_the_handshake_is_dropped_after_the_deadline(
    stall: Callable[[Wire], None], mock_clock: MockClock, certificates: Certificates
) -> None:
    log, (ours, theirs) = Log(), socket.socketpair()
    context = server_context(str(certificates.good), verify_peer=False)
    connection = Connection(ours, "a client", log.policy(MemoryDevice(bytearray(MIB)), TlsMode.ON, context))
    theirs.settimeout(5)
    with Wire(theirs) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            await wait_all_tasks_blocked()
            stall(client)
            await wait_all_tasks_blocked()
            mock_clock.jump(HANDSHAKE_SECONDS - 0.1)
            await wait_all_tasks_blocked()
            assert "a client: gone" not in log.debug
            mock_clock.jump(0.2)
        while client.sock.recv(4096):
            pass
    assert log.reports == []
    assert any("no handshake within 10 s" in line for line in log.debug)


async def test_a_slow_handshake_does_not_get_more_time_by_being_busy(mock_clock: MockClock) -> None:
    log, (ours, theirs) = Log(), socket.socketpair()
    connection = Connection(ours, "a client", log.policy(MemoryDevice(bytearray(MIB))))
    theirs.settimeout(5)
    with Wire(theirs) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            await wait_all_tasks_blocked()
            client.greet()
            for _ in range(int(HANDSHAKE_SECONDS)):
                assert "a client: gone" not in log.debug
                replies = await trio.to_thread.run_sync(client.option, wire.LIST)
                assert replies[-1][0] == wire.ACK
                mock_clock.jump(1.0)
                await wait_all_tasks_blocked()
        assert client.is_closed()


async def test_a_connection_that_has_been_negotiated_may_be_idle(mock_clock: MockClock) -> None:
    log, (ours, theirs) = Log(), socket.socketpair()
    connection = Connection(ours, "a client", log.policy(MemoryDevice(bytearray(MIB))))
    theirs.settimeout(5)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        await trio.to_thread.run_sync(negotiate, theirs)
        mock_clock.jump(1000 * HANDSHAKE_SECONDS)
        with Wire(theirs) as client:
            reply = await trio.to_thread.run_sync(client.ask, wire.READ, 0, 512)
            assert reply.data == bytes(512)


def negotiate(sock: socket.socket) -> Wire:
    client = Wire(sock)
    client.greet()
    return client.go()


async def test_stopping_waits_for_requests_in_worker_threads() -> None:
    """The reply is sent and the data written although the server was told to stop in between; later ones are not."""
    log, device, (ours, theirs) = Log(), SlowDevice(MIB), socket.socketpair()
    connection = Connection(ours, "a client", log.policy(device))
    theirs.settimeout(5)
    with Wire(theirs) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            await trio.to_thread.run_sync(negotiate, theirs)
            cookie, request = client.request(wire.WRITE, 4096, 512, wire.FUA, b"x" * 512)
            client.send(request)
            assert await trio.to_thread.run_sync(device.begun.wait, 5)
            connection.stop()
            await wait_all_tasks_blocked()
            client.send(client.request(wire.WRITE, 8192, 512, wire.FUA, b"y" * 512)[1])
            device.released.set()
        assert client.reply() == wire.Reply(cookie)
        assert client.is_closed()
    assert device.read(4096, 512) == b"x" * 512
    assert device.read(8192, 512) == bytes(512)
    assert device.flushes == 1


class Damaged(MemoryDevice):
    """A disk that finds damage wherever it is asked, except in `sound` bytes at the end."""

    sound = 4096

    def _look(self, offset: int, length: int) -> None:
        if offset < self.size - self.sound:
            raise FormatError("an entry points outside the file")

    def map(self, offset: int, length: int) -> Extent:
        self._look(offset, length)
        return super().map(offset, length)

    def map_nowait(self, offset: int, length: int) -> Extent | None:
        return self.map(offset, length)

    def write(self, offset: int, data: ReadBuffer) -> None:
        self._look(offset, len(data))
        super().write(offset, data)

    def write_nowait(self, offset: int, data: ReadBuffer) -> bool:
        self.write(offset, data)
        return True


async def test_damage_met_by_one_request_is_its_error_alone() -> None:
    """Wherever it is found: on the fast path as well as in a worker thread."""
    log, device, (ours, theirs) = Log(), Damaged(bytearray(4 * MIB)), socket.socketpair()
    connection = Connection(ours, "a client", log.policy(device))
    theirs.settimeout(5)

    def ask_for_everything() -> None:
        with negotiate(theirs) as client:
            for length in (512, 100_000, 2 * MIB):
                for command in (wire.READ, wire.BLOCK_STATUS, wire.CACHE, wire.WRITE_ZEROES):
                    reply = client.ask(command, 0, length)
                    assert (reply.error, reply.text) == (wire.EIO, "the image is damaged at this place")
                assert client.write(0, bytes(length)) == wire.EIO
            assert client.write(4 * MIB - 512, b"x" * 512) == 0
            assert client.read(4 * MIB - 512, 512) == b"x" * 512

    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        await trio.to_thread.run_sync(ask_for_everything)
    assert set(log.reports) == {"an entry points outside the file"}


async def test_computed_bytes_are_computed_however_large_the_read() -> None:
    """A device that knows at once where its bytes lie, namely nowhere: they must not be taken for a hole."""

    class AtHand(MemoryDevice):
        def map_nowait(self, offset: int, length: int) -> Extent | None:
            return self.map(offset, length)

    content = bytes(range(256)) * (MIB // 256)
    log, (ours, theirs) = Log(), socket.socketpair()
    connection = Connection(ours, "a client", log.policy(AtHand(bytearray(content))))
    theirs.settimeout(5)

    def read() -> None:
        with negotiate(theirs) as client:
            for length in (512, 64 << 10, MIB):
                for flags in (0, wire.DF):
                    assert client.read(0, length, flags) == content[:length]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        await trio.to_thread.run_sync(read)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


async def test_the_end_does_not_wait_long_for_a_client_that_reads_nothing(
    listener: socket.socket, mock_clock: MockClock
) -> None:
    log, device = Log(), SlowDevice(32 * MIB)
    server = Server([listener], log.policy(device))
    theirs = socket.socket()
    theirs.settimeout(5)
    with Wire(theirs) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run, lambda: None)
            await trio.to_thread.run_sync(theirs.connect, listener.getsockname())
            await trio.to_thread.run_sync(negotiate, theirs)
            client.send(b"".join(client.request(wire.READ, 0, 32 * MIB, wire.DF)[1] for _ in range(3)))
            await trio.to_thread.run_sync(client.receive, 1)
            await wait_all_tasks_blocked(0.2)
            server.stop()
            await wait_all_tasks_blocked()
            mock_clock.jump(DRAIN_SECONDS - 0.1)
            await wait_all_tasks_blocked(0.1)
            assert device.flushes == 0
            mock_clock.jump(0.2)
    assert device.flushes == 1


async def test_the_server_flushes_its_devices_at_the_end(listener: socket.socket) -> None:
    log, device = Log(), SlowDevice(MIB)
    server = Server([listener], log.policy(device))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run, server.stop)
    assert device.flushes == 1
    assert listener.fileno() == -1


async def test_a_device_that_cannot_be_flushed_at_the_end_is_an_error(listener: socket.socket) -> None:
    class Broken(MemoryDevice):
        def flush(self) -> None:
            raise OSError(5, "Input/output error", "disk.img")

    server = Server([listener], Log().policy(Broken(bytearray(MIB))))
    with pytest.raises(OSError, match=r"disk\.img"):
        await server.run(server.stop)
