"""nbdimg amend: other options for an existing image."""

from __future__ import annotations

import argparse

from nbdserve.cli.common import policy_of
from nbdserve.cli.img.common import Subparsers, add_format, add_opening, add_verb
from nbdserve.cli.img.options import add_options, help_lines, parse_options, wants_help
from nbdserve.errors import OpenError

EXAMPLES = """\
  nbdimg amend -o compat=1.1,lazy_refcounts=on old.qcow2
  nbdimg amend -o backing_file=moved/base.qcow2,backing_fmt=qcow2 overlay.qcow2
"""


def add_parser(subparsers: Subparsers) -> None:
    """The verb's command line."""
    parser = add_verb(subparsers, "amend", "Change options of an existing qcow2 image.", EXAMPLES)
    parser.add_argument("image", metavar="IMAGE", nargs="?")
    add_format(parser)
    add_options(parser)
    add_opening(parser, force_share=False)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says."""
    from nbdserve.imagetools.amending import AMENDABLE, amend

    if wants_help(options.format_options):
        print("\n".join(help_lines("qcow2", AMENDABLE)))
        return 0
    if options.image is None or not options.format_options:
        raise OpenError(f"amend: give an image and -o with any of {', '.join(AMENDABLE)}")
    values = parse_options("qcow2", options.format_options, may_be_empty=("backing_file",))
    amend(options.image, values, format=options.format, policy=policy_of(options))
    return 0
