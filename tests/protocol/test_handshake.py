"""Both roles of the handshake against each other."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nbdserve.errors import ProtocolError
from nbdserve.protocol.constants import TransmissionFlags
from nbdserve.protocol.handshake import HandshakeState
from nbdserve.protocol.handshake_client import ClientHandshake
from nbdserve.protocol.handshake_server import TlsMode
from nbdserve.protocol.messages import Agreement, Listing
from tests.protocol.pair import EXPORTS, FLAGS, ConnectionPair, server

STEPS = pytest.mark.parametrize("step", [1, 7, 0], ids=["bytewise", "sevens", "at once"])


def shaken(client: ClientHandshake, tls: TlsMode = TlsMode.OFF, step: int = 0) -> ConnectionPair:
    pair = ConnectionPair(client, server(tls), step)
    pair.run()
    return pair


def transmits(pair: ConnectionPair) -> bool:
    return pair.client.state is pair.server.state is HandshakeState.TRANSMISSION


@STEPS
@pytest.mark.parametrize("name", EXPORTS)
@pytest.mark.parametrize("structured", [True, False])
def test_both_roles_come_to_the_same_agreement(name: str, structured: bool, step: int) -> None:
    pair = shaken(ClientHandshake(name, structured=structured), step=step)
    assert transmits(pair)
    agreed = pair.server.agreement
    flags = FLAGS | EXPORTS[name].flags | TransmissionFlags.HAS_FLAGS
    if not structured:
        flags &= ~TransmissionFlags.SEND_DF
    offered = structured and "base:allocation" in EXPORTS[name].contexts
    assert agreed == Agreement(
        replace(EXPORTS[name], flags=flags), structured, {1: "base:allocation"} if offered else {}, tls=False
    )
    # What a client may select it learns by selecting it.
    assert replace(pair.client.agreement, export=replace(pair.client.agreement.export, contexts=())) == replace(
        agreed, export=replace(agreed.export, contexts=())
    )


@STEPS
@pytest.mark.parametrize("mode", [TlsMode.ON, TlsMode.REQUIRE])
def test_tls(mode: TlsMode, step: int) -> None:
    pair = shaken(ClientHandshake("größe", tls=True), mode, step)
    assert transmits(pair)
    assert pair.client.agreement.tls
    assert pair.server.agreement.tls
    assert "größe".encode() in pair.encrypted


def test_plaintext_where_tls_is_offered() -> None:
    pair = shaken(ClientHandshake(), TlsMode.ON)
    assert transmits(pair)
    assert not pair.server.agreement.tls


def test_tls_is_never_given_up() -> None:
    client = ClientHandshake(tls=True)
    with pytest.raises(ProtocolError, match=r"refuses STARTTLS.*not configured for TLS"):
        shaken(client, TlsMode.OFF)
    assert client.state is HandshakeState.CLOSED
    assert client.data_to_send().endswith(b"IHAVEOPT\0\0\0\2\0\0\0\0"), "the session is aborted politely"


def test_tls_required_of_a_client_without() -> None:
    with pytest.raises(ProtocolError, match="requires TLS"):
        shaken(ClientHandshake(), TlsMode.REQUIRE)


@STEPS
def test_listing(step: int) -> None:
    pair = shaken(ClientHandshake(list_only=True), step=step)
    assert pair.client.listed == tuple(Listing(name, EXPORTS[name].description) for name in EXPORTS)
    assert pair.client.state is pair.server.state is HandshakeState.CLOSED


def test_info_only() -> None:
    pair = shaken(ClientHandshake("sectors", info_only=True))
    assert pair.client.agreement.export.minimum_block == 512
    assert pair.client.agreement.contexts == {1: "base:allocation"}
    assert pair.client.state is pair.server.state is HandshakeState.CLOSED


def test_unknown_export() -> None:
    with pytest.raises(ProtocolError, match='refuses export "nosuch": it has no such export; it says: there is no'):
        shaken(ClientHandshake("nosuch"))


def test_several_contexts() -> None:
    wanted = ("x-test:two", "base:allocation", "x-other:thing", "base:")
    pair = shaken(ClientHandshake("many", contexts=wanted))
    assert set(pair.server.agreement.contexts.values()) == {"x-test:two", "base:allocation"}
    assert pair.client.agreement.contexts == pair.server.agreement.contexts


def test_shutting_down() -> None:
    pair = ConnectionPair(ClientHandshake(), server())
    pair.server.shutting_down = True
    with pytest.raises(ProtocolError, match="shutting down"):
        pair.run()
    pair.run()
    assert pair.server.state is HandshakeState.CLOSED, "the client's ABORT was served"


@pytest.mark.parametrize("zeroes", [True, False])
def test_falls_back_to_export_name(zeroes: bool) -> None:
    """A server that knows neither GO nor structured replies, made of ours by taking its options away."""
    client, old = ClientHandshake("größe"), server()
    old._handlers.clear()
    pair = ConnectionPair(client, old)
    if zeroes:
        greeting = bytearray(old.data_to_send())
        greeting[-1] &= ~2
        client.receive(bytes(greeting))
    pair.run()
    assert transmits(pair)
    ours, theirs = client.agreement, pair.server.agreement
    assert (ours.export.size, ours.export.flags) == (12345, theirs.export.flags)
    assert not ours.structured
    assert not theirs.structured
    assert client.trailing_data() == b"", "the zeroes were consumed"


def test_what_follows_the_handshake_is_kept() -> None:
    pair = shaken(ClientHandshake())
    pair.server.receive(b"first")
    pair.server.receive(b" request")
    assert pair.server.trailing_data() == b"first request"
    assert pair.server.trailing_data() == b""


def test_no_agreement_before_its_time() -> None:
    with pytest.raises(RuntimeError):
        _ = server().agreement
    with pytest.raises(RuntimeError):
        server().tls_established()
