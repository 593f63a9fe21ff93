"""Options of formats, as users write them after -o: name=value, separated by commas; a comma in a value is doubled."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from typing import Any

from nbdserve.cli.common import byte_size
from nbdserve.errors import OpenError
from nbdserve.imagetools.making import OPTIONS, Kind, Option

_SWITCHES = {"on": True, "yes": True, "true": True, "y": True, "off": False, "no": False, "false": False, "n": False}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The option -o."""
    parser.add_argument(
        "-o",
        dest="format_options",
        action="append",
        default=[],
        metavar="NAME=VALUE,...",
        help="options of the format; '-o help' lists them",
    )


def wants_help(texts: list[str]) -> bool:
    """Whether the user wants a list instead of anything done."""
    return any(part in ("help", "?") for text in texts for part in text.split(","))


def help_lines(format: str, only: Sequence[str] = ()) -> Iterator[str]:
    """The list of a format's options, or of some of them."""
    yield f"options of {format}:"
    for name, option in sorted(OPTIONS[format].items()):
        if only and name not in only:
            continue
        value = "|".join(option.choices) or option.kind.value
        yield f"  {name}={value:30} {option.help}"


def parse_options(format: str, texts: list[str], *, may_be_empty: Sequence[str] = ()) -> dict[str, Any]:
    """What the user wrote, checked against what the format has.

    Raises:
        OpenError: with what is wrong, and what there is.
    """
    values: dict[str, Any] = {}
    for part in (part for text in texts for part in _split(text)):
        name, equals, text = part.partition("=")
        option = OPTIONS[format].get(name)
        if name.endswith("key-secret"):
            raise OpenError(f"-o {name}: the passphrase is given with --passphrase-file FILE")
        if option is None:
            raise OpenError(f"-o {name}: {format} has no such option; it has {', '.join(sorted(OPTIONS[format]))}")
        if equals and not text and name in may_be_empty:
            values[name] = ""
            continue
        values[name] = _value(name, option, text if equals else None)
    return values


def _split(text: str) -> list[str]:
    """The parts between single commas."""
    parts, part = [], ""
    for piece in re.split(r"(,+)", text):
        if piece.startswith(","):
            part += "," * (len(piece) // 2)
            if len(piece) % 2:
                parts.append(part)
                part = ""
        else:
            part += piece
    return [each for each in (*parts, part) if each]


def _value(name: str, option: Option, text: str | None) -> int | bool | str:
    if text is None:
        if option.kind is Kind.SWITCH:
            return True
        raise OpenError(f"-o {name}: needs a value ({'|'.join(option.choices) or option.kind.value})")
    match option.kind:
        case Kind.SIZE:
            try:
                return byte_size(text)
            except argparse.ArgumentTypeError as error:
                raise OpenError(f"-o {name}: {error}") from None
        case Kind.NUMBER if text.isascii() and text.isdigit() and len(text) < 10:
            return int(text)
        case Kind.SWITCH if text in _SWITCHES:
            return _SWITCHES[text]
        case Kind.TEXT if text and (not option.choices or text in option.choices):
            return text
    raise OpenError(f"-o {name}={text}: {name} is {'|'.join(option.choices) or option.kind.value}")
