"""nbdimg overlay: a new, empty image on top of another one."""

from __future__ import annotations

import argparse

from nbdserve.cli.common import byte_size, policy_of
from nbdserve.cli.img.common import Subparsers, add_format, add_opening, add_verb, warn

EXAMPLES = """\
  nbdimg overlay monday.qcow2 base.qcow2       base.qcow2 must not be changed from now on
  nbdimg overlay clones/a.qcow2 golden.vhdx    records ../golden.vhdx, which is where it lies from there
  nbdimg overlay bigger.qcow2 base.raw 40G -F raw
"""


def add_parser(subparsers: Subparsers) -> None:
    """The verb's command line."""
    parser = add_verb(subparsers, "overlay", "Put a new, empty qcow2 image on top of another image.", EXAMPLES)
    parser.add_argument("overlay", metavar="NEW", help="the overlay, which must not exist yet")
    parser.add_argument("base", metavar="BASE", help="the image it stands on, which is only read from now on")
    parser.add_argument("size", metavar="SIZE", nargs="?", type=byte_size, help="of the disk; default: as the base's")
    add_format(parser, "-F", "--base-format", help="the base's format, to be recorded; default: recognised by content")
    parser.add_argument("--cluster-size", type=byte_size, metavar="BYTES", help="of the overlay; default: 64k")
    add_opening(parser, force_share=False)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says."""
    from nbdserve.imagetools.overlays import create_overlay

    chain = create_overlay(
        options.overlay,
        options.base,
        size=options.size,
        base_format=options.base_format,
        cluster_size=options.cluster_size,
        policy=policy_of(options),
        warn=warn,
    )
    if not options.quiet:
        print(" -> ".join(f"{link.path} ({link.format})" for link in chain))
    return 0
