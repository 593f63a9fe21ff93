"""The client's handshake against servers of every kind: raw bytes in, and never anything but an error or a wait."""

from __future__ import annotations

from struct import pack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdserve.errors import ProtocolError
from nbdserve.protocol.constants import Option, OptionReply
from nbdserve.protocol.handshake import HandshakeState
from nbdserve.protocol.handshake_client import ClientHandshake
from nbdserve.protocol.messages import Listing
from tests.protocol.pair import feed, option, reply, string

Opt, Rep = Option, OptionReply
GREETING = b"NBDMAGICIHAVEOPT\0\3"
PLAIN = reply(Opt.STRUCTURED_REPLY, Rep.ERR_UNSUP)
STRUCTURED = reply(Opt.STRUCTURED_REPLY, Rep.ACK) + reply(Opt.SET_META_CONTEXT, Rep.ACK)
EXPORT = reply(Opt.GO, Rep.INFO, pack(">HQH", 0, 4096, 1))


def info(kind: int, data: bytes = b"") -> bytes:
    return reply(Opt.GO, Rep.INFO, pack(">H", kind) + data)


def context(number: int, name: str) -> bytes:
    return reply(Opt.SET_META_CONTEXT, Rep.META_CONTEXT, pack(">I", number) + name.encode())


def test_greets_and_asks_in_order() -> None:
    client = ClientHandshake("disk")
    feed(client, GREETING)
    assert client.data_to_send() == pack(">I", 3) + option(Opt.STRUCTURED_REPLY)
    feed(client, reply(Opt.STRUCTURED_REPLY, Rep.ACK))
    assert client.data_to_send() == option(
        Opt.SET_META_CONTEXT, string("disk") + pack(">I", 1) + string("base:allocation")
    )
    feed(client, context(7, "base:allocation") + reply(Opt.SET_META_CONTEXT, Rep.ACK))
    assert client.data_to_send() == option(Opt.GO, string("disk") + pack(">4H", 3, 1, 2, 3))
    feed(
        client, EXPORT + info(3, pack(">III", 512, 4096, 1 << 20)) + info(4711, b"?") + reply(Opt.GO, Rep.ACK) + b"more"
    )
    assert client.state is HandshakeState.TRANSMISSION
    assert client.agreement.contexts == {7: "base:allocation"}
    export = client.agreement.export
    assert (export.name, export.size, export.minimum_block, export.maximum_block) == ("disk", 4096, 512, 1 << 20)
    assert client.trailing_data() == b"more"


def test_takes_only_the_flags_it_was_offered() -> None:
    client = ClientHandshake("disk")
    feed(client, b"NBDMAGICIHAVEOPT\x80\0")
    assert client.data_to_send() == pack(">I", 0) + option(Opt.EXPORT_NAME, b"disk")
    feed(client, pack(">QH", 77, 1) + bytes(124))
    assert client.agreement.export.size == 77


def test_canonical_name_and_description_are_the_servers() -> None:
    client = ClientHandshake("")
    feed(
        client, GREETING + PLAIN + EXPORT + info(1, b"disk0") + info(2, b"a \x1b[31mred\nline") + reply(Opt.GO, Rep.ACK)
    )
    assert (client.agreement.export.name, client.agreement.export.description) == ("disk0", "a ?[31mred?line")


def test_a_server_without_contexts_is_taken_without_them() -> None:
    client = ClientHandshake()
    feed(client, GREETING + reply(Opt.STRUCTURED_REPLY, Rep.ACK) + reply(Opt.SET_META_CONTEXT, Rep.ERR_UNSUP))
    feed(client, EXPORT + reply(Opt.GO, Rep.ACK))
    assert client.agreement.structured
    assert client.agreement.contexts == {}


@pytest.mark.parametrize("tls", [True, False])
def test_starttls_comes_first_or_not_at_all(tls: bool) -> None:
    client = ClientHandshake("secret", tls=tls)
    feed(client, GREETING)
    sent = client.data_to_send()
    assert (sent[4:] == option(Opt.STARTTLS)) is tls
    assert b"secret" not in sent


