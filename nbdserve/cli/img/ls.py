"""nbdimg ls: list files inside an image."""

from __future__ import annotations

import argparse
import os
import stat
import sys
import time
from typing import TYPE_CHECKING, Any

from nbdserve.cli.img.common import Subparsers, add_output, add_verb, print_json

if TYPE_CHECKING:
    from nbdserve.cli.img.guest_tree import Found, Guest

EXAMPLES = """\
  nbdimg ls disk.qcow2                         the partitions, or the files of the only file system
  nbdimg ls -l disk.qcow2 /p2/etc
  nbdimg ls -R --partition root disk.qcow2 /var/log
"""


def add_parser(subparsers: Subparsers) -> None:
    """The verb's command line."""
    from nbdserve.cli.img.guest_tree import add_reading_options

    parser = add_verb(subparsers, "ls", "List files inside an image, without a mount.", EXAMPLES)
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("path", metavar="PATH", nargs="?", default="/")
    parser.add_argument("-l", "--long", action="store_true", help="modes, links, owners, sizes, times and targets, too")
    parser.add_argument("-R", "--recursive", action="store_true", help="with all that lies below")
    add_output(parser)
    add_reading_options(parser)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says."""
    from nbdserve.cli.img.guest_tree import opened

    with opened(options, options.image, [os.fsencode(options.path)]) as (guest, (path,)):
        top = guest.find(path, follow=not options.long or path.endswith(b"/"))
        if options.recursive:
            found = [(name, each) for name, each in guest.walk(top, b"") if name]
        elif top.attributes.is_directory:
            found = [(each.name, each) for each in guest.children(top.node)]
        else:
            found = [(top.name, top)]
        if options.output == "json":
            print_json([_as_json(guest, name, each) for name, each in found])
        else:
            _print(guest, found, long=options.long)
    return 0


def _target(guest: Guest, found: Found) -> bytes | None:
    return guest.tree.stored_target(found.node) if stat.S_ISLNK(found.attributes.mode) else None


def _as_json(guest: Guest, name: bytes, found: Found) -> dict[str, Any]:
    from nbdserve.cli.img.guest_tree import kind_of

    attributes, target = found.attributes, _target(guest, found)
    facts = {
        "name": name.decode("utf-8", "backslashreplace"),
        "type": kind_of(attributes.mode),
        "mode": f"{stat.S_IMODE(attributes.mode):04o}",
        "links": attributes.links,
        "uid": attributes.uid,
        "gid": attributes.gid,
        "size": attributes.size,
        "allocated": attributes.blocks * 512,
        "mtime-ns": attributes.mtime_ns,
    }
    return facts if target is None else facts | {"target": target.decode("utf-8", "backslashreplace")}


def _print(guest: Guest, found: list[tuple[bytes, Found]], *, long: bool) -> None:
    """One line a file; what a terminal would obey is shown as an escape there, and nowhere else."""
    from nbdserve.cli.common import printable

    rows = [_row(guest, each) if long else ((), b"") for _, each in found]
    widths = [max(map(len, column)) for column in zip(*(row for row, _ in rows), strict=True)]
    for (name, _), (row, target) in zip(found, rows, strict=True):
        cells = " ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        line = (cells + " " if cells else "").encode() + name + target
        if sys.stdout.isatty():
            line = printable(os.fsdecode(line)).encode("utf-8", "backslashreplace")
        sys.stdout.buffer.write(line + b"\n")


def _row(guest: Guest, found: Found) -> tuple[tuple[str, ...], bytes]:
    attributes = found.attributes
    size = str(attributes.size)
    if stat.S_ISBLK(attributes.mode) or stat.S_ISCHR(attributes.mode):
        size = f"{os.major(attributes.device)},{os.minor(attributes.device)}"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(max(0, attributes.mtime_ns // 10**9)))
    target = _target(guest, found)
    mode, owners = stat.filemode(attributes.mode), (str(attributes.uid), str(attributes.gid))
    return (mode, str(attributes.links), *owners, size, when), b"" if target is None else b" -> " + target
