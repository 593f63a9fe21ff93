"""The server's side of the handshake (specification, sections "Newstyle negotiation", "TLS support", "Option types").

Only fixed newstyle is spoken. Every option is answered exactly once, after exactly the bytes that it announced:
an option that is refused is drained in small steps and never stored, whatever length it claims (up to 32 bits).

Invariants
----------
- Metadata contexts belong to the export name they were selected for. Every SET_META_CONTEXT forgets the previous
  selection, also when it fails; so does STARTTLS; and GO or EXPORT_NAME with another name gets none.
- Before TLS, a server that requires it does nothing but STARTTLS and ABORT, and looks up no name.
- A client cannot make the server work or grow without end: options are counted, and one that sends more of them
  without reading the answers is cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from enum import Enum
from typing import Final, TypeVar

from nbdserve.errors import ProtocolError, RequestError
from nbdserve.protocol.constants import (
    EXPORT_NAME_ZEROES,
    INIT_MAGIC,
    MAXIMUM_STRING,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
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
    GREETING,
    MAXIMUM_STEP,
    OPTION_HEADER,
    REPLY_HEADER,
    U16,
    U32,
    Handshake,
    HandshakeState,
    Steps,
)
from nbdserve.protocol.messages import Agreement, ExportInfo
from nbdserve.protocol.strings import decode, encode, message, quoted

MAXIMUM_OPTIONS: Final = 1000
"""How many options one connection may send before it must have decided."""

# An int, because the complement of an IntFlag lacks the bits that have no name.
_KNOWN_CLIENT_FLAGS: Final = int(ClientFlags.FIXED_NEWSTYLE | ClientFlags.NO_ZEROES)

_MAXIMUM_UNREAD: Final = 1 << 20  # bytes of answers that may wait while the client already sends its next option

_Result = TypeVar("_Result")
_Reading = Generator[int, bytes, _Result]  # steps that come to a result


class TlsMode(Enum):
    """When the server encrypts (specification, section "Server-side requirements")."""

    OFF = "off"
    ON = "on"
    REQUIRE = "require"


class _Refused(Exception):
    """The current option gets an error reply instead of an ACK."""

    def __init__(self, reply: OptionReply, text: str) -> None:
        super().__init__(text)
        self.reply = reply


class ServerHandshake(Handshake):
    """Negotiates with one client.

    Args:
        find: the export with a name, or None. May raise RequestError when there is such an export but it cannot be
            served; the error's text is shown to the client.
        exports: what LIST shows.
        tls: whether TLS is offered.

    `shutting_down` may be set at any time; options are then answered with ERR_SHUTDOWN.
    """

    def __init__(
        self,
        find: Callable[[str], ExportInfo | None],
        exports: Callable[[], Iterable[ExportInfo]],
        tls: TlsMode = TlsMode.OFF,
    ) -> None:
        self.shutting_down = False
        self._find = find
        self._exports = exports
        self._tls = tls
        self._handlers: dict[int, Callable[[], Steps]] = {
            Option.ABORT: self._abort,
            Option.LIST: self._list,
            Option.STARTTLS: self._starttls,
            Option.INFO: self._info,
            Option.GO: self._go,
            Option.STRUCTURED_REPLY: self._structured_reply,
            Option.LIST_META_CONTEXT: self._list_meta_context,
            Option.SET_META_CONTEXT: self._set_meta_context,
        }
        self._option = 0
        self._unread = 0  # bytes of the current option's data that have not arrived
        self._no_zeroes = False
        self._forget()
        super().__init__()

    def _forget(self) -> None:
        """Drop what options have settled so far."""
        self._structured = False
        self._contexts: dict[int, str] = {}
        self._contexts_for = ""

    # The frame: greeting, then options

    def _negotiate(self) -> Steps:
        offered = HandshakeFlags.FIXED_NEWSTYLE | HandshakeFlags.NO_ZEROES
        self._output += GREETING.pack(INIT_MAGIC, OPTION_MAGIC, offered)
        (flags,) = U32.unpack((yield U32.size))
        if flags & ~_KNOWN_CLIENT_FLAGS:
            raise ProtocolError(f"the client set flags that were not offered ({flags:#x})")
        self._no_zeroes = bool(flags & ClientFlags.NO_ZEROES)
        fixed = bool(flags & ClientFlags.FIXED_NEWSTYLE)
        for _ in range(MAXIMUM_OPTIONS):
            magic, self._option, self._unread = OPTION_HEADER.unpack((yield OPTION_HEADER.size))
            if magic != OPTION_MAGIC:
                raise ProtocolError(f"an option begins with {magic:#018x} instead of IHAVEOPT")
            if len(self._output) > _MAXIMUM_UNREAD:
                raise ProtocolError("the client sends options without reading the answers")
            if self._option == Option.EXPORT_NAME:
                yield from self._export_name()
            elif fixed:
                yield from self._answer()
            else:
                raise ProtocolError(f"option {self._option} from a client that did not agree to fixed newstyle")
            if self.state is not HandshakeState.NEGOTIATING:
                return
        raise ProtocolError(f"no decision after {MAXIMUM_OPTIONS} options")

    def _answer(self) -> Steps:
        """Serve one option, or drain it and say why not."""
        if self._option == Option.SET_META_CONTEXT:
            self._contexts = {}
        try:
            yield from self._admitted()()
        except _Refused as refused:
            yield from self._drain()
            self._reply(refused.reply, message(str(refused)))

    def _admitted(self) -> Callable[[], Steps]:
        """The handler of the current option, if it may run now."""
        if self._option != Option.ABORT:
            if self.shutting_down:
                raise _Refused(OptionReply.ERR_SHUTDOWN, "the server is shutting down")
            if self._lacks_tls and self._option != Option.STARTTLS:
                raise _Refused(OptionReply.ERR_TLS_REQD, "this server requires TLS; begin with STARTTLS")
        handler = self._handlers.get(self._option)
        if handler is None:
            raise _Refused(OptionReply.ERR_UNSUP, f"option {self._option} is not supported")
        return handler

    @property
    def _lacks_tls(self) -> bool:
        return self._tls is TlsMode.REQUIRE and not self._tls_active

    def _reply(self, reply: OptionReply, data: bytes = b"") -> None:
        self._output += REPLY_HEADER.pack(OPTION_REPLY_MAGIC, self._option, reply, len(data)) + data

    # The data of an option, read piece by piece; what is refused midway is drained by _answer

    def _take(self, count: int) -> _Reading[bytes]:
        if count > self._unread:
            raise _Refused(OptionReply.ERR_INVALID, "the option's data ends too early")
        self._unread -= count
        return (yield count)

    def _take_string(self, what: str) -> _Reading[str]:
        """A string behind its 32-bit length, which is judged before the string is read."""
        (length,) = U32.unpack((yield from self._take(U32.size)))
        if length > MAXIMUM_STRING:
            raise _Refused(OptionReply.ERR_TOO_BIG, f"{what} of {length} bytes, at most {MAXIMUM_STRING} are allowed")
        return _decoded((yield from self._take(length)), what)

    def _take_end(self) -> None:
        if self._unread:
            raise _Refused(OptionReply.ERR_INVALID, f"{self._unread} bytes more than this option has")

    def _drain(self) -> Steps:
        while self._unread:
            step = min(self._unread, MAXIMUM_STEP)
            self._unread -= step
            yield step

    # Options without data

    def _abort(self) -> Steps:
        yield from self._drain()
        self._reply(OptionReply.ACK)
        self._close()

    def _list(self) -> Steps:
        self._take_end()
        for export in self._exports():
            try:
                name = encode(export.name)
            except ValueError:
                continue  # no client could ask for it either
            self._reply(OptionReply.SERVER, U32.pack(len(name)) + name + message(export.description))
        self._reply(OptionReply.ACK)
        yield from ()

    def _starttls(self) -> Steps:
        self._take_end()
        if self._tls_active:
            raise _Refused(OptionReply.ERR_INVALID, "TLS is already in use")
        if self._tls is TlsMode.OFF:
            raise _Refused(OptionReply.ERR_POLICY, "this server is not configured for TLS")
        self._expect_silence()
        self._forget()
        self._reply(OptionReply.ACK)
        yield from self._start_tls()

    def _structured_reply(self) -> Steps:
        self._take_end()
        self._structured = True
        self._reply(OptionReply.ACK)
        yield from ()

    # Choosing an export

    def _export_name(self) -> Steps:
        """EXPORT_NAME has no error reply: what cannot be served ends the connection."""
        if self._lacks_tls:
            raise ProtocolError("the client chose an export without TLS, which this server requires")
        if self.shutting_down:
            raise ProtocolError("the client chose an export while the server is shutting down")
        if self._unread > MAXIMUM_STRING:
            raise ProtocolError(f"export name of {self._unread} bytes, at most {MAXIMUM_STRING} are allowed")
        try:
            name = _decoded((yield from self._take(self._unread)), "export name")
            export = self._lookup(name)
        except _Refused as refused:
            raise ProtocolError(f"cannot serve EXPORT_NAME: {refused}") from refused
        if not export.has_default_sizes:
            raise ProtocolError(f"the client chose {quoted(name)} without asking for its block sizes")
        self._output += EXPORT_SUMMARY.pack(export.size, export.flags)
        if not self._no_zeroes:
            self._output += bytes(EXPORT_NAME_ZEROES)
        self._agree(name, export)

    def _info(self) -> Steps:
        yield from self._describe()
        self._reply(OptionReply.ACK)

    def _go(self) -> Steps:
        name, export = yield from self._describe()
        self._reply(OptionReply.ACK)
        self._agree(name, export)

    def _describe(self) -> _Reading[tuple[str, ExportInfo]]:
        """Read the data that INFO and GO share, and send all that was asked for but the final ACK."""
        name = yield from self._take_string("export name")
        (count,) = U16.unpack((yield from self._take(U16.size)))
        wanted = {kind for (kind,) in U16.iter_unpack((yield from self._take(count * U16.size)))}
        self._take_end()
        export = self._lookup(name)
        self._reply_info(Info.EXPORT, EXPORT_SUMMARY.pack(export.size, export.flags))
        if Info.NAME in wanted:
            self._reply_info(Info.NAME, encode(export.name))
        if Info.DESCRIPTION in wanted and export.description:
            self._reply_info(Info.DESCRIPTION, message(export.description))
        if Info.BLOCK_SIZE in wanted or not export.has_default_sizes:
            sizes = BLOCK_SIZES.pack(export.minimum_block, export.preferred_block, export.maximum_block)
            self._reply_info(Info.BLOCK_SIZE, sizes)
        if Info.BLOCK_SIZE not in wanted and not export.has_default_sizes:
            raise _Refused(OptionReply.ERR_BLOCK_SIZE_REQD, "this export needs a client that honours its block sizes")
        return name, export

    def _reply_info(self, kind: Info, data: bytes) -> None:
        self._reply(OptionReply.INFO, U16.pack(kind) + data)

    def _lookup(self, name: str) -> ExportInfo:
        """The export with a name, with the flags that this client gets to see."""
        try:
            export = self._find(name)
        except RequestError as error:
            raise _Refused(OptionReply.ERR_UNKNOWN, f"export {quoted(name)} is not available: {error}") from error
        if export is None:
            raise _Refused(OptionReply.ERR_UNKNOWN, f"there is no export {quoted(name)}")
        flags = export.flags | TransmissionFlags.HAS_FLAGS
        if not self._structured:
            flags &= ~TransmissionFlags.SEND_DF
        return replace(export, flags=flags)

    def _agree(self, name: str, export: ExportInfo) -> None:
        contexts = self._contexts if self._contexts_for == name else {}
        self._enter_transmission(Agreement(export, self._structured, contexts, self._tls_active))

    # Metadata contexts

    def _list_meta_context(self) -> Steps:
        def matches(query: str, context: str) -> bool:
            return query == context or (query.endswith(":") and context.startswith(query))

        _, found = yield from self._query_contexts(matches, without_queries=True)
        for context in found:
            self._reply(OptionReply.META_CONTEXT, U32.pack(0) + encode(context))
        self._reply(OptionReply.ACK)

    def _set_meta_context(self) -> Steps:
        name, found = yield from self._query_contexts(str.__eq__, without_queries=False)
        self._contexts = dict(enumerate(found, 1))
        self._contexts_for = name
        for number, context in self._contexts.items():
            self._reply(OptionReply.META_CONTEXT, U32.pack(number) + encode(context))
        self._reply(OptionReply.ACK)

    def _query_contexts(
        self, matches: Callable[[str, str], bool], without_queries: bool
    ) -> _Reading[tuple[str, list[str]]]:
        """The export name, and those of its contexts that a query matches; queries that match none are ignored.

        Each query is judged as it arrives and then dropped, so their number needs no limit.
        """
        if not self._structured:
            raise _Refused(OptionReply.ERR_INVALID, "metadata contexts need STRUCTURED_REPLY first")
        name = yield from self._take_string("export name")
        contexts = self._lookup(name).contexts
        (count,) = U32.unpack((yield from self._take(U32.size)))
        found = set(contexts) if without_queries and not count else set()
        for _ in range(count):
            query = yield from self._take_string("query")
            found.update(context for context in contexts if matches(query, context))
        self._take_end()
        return name, [context for context in contexts if context in found]


def _decoded(data: bytes, what: str) -> str:
    try:
        return decode(data)
    except ValueError as error:
        raise _Refused(OptionReply.ERR_INVALID, f"the {what} {error}") from error
