"""What a client knows of a request under way: the events of its reply, and whether that reply is sound.

Invariant: the filled ranges of a read are disjoint and lie within it; the read has succeeded only when they are the
whole of it (specification, "Request types", NBD_CMD_READ). A server can scatter a read's data over many places, so
their number is bounded.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Final

from nbdserve.errors import ProtocolError
from nbdserve.protocol.constants import Command, CommandFlags, ErrorCode

_MOST_PIECES: Final = 4096  # separate ranges of one read that may be filled at a time
_MOST_ERRORS: Final = 1024  # error chunks of one reply


@dataclass(frozen=True, slots=True)
class DataChunk:
    """A part of a read; `data` is the part of the read's destination that now holds it."""

    cookie: int
    offset: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class HoleChunk:
    """A part of a read that is all zeros, as its destination is now."""

    cookie: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class BlockStatusChunk:
    """The extents of one metadata context from the request's offset on, as (bytes, status flags)."""

    cookie: int
    context: int
    extents: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class ErrorChunk:
    """The request fails, at `offset` if the server says where; more chunks may follow."""

    cookie: int
    error: ErrorCode
    text: str
    offset: int | None


@dataclass(frozen=True, slots=True)
class Done:
    """The reply is complete.

    Attributes:
        error: the first error of the reply, None if the request was done.
        text: the server's words about that error, may be empty.
        data: the destination of a read; complete if there is no error.
    """

    cookie: int
    error: ErrorCode | None
    text: str
    data: memoryview | None


Event = DataChunk | HoleChunk | BlockStatusChunk | ErrorChunk | Done


class Outstanding:
    """A request, and what has come of its reply."""

    __slots__ = ("command", "contents", "contexts", "covered", "destination", "errors", "flags", "length", "offset")

    def __init__(self, command: int, flags: int, offset: int, length: int, destination: memoryview | None) -> None:
        self.command = command
        self.flags = flags
        self.offset = offset
        self.length = length
        self.destination = destination
        self.contents = 0
        self.covered: list[tuple[int, int]] = []  # filled ranges [start, end), sorted, apart from each other
        self.errors: list[ErrorChunk] = []
        self.contexts: set[int] = set()

    def contains(self, offset: int, length: int) -> bool:
        return self.offset <= offset and offset + length <= self.offset + self.length

    def part(self, offset: int, length: int) -> memoryview:
        assert self.destination is not None
        return self.destination[offset - self.offset : offset - self.offset + length]

    def cover(self, offset: int, length: int) -> None:
        """Note that a content chunk fills this range, if it may."""
        end = offset + length
        if self.command != Command.READ:
            raise ProtocolError(f"the server answers a {command_name(self.command)} with data")
        if length <= 0 or not self.contains(offset, length):
            raise ProtocolError(
                f"the server sent bytes {offset} to {end} for a read of {self.length} bytes at {self.offset}"
            )
        self.contents += 1
        if self.contents > 1 and self.flags & CommandFlags.DF:
            raise ProtocolError("the server sent a second data chunk for a read that must not be fragmented")
        after = bisect_left(self.covered, (offset, 0))
        overlaps_next = after < len(self.covered) and self.covered[after][0] < end
        overlaps_previous = after > 0 and self.covered[after - 1][1] > offset
        if overlaps_next or overlaps_previous:
            raise ProtocolError(f"the server sent bytes {offset} to {end} of a read twice")
        if any(error.offset is not None and offset <= error.offset < end for error in self.errors):
            raise ProtocolError(f"the server sent bytes {offset} to {end} after an error within them")
        first, last = after, after
        if after < len(self.covered) and self.covered[after][0] == end:
            end = self.covered[after][1]
            last += 1
        if after > 0 and self.covered[after - 1][1] == offset:
            offset = self.covered[after - 1][0]
            first -= 1
        self.covered[first:last] = [(offset, end)]
        if len(self.covered) > _MOST_PIECES:
            raise ProtocolError(f"the server scatters the data of a read over more than {_MOST_PIECES} places")

    def describe(self, context: int, extents: tuple[tuple[int, int], ...]) -> None:
        """Note a metadata context's chunk, if it may be so."""
        if self.command != Command.BLOCK_STATUS:
            raise ProtocolError(f"the server answers a {command_name(self.command)} with a block status")
        if context in self.contexts:
            raise ProtocolError(f"the server described metadata context {context} twice")
        lengths = [length for length, _ in extents]
        if not all(lengths):
            raise ProtocolError("the server sent an extent of no length")
        if self.flags & CommandFlags.REQ_ONE:
            sound = len(lengths) == 1 and lengths[0] <= self.length
        else:
            sound = len(lengths) == 1 or sum(lengths[:-1]) < self.length
        if not sound:
            raise ProtocolError(f"the server sent more extents than the {self.length} bytes asked for have")
        self.contexts.add(context)

    def fail(self, error: ErrorChunk) -> None:
        """Note an error chunk, if it may be so."""
        if error.offset is not None and not self.contains(error.offset, 1):
            raise ProtocolError(f"the server reports an error at {error.offset}, outside the request")
        if len(self.errors) == _MOST_ERRORS:
            raise ProtocolError(f"the server sent more than {_MOST_ERRORS} errors for one request")
        self.errors.append(error)

    def check_complete(self, contexts: frozenset[int]) -> None:
        """Make sure that a reply without error chunks has said everything."""
        if self.command == Command.READ and self.length:
            if self.covered != [(self.offset, self.offset + self.length)]:
                raise ProtocolError(f"the server left out parts of a read of {self.length} bytes at {self.offset}")
        elif self.command == Command.BLOCK_STATUS and self.contexts != contexts:
            raise ProtocolError("the server did not describe just the agreed metadata contexts")


def command_name(command: int) -> str:
    """A command in a message."""
    try:
        return Command(command).name
    except ValueError:
        return f"command {command}"
