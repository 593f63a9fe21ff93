"""nbdimg commit: write an overlay's content into an image below it."""

from __future__ import annotations

import argparse

from nbdserve.cli.common import policy_of
from nbdserve.cli.img.common import Subparsers, add_format, add_opening, add_progress, add_verb, progress, warn

EXAMPLES = """\
  nbdimg commit monday.qcow2                   into the image it stands on; the overlay is empty then
  nbdimg commit -d monday.qcow2                the same, but leave the overlay as it is
  nbdimg commit -b base.qcow2 tuesday.qcow2    past those in between, which are of no use then
"""


def add_parser(subparsers: Subparsers) -> None:
    """The verb's command line."""
    parser = add_verb(subparsers, "commit", "Write an overlay's content into an image below it.", EXAMPLES)
    parser.add_argument("overlay", metavar="OVERLAY")
    add_format(parser)
    parser.add_argument("-b", "--base", metavar="BASE", help="write to this image of the chain; implies -d")
    parser.add_argument("-d", "--keep", action="store_true", help="do not empty the overlay")
    parser.add_argument(
        "--force", action="store_true", help="even where other overlays or internal snapshots would be damaged"
    )
    add_progress(parser)
    add_opening(parser, force_share=False)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says."""
    from nbdserve.imagetools.chains import read_chain
    from nbdserve.imagetools.committing import commit

    policy = policy_of(options)
    size = read_chain(options.overlay, format=options.format, policy=policy)[0].size
    with progress(options, size) as report:
        commit(
            options.overlay,
            format=options.format,
            base=options.base,
            empty=not options.keep and options.base is None,
            force=options.force,
            policy=policy,
            warn=warn,
            progress=report,
        )
    if not options.quiet:
        print("Image committed.")
    return 0
