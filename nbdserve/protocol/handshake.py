"""The handshake without I/O: what both roles share.

Theory of operation
-------------------
A handshake is an object between the socket and the decision: bytes from the peer go in through `receive`, bytes for
the peer come out of `data_to_send`, and `state` says what the owner of the socket has to do next. Nothing here
blocks, waits or reads a clock.

    NEGOTIATING    send what data_to_send() holds, then receive more
    STARTING_TLS   send what data_to_send() holds (it ends with the last plaintext byte), do the TLS handshake on the
                   socket, call tls_established(); from then on receive() gets decrypted bytes
    TRANSMISSION   send what data_to_send() holds; `agreement` says what was settled, trailing_data() is the beginning
                   of the transmission phase
    CLOSED         send what data_to_send() holds, then close

A role is one generator, `_negotiate`, that reads like the specification: `data = yield 16` means "the next sixteen
bytes". The generator is resumed when that many bytes are there, so it does not matter how the peer's bytes were cut
into pieces. No step asks for more than 128 KiB; that bounds the memory of a connection, whatever its peer claims.

Invariants
----------
No byte received in plaintext is ever interpreted after TLS was agreed (the injection class of CVE-2021-3716):
whatever lies in the buffer at that moment can only have been sent too early, and ends the connection.
After a ProtocolError the state is CLOSED, and whatever is received later is ignored.
"""

from __future__ import annotations

from collections.abc import Generator
from enum import Enum
from struct import Struct
from typing import Final

from nbdserve.errors import ProtocolError
from nbdserve.protocol.messages import Agreement

Steps = Generator[int, bytes, None]
"""A part of a negotiation: yields how many bytes it needs next, is sent exactly those."""

MAXIMUM_STEP: Final = 128 << 10
"""Bytes; the most that a negotiation asks for, and therefore holds, at once."""

GREETING: Final = Struct(">QQH")  # magic, option magic, handshake flags
OPTION_HEADER: Final = Struct(">QII")  # magic, option, length
REPLY_HEADER: Final = Struct(">QIII")  # magic, option, reply type, length
EXPORT_SUMMARY: Final = Struct(">QH")  # size, transmission flags
BLOCK_SIZES: Final = Struct(">III")  # minimum, preferred, maximum payload
U16: Final = Struct(">H")
U32: Final = Struct(">I")


class HandshakeState(Enum):
    """What the owner of the connection has to do next; see the theory of operation."""

    NEGOTIATING = "negotiating"
    STARTING_TLS = "starting TLS"
    TRANSMISSION = "transmission"
    CLOSED = "closed"


class Handshake:
    """The machinery of either role. Subclasses supply `_negotiate`."""

    def __init__(self) -> None:
        self.state = HandshakeState.NEGOTIATING
        self._agreement: Agreement | None = None
        self._tls_active = False
        self._input = bytearray()
        self._output = bytearray()
        self._steps = self._negotiate()
        self._needed = next(self._steps)

    def receive(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes from the peer, in pieces of any size.

        Raises:
            ProtocolError: the peer broke the protocol, or the two cannot agree. Send what data_to_send() still
                holds, then close the connection.
        """
        if self.state is HandshakeState.CLOSED:
            return
        if self.state is HandshakeState.STARTING_TLS and data:
            self._close()
            raise ProtocolError("plaintext arrived where the TLS handshake should have begun")
        self._input += data
        self._advance()

    def data_to_send(self) -> bytes:
        """What the peer must get now; each byte is handed out once."""
        data = bytes(self._output)
        self._output.clear()
        return data

    def tls_established(self) -> None:
        """Go on after STARTING_TLS, now that the connection is encrypted."""
        if self.state is not HandshakeState.STARTING_TLS or self._output:
            raise RuntimeError("TLS may begin only in STARTING_TLS, and after data_to_send() was sent")
        self._tls_active = True
        self.state = HandshakeState.NEGOTIATING
        self._advance()

    @property
    def agreement(self) -> Agreement:
        """What was settled; there from TRANSMISSION on (for a client that only asks, once it is CLOSED)."""
        if self._agreement is None:
            raise RuntimeError("the handshake has not come to an agreement")
        return self._agreement

    def trailing_data(self) -> bytes:
        """The bytes received behind the handshake's last one, once; they belong to the transmission phase."""
        data = bytes(self._input)
        self._input.clear()
        return data

    def _negotiate(self) -> Steps:
        raise NotImplementedError

    def _advance(self) -> None:
        """Run the negotiation as far as the bytes at hand reach."""
        try:
            while self.state is HandshakeState.NEGOTIATING and len(self._input) >= self._needed:
                data = bytes(self._input[: self._needed])
                del self._input[: self._needed]
                self._needed = self._steps.send(data)
        except StopIteration:
            assert self.state in (HandshakeState.TRANSMISSION, HandshakeState.CLOSED)
        except ProtocolError:
            self._close()
            raise

    def _expect_silence(self) -> None:
        """Make sure that nothing waits in the buffer where the peer must have waited for an answer."""
        if self._input:
            raise ProtocolError("data was sent behind STARTTLS, before TLS began; it may have been injected")

    def _start_tls(self) -> Steps:
        """Wait until the connection is encrypted."""
        self.state = HandshakeState.STARTING_TLS
        yield 0

    def _enter_transmission(self, agreement: Agreement) -> None:
        self._agreement = agreement
        self.state = HandshakeState.TRANSMISSION

    def _close(self) -> None:
        self.state = HandshakeState.CLOSED
        self._input.clear()
