"""nbdimg cat: print files inside an image."""

from __future__ import annotations

import argparse
import errno
import os
import stat
import sys

from nbdserve.cli.img.common import Subparsers, add_verb

EXAMPLES = """\
  nbdimg cat disk.qcow2 /p2/etc/fstab
  nbdimg cat -i disk.qcow2 /etc/os-release
"""


def add_parser(subparsers: Subparsers) -> None:
    """The verb's command line."""
    from nbdserve.cli.img.guest_tree import add_reading_options

    parser = add_verb(subparsers, "cat", "Print files inside an image, without a mount.", EXAMPLES)
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("paths", metavar="PATH", nargs="+")
    add_reading_options(parser)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says."""
    from nbdserve.cli.img.guest_tree import opened

    with opened(options, options.image, [os.fsencode(path) for path in options.paths]) as (guest, paths):
        for path in paths:
            found = guest.find(path)
            if not stat.S_ISREG(found.attributes.mode):
                number = errno.EISDIR if found.attributes.is_directory else errno.EINVAL
                raise guest.failure(path, OSError(number, os.strerror(number)))
            for _, piece in guest.content(found):
                sys.stdout.buffer.write(piece)
    return 0
