"""The server's request reader against a simple model, however the stream is cut."""

from __future__ import annotations

from collections.abc import Iterable
from struct import pack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdserve.errors import ProtocolError
from nbdserve.protocol.constants import Command
from nbdserve.protocol.transmission_server import LARGE_PAYLOAD, RequestReader

CAPACITY = 128 << 10
MAXIMUM = 600 << 10

Seen = tuple[int, int, int, int, int, bytes | None]


def request(flags: int, command: int, cookie: int, offset: int, length: int, payload: bytes = b"") -> bytes:
    return pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length) + payload


def write(cookie: int, payload: bytes) -> bytes:
    return request(0, Command.WRITE, cookie, 0, len(payload), payload)


def receive(reader: RequestReader, stream: bytes, pieces: Iterable[int]) -> list[Seen]:
    """Feed a stream as a socket would: a receive brings a piece, or what there is room for."""
    seen: list[Seen] = []
    position = 0
    kept: list[tuple[memoryview, bytes]] = []
    for piece in pieces:
        if position == len(stream):
            break
        space = reader.space()
        size = min(piece, len(space), len(stream) - position)
        assert size > 0
        space[:size] = stream[position : position + size]
        position += size
        reader.received(size)
        for flags, command, cookie, offset, length, payload in iter(reader.next_request, None):
            seen.append((flags, command, cookie, offset, length, None if payload is None else bytes(payload)))
            if payload is not None and not reader.is_borrowed(payload):
                kept.append((payload, bytes(payload)))
    assert position == len(stream)
    assert all(payload == content for payload, content in kept), "an owned payload was touched"
    return seen


def forever(pieces: list[int]) -> Iterable[int]:
    while True:
        yield from pieces


sizes = st.one_of(
    st.integers(0, 200),
    st.sampled_from(
        [LARGE_PAYLOAD - 1, LARGE_PAYLOAD, CAPACITY - 28, CAPACITY, MAXIMUM, MAXIMUM + 1, MAXIMUM + 99_999]
    ),
)


