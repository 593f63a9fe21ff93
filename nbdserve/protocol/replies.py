"""The server's replies of the transmission phase, packed (specification, "Simple reply message" and "Structured ...").

Two styles: the `put_` functions and the public structs write into a buffer of the caller, for what is sent hundreds
of thousands of times a second; the other functions return bytes. The cookie is an opaque number, echoed unchanged.

Flags of a chunk are 1 (ReplyFlags.DONE) for the last one of a reply, else 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Final

from nbdserve.protocol.constants import (
    MAXIMUM_STATUS_DESCRIPTORS,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    ChunkType,
    ReplyFlags,
)
from nbdserve.protocol.strings import message

SIMPLE_REPLY: Final = Struct(">IIQ")
"""SIMPLE_REPLY_MAGIC, error, cookie. The data of a read follows if error is 0."""

CHUNK: Final = Struct(">IHHQI")
"""STRUCTURED_REPLY_MAGIC, flags, type, cookie, bytes that follow."""

DATA_CHUNK: Final = Struct(">QQIQ")
"""CHUNK of type OFFSET_DATA, its first three numbers in one (LAST_DATA or MORE_DATA), and the offset; the data follows,
and counts with 8 more in the length."""

MORE_DATA: Final = STRUCTURED_REPLY_MAGIC << 32 | ChunkType.OFFSET_DATA
LAST_DATA: Final = MORE_DATA | ReplyFlags.DONE << 16

HOLE_CHUNK: Final = Struct(">IHHQIQI")
"""CHUNK of type OFFSET_HOLE, length 12, with the offset and the length of the hole."""

_ERROR: Final = Struct(">IH")  # error, bytes of text
_OFFSET: Final = Struct(">Q")

# Plain ints: an enum member costs a conversion with every pack.
_OFFSET_HOLE: Final = int(ChunkType.OFFSET_HOLE)

Buffer = bytearray | memoryview


def put_simple_reply(buffer: Buffer, position: int, cookie: int, error: int = 0) -> int:
    """Write a simple reply; returns the position behind it, where the data of a successful read goes."""
    SIMPLE_REPLY.pack_into(buffer, position, SIMPLE_REPLY_MAGIC, error, cookie)
    return position + 16


def put_data_chunk(buffer: Buffer, position: int, cookie: int, offset: int, length: int, done: bool) -> int:
    """Write what goes before `length` bytes of data; returns the position behind it, where the data goes."""
    DATA_CHUNK.pack_into(buffer, position, LAST_DATA if done else MORE_DATA, cookie, 8 + length, offset)
    return position + 28


def put_hole_chunk(buffer: Buffer, position: int, cookie: int, offset: int, length: int, done: bool) -> int:
    """Write a chunk that says that `length` bytes read as zeros; returns the position behind it."""
    HOLE_CHUNK.pack_into(buffer, position, STRUCTURED_REPLY_MAGIC, done, _OFFSET_HOLE, cookie, 12, offset, length)
    return position + 32


def simple_reply(cookie: int, error: int = 0) -> bytes:
    """A reply without data."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def none_chunk(cookie: int) -> bytes:
    """The end of a structured reply."""
    return _chunk(ChunkType.NONE, cookie, b"", done=True)


def status_chunk(cookie: int, context: int, extents: Sequence[tuple[int, int]], done: bool) -> bytes:
    """The extents of one metadata context, as (bytes, status flags); at least one and at most 2^20 of them."""
    assert 0 < len(extents) <= MAXIMUM_STATUS_DESCRIPTORS
    numbers = [number for extent in extents for number in extent]
    payload = Struct(f">I{len(numbers)}I").pack(context, *numbers)
    return _chunk(ChunkType.BLOCK_STATUS, cookie, payload, done)


def error_chunk(cookie: int, error: int, text: str = "", offset: int | None = None, done: bool = True) -> bytes:
    """An error, with words for the user and, for a read that failed midway, the offset where it happened."""
    assert error, "an error chunk cannot say that all is well"
    words = message(text)
    payload = _ERROR.pack(error, len(words)) + words
    if offset is None:
        return _chunk(ChunkType.ERROR, cookie, payload, done)
    return _chunk(ChunkType.ERROR_OFFSET, cookie, payload + _OFFSET.pack(offset), done)


def _chunk(kind: ChunkType, cookie: int, payload: bytes, done: bool) -> bytes:
    flags = ReplyFlags.DONE if done else 0
    return CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, kind, cookie, len(payload)) + payload
