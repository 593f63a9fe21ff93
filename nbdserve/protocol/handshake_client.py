"""The client's side of the handshake (specification, sections "Newstyle negotiation", "TLS support", "Option types").

The order is: STARTTLS if wanted, then LIST (and an end), or STRUCTURED_REPLY, SET_META_CONTEXT and GO. A server that
does not know GO is asked by EXPORT_NAME; one that does not know structured replies is taken without them.

Invariants
----------
- A client that asked for TLS gets TLS or an error; it never goes on in plaintext (CVE-2019-14842), and nothing that
  was received before TLS is believed after it.
- Every length that the server names is bounded before it is read, and so is the sum of its answers to one option.
- When the server refuses, ABORT is queued before ProtocolError is raised, so that the connection ends politely if
  the owner still sends data_to_send().
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from struct import Struct
from typing import Final, TypeVar

from nbdserve.errors import ProtocolError
from nbdserve.protocol.constants import (
    EXPORT_NAME_ZEROES,
    INIT_MAGIC,
    OLDSTYLE_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    REPLY_ERROR_BIT,
    ClientFlags,
    HandshakeFlags,
    Info,
    Option,
    OptionReply,
    TransmissionFlags,
)
from nbdserve.protocol.handshake import (
    BLOCK_SIZES,
    EXPORT_SUMMARY,
    MAXIMUM_STEP,
    OPTION_HEADER,
    REPLY_HEADER,
    U16,
    U32,
    Handshake,
    HandshakeState,
    Steps,
)
from nbdserve.protocol.messages import Agreement, ExportInfo, Listing
from nbdserve.protocol.strings import decode, encode, quoted, readable

_MAXIMUM_ANSWER: Final = 4 << 20  # bytes of all replies to one option; a list of some forty thousand exports
_MAXIMUM_SIZE: Final = (1 << 63) - 1  # bytes of an export; what an offset of this host can address

_U64: Final = Struct(">Q")

_MEANINGS: Final[dict[int, str]] = {
    OptionReply.ERR_UNSUP: "it does not support this",
    OptionReply.ERR_POLICY: "its policy forbids this",
    OptionReply.ERR_INVALID: "it calls the request invalid",
    OptionReply.ERR_PLATFORM: "its platform does not support this",
    OptionReply.ERR_TLS_REQD: "it requires TLS",
    OptionReply.ERR_UNKNOWN: "it has no such export",
    OptionReply.ERR_SHUTDOWN: "it is shutting down",
    OptionReply.ERR_BLOCK_SIZE_REQD: "it insists on its block sizes",
    OptionReply.ERR_TOO_BIG: "the request or its answer is too big",
    OptionReply.ERR_EXT_HEADER_REQD: "it requires extended headers",
}


@dataclass(frozen=True, slots=True)
class _Answer:
    """All replies to one option: those before the final one as (type, data), then the final one."""

    parts: list[tuple[int, bytes]]
    final: int
    text: str  # the server's words, if the final reply is an error

    @property
    def refused(self) -> bool:
        return self.final != OptionReply.ACK


_Result = TypeVar("_Result")
_Reading = Generator[int, bytes, _Result]  # steps that come to a result


class ClientHandshake(Handshake):
    """Negotiates with one server.

    Args:
        export_name: what to ask for; "" is the server's default export.
        tls: insist on TLS.
        structured: ask for structured replies.
        contexts: metadata contexts to select, if structured replies are agreed.
        info_only: learn about the export (`agreement`), then end the session.
        list_only: learn the names of all exports (`listed`), then end the session.

    Raises:
        ValueError: the wire has no such export name.
    """

    def __init__(
        self,
        export_name: str = "",
        *,
        tls: bool = False,
        structured: bool = True,
        contexts: Iterable[str] = ("base:allocation",),
        info_only: bool = False,
        list_only: bool = False,
    ) -> None:
        self.listed: tuple[Listing, ...] = ()
        self._name = export_name
        self._encoded_name = encode(export_name)
        self._tls_wanted = tls
        self._structured_wanted = structured
        self._contexts_wanted = tuple(encode(context) for context in contexts)
        self._info_only = info_only
        self._list_only = list_only
        self._zeroes = EXPORT_NAME_ZEROES
        self._waiting_for = "its greeting"
        super().__init__()

    def connection_lost(self) -> None:
        """The server has hung up.

        Raises:
            ProtocolError: it did so before the handshake was over; says during which step.
        """
        if self.state in (HandshakeState.NEGOTIATING, HandshakeState.STARTING_TLS):
            self._close()
            raise ProtocolError(f"the server hung up while the client waited for {self._waiting_for}")

    # The order of things

    def _negotiate(self) -> Steps:
        offered = yield from self._greeting()
        taken = ClientFlags(offered & (ClientFlags.FIXED_NEWSTYLE | ClientFlags.NO_ZEROES))
        self._output += U32.pack(taken)
        self._zeroes = 0 if taken & ClientFlags.NO_ZEROES else EXPORT_NAME_ZEROES
        if not taken & ClientFlags.FIXED_NEWSTYLE:
            if self._tls_wanted or self._list_only or self._info_only:
                raise ProtocolError("the server lacks the fixed newstyle handshake; it knows no TLS and no questions")
            yield from self._choose(structured=False, contexts={}, by_name=True)
            return
        if self._tls_wanted:
            yield from self._starttls()
        if self._list_only:
            yield from self._list()
            self._abort()
            return
        structured = self._structured_wanted and (yield from self._structured_reply())
        contexts = (yield from self._set_meta_context()) if structured and self._contexts_wanted else {}
        yield from self._choose(structured, contexts)

    def _greeting(self) -> _Reading[HandshakeFlags]:
        (magic,) = _U64.unpack((yield _U64.size))
        if magic != INIT_MAGIC:
            raise ProtocolError("the other side is no NBD server: its greeting does not begin with NBDMAGIC")
        (magic,) = _U64.unpack((yield _U64.size))
        if magic == OLDSTYLE_MAGIC:
            raise ProtocolError("the server speaks the oldstyle handshake (before nbd 2.9.17), which is not supported")
        if magic != OPTION_MAGIC:
            raise ProtocolError(f"the server's greeting goes on with {magic:#018x} instead of IHAVEOPT")
        (flags,) = U16.unpack((yield U16.size))
        return HandshakeFlags(flags)

    def _starttls(self) -> Steps:
        answer = yield from self._ask(Option.STARTTLS)
        if answer.refused:
            raise self._refusal(answer, "STARTTLS, and TLS was asked for")
        self._expect_silence()
        self._waiting_for = "the end of the TLS handshake"
        yield from self._start_tls()

    def _list(self) -> Steps:
        answer = yield from self._ask(Option.LIST)
        if answer.refused:
            raise self._refusal(answer, "to list its exports")
        self.listed = tuple(_listing(body) for body in _bodies(answer, OptionReply.SERVER))

    def _structured_reply(self) -> _Reading[bool]:
        answer = yield from self._ask(Option.STRUCTURED_REPLY)
        return not answer.refused

    def _set_meta_context(self) -> _Reading[dict[int, str]]:
        """The contexts that the server selected; none if it would not (GO then says what is wrong, if anything)."""
        queries = b"".join(U32.pack(len(query)) + query for query in self._contexts_wanted)
        name = self._encoded_name
        data = U32.pack(len(name)) + name + U32.pack(len(self._contexts_wanted)) + queries
        answer = yield from self._ask(Option.SET_META_CONTEXT, data)
        contexts: dict[int, str] = {}
        for body in () if answer.refused else _bodies(answer, OptionReply.META_CONTEXT):
            number, context = _numbered(body)
            if number in contexts:
                raise ProtocolError(f"the server gave two metadata contexts the number {number}")
            contexts[number] = context
        return contexts

    def _choose(self, structured: bool, contexts: dict[int, str], by_name: bool = False) -> Steps:
        """Come to the agreement: by INFO or GO, or by EXPORT_NAME with a server that does not know GO."""
        export = None if by_name else (yield from self._go())
        if export is None:
            export = yield from self._export_name()
        agreement = Agreement(export, structured, contexts, self._tls_active)
        if self._info_only:
            self._agreement = agreement
            self._abort()
        else:
            self._enter_transmission(agreement)

    def _go(self) -> _Reading[ExportInfo | None]:
        """The export's description, or None if the server is too old for GO."""
        wanted = (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)
        name = self._encoded_name
        data = U32.pack(len(name)) + name + U16.pack(len(wanted)) + b"".join(map(U16.pack, wanted))
        answer = yield from self._ask(Option.INFO if self._info_only else Option.GO, data)
        if answer.final == OptionReply.ERR_UNSUP and not self._info_only:
            return None
        if answer.refused:
            raise self._refusal(answer, f"export {quoted(self._name)}")
        return _described(self._name, _bodies(answer, OptionReply.INFO))

    def _export_name(self) -> _Reading[ExportInfo]:
        name = self._encoded_name
        self._output += OPTION_HEADER.pack(OPTION_MAGIC, Option.EXPORT_NAME, len(name)) + name
        self._waiting_for = f"export {quoted(self._name)} (so it probably has none of that name)"
        summary = yield EXPORT_SUMMARY.size
        yield self._zeroes
        return _summarized(self._name, summary)

    # One option and its answers

    def _ask(self, option: Option, data: bytes = b"") -> _Reading[_Answer]:
        """Send an option and collect the replies to it. The refusals that end every session are raised at once."""
        self._output += OPTION_HEADER.pack(OPTION_MAGIC, option, len(data)) + data
        self._waiting_for = f"an answer to {option.name}"
        parts: list[tuple[int, bytes]] = []
        size = 0
        while True:
            magic, answered, reply, length = REPLY_HEADER.unpack((yield REPLY_HEADER.size))
            if magic != OPTION_REPLY_MAGIC:
                raise ProtocolError(f"the server's answer to {option.name} begins with the wrong number {magic:#018x}")
            if answered != option:
                raise ProtocolError(f"the server answers option {answered} where {option.name} was asked")
            size += REPLY_HEADER.size + length
            if length > MAXIMUM_STEP or size > _MAXIMUM_ANSWER:
                raise ProtocolError(f"the server's answer to {option.name} is too long ({size} bytes)")
            body = yield length
            if reply != OptionReply.ACK and not reply & REPLY_ERROR_BIT:
                parts.append((reply, body))
                continue
            answer = _Answer(parts, reply, readable(body))
            if reply in (OptionReply.ERR_TLS_REQD, OptionReply.ERR_SHUTDOWN):
                raise self._refusal(answer, option.name)
            return answer

    def _refusal(self, answer: _Answer, what: str) -> ProtocolError:
        """The error to raise for a refused option; the session ends with a soft disconnect."""
        self._abort()
        meaning = _MEANINGS.get(answer.final, f"error {answer.final:#x}")
        words = f"; it says: {answer.text}" if answer.text else ""
        return ProtocolError(f"the server refuses {what}: {meaning}{words}")

    def _abort(self) -> None:
        self._output += OPTION_HEADER.pack(OPTION_MAGIC, Option.ABORT, 0)
        self._close()


