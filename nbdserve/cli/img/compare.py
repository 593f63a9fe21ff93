"""nbdimg compare: whether two images show the same disk."""

from __future__ import annotations

import argparse

from nbdserve.cli.img.common import Subparsers, add_format, add_opening, add_progress, add_verb, open_named, progress

FAILURE = 2
_DIFFERENT = 1

EXAMPLES = """\
  nbdimg compare disk.vhd disk.qcow2
  nbdimg compare -f raw disk.raw nbd://server/export

exit status: 0 alike, 1 different, 2 an error
"""


def add_parser(subparsers: Subparsers) -> None:
    """The verb's command line."""
    parser = add_verb(subparsers, "compare", "Tell whether two images show the same disk.", EXAMPLES, failure=FAILURE)
    parser.add_argument("one", metavar="IMAGE", help="file, block device or NBD URI")
    parser.add_argument("other", metavar="IMAGE")
    add_format(parser, help="of the first image; default: recognised by content")
    add_format(parser, "-F", "--other-format", help="of the second image")
    parser.add_argument("-s", "--strict", action="store_true", help="length and allocation have to be the same as well")
    add_progress(parser)
    add_opening(parser)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says."""
    from nbdserve.imagetools.comparing import allocation_difference, first_difference

    def tell(line: str) -> None:
        if not options.quiet:
            print(line)

    with (
        open_named(options, options.one, format=options.format) as one,
        open_named(options, options.other, format=options.other_format) as other,
    ):
        if one.size != other.size:
            if options.strict:
                tell("Strict mode: Image size mismatch!")
                return _DIFFERENT
            tell("Warning: Image size mismatch!")
        limit = allocation_difference(one, other) if options.strict else None
        with progress(options, max(one.size, other.size)) as report:
            found = first_difference(one, other, report, limit=limit)
    if found is not None:
        tell(f"Content mismatch at offset {found}!")
        return _DIFFERENT
    if limit is not None:
        tell(f"Strict mode: Offset {limit} block status mismatch!")
        return _DIFFERENT
    tell("Images are identical.")
    return 0
