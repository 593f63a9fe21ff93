"""The server's handshake against clients of every kind: raw options in, raw replies out."""

from __future__ import annotations

from struct import pack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdserve.errors import ProtocolError, RequestError
from nbdserve.protocol.constants import Option, OptionReply
from nbdserve.protocol.handshake import HandshakeState
from nbdserve.protocol.handshake_server import MAXIMUM_OPTIONS, ServerHandshake, TlsMode
from nbdserve.protocol.messages import ExportInfo
from tests.protocol.pair import EXPORTS, FLAGS, feed, name_and_infos, name_and_queries, option, replies, server, string

Opt, Rep = Option, OptionReply
STRUCTURED = option(Opt.STRUCTURED_REPLY)


def begun(tls: TlsMode = TlsMode.OFF, flags: int = 3) -> ServerHandshake:
    """A server that has got as far as the first option."""
    handshake = server(tls)
    assert handshake.data_to_send() == b"NBDMAGICIHAVEOPT\0\3"
    handshake.receive(pack(">I", flags))
    return handshake


def answers(handshake: ServerHandshake, data: bytes, step: int = 0) -> list[tuple[int, int, bytes]]:
    feed(handshake, data, step)
    return list(replies(handshake.data_to_send()))


ANSWERS = [  # what a client sends, and the types of the replies
    ("LIST", option(Opt.LIST), [Rep.SERVER] * len(EXPORTS) + [Rep.ACK]),
    ("LIST with data", option(Opt.LIST, b"x"), [Rep.ERR_INVALID]),
    ("ABORT", option(Opt.ABORT), [Rep.ACK]),
    ("ABORT with data", option(Opt.ABORT, b"bye"), [Rep.ACK]),
    ("STARTTLS without TLS", option(Opt.STARTTLS), [Rep.ERR_POLICY]),
    ("STARTTLS with data", option(Opt.STARTTLS, b"x"), [Rep.ERR_INVALID]),
    ("STRUCTURED_REPLY", STRUCTURED, [Rep.ACK]),
    ("STRUCTURED_REPLY with data", option(Opt.STRUCTURED_REPLY, b"x" * 99), [Rep.ERR_INVALID]),
    ("EXTENDED_HEADERS", option(Opt.EXTENDED_HEADERS), [Rep.ERR_UNSUP]),
    ("PEEK_EXPORT", option(Opt.PEEK_EXPORT, b"x" * 200_000), [Rep.ERR_UNSUP]),
    ("option 0", option(0, b"data"), [Rep.ERR_UNSUP]),
    ("option 2^32-1", option(0xFFFFFFFF), [Rep.ERR_UNSUP]),
    ("GO", option(Opt.GO, name_and_infos("")), [Rep.INFO, Rep.ACK]),
    ("GO asking all", option(Opt.GO, name_and_infos("", 0, 1, 2, 3)), [Rep.INFO] * 4 + [Rep.ACK]),
    ("GO asking the unknown", option(Opt.GO, name_and_infos("", 99, 65535)), [Rep.INFO, Rep.ACK]),
    ("INFO", option(Opt.INFO, name_and_infos("größe", 1, 2)), [Rep.INFO, Rep.INFO, Rep.ACK]),
    (
        "GO without block sizes",
        option(Opt.GO, name_and_infos("sectors")),
        [Rep.INFO, Rep.INFO, Rep.ERR_BLOCK_SIZE_REQD],
    ),
    ("GO with block sizes", option(Opt.GO, name_and_infos("sectors", 3)), [Rep.INFO, Rep.INFO, Rep.ACK]),
    ("GO nowhere", option(Opt.GO, name_and_infos("nosuch")), [Rep.ERR_UNKNOWN]),
    ("GO without data", option(Opt.GO), [Rep.ERR_INVALID]),
    ("GO cut in its name", option(Opt.GO, pack(">I", 10) + b"abc"), [Rep.ERR_INVALID]),
    ("GO cut in its infos", option(Opt.GO, string("") + pack(">HH", 2, 0)), [Rep.ERR_INVALID]),
    ("GO with more than it has", option(Opt.GO, name_and_infos("") + b"x"), [Rep.ERR_INVALID]),
    ("GO with a long name", option(Opt.GO, name_and_infos("n" * 4097)), [Rep.ERR_TOO_BIG]),
    ("GO with a name that is not there", option(Opt.GO, pack(">I", 0xFFFFFFFF) + b"ab"), [Rep.ERR_TOO_BIG]),
    ("GO with a long unknown name", option(Opt.GO, name_and_infos("n" * 4096)), [Rep.ERR_UNKNOWN]),
    ("GO with a name that is no text", option(Opt.GO, name_and_infos(b"\xff\xfe")), [Rep.ERR_INVALID]),
    ("GO with NUL", option(Opt.GO, name_and_infos(b"a\0b")), [Rep.ERR_INVALID]),
    ("contexts without structure", option(Opt.SET_META_CONTEXT, name_and_queries("")), [Rep.ERR_INVALID]),
    ("list without structure", option(Opt.LIST_META_CONTEXT, name_and_queries("")), [Rep.ERR_INVALID]),
    *[
        (f"{label} {queries}", STRUCTURED + option(number, name_and_queries("many", *queries)), [Rep.ACK, *kinds])
        for number, label, queries, kinds in [
            (Opt.LIST_META_CONTEXT, "list", (), [Rep.META_CONTEXT] * 3 + [Rep.ACK]),
            (Opt.LIST_META_CONTEXT, "list", ("base:",), [Rep.META_CONTEXT, Rep.ACK]),
            (Opt.LIST_META_CONTEXT, "list", ("x-test:", "x-test:one"), [Rep.META_CONTEXT] * 2 + [Rep.ACK]),
            (Opt.LIST_META_CONTEXT, "list", ("qemu:", "base:what", "", "colonless"), [Rep.ACK]),
            (Opt.SET_META_CONTEXT, "set", (), [Rep.ACK]),
            (Opt.SET_META_CONTEXT, "set", ("base:", "base:what", ""), [Rep.ACK]),
            (Opt.SET_META_CONTEXT, "set", ("base:allocation", "base:allocation"), [Rep.META_CONTEXT, Rep.ACK]),
            (Opt.SET_META_CONTEXT, "set", ("base:allocation", "q" * 4097), [Rep.ERR_TOO_BIG]),
            (Opt.SET_META_CONTEXT, "set", (b"\xff",), [Rep.ERR_INVALID]),
            (Opt.SET_META_CONTEXT, "set", ("nothing:x",) * 20_000, [Rep.ACK]),
        ]
    ],
    (
        "contexts of no export",
        STRUCTURED + option(Opt.SET_META_CONTEXT, name_and_queries("no")),
        [Rep.ACK, Rep.ERR_UNKNOWN],
    ),
    (
        "queries that are not there",
        STRUCTURED + option(Opt.SET_META_CONTEXT, string("") + pack(">I", 0xFFFFFFFF)),
        [Rep.ACK, Rep.ERR_INVALID],
    ),
]


