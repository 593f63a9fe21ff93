"""nbdimg info: what an image is."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

from nbdserve.cli.common import human_size, policy_of
from nbdserve.cli.img.common import Subparsers, add_format, add_opening, add_output, add_verb, print_json

EXAMPLES = """\
  nbdimg info disk.qcow2
  nbdimg info --backing-chain --json overlay.qcow2
"""


def add_parser(subparsers: Subparsers) -> None:
    """The verb's command line."""
    parser = add_verb(subparsers, "info", "Tell what an image is.", EXAMPLES)
    parser.add_argument("image", metavar="IMAGE", help="file, block device or NBD URI")
    add_format(parser)
    parser.add_argument("--backing-chain", action="store_true", help="tell of all images that it stands on as well")
    add_output(parser)
    add_opening(parser)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says."""
    from nbdserve.imagetools.describing import describe

    found = describe(
        options.image,
        format=options.format,
        force_share=options.force_share,
        policy=policy_of(options),
        whole_chain=options.backing_chain,
    )
    if options.output == "json":
        print_json(found if options.backing_chain else found[0])
    else:
        print("\n\n".join("\n".join(info_lines(info)) for info in found))
    return 0


def info_lines(info: dict[str, Any]) -> Iterator[str]:
    """What describe() says of one image, for people."""
    yield f"image: {info['filename']}"
    yield f"file format: {info['format']}"
    yield f"virtual size: {human_size(info['virtual-size'])} ({info['virtual-size']} bytes)"
    yield f"disk size: {human_size(info['actual-size']) if 'actual-size' in info else 'unavailable'}"
    if info.get("encrypted"):
        yield "encrypted: yes"
    if "cluster-size" in info:
        yield f"cluster_size: {info['cluster-size']}"
    if info["dirty-flag"]:
        yield "cleanly shut down: no"
    if "backing-filename" in info:
        full = info["full-backing-filename"]
        yield f"backing file: {info['backing-filename']}" + (
            f" (actual path: {full})" if full != info["backing-filename"] else ""
        )
    if "backing-filename-format" in info:
        yield f"backing file format: {info['backing-filename-format']}"
    if "snapshots" in info:
        yield from snapshot_lines(info["snapshots"])
    if "format-specific" in info:
        yield "Format specific information:"
        yield from _tree(info["format-specific"]["data"], 1)


def snapshot_lines(snapshots: list[dict[str, Any]]) -> Iterator[str]:
    """The table of internal snapshots, as qemu-img prints it."""
    yield "Snapshot list:"
    yield "ID        TAG               VM SIZE                DATE     VM CLOCK     ICOUNT"
    for one in snapshots:
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["date-sec"]))
        minutes, seconds = divmod(one["vm-clock-sec"], 60)
        clock = f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}.{one['vm-clock-nsec'] // 1000000:03}"
        size = human_size(one["vm-state-size"])
        yield f"{one['id']:9} {one['name']:16} {size:>8}{date:>20}{clock:>13}{one.get('icount', ''):>11}"


def _tree(value: dict[str, Any] | list[Any], depth: int) -> Iterator[str]:
    """Nested facts, one a line."""
    pairs = value.items() if isinstance(value, dict) else ((f"[{index}]", item) for index, item in enumerate(value))
    for key, item in pairs:
        name = f"{'    ' * depth}{key.replace('-', ' ')}:"
        if isinstance(item, dict | list):
            yield name
            yield from _tree(item, depth + 1)
        else:
            yield f"{name} {str(item).lower() if isinstance(item, bool) else item}"
