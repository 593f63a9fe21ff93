"""nbdimg rebase: let an overlay stand on another image."""

from __future__ import annotations

import argparse

from nbdserve.cli.common import policy_of
from nbdserve.cli.img.common import Subparsers, add_format, add_opening, add_progress, add_verb, progress, warn

EXAMPLES = """\
  nbdimg rebase -b base.qcow2 tuesday.qcow2    what differs is copied into tuesday.qcow2 first
  nbdimg rebase -u -b moved/base.qcow2 -F qcow2 monday.qcow2
                                               the base was moved: change the record and nothing else
"""


def add_parser(subparsers: Subparsers) -> None:
    """The verb's command line."""
    parser = add_verb(subparsers, "rebase", "Let a qcow2 overlay stand on another image.", EXAMPLES)
    parser.add_argument("overlay", metavar="OVERLAY")
    add_format(parser)
    parser.add_argument(
        "-b",
        "--backing",
        metavar="NEW",
        required=True,
        help="the name to record; a relative one starts in the overlay's folder; '' for none",
    )
    add_format(parser, "-F", "--backing-format", help="its format, to be recorded; default: recognised by content")
    parser.add_argument("-u", "--unsafe", action="store_true", help="change the record and read nothing")
    parser.add_argument("--force", action="store_true", help="even where internal snapshots may be damaged")
    add_progress(parser)
    add_opening(parser, force_share=False)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says."""
    return relink(options, options.backing or None, options.backing_format, unsafe=options.unsafe)


def relink(options: argparse.Namespace, backing: str | None, backing_format: str | None, *, unsafe: bool) -> int:
    """What rebase and flatten have in common."""
    from nbdserve.imagetools.describing import describe
    from nbdserve.imagetools.rebasing import rebase

    policy = policy_of(options)
    size = describe(options.overlay, format=options.format, policy=policy)[0]["virtual-size"]
    with progress(options, size) as report:
        rebase(
            options.overlay,
            backing,
            backing_format=backing_format,
            format=options.format,
            unsafe=unsafe,
            force=options.force,
            policy=policy,
            warn=warn,
            progress=report,
        )
    return 0