@pytest.mark.parametrize(("data", "kinds"), [case[1:] for case in ANSWERS], ids=[case[0][:60] for case in ANSWERS])
@pytest.mark.parametrize("step", [1, 0], ids=["bytewise", "at once"])
def test_answers(data: bytes, kinds: list[OptionReply], step: int) -> None:
    if step and len(data) > 10_000:
        step = 999
    handshake = begun()
    given_answers = answers(handshake, data, step)
    assert [kind for _, kind, _ in given_answers] == kinds
    errors = [text for _, kind, text in given_answers if kind & 1 << 31]
    assert all(0 < len(text) < 4096 and text.decode().isprintable() for text in errors)
    if handshake.state is HandshakeState.NEGOTIATING:  # and the stream is still in step
        assert answers(handshake, option(77)) == [(77, Rep.ERR_UNSUP, b"option 77 is not supported")]


def test_go_tells_what_was_asked() -> None:
    told = [data for _, kind, data in answers(begun(), option(Opt.GO, name_and_infos("", 1, 2, 3))) if kind == Rep.INFO]
    assert told == [
        pack(">HQH", 0, 1 << 30, FLAGS & ~0x80 | 1),
        pack(">H", 1),
        pack(">H", 2) + b"the default",
        pack(">HIII", 3, 1, 4096, 32 << 20),
    ]