@st.composite
def requests(draw: st.DrawFn) -> Seen:
    command = draw(st.one_of(st.sampled_from(Command), st.integers(0, 0xFFFF)))
    flags, cookie, offset = (
        draw(st.integers(0, 0xFFFF)),
        draw(st.integers(0, 2**64 - 1)),
        draw(st.integers(0, 2**64 - 1)),
    )
    if command != Command.WRITE:
        return flags, command, cookie, offset, draw(st.integers(0, 2**32 - 1)), None
    length = draw(sizes)
    return flags, command, cookie, offset, length, (cookie.to_bytes(8, "big") * (length // 8 + 1))[:length]


@settings(max_examples=150, deadline=None)
@given(st.lists(requests(), max_size=12), st.lists(st.integers(1, 200_000), min_size=1, max_size=6))
def test_any_stream_cut_anywhere(sent: list[Seen], pieces: list[int]) -> None:
    stream = b"".join(request(*fields, payload or b"") for *fields, payload in sent)
    if len(stream) > 20_000:
        pieces = [max(piece, 500) for piece in pieces]
    expected = [(*fields, None if payload is None or len(payload) > MAXIMUM else payload) for *fields, payload in sent]
    assert receive(RequestReader(MAXIMUM, CAPACITY), stream, forever(pieces)) == expected


@pytest.mark.parametrize("step", [1, 27, 28, 29, 1000])
def test_small_requests_bytewise(step: int) -> None:
    stream = request(0, 0, 1, 4096, 512) + write(2, b"abc") + write(3, b"") + request(1, 3, 4, 0, 0) * 50
    seen = receive(RequestReader(), stream, forever([step]))
    assert [entry[5] for entry in seen[:4]] == [None, b"abc", b"", None]
    assert [entry[2] for entry in seen] == [1, 2, 3] + [4] * 50


def test_small_payloads_are_borrowed_and_large_ones_that_do_not_fit_are_owned() -> None:
    reader = RequestReader(MAXIMUM, CAPACITY)
    small, large = write(1, b"s" * 1000), write(2, b"l" * 500_000)
    stream = memoryview(small + large)
    space = reader.space()
    space[:] = stream[: len(space)]
    reader.received(len(space))
    ((*_, payload),) = iter(reader.next_request, None)
    assert payload is not None
    assert reader.is_borrowed(payload)
    rest = reader.space()
    assert len(rest) == len(small) + len(large) - len(space), "the rest goes straight to its destination"
    rest[:] = stream[-len(rest) :]
    reader.received(len(rest))
    ((*_, payload),) = iter(reader.next_request, None)
    assert payload is not None
    assert not reader.is_borrowed(payload)
    assert bytes(payload) == b"l" * 500_000
    assert payload.nbytes == len(payload.obj), "it is memory of exactly its length"  # type: ignore[arg-type]


def test_behind_a_large_payload_only_the_beginning_of_the_next_is_buffered() -> None:
    reader = RequestReader(MAXIMUM, CAPACITY)
    stream = write(1, bytes(300_000))
    reader.space()[:100] = stream[:100]
    reader.received(100)
    assert list(iter(reader.next_request, None)) == []
    reader.received(len(reader.space()))
    assert len(list(iter(reader.next_request, None))) == 1
    assert len(reader.space()) < CAPACITY
    reader.space()[:28] = request(0, 0, 0, 0, 0)
    reader.received(28)
    assert len(list(iter(reader.next_request, None))) == 1
    assert len(reader.space()) == CAPACITY


def test_a_payload_that_is_too_long_is_dropped_in_bounded_memory() -> None:
    reader = RequestReader(MAXIMUM, CAPACITY)
    reader.space()[:28] = request(3, Command.WRITE, 9, 8, 0xFFFFFFFF)
    reader.received(28)
    left = 0xFFFFFFFF
    while left:
        assert list(iter(reader.next_request, None)) == []
        space = reader.space()
        assert len(space) <= CAPACITY
        size = min(len(space), left)
        reader.received(size)
        left -= size
    assert list(iter(reader.next_request, None)) == [(3, 1, 9, 8, 0xFFFFFFFF, None)]
    reader.space()[:28] = request(0, 0, 10, 0, 1)
    reader.received(28)
    assert list(iter(reader.next_request, None)) == [(0, 0, 10, 0, 1, None)]


def test_iteration_may_be_left_early() -> None:
    reader = RequestReader()
    stream = b"".join([request(0, 0, 1, 0, 1), write(2, b"two"), request(0, 0, 3, 0, 1), request(0, 0, 4, 0, 1)])
    reader.space()[: len(stream)] = stream
    reader.received(len(stream))
    cookies = []
    for _ in range(4):
        for _, _, cookie, *_ in iter(reader.next_request, None):
            cookies.append(cookie)
            break
    assert cookies == [1, 2, 3, 4]
    assert list(iter(reader.next_request, None)) == []


@pytest.mark.parametrize("garbage", [bytes(28), b"GET / HTTP/1.1\r\nHost: nbd.example\r\n", b"\x12\x56\x09\x53" * 7])
@pytest.mark.parametrize("before", [b"", request(0, 0, 1, 0, 1) * 3, write(1, b"x") * 3])
def test_a_wrong_magic_ends_the_connection_after_the_good_requests(garbage: bytes, before: bytes) -> None:
    reader = RequestReader()
    stream = before + garbage
    reader.space()[: len(stream)] = stream
    reader.received(len(stream))
    requests = iter(reader.next_request, None)
    for _ in range(3 if before else 0):
        next(requests)
    with pytest.raises(ProtocolError, match="instead of 0x25609513"):
        next(requests)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400), st.lists(st.integers(1, 100), min_size=1, max_size=3))
def test_any_bytes_lead_to_requests_an_error_or_a_wait(data: bytes, pieces: list[int]) -> None:
    try:
        receive(RequestReader(), data, forever(pieces))
    except ProtocolError:
        assert len(data) >= 28


def test_a_capacity_that_could_stall() -> None:
    with pytest.raises(ValueError, match="too small"):
        RequestReader(capacity=LARGE_PAYLOAD)


@pytest.mark.parametrize("size", [100, 4096, LARGE_PAYLOAD - 1, LARGE_PAYLOAD, 100_000])
@pytest.mark.parametrize("piece", [1 << 20, 50_000])
def test_a_long_stream_of_writes_that_end_anywhere_in_the_buffer(size: int, piece: int) -> None:
    payloads = [bytes([cookie]) * size for cookie in range(1 + 600_000 // size % 250)]
    stream = b"".join(write(cookie, payload) for cookie, payload in enumerate(payloads))
    seen = receive(RequestReader(MAXIMUM, CAPACITY), stream * 2, forever([piece]))
    assert [payload for *_, payload in seen] == payloads * 2
