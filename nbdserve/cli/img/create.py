"""nbdimg create: new, empty images."""

from __future__ import annotations

import argparse

from nbdserve.cli.common import byte_size, policy_of
from nbdserve.cli.img.common import Subparsers, add_format, add_opening, add_verb, warn
from nbdserve.cli.img.options import add_options, help_lines, parse_options, wants_help
from nbdserve.errors import OpenError

EXAMPLES = """\
  nbdimg create disk.qcow2 20G
  nbdimg create -f vmdk -o subformat=twoGbMaxExtentSparse disk.vmdk 20G
  nbdimg create -b base.qcow2 -F qcow2 overlay.qcow2
  nbdimg create -f vhdx -o help
"""


def add_parser(subparsers: Subparsers) -> None:
    """The verb's command line."""
    parser = add_verb(subparsers, "create", "Make a new image, empty or on top of another one.", EXAMPLES)
    parser.add_argument("image", metavar="IMAGE", nargs="?", help="the new file; an existing one is replaced")
    parser.add_argument("size", metavar="SIZE", nargs="?", type=byte_size, help="length of the disk: 512, 64k, 20G")
    add_format(parser, help="of the new image: qcow2, vpc, vhdx, vdi, vmdk, luks or raw; default: by the name")
    parser.add_argument(
        "-b", "--backing", metavar="NAME", help="the image to stand on, from the new one's own directory"
    )
    add_format(parser, "-F", "--backing-format", help="the format of that image")
    parser.add_argument("-u", "--unsafe", action="store_true", help="do not look at the backing file")
    add_options(parser)
    add_opening(parser, force_share=False)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says."""
    from nbdserve.imagetools.creating import create, is_outside
    from nbdserve.imagetools.making import format_for

    format = format_for(options.image, options.format)
    if wants_help(options.format_options):
        print("\n".join(help_lines(format)))
        return 0
    if options.image is None:
        raise OpenError("create: give the name of the new image")
    values = parse_options(format, options.format_options)
    backing = options.backing or values.pop("backing_file", None)
    backing_format = options.backing_format or values.pop("backing_fmt", None)
    wanted = values.pop("size", None) if options.size is None else options.size
    size, chain = create(
        options.image,
        format,
        wanted,
        values,
        backing=backing,
        backing_format=backing_format,
        unchecked=options.unsafe,
        policy=policy_of(options),
    )
    if backing is not None and is_outside(options.image, backing):
        warn(f"{options.image}: {backing} lies outside its directory, so opening it needs --allow-path DIR")
    if not options.quiet:
        details = "".join(f" {name}={_shown(value)}" for name, value in values.items())
        print(f"Formatting '{options.image}', fmt={format} size={size}{details}")
        if chain:
            print(f"chain: {' <- '.join((*reversed(chain), options.image))}")
    return 0


def _shown(value: object) -> object:
    return ("off", "on")[value] if isinstance(value, bool) else value