def test_info_and_go_tell_the_same() -> None:
    handshake = begun()
    feed(handshake, STRUCTURED)
    handshake.data_to_send()
    asked = name_and_infos("many", 0, 1, 2, 3)
    info, go = (answers(handshake, option(number, asked)) for number in (Opt.INFO, Opt.GO))
    assert [entry[1:] for entry in info] == [entry[1:] for entry in go]


@pytest.mark.parametrize("flags", [3, 2, 1, 0])
@pytest.mark.parametrize("name", ["", "größe"])
def test_export_name(flags: int, name: str) -> None:
    handshake = begun(flags=flags)
    feed(handshake, option(Opt.EXPORT_NAME, name.encode()) + b"request")
    size = EXPORTS[name].size
    expected = pack(">QH", size, EXPORTS[name].flags & ~0x80 | 1) + bytes(0 if flags & 2 else 124)
    assert handshake.data_to_send() == expected
    assert handshake.state is HandshakeState.TRANSMISSION
    assert handshake.trailing_data() == b"request"


VIOLATIONS = [
    ("a wrong magic", 3, b"IHAVEOPS" + bytes(8), "IHAVEOPT"),
    ("an unknown export", 3, option(Opt.EXPORT_NAME, b"nosuch"), "no export"),
    ("an export name that is no text", 3, option(Opt.EXPORT_NAME, b"\xff"), "UTF-8"),
    ("an export name that is too long", 3, option(Opt.EXPORT_NAME, length=4097), "4097"),
    ("an export name that is huge", 3, option(Opt.EXPORT_NAME, length=0xFFFFFFFF), "4294967295"),
    ("block sizes not asked for", 3, option(Opt.EXPORT_NAME, b"sectors"), "block sizes"),
    ("GO without fixed newstyle", 2, option(Opt.GO, name_and_infos("")), "fixed newstyle"),
    ("endless options", 3, option(77) * (MAXIMUM_OPTIONS + 1), "no decision"),
]


@pytest.mark.parametrize(
    ("flags", "data", "words"), [case[1:] for case in VIOLATIONS], ids=[case[0] for case in VIOLATIONS]
)
def test_violations_end_the_connection(flags: int, data: bytes, words: str) -> None:
    handshake = begun(flags=flags)
    with pytest.raises(ProtocolError, match=words):
        feed(handshake, data, 16)
    assert handshake.state is HandshakeState.CLOSED
    handshake.receive(b"more")
    assert not handshake.trailing_data()


@pytest.mark.parametrize("flags", [4, 7, 0x80000003])
def test_unknown_client_flags(flags: int) -> None:
    with pytest.raises(ProtocolError, match="flags"):
        begun(flags=flags)


def test_a_huge_option_is_drained_without_being_kept() -> None:
    handshake = begun()
    feed(handshake, option(77, length=200 << 20))
    piece = bytes(1 << 20)
    for _ in range(200):
        assert handshake.data_to_send() == b""
        handshake.receive(piece)
        assert len(handshake._input) <= 128 << 10
    assert [kind for _, kind, _ in answers(handshake, b"")] == [Rep.ERR_UNSUP]


def test_answers_that_nobody_reads_do_not_pile_up() -> None:
    exports = [ExportInfo("x" * 4000, 1, FLAGS)] * 100
    handshake = ServerHandshake(EXPORTS.get, lambda: exports)
    handshake.receive(pack(">I", 3))
    with pytest.raises(ProtocolError, match="without reading"):
        handshake.receive(option(Opt.LIST) * 900)
    assert len(handshake.data_to_send()) < 2 << 20


