"""Many clients at once, some of them bad ones: whatever one of them does, the others are served."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random
from struct import pack

import pytest

from tests.interop.certificates import Certificates
from tests.server import wire
from tests.server.wire import Wire
from tests.serving import Served, resident_bytes

MIB = 1 << 20
SIZE = 32 * MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(Random(1).randbytes(MIB) * (SIZE // MIB))
    return path


@pytest.fixture
def server(image: Path, tmp_path: Path) -> Iterator[Served]:
    with Served(image, "-f", "raw", "-v", "-k", tmp_path / "socket") as served:
        yield served


def connect(server: Served, context: ssl.SSLContext | None = None) -> Wire:
    client = Wire(server.connect())
    client.greet()
    if context:
        client.start_tls(context)
    return client.go()


def work(client: Wire, number: int) -> None:
    """Write, read, zero and flush in a MiB of the client's own, and check every answer."""
    base, chance = number * MIB, Random(number)
    for round_ in range(20):
        length = chance.choice((512, 4096, 70_000, 300_000))
        offset = base + chance.randrange(MIB - length)
        data = chance.randbytes(length)
        assert client.write(offset, data) == 0
        assert client.read(offset, length) == data
        assert client.ask(wire.WRITE_ZEROES, offset, length // 2).error == 0
        assert client.read(offset, length) == bytes(length // 2) + data[length // 2 :]
        if not round_ % 7:
            assert client.ask(wire.FLUSH).error == 0


def test_everyone_else_is_served_while_one_stalls(image: Path, certificates: Certificates) -> None:
    """Two clients with TLS, ten without, and three that stall: in a write, in a header, in the handshake."""
    context = ssl.create_default_context(cafile=str(certificates.good / "ca-cert.pem"))
    options = ("--tls", "on", "--tls-certs", certificates.good)
    with Served(image, "-f", "raw", *options) as server, ExitStack() as stack:
        stalled = stack.enter_context(connect(server))
        _, write = stalled.request(wire.WRITE, 30 * MIB, MIB, payload=b"half" * (MIB // 8))
        stalled.send(write)
        in_header = stack.enter_context(connect(server))
        in_header.send(write[:13])
        in_handshake = stack.enter_context(Wire(server.connect()))
        in_handshake.greet()
        clients = [stack.enter_context(connect(server, context if number < 2 else None)) for number in range(12)]
        with ThreadPoolExecutor(len(clients)) as threads:
            for result in [threads.submit(work, client, number) for number, client in enumerate(clients)]:
                result.result(60)
        stalled.send(b"rest" * (MIB // 8))
        assert stalled.reply().error == 0
        assert stalled.read(30 * MIB, MIB) == b"half" * (MIB // 8) + b"rest" * (MIB // 8)


def test_a_client_that_does_not_read_stalls_nobody(server: Served) -> None:
    with connect(server) as greedy, connect(server) as other:
        before = resident_bytes(server.process)
        request = b"".join(greedy.request(wire.READ, 0, 2 * MIB)[1] for _ in range(200))
        mapped = b"".join(greedy.request(wire.BLOCK_STATUS, 0, SIZE)[1] for _ in range(2000))
        greedy.sock.settimeout(0.5)
        with suppress(TimeoutError):  # the server stops reading, too
            for _ in range(50):
                greedy.send(request + mapped)
        started = time.monotonic()
        work(other, 3)
        assert time.monotonic() - started < 5
        assert resident_bytes(server.process) - before < 100 * MIB


def garbage(client: Wire) -> None:
    client.send(Random(5).randbytes(100_000))


def garbage_requests(client: Wire) -> None:
    client.greet()
    client.go()
    client.send(Random(6).randbytes(100_000))


def leave_in_mid_handshake(client: Wire) -> None:
    client.greet()
    client.send(b"IHAVEOPT\0\0")


def leave_in_mid_request(client: Wire) -> None:
    client.greet()
    client.go().send(client.request(wire.WRITE, 0, MIB, payload=bytes(1000))[1])


def leave_in_mid_reply(client: Wire) -> None:
    client.greet()
    client.go()
    client.send(b"".join(client.request(wire.READ, 0, SIZE // 2)[1] for _ in range(8)))
    client.receive(100)


def leave_with_work_in_threads(client: Wire) -> None:
    client.greet()
    client.go()
    writes = [client.request(wire.WRITE, 31 * MIB, 4096, wire.FUA, bytes(4096))[1] for _ in range(50)]
    client.send(b"".join(writes))


def hang_up_at_once(client: Wire) -> None:
    pass


def promise_a_huge_option(client: Wire) -> None:
    client.greet()
    client.send(pack(">8sII", b"IHAVEOPT", wire.GO, 0xFFFFFFFF) + bytes(200_000))


@pytest.mark.parametrize(
    "misbehave",
    [
        garbage,
        garbage_requests,
        leave_in_mid_handshake,
        leave_in_mid_request,
        leave_in_mid_reply,
        leave_with_work_in_threads,
        hang_up_at_once,
        promise_a_huge_option,
    ],
)
def test_a_bad_client_is_dropped_alone(server: Served, image: Path, misbehave: Callable[[Wire], None]) -> None:
    with connect(server) as other:
        for _ in range(3):
            with Wire(server.connect()) as client, suppress(BrokenPipeError, ConnectionResetError):
                misbehave(client)
        server.wait_for_line("gone", count=3)
        work(other, 2)
    assert image.stat().st_size == SIZE


def test_more_clients_than_allowed_are_turned_away(image: Path, tmp_path: Path) -> None:
    with Served(image, "-f", "raw", "--shared", "2", "-k", tmp_path / "socket", "-v") as server:
        with connect(server) as first, connect(server):
            for _ in range(3):
                with Wire(server.connect()) as third:
                    assert third.is_closed()
            assert first.read(0, 10) == image.read_bytes()[:10]
        server.wait_for_line("gone", count=2)
        with connect(server) as next_one:
            assert next_one.read(0, 10) == image.read_bytes()[:10]
        assert any("turned away" in line and "--shared" in line for line in server.stderr)


def test_a_write_is_seen_by_every_connection(server: Served) -> None:
    """What CAN_MULTI_CONN promises."""
    with connect(server) as first, connect(server) as second:
        for number in range(50):
            assert first.write(number * 5000, bytes([number]) * 5000) == 0
            assert second.read(number * 5000, 5000) == bytes([number]) * 5000
        assert second.ask(wire.FLUSH).error == 0


# The end


def test_sigterm_answers_what_was_taken(server: Served, image: Path) -> None:
    """In the middle of a stream of writes: every write that was answered is in the file, and there is no torn reply."""
    answered: list[int] = []
    with connect(server) as client:

        def collect() -> None:
            with suppress(EOFError, ConnectionResetError):
                while True:
                    reply = client.reply()
                    assert reply.error == 0
                    answered.append(reply.cookie)

        collector = threading.Thread(target=collect)
        collector.start()
        offsets: dict[int, int] = {}
        sender = threading.Thread(target=send_writes, args=(client, offsets))
        sender.start()
        while len(answered) < 50:
            time.sleep(0.001)
        started = time.monotonic()
        server.stop()
        assert time.monotonic() - started < 5
        sender.join()
        collector.join()
    content = image.read_bytes()
    assert len(answered) >= 50
    for cookie in answered:
        offset = offsets[cookie]
        assert content[offset : offset + 8192] == pack(">Q", cookie) * 1024


def send_writes(client: Wire, offsets: dict[int, int]) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):
        for offset in range(0, SIZE, 8192):
            cookie, head = client.request(wire.WRITE, offset, 8192, wire.FUA if offset % 5 == 0 else 0)
            offsets[cookie] = offset
            client.send(head + pack(">Q", cookie) * 1024)


@pytest.mark.parametrize("tls", [False, True])
def test_sigterm_tears_no_reply(image: Path, certificates: Certificates, tls: bool) -> None:
    """Over TCP a close with unread requests would reset the connection, and replies under way would be lost."""
    options = ("--tls", "on", "--tls-certs", certificates.good)
    context = ssl.create_default_context(cafile=str(certificates.good / "ca-cert.pem")) if tls else None
    with Served(image, "-f", "raw", *options) as server, connect(server, context) as client:
        requests = [client.request(wire.READ, number * 4096, 2 * MIB)[1] for number in range(30)]
        client.send(b"".join(requests[:15]))
        assert client.reply().error == 0
        client.send(b"".join(requests[15:]))  # not read while the server waits for us to take the others
        server.process.terminate()
        time.sleep(0.3)
        whole = 1
        with suppress(ConnectionResetError):
            while client.sock.recv(1):
                head = client.receive(19)
                length = int.from_bytes(head[15:], "big")
                assert len(client.receive(length)) == length
                whole += 1
        assert whole >= 15
        server.wait()


def test_sigterm_with_clients_that_do_nothing(server: Served, tmp_path: Path) -> None:
    with connect(server), connect(server) as stalled, Wire(server.connect()) as silent, Wire(server.connect()) as half:
        stalled.send(stalled.request(wire.WRITE, 0, MIB, payload=bytes(5000))[1])
        half.greet()
        half.send(b"IHAVEOPT")
        silent.receive(8)
        started = time.monotonic()
        server.stop()
        assert time.monotonic() - started < 3
    assert not (tmp_path / "socket").exists()


def test_sigterm_in_the_middle_of_a_tls_handshake(image: Path, certificates: Certificates) -> None:
    with Served(image, "-f", "raw", "--tls-certs", certificates.good) as server, Wire(server.connect()) as client:
        client.greet()
        assert client.option(wire.STARTTLS) == [(wire.ACK, b"")]
        client.send(b"\x16\x03\x01\x02\x00")  # the head of a ClientHello
        started = time.monotonic()
        server.stop()
        assert time.monotonic() - started < 3
