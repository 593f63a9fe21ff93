"""A client handshake and a server handshake that talk to each other, and raw options to talk to one alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from struct import pack, unpack_from

from nbdserve.protocol.constants import TransmissionFlags
from nbdserve.protocol.handshake import HandshakeState
from nbdserve.protocol.handshake_client import ClientHandshake
from nbdserve.protocol.handshake_server import ServerHandshake, TlsMode
from nbdserve.protocol.messages import ExportInfo

FLAGS = TransmissionFlags.SEND_FLUSH | TransmissionFlags.SEND_DF | TransmissionFlags.SEND_TRIM
EXPORTS = {
    "": ExportInfo("", 1 << 30, FLAGS, "the default"),
    "größe": ExportInfo("größe", 12345, FLAGS | TransmissionFlags.READ_ONLY, contexts=()),
    "sectors": ExportInfo("sectors", 1 << 20, FLAGS, minimum_block=512, preferred_block=65536, maximum_block=1 << 20),
    "many": ExportInfo("many", 1 << 62, FLAGS, contexts=("base:allocation", "x-test:one", "x-test:two")),
}


def server(tls: TlsMode = TlsMode.OFF) -> ServerHandshake:
    """A server of EXPORTS."""
    return ServerHandshake(EXPORTS.get, EXPORTS.values, tls)


@dataclass
class ConnectionPair:
    """Carries bytes between the two until neither has anything to say, in pieces of `step` bytes (0: all at once).

    TLS is simulated: once both want it, both are told that it stands; `encrypted` keeps what was said after that.
    """

    client: ClientHandshake
    server: ServerHandshake
    step: int = 0
    encrypted: bytearray = field(default_factory=bytearray)
    tls: bool = False

    def run(self) -> None:
        while True:
            from_server = self.server.data_to_send()
            feed(self.client, from_server, self.step)
            from_client = self.client.data_to_send()
            if self.tls:
                self.encrypted += from_client + from_server
            feed(self.server, from_client, self.step)
            starting = {self.client.state, self.server.state} == {HandshakeState.STARTING_TLS}
            if starting:
                self.client.tls_established()
                self.server.tls_established()
                self.tls = True
            elif not from_client and not from_server:
                return


def feed(role: ClientHandshake | ServerHandshake, data: bytes, step: int = 0) -> None:
    """Give bytes to a role in pieces."""
    for start in range(0, len(data), step or max(len(data), 1)):
        role.receive(data[start : start + (step or len(data))])


def option(number: int, data: bytes = b"", length: int | None = None) -> bytes:
    """An option as a client sends it; `length` may lie."""
    return pack(">8sII", b"IHAVEOPT", number, len(data) if length is None else length) + data


def string(text: bytes | str) -> bytes:
    """A string behind its length."""
    data = text.encode() if isinstance(text, str) else text
    return pack(">I", len(data)) + data


def name_and_infos(name: bytes | str, *infos: int) -> bytes:
    """The data of INFO and GO."""
    return string(name) + pack(f">H{len(infos)}H", len(infos), *infos)


def name_and_queries(name: bytes | str, *queries: bytes | str) -> bytes:
    """The data of the metadata context options."""
    return string(name) + pack(">I", len(queries)) + b"".join(map(string, queries))


def reply(number: int, kind: int, data: bytes = b"") -> bytes:
    """An option reply as a server sends it."""
    return pack(">QIII", 0x3E889045565A9, number, kind, len(data)) + data


def replies(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """What a server sent, as (option, reply type, data)."""
    position = 0
    while position < len(data):
        magic, number, kind, length = unpack_from(">QIII", data, position)
        assert magic == 0x3E889045565A9
        position += 20 + length
        assert position <= len(data), "the last reply is cut off"
        yield number, kind, data[position - length : position]
