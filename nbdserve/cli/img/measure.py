"""nbdimg measure: how much space an image would take."""

from __future__ import annotations

import argparse

from nbdserve.cli.common import byte_size
from nbdserve.cli.img.common import Subparsers, add_format, add_opening, add_output, add_verb, open_named, print_json
from nbdserve.cli.img.options import add_options, help_lines, parse_options, wants_help
from nbdserve.errors import OpenError

EXAMPLES = """\
  nbdimg measure -O qcow2 disk.raw
  nbdimg measure --size 20G -O qcow2 -o preallocation=full
"""


def add_parser(subparsers: Subparsers) -> None:
    """The verb's command line."""
    parser = add_verb(subparsers, "measure", "Tell how much space an image would take.", EXAMPLES)
    parser.add_argument("image", metavar="IMAGE", nargs="?", help="what would be converted")
    add_format(parser)
    add_format(parser, "-O", "--output-format", help="of the new image: raw or qcow2; default: raw")
    parser.add_argument("--size", type=byte_size, metavar="SIZE", help="length of a new, empty disk")
    parser.add_argument("-l", "--snapshot", metavar="NAME", help="measure an internal snapshot (name or ID)")
    add_options(parser)
    add_output(parser)
    add_opening(parser)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says."""
    from nbdserve.imagetools.making import format_for
    from nbdserve.imagetools.measuring import measure

    format = format_for(None, options.output_format)
    if wants_help(options.format_options):
        print("\n".join(help_lines(format)))
        return 0
    values = parse_options(format, options.format_options)
    if (options.image is None) == (options.size is None):
        raise OpenError("measure: give either an image or --size")
    if options.image is None:
        found = measure(options.size, None, format, values)
    else:
        with open_named(options, options.image, format=options.format, snapshot=options.snapshot) as source:
            found = measure(source.size, source, format, values)
    numbers = {"required": found.required, "fully-allocated": found.fully_allocated}
    if found.bitmaps is not None:
        numbers["bitmaps"] = found.bitmaps
    if options.output == "json":
        print_json(numbers)
        return 0
    print(f"required size: {found.required}\nfully allocated size: {found.fully_allocated}")
    if found.bitmaps is not None:
        print(f"bitmaps size: {found.bitmaps}")
    return 0