@pytest.mark.parametrize("error", [Rep.ERR_UNSUP, Rep.ERR_POLICY, Rep.ERR_INVALID, Rep.ERR_PLATFORM, 0x80001234])
def test_no_error_makes_a_tls_client_go_on_in_plaintext(error: int) -> None:
    client = ClientHandshake(tls=True)
    feed(client, GREETING)
    client.data_to_send()
    with pytest.raises(ProtocolError, match="STARTTLS"):
        feed(client, reply(Opt.STARTTLS, error, b"no"))
    assert client.data_to_send() == option(Opt.ABORT)
    assert client.state is HandshakeState.CLOSED


def test_plaintext_behind_the_starttls_answer_is_never_believed() -> None:
    client = ClientHandshake(tls=True)
    with pytest.raises(ProtocolError, match="injected"):
        feed(client, GREETING + reply(Opt.STARTTLS, Rep.ACK) + STRUCTURED)


def test_a_server_too_old_for_tls() -> None:
    with pytest.raises(ProtocolError, match="fixed newstyle"):
        feed(ClientHandshake(tls=True), b"NBDMAGICIHAVEOPT\0\0")


def test_names_that_the_wire_has_not() -> None:
    for name in ("x" * 4097, "a\0b", "\udc80"):
        with pytest.raises(ValueError, match=r"bytes|NUL|UTF-8"):
            ClientHandshake(name)


