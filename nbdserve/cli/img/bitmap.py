"""nbdimg bitmap: persistent bitmaps of qcow2 images."""

from __future__ import annotations

import argparse

from nbdserve.cli.common import byte_size, policy_of
from nbdserve.cli.img.common import Subparsers, add_format, add_opening, add_verb, open_named
from nbdserve.errors import OpenError

EXAMPLES = """\
  nbdimg bitmap --add disk.qcow2 since-monday
  nbdimg bitmap --add -g 4k --disable disk.qcow2 fine
  nbdimg bitmap --merge tuesday --merge wednesday disk.qcow2 week
  nbdimg bitmap --remove disk.qcow2 since-monday

actions are done in the order in which they are given.
"""


def add_parser(subparsers: Subparsers) -> None:
    """The verb's command line."""
    parser = add_verb(subparsers, "bitmap", "Add, change or remove persistent bitmaps of a qcow2 image.", EXAMPLES)
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("bitmap", metavar="NAME", help="the bitmap's name")
    for action, text in (
        ("add", "add an empty bitmap, switched on"),
        ("remove", "remove it"),
        ("clear", "let no bit be set"),
        ("enable", "let it note writes"),
        ("disable", "let it note no writes"),
    ):
        parser.add_argument(
            f"--{action}", dest="actions", action="append_const", const=(action, None), default=[], help=text
        )
    parser.add_argument(
        "--merge",
        dest="actions",
        action="append",
        type=lambda name: ("merge", name),
        metavar="OTHER",
        help="add its bits",
    )
    parser.add_argument("-g", "--granularity", type=byte_size, default=65536, metavar="SIZE", help="bytes for each bit")
    parser.add_argument("-b", "--source-file", metavar="IMAGE", help="where the bitmaps to merge are")
    add_format(parser)
    add_format(parser, "-F", "--source-format", help="the format of that image")
    add_opening(parser, force_share=False)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says."""
    from nbdserve.imagetools.bitmaps import editor_of, read_other

    if not options.actions:
        raise OpenError("bitmap: what is to be done? Give --add, --remove, --clear, --enable, --disable or --merge")
    others = {
        name: read_other(options.source_file, options.source_format, name, policy_of(options))
        for action, name in options.actions
        if action == "merge" and options.source_file is not None
    }
    with open_named(options, options.image, format=options.format, read_only=False) as device:
        editor = editor_of(device, options.image)
        for action, name in options.actions:
            match action:
                case "add":
                    editor.add(options.bitmap, options.granularity)
                case "remove":
                    editor.remove(options.bitmap)
                case "clear":
                    editor.clear(options.bitmap)
                case "merge":
                    editor.merge(options.bitmap, *(others.get(name) or editor.content(name)))
                case _:
                    editor.enable(options.bitmap, action == "enable")
    return 0
