"""The transmission phase on a real connection, byte for byte: every answer that the specification prescribes."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server import wire
from tests.server.wire import Wire
from tests.serving import Served

MIB = 1 << 20
SIZE = 64 * MIB + 512
DATA_END = 3 * MIB  # of pattern, then a hole up to the last sector
MAXIMUM = 32 * MIB


def pattern(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


CONTENT = pattern(DATA_END)
LAST = b"the last sector ".ljust(512, b".")


def make_image(path: Path) -> Path:
    with path.open("wb") as file:
        file.write(CONTENT)
        file.seek(SIZE - len(LAST))
        file.write(LAST)
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that tests read from; what they write goes to the hole, each to MiBs of its own."""
    folder = tmp_path_factory.mktemp("requests")
    with Served(make_image(folder / "disk.raw"), "-f", "raw", "-k", folder / "socket") as served:
        yield served


@pytest.fixture
def client(server: Served) -> Iterator[Wire]:
    with connect(server) as connected:
        yield connected
        assert connected.read(0, 100) == CONTENT[:100], "the connection is usable to the end"


@pytest.fixture
def simple_client(server: Served) -> Iterator[Wire]:
    """A client that did not negotiate structured replies."""
    with connect(server, structured=False) as connected:
        yield connected
        assert connected.read(0, 100) == CONTENT[:100]


def connect(server: Served, *, structured: bool = True, contexts: bool = True) -> Wire:
    client = Wire(server.connect())
    client.greet()
    return client.go(structured=structured, contexts=contexts)


def test_the_export_is_described(client: Wire, simple_client: Wire) -> None:
    every = 0b1101_0110_1101  # FAST_ZERO, CACHE, MULTI_CONN, WRITE_ZEROES, TRIM, FUA, FLUSH, HAS_FLAGS
    assert (client.size, client.flags) == (SIZE, every | 1 << 7)
    assert (simple_client.size, simple_client.flags) == (SIZE, every)


# Errors


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize(
    ("command", "offset", "length", "flags", "error"),
    [
        pytest.param(8, 0, 512, 0, wire.EINVAL, id="resize"),
        pytest.param(0xFFFF, 0, 0, 0, wire.EINVAL, id="unknown command"),
        pytest.param(wire.READ, 0, 512, wire.NO_HOLE, wire.EINVAL, id="flag of another command"),
        pytest.param(wire.READ, 0, 512, 1 << 15, wire.EINVAL, id="flag without a name"),
        pytest.param(wire.FLUSH, 0, 0, 1 << 7, wire.EINVAL, id="flush with a flag"),
        pytest.param(wire.WRITE_ZEROES, 0, 512, wire.DF, wire.EINVAL, id="zeroes with DF"),
        pytest.param(wire.READ, SIZE - 511, 512, 0, wire.EINVAL, id="read past the end"),
        pytest.param(wire.READ, SIZE, 1, 0, wire.EINVAL, id="read at the end"),
        pytest.param(wire.READ, (1 << 64) - 1, 1, 0, wire.EINVAL, id="read at 2^64-1"),
        pytest.param(wire.READ, 0, MAXIMUM + 1, 0, wire.EINVAL, id="read too large"),
        pytest.param(wire.READ, 0, (1 << 32) - 1, 0, wire.EINVAL, id="read of 4 GiB"),
        pytest.param(wire.WRITE_ZEROES, SIZE - 511, 512, 0, wire.ENOSPC, id="zeroes past the end"),
        pytest.param(wire.WRITE_ZEROES, (1 << 64) - 1, (1 << 32) - 1, 0, wire.ENOSPC, id="zeroes at 2^64-1"),
        pytest.param(wire.TRIM, SIZE - 511, 512, 0, wire.EINVAL, id="trim past the end"),
        pytest.param(wire.CACHE, SIZE, 512, 0, wire.EINVAL, id="cache past the end"),
        pytest.param(wire.BLOCK_STATUS, SIZE, 512, 0, wire.EINVAL, id="status past the end"),
        pytest.param(wire.BLOCK_STATUS, 0, 0, 0, wire.EINVAL, id="status of nothing"),
    ],
)
def test_bad_requests_are_refused_and_the_connection_goes_on(
    server: Served, structured: bool, command: int, offset: int, length: int, flags: int, error: int
) -> None:
    with connect(server, structured=structured) as client:
        reply = client.ask(command, offset, length, flags)
        assert reply.error == error
        assert bool(reply.text) == structured
        assert client.read(1000, 100) == CONTENT[1000:1100]


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize(
    ("offset", "length", "flags", "error"),
    [
        (SIZE - 511, 512, 0, wire.ENOSPC),
        (SIZE, 1, 0, wire.ENOSPC),
        ((1 << 64) - 4096, 8192, 0, wire.ENOSPC),
        (SIZE - 1024, 2 * MIB, 0, wire.ENOSPC),
        (0, 512, wire.DF, wire.EINVAL),
        (0, 512, 1 << 14, wire.EINVAL),
        (0, MAXIMUM + 1, 0, wire.EINVAL),
    ],
)
def test_bad_writes_are_refused_with_their_payload(
    server: Served, structured: bool, offset: int, length: int, flags: int, error: int
) -> None:
    with connect(server, structured=structured) as client:
        assert client.write(offset, bytes(length), flags) == error
        assert client.read(0, 512) == CONTENT[:512]
        assert client.read(SIZE - 512, 512) == LAST