def test_names_that_the_wire_cannot_spell_are_not_listed() -> None:
    exports = [ExportInfo(name, 1, FLAGS, "a\nb") for name in ("good", "bad\udc80", "n" * 5000, "nul\0")]
    handshake = ServerHandshake(EXPORTS.get, lambda: exports)
    handshake.receive(pack(">I", 3))
    handshake.data_to_send()
    assert answers(handshake, option(Opt.LIST)) == [
        (Opt.LIST, Rep.SERVER, string("good") + b"a?b"),
        (Opt.LIST, Rep.ACK, b""),
    ]


def test_error_texts_are_cleaned_and_cut() -> None:
    name = "\x1b[2J" + "evil\r\n" * 500
    ((_, kind, text),) = answers(begun(), option(Opt.GO, name_and_infos(name)))
    assert kind == Rep.ERR_UNKNOWN
    assert text.startswith(b'there is no export "?[2Jevil??evil??')
    assert len(text) < 200


def test_an_export_that_cannot_be_served() -> None:
    def find(name: str) -> ExportInfo | None:
        raise RequestError(5, "its image is damaged")

    handshake = ServerHandshake(find, list)
    handshake.receive(pack(">I", 3))
    handshake.data_to_send()
    ((_, kind, text),) = answers(handshake, option(Opt.GO, name_and_infos("disk")))
    assert (kind, text) == (Rep.ERR_UNKNOWN, b'export "disk" is not available: its image is damaged')


# Metadata contexts belong to a name

SET = option(Opt.SET_META_CONTEXT, name_and_queries("many", "base:allocation", "x-test:one"))
SELECTIONS = [
    ("the same name", SET + option(Opt.GO, name_and_infos("many")), {1: "base:allocation", 2: "x-test:one"}),
    ("by EXPORT_NAME", SET + option(Opt.EXPORT_NAME, b"many"), {1: "base:allocation", 2: "x-test:one"}),
    ("another name", SET + option(Opt.GO, name_and_infos("")), {}),
    ("a name that is refused", SET + option(Opt.GO, name_and_infos("no")) + option(Opt.GO, name_and_infos("")), {}),
    (
        "an INFO in between",
        SET + option(Opt.INFO, name_and_infos("")) + option(Opt.GO, name_and_infos("many")),
        {1: "base:allocation", 2: "x-test:one"},
    ),
    (
        "a new selection",
        SET
        + option(Opt.SET_META_CONTEXT, name_and_queries("many", "x-test:two"))
        + option(Opt.GO, name_and_infos("many")),
        {1: "x-test:two"},
    ),
    (
        "a new selection that fails",
        SET + option(Opt.SET_META_CONTEXT, name_and_queries("nosuch", "x")) + option(Opt.GO, name_and_infos("many")),
        {},
    ),
    (
        "a new selection that is nonsense",
        SET + option(Opt.SET_META_CONTEXT, b"\0") + option(Opt.GO, name_and_infos("many")),
        {},
    ),
]


@pytest.mark.parametrize(("data", "contexts"), [case[1:] for case in SELECTIONS], ids=[case[0] for case in SELECTIONS])
def test_contexts_belong_to_a_name(data: bytes, contexts: dict[int, str]) -> None:
    handshake = begun()
    feed(handshake, STRUCTURED + data)
    assert handshake.agreement.contexts == contexts


# TLS


@pytest.mark.parametrize("number", [number for number in range(12) if number not in (Opt.EXPORT_NAME, Opt.STARTTLS)])
def test_before_required_tls_only_starttls_and_abort_are_served(number: int) -> None:
    def find(name: str) -> ExportInfo | None:
        raise AssertionError("no name is looked up before TLS")

    handshake = ServerHandshake(find, list, TlsMode.REQUIRE)
    handshake.receive(pack(">I", 3))
    handshake.data_to_send()
    ((_, kind, _),) = answers(handshake, option(number, name_and_infos("")))
    assert kind == (Rep.ACK if number == Opt.ABORT else Rep.ERR_TLS_REQD)