# What the bodies of replies mean; everything from the server is checked here


def _bodies(answer: _Answer, expected: OptionReply) -> list[bytes]:
    for reply, _ in answer.parts:
        if reply != expected:
            raise ProtocolError(f"the server sent a reply of type {reply} where {expected.name} belongs")
    return [body for _, body in answer.parts]


def _string(data: bytes, what: str) -> str:
    try:
        return decode(data)
    except ValueError as error:
        raise ProtocolError(f"the {what} that the server sent {error}") from error


def _numbered(body: bytes) -> tuple[int, str]:
    if len(body) < U32.size:
        raise ProtocolError(f"the server described a metadata context in {len(body)} bytes")
    (number,) = U32.unpack_from(body)
    return number, _string(body[U32.size :], "metadata context")


def _listing(body: bytes) -> Listing:
    if len(body) < U32.size:
        raise ProtocolError(f"the server listed an export in {len(body)} bytes")
    (length,) = U32.unpack_from(body)
    name, description = body[U32.size : U32.size + length], body[U32.size + length :]
    if len(name) != length:
        raise ProtocolError(f"the server listed a name of {length} bytes in {len(body)} bytes")
    return Listing(_string(name, "export name"), readable(description))


def _summarized(name: str, summary: bytes) -> ExportInfo:
    size, flags = EXPORT_SUMMARY.unpack(summary)
    if size > _MAXIMUM_SIZE:
        raise ProtocolError(f"the server claims an export of {size} bytes, more than 2^63-1")
    if not flags & TransmissionFlags.HAS_FLAGS:
        raise ProtocolError(f"the server sent transmission flags {flags:#06x}, which lack the bit that is always set")
    return ExportInfo(name, size, TransmissionFlags(flags))