def test_a_status_needs_a_context(server: Served) -> None:
    with connect(server, contexts=False) as client:
        assert client.ask(wire.BLOCK_STATUS, 0, 512).error == wire.EINVAL
        assert client.read(0, 10) == CONTENT[:10]


def test_a_read_only_export_refuses_changes(tmp_path: Path) -> None:
    image = make_image(tmp_path / "disk.raw")
    with Served(image, "-r", "-f", "raw", "-k", tmp_path / "socket") as server, connect(server) as client:
        assert client.flags & 2
        assert not client.flags & (1 << 5 | 1 << 6)
        assert client.write(0, b"x" * 512) == wire.EPERM
        assert client.write(0, b"x" * (2 * MIB)) == wire.EPERM
        for command in (wire.TRIM, wire.WRITE_ZEROES):
            assert client.ask(command, 0, 4096).error == wire.EPERM
        assert client.ask(wire.FLUSH).error == 0
        assert client.read(0, 4096) == CONTENT[:4096]
    assert image.read_bytes()[:DATA_END] == CONTENT


def test_a_wrong_magic_ends_the_connection(server: Served) -> None:
    with connect(server) as client:
        assert client.read(0, 100) == CONTENT[:100]
        client.send(b"\x25\x60\x95\x14" + bytes(24))
        assert client.is_closed()


# Reading


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 1),
        (1, 511),
        (4095, 4097),
        (0, (64 << 10) - 1),
        (0, 64 << 10),
        (7, (64 << 10) + 1),
        (0, DATA_END),
        (12345, 2 * MIB + 1),
        (DATA_END - 100, 200),
        (DATA_END - 70000, 140000),
        (DATA_END, 10 * MIB),
        (SIZE - 512, 512),
        (SIZE - 3 * MIB, 3 * MIB),
        (SIZE - 1, 1),
        (0, MAXIMUM),
        (SIZE - MAXIMUM, MAXIMUM),
    ],
)
def test_reads_of_every_size(client: Wire, simple_client: Wire, server: Served, offset: int, length: int) -> None:
    with Path(server.command[3]).open("rb") as file:
        file.seek(offset)
        expected = file.read(length)
    assert client.read(offset, length) == expected
    assert client.read(offset, length, wire.DF) == expected
    assert simple_client.read(offset, length) == expected


def test_a_read_of_nothing_succeeds(client: Wire, simple_client: Wire) -> None:
    assert client.read(100, 0) == b""
    assert client.read(SIZE, 0) == b""
    assert simple_client.read(100, 0) == b""


def test_zeros_travel_as_holes(client: Wire) -> None:
    assert client.ask(wire.READ, 40 * MIB, MIB).chunks == ((wire.OFFSET_HOLE, MIB),)
    mixed = client.ask(wire.READ, DATA_END - MIB, 2 * MIB)
    assert mixed.chunks == ((wire.OFFSET_DATA, MIB), (wire.OFFSET_HOLE, MIB))
    assert mixed.data == CONTENT[-MIB:] + bytes(MIB)


def test_df_forbids_fragments(client: Wire) -> None:
    reply = client.ask(wire.READ, DATA_END - MIB, 2 * MIB, wire.DF)
    assert reply.chunks == ((wire.OFFSET_DATA, 2 * MIB),)
    assert reply.data == CONTENT[-MIB:] + bytes(MIB)


# Writing