HOSTILE = [
    ("not NBD", b"SSH-2.0-OpenSSH_9", "no NBD server"),
    ("oldstyle", b"NBDMAGIC" + pack(">QQI", 0x00420281861253, 4096, 1) + bytes(124), "oldstyle"),
    ("half NBD", b"NBDMAGIC" + bytes(8), "IHAVEOPT"),
    ("a wrong reply magic", GREETING + bytes(20), "wrong number"),
    ("a reply to what was not asked", GREETING + reply(Opt.GO, Rep.ACK), "option 7"),
    ("a reply of 4 GiB", GREETING + pack(">QIII", 0x3E889045565A9, 8, Rep.ACK, 0xFFFFFFFF), "too long"),
    ("endless replies", GREETING + PLAIN + info(9, bytes(60_000)) * 100, "too long"),
    ("endless small replies", GREETING + PLAIN + EXPORT * 150_000, "too long"),
    ("a reply type from elsewhere", GREETING + PLAIN + reply(Opt.GO, Rep.SERVER) + reply(Opt.GO, Rep.ACK), "type 2"),
    ("no size", GREETING + PLAIN + reply(Opt.GO, Rep.ACK), "did not tell the size"),
    ("a short size", GREETING + PLAIN + info(0, b"1234") + reply(Opt.GO, Rep.ACK), "did not tell the size"),
    ("info without type", GREETING + PLAIN + EXPORT + reply(Opt.GO, Rep.INFO, b"1") + reply(Opt.GO, Rep.ACK), "type"),
    ("a huge size", GREETING + PLAIN + info(0, pack(">QH", 1 << 63, 1)) + reply(Opt.GO, Rep.ACK), "2\\^63"),
    ("no flags", GREETING + PLAIN + info(0, pack(">QH", 1, 0)) + reply(Opt.GO, Rep.ACK), "flags"),
    ("a name that is no text", GREETING + PLAIN + EXPORT + info(1, b"\xff") + reply(Opt.GO, Rep.ACK), "UTF-8"),
    ("a long name", GREETING + PLAIN + EXPORT + info(1, b"n" * 5000) + reply(Opt.GO, Rep.ACK), "5000"),
    *[
        (f"sizes {sizes}", GREETING + PLAIN + EXPORT + info(3, pack(">3I", *sizes)) + reply(Opt.GO, Rep.ACK), "imposs")
        for sizes in [(0, 512, 512), (3, 4096, 4096), (1 << 17, 1 << 17, 1 << 20), (512, 256, 4096), (1, 4096, 512)]
    ],
    ("short block sizes", GREETING + PLAIN + EXPORT + info(3, bytes(11)) + reply(Opt.GO, Rep.ACK), "in 11 bytes"),
    ("a context without number", GREETING + STRUCTURED[:20] + reply(Opt.SET_META_CONTEXT, Rep.META_CONTEXT, b"abc")
     + reply(Opt.SET_META_CONTEXT, Rep.ACK), "3 bytes"),
    ("a number twice", GREETING + STRUCTURED[:20] + context(1, "a") * 2 + reply(Opt.SET_META_CONTEXT, Rep.ACK), "two"),
    ("TLS required", GREETING + reply(Opt.STRUCTURED_REPLY, Rep.ERR_TLS_REQD), "requires TLS"),
    ("shutting down", GREETING + PLAIN + reply(Opt.GO, Rep.ERR_SHUTDOWN, b"bye"), "shutting down; it says: bye"),
    ("policy", GREETING + PLAIN + reply(Opt.GO, Rep.ERR_POLICY, b"\x1b[31mno"), r"forbids this; it says: \?\[31mno"),
    ("an error from the future", GREETING + PLAIN + reply(Opt.GO, 0x80ABCDEF), "0x80abcdef"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "words"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_hostile_servers(data: bytes, words: str) -> None:
    client = ClientHandshake("disk")
    with pytest.raises(ProtocolError, match=words):
        feed(client, data, 4096)
    assert client.state is HandshakeState.CLOSED


@pytest.mark.parametrize("body", [b"", b"\0\0", pack(">I", 9) + b"short", pack(">I", 1) + b"\xff"])
def test_hostile_listings(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        feed(ClientHandshake(list_only=True), GREETING + reply(Opt.LIST, Rep.SERVER, body) + reply(Opt.LIST, Rep.ACK))


def test_listing_with_and_without_descriptions() -> None:
    client = ClientHandshake(list_only=True)
    feed(
        client,
        GREETING + reply(Opt.LIST, Rep.SERVER, string("a")) + reply(Opt.LIST, Rep.SERVER, string("b") + b"the b\n"),
    )
    feed(client, reply(Opt.LIST, Rep.ACK))
    assert client.listed == (Listing("a"), Listing("b", "the b?"))


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"", "greeting"), (GREETING, "STRUCTURED_REPLY"), (GREETING + PLAIN + reply(Opt.GO, Rep.ERR_UNSUP), '"disk"')],
)
def test_a_server_that_hangs_up(data: bytes, words: str) -> None:
    client = ClientHandshake("disk")
    feed(client, data)
    with pytest.raises(ProtocolError, match=words):
        client.connection_lost()
    client.connection_lost()  # once is enough


conversations = st.lists(
    st.builds(
        reply,
        st.sampled_from([Opt.STRUCTURED_REPLY, Opt.SET_META_CONTEXT, Opt.GO, Opt.LIST, Opt.STARTTLS]),
        st.sampled_from(OptionReply),
        st.one_of(st.binary(max_size=20), st.just(pack(">HQH", 0, 4096, 1)), st.just(string("name"))),
    ),
    max_size=8,
)


@settings(max_examples=300, deadline=None)
@given(
    st.booleans(),
    st.booleans(),
    st.one_of(
        st.binary(max_size=200),
        conversations.map(lambda all: GREETING + b"".join(all)),
        conversations.map(lambda all: GREETING + STRUCTURED + b"".join(all)),
    ),
    st.integers(0, 30),
)
def test_any_bytes_lead_to_an_agreement_an_error_or_a_wait(tls: bool, listing: bool, data: bytes, step: int) -> None:
    client = ClientHandshake("disk", tls=tls, list_only=listing)
    try:
        feed(client, data, step)
    except ProtocolError:
        assert client.state is HandshakeState.CLOSED
