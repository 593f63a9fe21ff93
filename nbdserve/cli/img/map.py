"""nbdimg map: which parts of a disk hold data, and where."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from nbdserve.cli.common import byte_size
from nbdserve.cli.img.common import Subparsers, add_format, add_opening, add_output, add_verb, open_named
from nbdserve.errors import OpenError

if TYPE_CHECKING:
    from nbdserve.imagetools.mapping import Entry

EXAMPLES = """\
  nbdimg map disk.qcow2
  nbdimg map --json --start-offset 1M --max-length 64M overlay.qcow2
"""


def add_parser(subparsers: Subparsers) -> None:
    """The verb's command line."""
    parser = add_verb(subparsers, "map", "Tell which parts of a disk hold data, and where they lie.", EXAMPLES)
    parser.add_argument("image", metavar="IMAGE", help="file, block device or NBD URI")
    add_format(parser)
    parser.add_argument("-s", "--start-offset", type=byte_size, default=0, metavar="BYTES", help="begin here")
    parser.add_argument("-l", "--max-length", type=byte_size, metavar="BYTES", help="tell of so many bytes")
    add_output(parser)
    add_opening(parser)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says."""
    from nbdserve.imagetools.mapping import entries

    with open_named(options, options.image, format=options.format) as device:
        if options.start_offset > device.size:
            raise OpenError(f"{options.image}: has {device.size} bytes; nothing begins at {options.start_offset}")
        found = entries(device, options.start_offset, options.max_length)
        if options.output == "json":
            print("[" + ",\n".join(json.dumps(_as_json(entry)) for entry in found) + "]")
            return 0
        print(f"{'Offset':16}{'Length':16}{'Mapped to':16}File")
        for entry in found:
            if entry.data and not entry.zero:
                _print(options.image, entry)
    return 0


def _as_json(entry: Entry) -> dict[str, object]:
    fields: dict[str, object] = {
        "start": entry.start,
        "length": entry.length,
        "depth": entry.depth,
        "present": entry.present,
        "zero": entry.zero,
        "data": entry.data,
    }
    return fields if entry.offset is None else fields | {"offset": entry.offset}


def _print(name: str, entry: Entry) -> None:
    if entry.offset is None:
        raise OpenError(f"{name}: has compressed or remote data at {entry.start}, which has no place; use --json")
    numbers = "".join(
        f"{number:<#16x}" if number else f"{0:<16}" for number in (entry.start, entry.length, entry.offset)
    )
    print(f"{numbers}{entry.file}")
