"""nbdimg snapshot: list, make, apply and delete internal snapshots."""

from __future__ import annotations

import argparse

from nbdserve.cli.common import policy_of
from nbdserve.cli.img.common import Subparsers, add_format, add_opening, add_output, add_verb, print_json, warn

EXAMPLES = """\
  nbdimg snapshot -c before-upgrade disk.qcow2
  nbdimg snapshot -l disk.qcow2
  nbdimg snapshot -a before-upgrade disk.qcow2
  nbdimg snapshot -d before-upgrade disk.qcow2
"""


def add_parser(subparsers: Subparsers) -> None:
    """The verb's command line."""
    parser = add_verb(subparsers, "snapshot", "List, make, apply or delete a qcow2 image's snapshots.", EXAMPLES)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("-l", "--list", action="store_true", help="list the snapshots (default)")
    what.add_argument("-c", "--create", metavar="NAME", help="keep the present state of the disk under a name")
    what.add_argument("-a", "--apply", metavar="NAME", help="let the disk be again as it was (name or ID)")
    what.add_argument("-d", "--delete", metavar="NAME", help="forget a snapshot (name or ID)")
    parser.add_argument("image", metavar="IMAGE")
    add_format(parser)
    add_output(parser)
    add_opening(parser)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says."""
    from nbdserve.imagetools.snapshots import Change, change_snapshots, list_snapshots

    for change, name in (
        (Change.CREATE, options.create),
        (Change.APPLY, options.apply),
        (Change.DELETE, options.delete),
    ):
        if name is not None:
            change_snapshots(options.image, change, name, format=options.format, policy=policy_of(options), warn=warn)
            return 0
    found = list_snapshots(
        options.image, format=options.format, force_share=options.force_share, policy=policy_of(options)
    )
    if options.output == "json":
        print_json(found)
    elif found:
        from nbdserve.cli.img.info import snapshot_lines

        print("\n".join(snapshot_lines(found)))
    return 0
