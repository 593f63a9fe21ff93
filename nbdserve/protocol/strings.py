"""Strings of the wire: UTF-8, no NUL, at most 4096 bytes (specification, section "Conventions").

Text that a peer sent ends up in logs and terminals, and text about a peer's request goes back to it. Both pass
through `readable`, so that neither can carry control characters or grow without bound.
"""

from __future__ import annotations

from typing import Final

from nbdserve.protocol.constants import MAXIMUM_STRING

_LONGEST_TEXT: Final = MAXIMUM_STRING // 4  # characters; whatever they are, their UTF-8 then is a legal string


def decode(data: bytes) -> str:
    """A name or query from the wire.

    Raises:
        ValueError: it is too long, is not UTF-8 or contains NUL; the text says which.
    """
    if len(data) > MAXIMUM_STRING:
        raise ValueError(f"is {len(data)} bytes long, at most {MAXIMUM_STRING} are allowed")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError("is not valid UTF-8") from error
    if "\0" in text:
        raise ValueError("contains a NUL character")
    return text


def encode(text: str) -> bytes:
    """A name or query for the wire.

    Raises:
        ValueError: the wire has no such string; the text says why.
    """
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("cannot be written as UTF-8") from error
    decode(data)
    return data


def readable(text: str | bytes, longest: int = _LONGEST_TEXT) -> str:
    """Text that may be shown: control characters become "?", the rest is cut after `longest` characters."""
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    shown = text if len(text) <= longest else text[: longest - 1] + "…"
    return shown if shown.isprintable() else "".join(c if c.isprintable() else "?" for c in shown)


def quoted(name: str) -> str:
    """A name within a message."""
    return f'"{readable(name, 80)}"'


def message(text: str) -> bytes:
    """Text for people as it goes on the wire."""
    return readable(text).encode()
