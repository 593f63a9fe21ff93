"""nbdimg convert: an image in another format."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from nbdserve.cli.common import byte_size, policy_of
from nbdserve.cli.img.common import (
    Subparsers,
    add_format,
    add_opening,
    add_progress,
    add_verb,
    open_named,
    progress,
    warn,
)
from nbdserve.cli.img.options import add_options, help_lines, parse_options, wants_help
from nbdserve.errors import OpenError

if TYPE_CHECKING:
    from nbdserve.block import BlockDevice
    from nbdserve.imagetools.rescue import Salvaged

EXAMPLES = """\
  nbdimg convert -p disk.vhd disk.qcow2
  nbdimg convert -O qcow2 -c -o compression_type=zstd disk.raw disk.qcow2
  nbdimg convert --partition 1 disk.qcow2 root.raw
  nbdimg convert nbd://server/export disk.qcow2
  nbdimg convert -O raw disk.qcow2 /dev/sdx
  nbdimg convert --skip-errors bad.map /dev/sdx rescued.raw
"""


def add_parser(subparsers: Subparsers) -> None:
    """The verb's command line."""
    parser = add_verb(subparsers, "convert", "Copy an image into another format.", EXAMPLES)
    parser.add_argument("source", metavar="SRC", nargs="?", help="file, block device or NBD URI")
    parser.add_argument("target", metavar="DST", nargs="?", help="file, block device or NBD URI; a file is replaced")
    add_format(parser, help="of the source; default: recognised by content")
    add_format(parser, "-O", "--output-format", help="of the target; default: by its name, else raw")
    parser.add_argument("-c", "--compress", action="store_true", help="compress the data (qcow2 and vmdk)")
    add_options(parser)
    parser.add_argument(
        "-S", "--sparse", type=byte_size, default=4096, metavar="SIZE", help="leave out zeros of this length; 0: none"
    )
    parser.add_argument("-l", "--snapshot", metavar="NAME", help="copy an internal snapshot (name or ID)")
    parser.add_argument("-P", "--partition", metavar="N", help="copy only partition N of the source; or its UUID")
    parser.add_argument("-B", "--backing", metavar="NAME", help="let the target stand on this image")
    add_format(parser, "-F", "--backing-format", help="the format of that image")
    parser.add_argument("-n", "--existing", action="store_true", help="write into the image that is there")
    parser.add_argument("--target-is-zero", action="store_true", help="with -n: that image reads as zeros")
    parser.add_argument("--target-partition", metavar="N", help="write into partition N of the image that is there")
    parser.add_argument("--skip-errors", metavar="MAP", help="go on past what cannot be read, and list it in this file")
    parser.add_argument("--salvage", action="store_true", help="go on past what cannot be read")
    parser.add_argument("-m", "--threads", type=int, choices=range(1, 17), metavar="N", help="default: by processors")
    parser.add_argument(
        "-t",
        "--cache",
        choices=("unsafe", "writeback", "writethrough", "none", "directsync"),
        default="unsafe",
        help="unsafe (the default): leave it to the host when a new image reaches its storage; others: wait for that",
    )
    parser.add_argument("-W", action="store_true", help="write in any order (always so)")
    add_progress(parser)
    add_opening(parser)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says."""
    from nbdserve.imagetools.converting import Target, convert
    from nbdserve.imagetools.making import format_for
    from nbdserve.opening import select_partition

    format = format_for(options.target, options.output_format)
    if wants_help(options.format_options):
        print("\n".join(help_lines(format)))
        return 0
    if options.target is None:
        raise OpenError("convert: give the source and the target")
    if options.sparse % 512 or options.sparse > 2 << 20 or (options.sparse & options.sparse - 1):
        raise OpenError(f"-S {options.sparse}: give 0, or a power of two from 512 to 2M")
    values = parse_options(format, options.format_options)
    values.pop("size", None)
    target = Target(
        options.target,
        format,
        backing=options.backing or values.pop("backing_file", None),
        backing_format=options.backing_format or values.pop("backing_fmt", None),
        values=values,
        compress=options.compress,
        sparse=options.sparse,
        existing=options.existing or options.target_partition is not None,
        partition=options.target_partition,
        blank=options.target_is_zero,
        durable=options.cache != "unsafe",
        workers=options.threads or max(2, min(8, os.cpu_count() or 2)),
    )
    if (
        os.path.exists(options.target)
        and os.path.exists(options.source)
        and os.path.samefile(options.source, options.target)
    ):
        raise OpenError(f"{options.target}: is the source as well; give the target another name")
    if options.skip_errors:
        from nbdserve.imagetools.rescue import demand_map_place

        demand_map_place(options.skip_errors)
        if os.path.realpath(options.skip_errors) == os.path.realpath(options.target):
            raise OpenError(f"{options.target}: is to be the map as well; give the target another name")
    with open_named(options, options.source, format=options.format, snapshot=_snapshot(options.snapshot)) as whole:
        source = whole
        if options.partition is not None:
            source = select_partition(whole, options.partition, options.source, warn)
        salvaged = _salvaged(source) if options.salvage or options.skip_errors else None
        with progress(options, source.size) as report:
            convert(salvaged or source, target, policy=policy_of(options), progress=report)
        if salvaged is not None:
            _report(options, salvaged)
    return 0


def _snapshot(text: str | None) -> str | None:
    """qemu-img also spells it snapshot.id=ID or snapshot.name=NAME."""
    return text and text.removeprefix("snapshot.id=").removeprefix("snapshot.name=")


def _salvaged(source: BlockDevice) -> Salvaged:
    from nbdserve.imagetools.rescue import Salvaged

    return Salvaged(source)


def _report(options: argparse.Namespace, source: Salvaged) -> None:
    from nbdserve.imagetools.rescue import write_map

    if options.skip_errors:
        write_map(options.skip_errors, source.size, source.unreadable)
    if source.unreadable:
        lost = sum(length for _, length in source.unreadable)
        where = f"; {options.skip_errors} lists them" if options.skip_errors else ""
        warn(f"{options.source}: {lost} bytes could not be read and are zeros in the copy{where}")
