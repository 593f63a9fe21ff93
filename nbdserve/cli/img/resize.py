"""nbdimg resize: another length for a disk."""

from __future__ import annotations

import argparse
import re

from nbdserve.cli.common import byte_size
from nbdserve.cli.img.common import Subparsers, add_format, add_opening, add_verb, open_named

EXAMPLES = """\
  nbdimg resize disk.qcow2 40G
  nbdimg resize disk.qcow2 +8G
  nbdimg resize --shrink disk.raw -1G
"""


def add_parser(subparsers: Subparsers) -> None:
    """The verb's command line."""
    parser = add_verb(subparsers, "resize", "Change the length of a disk.", EXAMPLES)
    parser.add_argument("image", metavar="IMAGE", help="raw file or qcow2 image")
    parser.add_argument("size", metavar="[+|-]SIZE", type=_change, help="the new length, or by how much it changes")
    add_format(parser)
    parser.add_argument("--shrink", action="store_true", help="what lies behind the new end may be lost")
    parser.add_argument(
        "--preallocation",
        choices=("off", "metadata", "falloc", "full"),
        default="off",
        help="give what is new its place in the file: only in the tables, with host space, or written with zeros",
    )
    add_opening(parser, force_share=False)
    # argparse takes what begins with a minus for an option, but for what this matches.
    parser._negative_number_matcher = re.compile(r"-\d[\d.]*[bkmgtpe]?(ib)?$", re.IGNORECASE)


def _change(text: str) -> tuple[str, int]:
    sign = text[:1] if text[:1] in "+-" else ""
    return sign, byte_size(text.removeprefix(sign))


def run(options: argparse.Namespace) -> int:
    """Do what the command line says."""
    from nbdserve.imagetools.lengthening import resize

    sign, number = options.size
    with open_named(options, options.image, format=options.format, read_only=False) as device:
        size = device.size + number if sign == "+" else device.size - number if sign == "-" else number
        resize(device, options.image, size, shrink=options.shrink, fill=options.preallocation)
    if not options.quiet:
        print("Image resized.")
    return 0
