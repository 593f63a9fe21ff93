"""What the commands share: options, how errors are shown, and how sizes are read."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, NoReturn

from nbdserve.errors import NbdserveError

if TYPE_CHECKING:
    from nbdserve.cli.passphrase import Passphrase
    from nbdserve.opening import ReferencePolicy

_UNITS = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_SIZE = r"(\d{1,20})(?:\.(\d{1,20}))?([bkmgtpe]?)(?:ib)?"


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps examples as they are. argparse makes one for every option, and would load shutil to learn the width."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_terminal_width() - 2)


@cache
def _terminal_width() -> int:
    try:
        return int(os.environ.get("COLUMNS", "")) or 80
    except ValueError:
        pass
    try:
        return os.get_terminal_size(1).columns or 80
    except OSError:
        return 80


def byte_size(text: str) -> int:
    """A number of bytes as qemu-img reads it: 512, 64k, 1M, 1.5G (powers of 1024)."""
    found = re.fullmatch(_SIZE, text.lower(), re.ASCII)
    if found is None or (found[2] and not _UNITS[found[3]]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write bytes, or a number with k, M, G or T")
    whole, fraction = int(found[1]), found[2] or ""
    scale: int = 10 ** len(fraction)
    return (whole * scale + int(fraction or 0) << _UNITS[found[3]]) // scale


def format_help() -> str:
    """What --format takes."""
    from nbdserve.opening import format_names

    return f"{', '.join(format_names())}; default: recognised by content"


def add_force_share(group: argparse._ArgumentGroup) -> None:
    """The option for a look at an image that a running machine writes to, spelt as qemu-img and qemu-io do."""
    group.add_argument(
        "-U",
        "--force-share",
        action="store_true",
        help="with -r: open the image even while another program writes to it; what is seen may be inconsistent",
    )


def add_references(group: argparse._ActionsContainer) -> None:
    """The options on what images may refer to, and on what opens them; see policy_of()."""
    group.add_argument(
        "--allow-path",
        action="append",
        default=[],
        metavar="DIR",
        help="let images refer to files below DIR, besides their own directory (may be repeated)",
    )
    group.add_argument("--trust-references", action="store_true", help="let images refer to any local file")
    group.add_argument(
        "--passphrase-file",
        type=_passphrase,
        dest="passphrase",
        metavar="FILE",
        help="holds the passphrase of images encrypted with LUKS; - asks for it",
    )


def _passphrase(name: str) -> Passphrase:
    from nbdserve.cli.passphrase import Passphrase

    return Passphrase(name)


def policy_of(options: argparse.Namespace) -> ReferencePolicy:
    """What images may refer to, and what opens them, by the options of add_references()."""
    from pathlib import Path

    from nbdserve.opening import ReferencePolicy

    return ReferencePolicy(tuple(map(Path, options.allow_path)), options.trust_references, options.passphrase)


def human_size(size: int) -> str:
    """A number of bytes with a unit, in at most three significant digits, as qemu-img prints it: 1.5 GiB."""
    number, unit = _scaled(size)
    return f"{number} {unit}iB" if unit else f"{number} B"


def short_size(size: int) -> str:
    """The same in one word, for the columns of tables: 1.5G."""
    return "".join(_scaled(size))


def _scaled(size: int) -> tuple[str, str]:
    """Three significant digits, and the letter of the power of 1024 that goes with them."""
    unit = max(0, min(6, (size.bit_length() - 1) // 10))
    if size and size / (1 << 10 * unit) >= 999.5 and unit < 6:
        unit += 1
    return f"{size / (1 << 10 * unit):.3g}", ("", *"KMGTPE")[unit]


def printable(text: str) -> str:
    """Text that comes from elsewhere, say a file's name, with escapes for what a terminal would obey."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def say(program: str, line: str) -> None:
    """One line on stderr."""
    print(f"{program}: {printable(line)}", file=sys.stderr, flush=True)


def run(program: str, command: Callable[[], int | None], *, failure: int = 1) -> NoReturn:
    """Run a command and leave with the exit status that it returns, or with `failure` after one line that says why."""
    status = failure
    try:
        status = command() or 0
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a failure is still reported
    except NbdserveError as error:
        say(program, str(error))
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        say(program, f"{name}{error.strerror or error}")
        status = failure
    except KeyboardInterrupt:
        say(program, "interrupted")
    _flush_stdout()
    sys.exit(status)


def _flush_stdout() -> None:
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads it any more: Python would complain once again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