@pytest.mark.parametrize("flags", [0, wire.FUA])
@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 1), (1, 4096), (511, 70000), (0, MIB - 1), (3, MIB), (0, MIB + 1), (0, 5 * MIB), (0, 0)],
)
def test_writes_of_every_size(client: Wire, flags: int, offset: int, length: int) -> None:
    base = 8 * MIB
    assert client.ask(wire.WRITE_ZEROES, base, 8 * MIB).error == 0
    data = pattern(length, seed=length)
    assert client.write(base + offset, data, flags) == 0
    assert client.read(base, 6 * MIB) == (bytes(offset) + data).ljust(6 * MIB, b"\0")


def test_the_largest_write(client: Wire) -> None:
    data = pattern(MAXIMUM, seed=32)
    assert client.write(30 * MIB, data) == 0
    assert client.read(30 * MIB, MAXIMUM) == data
    assert client.ask(wire.WRITE_ZEROES, 30 * MIB, MAXIMUM).error == 0


@pytest.mark.parametrize("flags", [0, wire.FUA, wire.NO_HOLE, wire.FAST_ZERO, wire.FUA | wire.NO_HOLE | wire.FAST_ZERO])
def test_zeroing(client: Wire, flags: int) -> None:
    base, data = 20 * MIB, pattern(MIB, seed=1)
    assert client.write(base, data) == 0
    assert client.ask(wire.WRITE_ZEROES, base + 1000, 500_000, flags).error == 0
    assert client.read(base, MIB) == data[:1000] + bytes(500_000) + data[501_000:]


def test_no_hole_keeps_space_allocated(client: Wire, server: Served) -> None:
    base, image = 22 * MIB, Path(server.command[3])
    assert client.write(base, pattern(MIB), wire.FUA) == 0
    full = image.stat().st_blocks
    assert client.ask(wire.WRITE_ZEROES, base, MIB, wire.NO_HOLE | wire.FUA).error == 0
    assert image.stat().st_blocks == full
    assert client.ask(wire.WRITE_ZEROES, base, MIB, wire.FUA).error == 0
    assert image.stat().st_blocks <= full - MIB // 512


def test_trim_gives_space_back(client: Wire, server: Served) -> None:
    base, image = 24 * MIB, Path(server.command[3])
    assert client.write(base, pattern(MIB), wire.FUA) == 0
    full = image.stat().st_blocks
    assert client.ask(wire.TRIM, base, MIB, wire.FUA).error == 0
    assert image.stat().st_blocks <= full - MIB // 512
    assert client.read(base, MIB) == bytes(MIB)


def test_a_flush_and_a_cache_succeed(client: Wire) -> None:
    assert client.ask(wire.FLUSH).error == 0
    assert client.ask(wire.CACHE, 0, SIZE).error == 0
    assert client.ask(wire.CACHE, 0, 0).error == 0


# Block status


def test_status_of_the_whole_device(client: Wire) -> None:
    extents = client.ask(wire.BLOCK_STATUS, 0, SIZE).extents
    assert sum(length for length, _ in extents) == SIZE
    assert extents[0] == (DATA_END, 0)
    assert extents[1][1] == 3
    assert extents[-1][1] == 0


@pytest.mark.parametrize(
    ("offset", "length", "first"),
    [
        (0, 1, (1, 0)),
        (1, 1, (1, 0)),
        (513, 100, (100, 0)),
        (DATA_END - 1, 2, (1, 0)),
        (DATA_END + 1, 12345, (12345, 3)),
        (SIZE - 1, 1, (1, 0)),
        (SIZE - 512, 512, (512, 0)),
    ],
)
def test_status_of_odd_ranges(client: Wire, offset: int, length: int, first: tuple[int, int]) -> None:
    assert client.ask(wire.BLOCK_STATUS, offset, length).extents[0] == first


def test_req_one_gives_one_extent_within_the_range(client: Wire) -> None:
    assert client.ask(wire.BLOCK_STATUS, 0, SIZE, wire.REQ_ONE).extents == ((DATA_END, 0),)
    assert client.ask(wire.BLOCK_STATUS, 0, 100, wire.REQ_ONE).extents == ((100, 0),)
    assert client.ask(wire.BLOCK_STATUS, DATA_END, 4096, wire.REQ_ONE).extents == ((4096, 3),)