def test_before_required_tls_export_name_ends_the_connection() -> None:
    with pytest.raises(ProtocolError, match="without TLS"):
        feed(begun(TlsMode.REQUIRE), option(Opt.EXPORT_NAME))


def start_tls(handshake: ServerHandshake) -> None:
    assert answers(handshake, option(Opt.STARTTLS)) == [(Opt.STARTTLS, Rep.ACK, b"")]
    assert handshake.state is HandshakeState.STARTING_TLS
    handshake.tls_established()


def test_tls_forgets_what_was_negotiated_before() -> None:
    handshake = begun(TlsMode.ON)
    answers(handshake, STRUCTURED + SET)
    start_tls(handshake)
    ((_, kind, _),) = answers(handshake, SET)
    assert kind == Rep.ERR_INVALID, "structured replies are forgotten"
    feed(handshake, option(Opt.GO, name_and_infos("many")))
    assert (handshake.agreement.structured, handshake.agreement.contexts, handshake.agreement.tls) == (False, {}, True)


def test_tls_twice() -> None:
    handshake = begun(TlsMode.REQUIRE)
    start_tls(handshake)
    ((_, kind, _),) = answers(handshake, option(Opt.STARTTLS))
    assert kind == Rep.ERR_INVALID


@pytest.mark.parametrize("mode", [TlsMode.ON, TlsMode.REQUIRE])
def test_plaintext_behind_starttls_is_never_believed(mode: TlsMode) -> None:
    handshake = begun(mode)
    with pytest.raises(ProtocolError, match="injected"):
        handshake.receive(option(Opt.STARTTLS) + option(Opt.GO, name_and_infos("")))
    assert handshake.data_to_send() == b"", "nothing was acknowledged"
    handshake = begun(mode)
    feed(handshake, option(Opt.STARTTLS))
    with pytest.raises(ProtocolError, match="plaintext"):
        handshake.receive(b"I")


def test_tls_begins_only_after_the_last_plaintext_was_sent() -> None:
    handshake = begun(TlsMode.ON)
    feed(handshake, option(Opt.STARTTLS))
    with pytest.raises(RuntimeError):
        handshake.tls_established()


# Shutting down


def test_shutting_down_refuses_all_but_abort() -> None:
    handshake = begun()
    handshake.shutting_down = True
    for number in (Opt.LIST, Opt.GO, Opt.STARTTLS, 77):
        assert [kind for _, kind, _ in answers(handshake, option(number, b"data"))] == [Rep.ERR_SHUTDOWN]
    assert [kind for _, kind, _ in answers(handshake, option(Opt.ABORT))] == [Rep.ACK]
    handshake = begun()
    handshake.shutting_down = True
    with pytest.raises(ProtocolError, match="shutting down"):
        feed(handshake, option(Opt.EXPORT_NAME))


# Anything at all

options = st.builds(
    option,
    st.one_of(st.sampled_from(Option), st.integers(0, 0xFFFFFFFF)),
    st.one_of(
        st.binary(max_size=60),
        st.builds(name_and_infos, st.sampled_from(list(EXPORTS)), st.integers(0, 4)),
        st.builds(name_and_queries, st.sampled_from(list(EXPORTS)), st.sampled_from(["base:", "base:allocation"])),
    ),
    st.one_of(st.none(), st.integers(0, 80), st.integers(0, 0xFFFFFFFF)),
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(TlsMode),
    st.one_of(st.binary(max_size=300), st.lists(options, max_size=8).map(lambda all: b"\0\0\0\3" + b"".join(all))),
    st.integers(0, 40),
)
def test_any_bytes_lead_to_an_answer_an_error_or_a_wait(mode: TlsMode, data: bytes, step: int) -> None:
    handshake = server(mode)
    try:
        feed(handshake, data, step)
    except ProtocolError:
        assert handshake.state is HandshakeState.CLOSED
