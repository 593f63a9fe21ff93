"""nbdimg partitions: the partition table of an image, and how to reach each partition."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from nbdserve.cli.common import human_size, policy_of, printable
from nbdserve.cli.img.common import (
    Subparsers,
    add_format,
    add_opening,
    add_output,
    add_verb,
    open_named,
    print_json,
    warn,
)
from nbdserve.cli.img.partition_table import describe_partitions
from nbdserve.errors import NbdserveError

EXAMPLES = """\
  nbdimg partitions disk.qcow2
  nbdimg partitions --json disk.img
"""


def add_parser(subparsers: Subparsers) -> None:
    """The verb's command line."""
    parser = add_verb(subparsers, "partitions", "List partitions, and the commands that reach them.", EXAMPLES)
    parser.add_argument("image", metavar="IMAGE", help="file, block device or NBD URI")
    add_format(parser)
    parser.add_argument("--snapshot", metavar="NAME", help="of an internal snapshot (name or ID)")
    add_output(parser)
    add_opening(parser)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says."""
    found = read_description(options, options.image, options.format, options.snapshot)
    if options.output == "json":
        print_json(found)
    else:
        print("\n".join(_lines(found)))
    return 0


def read_description(
    options: argparse.Namespace, image: str, format: str | None, snapshot: str | None = None
) -> dict[str, Any]:
    """What partition_table.describe_partitions() tells of an image that is not open yet."""
    from nbdserve.opening import is_remote, look_into

    chosen = format
    if is_remote(image):
        chosen = "nbd"
    elif format is None or not options.force_share:
        with look_into(image, format=format, force_share=options.force_share, policy=policy_of(options)) as file:
            format = chosen = file.format
    with open_named(options, image, format=format, snapshot=snapshot) as device:
        try:
            return describe_partitions(image, chosen or "", device, lambda line: warn(f"{image}: {line}"))
        except NbdserveError as error:
            raise type(error)(f"{image}: {error}") from None


def _lines(found: dict[str, Any]) -> Iterator[str]:
    size = found["virtual-size"]
    kind = {"none": "no partition table", "mbr": "MBR", "gpt": "GPT"}[found["partition-table"]]
    yield f"{found['image']}: {found['format']}, {human_size(size)} ({size} bytes), {kind}" + (
        f", sectors of {found['sector-size']} bytes" if found["partitions"] else ""
    )
    rows: list[tuple[str, ...]] = [
        ("NR", "START", "END", "SECTORS", "OFFSET", "SIZE", "TYPE", "LABEL", "UUID", "FILE SYSTEM")
    ]
    rows += [_row(part) for part in found["partitions"]]
    if len(rows) > 1:
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for row in rows:
            cells = zip(row, widths, range(len(row)), strict=True)
            yield "  ".join(
                cell.rjust(width) if column < 6 else cell.ljust(width) for cell, width, column in cells
            ).rstrip()
    elif found.get("filesystem"):
        yield f"the whole disk is one file system: {shown_filesystem(found['filesystem'])}"
    for part in found["partitions"] or [found]:
        commands = part.get("commands", {})
        if commands:
            yield ""
            yield f"partition {part['number']}:" if "number" in part else "the disk:"
            yield from (f"  {line}" for line in commands.values())


def _row(part: dict[str, Any]) -> tuple[str, ...]:
    numbers = (str(part[key]) for key in ("number", "start", "end", "sectors", "offset"))
    kind = part["type-name"] or part["type"]
    label = printable(part["label"]) or "-"
    marked = f"{kind} *" if part["bootable"] else kind
    return *numbers, human_size(part["size"]), marked, label, part["uuid"], shown_filesystem(part["filesystem"])


def shown_filesystem(filesystem: dict[str, Any] | None) -> str:
    """A file system in a few words."""
    if filesystem is None:
        return "-"
    label = f' "{printable(filesystem["label"])}"' if filesystem["label"] else ""
    return f"{filesystem['type']}{label}" + (f" {filesystem['uuid']}" if filesystem["uuid"] else "")
