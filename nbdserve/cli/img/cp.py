"""nbdimg cp: copy files out of an image, or into it."""

from __future__ import annotations

import argparse
import os
import re

from nbdserve.cli.img.common import Subparsers, add_opening, add_verb
from nbdserve.errors import OpenError

EXAMPLES = """\
a path in an image is written IMAGE:/PATH:
  nbdimg cp disk.qcow2:/p1/etc/hosts .
  nbdimg cp -r disk.qcow2:/p2/home/ann backup/
  nbdimg cp authorized_keys disk.qcow2:/p2/root/.ssh/ --owner 0:0
  nbdimg cp -r site/ disk.img:/www
"""

_IN_IMAGE = re.compile(r"(.+?):(/(?!/).*|/)", re.DOTALL)


def add_parser(subparsers: Subparsers) -> None:
    """The verb's command line."""
    from nbdserve.cli.img.guest_tree import add_guest_options

    description = "Copy files out of an image, or into it, without a mount."
    parser = add_verb(subparsers, "cp", description, EXAMPLES)
    parser.add_argument("sources", metavar="SOURCE", nargs="+", help="files here, or IMAGE:/PATH")
    parser.add_argument("destination", metavar="DESTINATION", help="a file or directory here, or IMAGE:/PATH")
    parser.add_argument("-r", "--recursive", action="store_true", help="directories with all that lies in them")
    parser.add_argument(
        "--owner", metavar="UID:GID", type=_owner, help="of what is copied into an image; default: as it is here"
    )
    add_guest_options(parser)
    add_opening(parser)


def _owner(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text, re.ASCII)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no owner; write two numbers, as in 0:0")
    return int(found[1]), int(found[2])


def run(options: argparse.Namespace) -> int:
    """Do what the command line says."""
    from nbdserve.cli.img.guest_tree import opened

    sources = [_IN_IMAGE.fullmatch(source) for source in options.sources]
    destination = _IN_IMAGE.fullmatch(options.destination)
    images = {source[1] for source in sources if source is not None}
    if destination is not None and not images:
        with opened(options, destination[1], [os.fsencode(destination[2])], writable=True) as (guest, (path,)):
            from nbdserve.cli.img.copying_in import copy_in

            left_out = copy_in(guest, options.sources, path, recursive=options.recursive, owner=options.owner)
        return 1 if left_out else 0
    if destination is not None or len(images) != 1 or None in sources:
        raise OpenError("either all sources or the destination must be in one image, written IMAGE:/PATH")
    paths = [os.fsencode(source[2]) for source in sources if source is not None]
    with opened(options, images.pop(), paths) as (guest, paths):
        from nbdserve.cli.img.copying_out import copy_out

        left_out = copy_out(guest, paths, options.destination, recursive=options.recursive)
    return 1 if left_out else 0
