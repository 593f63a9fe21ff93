"""What verbs have in common: options that name and open images, output as text or JSON, progress."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from nbdserve.cli.common import HelpFormatter, add_references, format_help, policy_of, say

if TYPE_CHECKING:
    from nbdserve.block import BlockDevice

PROGRAM = "nbdimg"

Subparsers: TypeAlias = "argparse._SubParsersAction[Parser]"


class Parser(argparse.ArgumentParser):
    """Exits with a verb's own status of failure: argparse's 2 would mean damage to those who call check."""

    failure = 1

    def error(self, message: str) -> NoReturn:
        self.exit(self.failure, f"{self.prog}: {message}; see {self.prog} --help\n")


def add_verb(subparsers: Subparsers, verb: str, description: str, examples: str, *, failure: int = 1) -> Parser:
    """The parser of a verb.

    Args:
        examples: lines as they are to be shown.
        failure: the exit status of wrong usage.
    """
    parser = subparsers.add_parser(
        verb,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.failure = failure
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")
    return parser


def add_format(parser: argparse.ArgumentParser, *names: str, help: str = "") -> None:
    """The option for an image's format; -f unless other names are given."""
    parser.add_argument(
        *(names or ("-f", "--format")),
        metavar="FMT",
        help=help or format_help(),
    )


def add_opening(parser: argparse.ArgumentParser, *, force_share: bool = True) -> None:
    """Options on how images are opened and what they may refer to."""
    if force_share:
        parser.add_argument(
            "-U",
            "--force-share",
            action="store_true",
            help="look at an image even while another program writes to it; what is seen may be inconsistent",
        )
    add_references(parser)


def add_output(parser: argparse.ArgumentParser) -> None:
    """The option for JSON, in qemu-img's spelling and in a short one."""
    parser.add_argument("--output", choices=("human", "json"), default="human", help="default: human")
    parser.add_argument("--json", dest="output", action="store_const", const="json", help="the same as --output=json")


def add_progress(parser: argparse.ArgumentParser) -> None:
    """The option for a progress bar."""
    parser.add_argument("-p", "--progress", action="store_true", help="show progress, when stderr is a terminal")


def warn(line: str) -> None:
    """Tell the user of something that is no error."""
    say(PROGRAM, line)


def open_named(
    options: argparse.Namespace,
    name: str,
    *,
    format: str | None = None,
    read_only: bool = True,
    snapshot: str | None = None,
) -> BlockDevice:
    """Open an image that the user named, by the options of add_opening().

    Raises:
        OpenError: with the reason in one line.
    """
    from nbdserve.opening import open_image

    return open_image(
        name,
        format=format,
        read_only=read_only,
        force_share=getattr(options, "force_share", False),
        snapshot=snapshot,
        policy=policy_of(options),
        warn=warn,
    )


def print_json(value: Any) -> None:
    """A value as JSON, indented as qemu-img does."""
    import json

    print(json.dumps(value, indent=4))


@contextmanager
def progress(options: argparse.Namespace, total: int) -> Iterator[Callable[[int], None]]:
    """What is to be told how many bytes of `total` are done so far; a bar shows it where the user wants one."""
    if not options.progress or options.quiet or not sys.stderr.isatty():
        yield lambda done: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, file=sys.stderr, leave=True) as bar:

        def report(done: int) -> None:
            bar.update(done - bar.n)

        yield report