def test_status_of_the_longest_range(tmp_path: Path) -> None:
    """2^32-1 bytes, in a device that has them and in one that does not (CVE-2025-47711)."""
    image = tmp_path / "large.raw"
    with image.open("wb") as file:
        file.truncate(5 << 30)
    with Served(image, "-f", "raw", "-k", tmp_path / "socket") as server, connect(server) as client:
        longest = (1 << 32) - 1
        assert client.ask(wire.BLOCK_STATUS, 1, longest).extents == ((longest, 3),)
        assert client.ask(wire.BLOCK_STATUS, (5 << 30) - longest, longest, wire.REQ_ONE).extents == ((longest, 3),)
        assert client.ask(wire.BLOCK_STATUS, 2 << 30, longest).error == wire.EINVAL
        assert client.ask(wire.WRITE_ZEROES, 3, longest).error == 0
        assert client.ask(wire.TRIM, 0, longest).error == 0
        assert client.ask(wire.READ, 0, longest).error == wire.EINVAL


# How the bytes are cut


def mixed_requests(client: Wire, base: int) -> tuple[bytes, dict[int, bytes | None]]:
    """Requests of many kinds that do not depend on each other, and what a successful read of each must bring."""
    chance = random.Random(3)
    sent, expected = bytearray(), {}
    for number in range(60):
        match number % 4:
            case 0 | 1:
                offset, length = chance.randrange(DATA_END - 5000), chance.randrange(1, 5000)
                cookie, data = client.request(wire.READ, offset, length)
                expected[cookie] = CONTENT[offset : offset + length]
            case 2:
                cookie, data = client.request(wire.WRITE, base + number * 4096, 777, payload=pattern(777, number))
                expected[cookie] = None
            case _:
                cookie, data = client.request(wire.FLUSH)
                expected[cookie] = None
        sent += data
    return bytes(sent), expected


@pytest.mark.parametrize("step", [0, 1, 29])
@pytest.mark.parametrize("structured", [True, False])
def test_requests_may_come_in_any_pieces(server: Served, step: int, structured: bool) -> None:
    with connect(server, structured=structured) as client:
        data, expected = mixed_requests(client, base=25 * MIB)
        sender = threading.Thread(target=send_in_pieces, args=(client, data, step))
        sender.start()
        for _ in range(len(expected)):
            reply = client.reply()
            assert reply.error == 0
            content = expected.pop(reply.cookie)
            assert content is None or reply.data == content
        sender.join()
        for number in range(2, 60, 4):
            assert client.read(25 * MIB + number * 4096, 777) == pattern(777, number)


def send_in_pieces(client: Wire, data: bytes, step: int) -> None:
    for start in range(0, len(data), step or len(data)):
        client.send(data[start : start + (step or len(data))])


def test_large_requests_in_a_row(client: Wire) -> None:
    """Writes and reads larger than every buffer, all sent before the first reply is read."""
    base, pieces = 26 * MIB, [pattern(MIB + 13 * number, number) for number in range(4)]
    sent, offset = bytearray(), base
    for piece in pieces:
        sent += client.request(wire.WRITE, offset, len(piece), payload=piece)[1]
        offset += len(piece)
    client.send(sent)
    assert [client.reply().error for _ in pieces] == [0] * len(pieces)
    expected = {}
    for length in (3 * MIB, MIB, 70_001, 2 * MIB, 4096):
        cookie, data = client.request(wire.READ, base, length)
        expected[cookie] = b"".join(pieces)[:length]
        client.send(data)
    while expected:
        reply = client.reply()
        assert reply.data == expected.pop(reply.cookie)


def test_requests_right_behind_the_handshake(server: Served) -> None:
    """A client need not wait for the answer to GO."""
    with Wire(server.connect()) as client:
        client.greet()
        _, data = client.request(wire.READ, 100, 5000)
        client.send(b"IHAVEOPT" + bytes([0, 0, 0, wire.GO, 0, 0, 0, 6]) + bytes(6) + data)
        assert client.option_replies(wire.GO)[-1][0] == wire.ACK
        assert client.reply().data == CONTENT[100:5100]


def test_disconnecting_ends_after_the_replies(server: Served) -> None:
    with connect(server) as client:
        _, read = client.request(wire.READ, 0, 1000)
        _, status = client.request(wire.BLOCK_STATUS, 0, 1000)
        _, goodbye = client.request(wire.DISC)
        client.send(read + status + goodbye)
        assert {client.reply().error, client.reply().error} == {0}
        assert client.is_closed()