def _described(name: str, infos: Iterable[bytes]) -> ExportInfo:
    """An export from the INFO replies about it; kinds that nobody knows are ignored, the last of a kind counts."""
    bodies: dict[int, bytes] = {}
    for info in infos:
        if len(info) < U16.size:
            raise ProtocolError("the server sent an information reply without a type")
        bodies[U16.unpack_from(info)[0]] = info[U16.size :]
    summary, sizes = bodies.get(Info.EXPORT, b""), bodies.get(Info.BLOCK_SIZE)
    if len(summary) != EXPORT_SUMMARY.size:
        raise ProtocolError("the server did not tell the size of the export")
    if Info.NAME in bodies:
        name = _string(bodies[Info.NAME], "export name")
    export = replace(_summarized(name, summary), description=readable(bodies.get(Info.DESCRIPTION, b"")))
    return export if sizes is None else _with_block_sizes(export, sizes)


def _with_block_sizes(export: ExportInfo, data: bytes) -> ExportInfo:
    if len(data) != BLOCK_SIZES.size:
        raise ProtocolError(f"the server sent block sizes in {len(data)} bytes instead of {BLOCK_SIZES.size}")
    minimum, preferred, maximum = BLOCK_SIZES.unpack(data)
    powers = all(size and not size & (size - 1) for size in (minimum, preferred))
    if not powers or minimum > 1 << 16 or not minimum <= preferred <= maximum:
        raise ProtocolError(f"the server sent impossible block sizes {minimum}, {preferred}, {maximum}")
    return replace(export, minimum_block=minimum, preferred_block=preferred, maximum_block=maximum)
