"""nbdimg delete-middle: take one image out of a chain."""

from __future__ import annotations

import argparse

from nbdserve.cli.common import policy_of
from nbdserve.cli.img.common import Subparsers, add_opening, add_progress, add_verb, progress, warn

EXAMPLES = """\
with base <- sn1 <- sn2 <- sn3:
  nbdimg delete-middle sn2 sn3                 sn3 gets what it needs of sn2: base <- sn1 <- sn3
  nbdimg delete-middle --into below sn2 sn3    sn1 gets what sn2 holds: the same chain, less copying
                                               if sn2 is small; nobody else may stand on sn1
"""


def add_parser(subparsers: Subparsers) -> None:
    """The verb's command line."""
    parser = add_verb(
        subparsers, "delete-middle", "Take an image out of a chain; its overlays go on showing the same.", EXAMPLES
    )
    parser.add_argument("middle", metavar="MIDDLE", help="the image that is to go")
    parser.add_argument("overlays", metavar="OVERLAY", nargs="+", help="all images that stand on it")
    parser.add_argument(
        "--into",
        choices=("above", "below"),
        default="above",
        help="where its content goes: the overlays (default), or the image it stands on",
    )
    parser.add_argument("--keep", action="store_true", help="do not remove the file of the middle image")
    parser.add_argument(
        "--look-in",
        action="append",
        default=[],
        metavar="DIR",
        help="look for other overlays here, besides the folders of the images (may be repeated)",
    )
    add_progress(parser)
    add_opening(parser, force_share=False)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says."""
    from nbdserve.imagetools.chains import read_chain
    from nbdserve.imagetools.middle import Into, delete_middle

    policy = policy_of(options)
    size = read_chain(options.middle, policy=policy)[0].size
    with progress(options, size) as report:
        delete_middle(
            options.middle,
            options.overlays,
            Into(options.into),
            keep=options.keep,
            folders=options.look_in,
            policy=policy,
            warn=warn,
            progress=report,
        )
    return 0
