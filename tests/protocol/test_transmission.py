"""Both roles of the transmission phase: one table of requests and replies drives the writers and readers of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from struct import pack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdserve.errors import ProtocolError
from nbdserve.protocol.constants import Command, CommandFlags, ErrorCode
from nbdserve.protocol.outstanding import BlockStatusChunk, DataChunk, Done, ErrorChunk, Event, HoleChunk
from nbdserve.protocol.replies import (
    error_chunk,
    none_chunk,
    put_data_chunk,
    put_hole_chunk,
    put_simple_reply,
    simple_reply,
    status_chunk,
)
from nbdserve.protocol.transmission_client import ReplyReader
from nbdserve.protocol.transmission_server import RequestReader

COOKIE = 0xFEDCBA9876543210
DATA = bytes(range(256)) * 400  # 100 KiB: its rest is received straight into the destination
AT = 1 << 40


def data_chunk(offset: int, data: bytes, done: bool = False, cookie: int = COOKIE) -> bytes:
    buffer = bytearray(28)
    assert put_data_chunk(buffer, 0, cookie, offset, len(data), done) == len(buffer)
    return bytes(buffer) + data


def hole_chunk(offset: int, length: int, done: bool = False) -> bytes:
    buffer = bytearray(40)
    assert put_hole_chunk(buffer, 8, COOKIE, offset, length, done) == len(buffer)
    return bytes(buffer[8:])


def simple(error: int = 0, data: bytes = b"") -> bytes:
    buffer = bytearray(16)
    assert put_simple_reply(buffer, 0, COOKIE, error) == len(buffer)
    assert error or buffer == simple_reply(COOKIE)
    return bytes(buffer) + data


def chunk(kind: int, payload: bytes, flags: int = 1, cookie: int = COOKIE) -> bytes:
    """A chunk that no writer of ours would make."""
    return pack(">IHHQI", 0x668E33EF, flags, kind, cookie, len(payload)) + payload


@dataclass
class Case:
    """A request, a reply to it, and what the client makes of that."""

    name: str
    command: Command
    length: int
    reply: bytes
    events: list[Event]
    structured: bool = True
    flags: int = 0


def ok(data: bytes | None = None) -> Done:
    return Done(COOKIE, None, "", None if data is None else memoryview(data))


def failed(error: ErrorCode, text: str = "", data: bytes | None = None) -> Done:
    return Done(COOKIE, error, text, None if data is None else memoryview(data))


EIO, ENOSPC = ErrorCode.EIO, ErrorCode.ENOSPC
READ, WRITE, STATUS = Command.READ, Command.WRITE, Command.BLOCK_STATUS
WHOLE = DataChunk(COOKIE, AT, memoryview(DATA))
HALF = len(DATA) // 2
EXTENTS = ((4096, 0), (1 << 20, 3), (8192, 1))

CASES = [
    Case("read", READ, len(DATA), data_chunk(AT, DATA, True), [WHOLE, ok(DATA)]),
    Case("read, end apart", READ, len(DATA), data_chunk(AT, DATA) + none_chunk(COOKIE), [WHOLE, ok(DATA)]),
    Case("read, unfragmented", READ, len(DATA), data_chunk(AT, DATA, True), [WHOLE, ok(DATA)], flags=CommandFlags.DF),
    Case("read a byte", READ, 1, data_chunk(AT, b"x", True), [DataChunk(COOKIE, AT, memoryview(b"x")), ok(b"x")]),
    Case("read nothing", READ, 0, none_chunk(COOKIE), [ok(b"")]),
    Case("read, simple", READ, len(DATA), simple(0, DATA), [WHOLE, ok(DATA)], structured=False),
    Case("read nothing, simple", READ, 0, simple(), [ok(b"")], structured=False),
    Case(
        "read, simple error",
        READ,
        4,
        simple(EIO),
        [ErrorChunk(COOKIE, EIO, "", None), failed(EIO, "", bytes(4))],
        structured=False,
    ),
    Case(
        "read a hole",
        READ,
        1 << 20,
        hole_chunk(AT, 1 << 20, True),
        [HoleChunk(COOKIE, AT, 1 << 20), ok(bytes(1 << 20))],
    ),
    Case(
        "read out of order",
        READ,
        2 * len(DATA),
        data_chunk(AT + len(DATA), DATA) + hole_chunk(AT, HALF) + data_chunk(AT + HALF, DATA[HALF:], True),
        [
            DataChunk(COOKIE, AT + len(DATA), memoryview(DATA)),
            HoleChunk(COOKIE, AT, HALF),
            DataChunk(COOKIE, AT + HALF, memoryview(DATA[HALF:])),
            ok(bytes(HALF) + DATA[HALF:] + DATA),
        ],
    ),
    Case(
        "read with an error midway",
        READ,
        len(DATA),
        data_chunk(AT, DATA[:HALF]) + error_chunk(COOKIE, EIO, "sector\nunreadable", AT + 10),
        [
            DataChunk(COOKIE, AT, memoryview(DATA[:HALF])),
            ErrorChunk(COOKIE, EIO, "sector?unreadable", AT + 10),
            failed(EIO, "sector?unreadable", DATA[:HALF] + bytes(HALF)),
        ],
    ),
    Case(
        "read with two errors and an end apart",
        READ,
        len(DATA),
        error_chunk(COOKIE, EIO, "one", AT, done=False)
        + error_chunk(COOKIE, ErrorCode.EOVERFLOW, "two", AT + 9, done=False)
        + none_chunk(COOKIE),
        [
            ErrorChunk(COOKIE, EIO, "one", AT),
            ErrorChunk(COOKIE, ErrorCode.EOVERFLOW, "two", AT + 9),
            failed(EIO, "one", bytes(len(DATA))),
        ],
    ),
    Case("write", WRITE, len(DATA), simple(), [ok()], structured=False),
    Case("write, simple among structured", WRITE, 7, simple(), [ok()], flags=CommandFlags.FUA),
    Case("write, structured", WRITE, 7, none_chunk(COOKIE), [ok()]),
    Case(
        "write, no space",
        WRITE,
        7,
        error_chunk(COOKIE, ENOSPC, "the disk is full"),
        [ErrorChunk(COOKIE, ENOSPC, "the disk is full", None), failed(ENOSPC, "the disk is full")],
    ),
    Case("flush", Command.FLUSH, 0, none_chunk(COOKIE), [ok()]),
    Case("trim", Command.TRIM, 0xFFFFFFFF, simple(), [ok()]),
    Case("zeroes", Command.WRITE_ZEROES, 1 << 31, none_chunk(COOKIE), [ok()], flags=CommandFlags.FAST_ZERO),
    Case("cache", Command.CACHE, 4096, simple(), [ok()]),
    Case(
        "an error number from the future",
        Command.TRIM,
        1,
        simple(4711),
        [ErrorChunk(COOKIE, ErrorCode.EINVAL, "", None), failed(ErrorCode.EINVAL)],
    ),
    Case(
        "an error chunk from the future",
        Command.TRIM,
        1,
        chunk(0x8077, pack(">IH", 5, 3) + b"huh" + b"and more"),
        [ErrorChunk(COOKIE, EIO, "huh", None), failed(EIO, "huh")],
    ),
    Case(
        "unknown flags",
        Command.TRIM,
        1,
        chunk(0, b"", flags=0xFFFF),
        [ok()],
    ),
    Case(
        "status",
        STATUS,
        2 << 20,
        status_chunk(COOKIE, 7, EXTENTS, False) + status_chunk(COOKIE, 1, EXTENTS[:1], True),
        [BlockStatusChunk(COOKIE, 7, EXTENTS), BlockStatusChunk(COOKIE, 1, EXTENTS[:1]), ok()],
    ),
    Case(
        "status of one extent",
        STATUS,
        4096,
        status_chunk(COOKIE, 1, EXTENTS[:1], False) + status_chunk(COOKIE, 7, ((1, 9),), False) + none_chunk(COOKIE),
        [BlockStatusChunk(COOKIE, 1, EXTENTS[:1]), BlockStatusChunk(COOKIE, 7, ((1, 9),)), ok()],
        flags=CommandFlags.REQ_ONE,
    ),
    Case(
        "status beyond what was asked",
        STATUS,
        1,
        status_chunk(COOKIE, 1, ((0xFFFFFFFF, 0),), False) + status_chunk(COOKIE, 7, ((1, 0),), True),
        [BlockStatusChunk(COOKIE, 1, ((0xFFFFFFFF, 0),)), BlockStatusChunk(COOKIE, 7, ((1, 0),)), ok()],
    ),
    Case(
        "status of very many extents",
        STATUS,
        0xFFFFFFFF,
        status_chunk(COOKIE, 1, ((512, 0), (512, 3)) * 50_000, False) + status_chunk(COOKIE, 7, ((1, 0),), True),
        [BlockStatusChunk(COOKIE, 1, ((512, 0), (512, 3)) * 50_000), BlockStatusChunk(COOKIE, 7, ((1, 0),)), ok()],
    ),
    Case(
        "status that fails",
        STATUS,
        1,
        status_chunk(COOKIE, 1, EXTENTS[:1], False) + error_chunk(COOKIE, EIO),
        [BlockStatusChunk(COOKIE, 1, EXTENTS[:1]), ErrorChunk(COOKIE, EIO, "", None), failed(EIO)],
    ),
]  # fmt: skip


def receive(reader: ReplyReader | RequestReader, data: bytes, step: int, drain: Callable[[], None]) -> None:
    """Feed a reader as a socket would."""
    position = 0
    while position < len(data):
        space = reader.space()
        size = min(step or len(data), len(space), len(data) - position)
        space[:size] = data[position : position + size]
        reader.received(size)
        position += size
        drain()


def replied(reader: ReplyReader, data: bytes, step: int = 0) -> list[Event]:
    events: list[Event] = []
    receive(reader, data, step, lambda: events.extend(reader.events()))
    return events


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
@pytest.mark.parametrize("step", [13, 20_000, 0], ids=["thirteens", "20000s", "at once"])
def test_both_roles(case: Case, step: int) -> None:
    client, server = ReplyReader(case.structured, [1, 7]), RequestReader()
    payload = DATA[: case.length] if case.command == WRITE else None
    sent = client.request(case.command, COOKIE, AT, case.length, case.flags)
    seen: list[tuple[object, ...]] = []
    receive(server, sent + (payload or b""), step, lambda: seen.extend(iter(server.next_request, None)))
    assert seen == [(case.flags, case.command, COOKIE, AT, case.length, payload)]

    assert client.outstanding == 1
    assert replied(client, case.reply, step) == case.events
    assert client.outstanding == 0


def test_replies_interleave() -> None:
    client = ReplyReader(structured=True)
    for cookie in (1, 2):
        client.request(READ, cookie, 0, 8)
    client.request(Command.FLUSH, 3)
    stream = (
        data_chunk(0, b"1111", cookie=1)
        + data_chunk(4, b"2222", cookie=2)
        + simple_reply(3)
        + data_chunk(0, b"2222", True, cookie=2)
        + data_chunk(4, b"1111", True, cookie=1)
    )
    done = [event for event in replied(client, stream) if isinstance(event, Done)]
    assert done == [
        Done(3, None, "", None),
        Done(2, None, "", memoryview(b"22222222")),
        Done(1, None, "", memoryview(b"11111111")),
    ]


def test_data_goes_where_the_caller_wants_it_and_straight() -> None:
    client = ReplyReader(structured=True)
    target = bytearray(b"\xff" * 300_000)
    client.request(READ, COOKIE, 0, 200_000, into=memoryview(target)[50_000:250_000])
    beginning = hole_chunk(0, 100_000) + data_chunk(100_000, bytes(100_000), True)[:28]
    assert replied(client, beginning) == [HoleChunk(COOKIE, 0, 100_000)]
    space = client.space()
    assert space.obj is target
    space[:] = b"b" * 100_000
    client.received(100_000)
    assert [type(event) for event in client.events()] == [DataChunk, Done]
    assert target == b"\xff" * 50_000 + bytes(100_000) + b"b" * 100_000 + b"\xff" * 50_000


def test_disconnect_expects_no_reply() -> None:
    client = ReplyReader(structured=True)
    assert client.request(Command.DISC, 5) == pack(">IHHQQI", 0x25609513, 0, 2, 5, 0, 0)
    assert client.outstanding == 0


def test_error_texts_stay_legal_strings() -> None:
    packed = error_chunk(COOKIE, EIO, "€" * 5000 + "\n")
    assert len(packed) <= 20 + 6 + 4096
    assert chr(10).encode() not in packed[26:]


HOSTILE = [  # a reply to a read of 1000 bytes at AT, and words of the complaint
    ("a wrong magic", bytes(16), "wrong number"),
    ("an unknown cookie", chunk(0, b"", cookie=1), "not outstanding"),
    ("a simple reply to a read", simple(0, DATA[:1000]), "simple reply"),
    ("a simple error to a read", simple(EIO), "simple reply"),
    ("data before the read", data_chunk(AT - 1, bytes(10)), "for a read of 1000"),
    ("data behind the read", data_chunk(AT + 999, bytes(2)), "for a read of 1000"),
    ("data of 4 GiB", pack(">IHHQIQ", 0x668E33EF, 0, 1, COOKIE, 0xFFFFFFFF, AT), "for a read of 1000"),
    ("no data", data_chunk(AT, b""), "for a read of 1000"),
    ("data without offset", pack(">IHHQIQ", 0x668E33EF, 0, 1, COOKIE, 3, AT), "for a read of 1000"),
    ("data twice", data_chunk(AT, bytes(10)) + data_chunk(AT + 9, bytes(2)), "twice"),
    ("data over a hole", hole_chunk(AT + 5, 10) + data_chunk(AT, bytes(6)), "twice"),
    ("a hole within data", data_chunk(AT, bytes(10)) + hole_chunk(AT + 3, 1), "twice"),
    ("a gap", data_chunk(AT, bytes(500)) + data_chunk(AT + 501, bytes(499), True), "left out"),
    ("an end too early", data_chunk(AT, bytes(999), True), "left out"),
    ("an end at once", none_chunk(COOKIE), "left out"),
    ("a hole of nothing", hole_chunk(AT, 0), "for a read of 1000"),
    ("a hole outside", hole_chunk(AT + 1, 1000), "for a read of 1000"),
    ("a short hole", chunk(2, bytes(11)), "of 11 bytes"),
    ("an end that is none", chunk(0, b"", flags=0), "type 0"),
    ("an end with payload", chunk(0, b"x"), "type 0"),
    ("a status for a read", status_chunk(COOKIE, 1, EXTENTS, True), "with a block status"),
    ("an unknown type", chunk(3, b""), "unknown type 3"),
    ("an error of nothing", chunk(0x8001, pack(">IH", 0, 0)), "without an error"),
    ("a short error", chunk(0x8001, bytes(5)), "of 5 bytes"),
    ("an error longer than its chunk", chunk(0x8001, pack(">IH", 5, 9) + b"short"), "9 bytes"),
    ("an error text over its offset", chunk(0x8002, pack(">IHQ", 5, 1, AT)), "1 bytes"),
    ("an error outside", error_chunk(COOKIE, 5, "x", AT + 1000), "outside"),
    ("a huge error", pack(">IHHQI", 0x668E33EF, 1, 0x8001, COOKIE, 0xFFFFFFFF), "4294967295"),
    ("data over an error", error_chunk(COOKIE, 5, "", AT + 3, done=False) + data_chunk(AT, bytes(4)), "after an error"),
    ("endless errors", error_chunk(COOKIE, 5, done=False) * 1025, "more than"),
    ("a second reply", data_chunk(AT, bytes(1000), True) * 2, "not outstanding"),
]


@pytest.mark.parametrize(("data", "words"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_hostile_replies_to_a_read(data: bytes, words: str) -> None:
    client = ReplyReader(structured=True)
    client.request(READ, COOKIE, AT, 1000)
    with pytest.raises(ProtocolError, match=words):
        replied(client, data)


HOSTILE_OTHERS = [
    ("fragments", READ, CommandFlags.DF, data_chunk(AT, bytes(10)) + data_chunk(AT + 10, bytes(10)), "fragmented"),
    ("data for a write", WRITE, 0, data_chunk(AT, bytes(1000), True), "WRITE with data"),
    ("a hole for a trim", Command.TRIM, 0, hole_chunk(AT, 1000, True), "TRIM with data"),
    ("status without status", STATUS, 0, simple(), "did not describe"),
    ("status of an unknown context", STATUS, 0, status_chunk(COOKIE, 2, EXTENTS[:1], True), "agreed"),
    ("status of one context twice", STATUS, 0, status_chunk(COOKIE, 1, EXTENTS[:1], False) * 2, "twice"),
    ("status of half", STATUS, 0, chunk(5, bytes(4 + 12)), "type 5"),
    ("status of nothing", STATUS, 0, chunk(5, bytes(4)), "type 5"),
    ("status of 4 GiB", STATUS, 0, pack(">IHHQI", 0x668E33EF, 0, 5, COOKIE, 0xFFFFFFFC), "type 5"),
    ("an extent of nothing", STATUS, 0, status_chunk(COOKIE, 1, ((0, 1),), True), "no length"),
    ("too many extents", STATUS, 0, status_chunk(COOKIE, 1, ((1000, 0), (1, 1)), True), "more extents"),
    ("two for one", STATUS, CommandFlags.REQ_ONE, status_chunk(COOKIE, 1, ((1, 0), (1, 1)), True), "more extents"),
    ("one too long", STATUS, CommandFlags.REQ_ONE, status_chunk(COOKIE, 1, ((1001, 0),), True), "more extents"),
]


@pytest.mark.parametrize(
    ("command", "flags", "data", "words"),
    [case[1:] for case in HOSTILE_OTHERS],
    ids=[case[0] for case in HOSTILE_OTHERS],
)
def test_hostile_replies_to_others(command: int, flags: int, data: bytes, words: str) -> None:
    client = ReplyReader(structured=True, contexts=[1])
    client.request(command, COOKIE, AT, 1000, flags)
    with pytest.raises(ProtocolError, match=words):
        replied(client, data)


def test_structured_replies_must_have_been_agreed() -> None:
    client = ReplyReader(structured=False)
    client.request(READ, COOKIE, AT, 1000)
    with pytest.raises(ProtocolError, match="not agreed"):
        replied(client, none_chunk(COOKIE))


def test_scattered_data_is_bounded() -> None:
    client = ReplyReader(structured=True)
    client.request(READ, COOKIE, 0, 20_000)
    with pytest.raises(ProtocolError, match="scatters"):
        replied(client, b"".join(data_chunk(offset, b"x") for offset in range(0, 20_000, 2)))


@settings(max_examples=200, deadline=None)
@given(st.permutations(range(12)), st.sets(st.integers(1, 199), min_size=11, max_size=11), st.integers(1, 90))
def test_any_order_of_any_chunks_is_reassembled(order: list[int], cuts: set[int], step: int) -> None:
    edges = [0, *sorted(cuts), 200]
    content = bytearray(range(200))
    client = ReplyReader(structured=True)
    client.request(READ, COOKIE, AT, 200)
    stream = b""
    for index in order:
        begin, end = edges[index], edges[index + 1]
        if index % 3:
            stream += data_chunk(AT + begin, content[begin:end])
        else:
            content[begin:end] = bytes(end - begin)
            stream += hole_chunk(AT + begin, end - begin)
    *_, done = replied(client, stream + none_chunk(COOKIE), step)
    assert done == ok(bytes(content))


chunks = st.builds(
    chunk,
    st.sampled_from([0, 1, 2, 3, 5, 0x8001, 0x8002, 0x8003]),
    st.one_of(
        st.binary(max_size=30),
        st.builds(lambda offset, length: pack(">QI", AT + offset, length), st.integers(0, 40), st.integers(0, 50)),
        st.builds(lambda offset, data: pack(">Q", AT + offset) + data, st.integers(0, 40), st.binary(max_size=40)),
    ),
    st.integers(0, 1),
    st.sampled_from([1, 2, 3]),
)


@settings(max_examples=300, deadline=None)
@given(
    st.booleans(),
    st.one_of(st.binary(max_size=100), st.lists(st.one_of(chunks, st.just(simple_reply(2)))).map(b"".join)),
    st.integers(0, 40),
)
def test_any_bytes_lead_to_events_an_error_or_a_wait(structured: bool, data: bytes, step: int) -> None:
    client = ReplyReader(structured, contexts=[1])
    client.request(READ, 1, AT, 40)
    client.request(WRITE, 2, AT, 40)
    client.request(STATUS, 3, AT, 40)
    try:
        events = replied(client, data, step)
    except ProtocolError:
        return
    assert sum(isinstance(event, Done) for event in events) == 3 - client.outstanding
