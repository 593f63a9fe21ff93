"""nbdimg flatten: let an image stand on its own."""

from __future__ import annotations

import argparse

from nbdserve.cli.img.common import Subparsers, add_format, add_opening, add_progress, add_verb
from nbdserve.cli.img.rebase import relink

EXAMPLES = """\
  nbdimg flatten -p tuesday.qcow2              copies in all that it shows of other images
"""


def add_parser(subparsers: Subparsers) -> None:
    """The verb's command line."""
    parser = add_verb(subparsers, "flatten", "Copy into a qcow2 overlay all that it shows of others.", EXAMPLES)
    parser.add_argument("overlay", metavar="IMAGE")
    add_format(parser)
    parser.add_argument("--force", action="store_true", help="even where internal snapshots may be damaged")
    add_progress(parser)
    add_opening(parser, force_share=False)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says."""
    return relink(options, None, None, unsafe=False)
