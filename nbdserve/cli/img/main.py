"""The command nbdimg: a verb, and what follows it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Any, NoReturn

import nbdserve
from nbdserve.cli.common import HelpFormatter, run
from nbdserve.cli.img.common import Parser, Subparsers

PROGRAM = "nbdimg"

VERBS = {
    "create": "make a new image, empty or on top of another one",
    "convert": "copy an image into another format",
    "info": "tell what an image is",
    "map": "tell which parts hold data, and where",
    "check": "look for damage, and repair it",
    "measure": "tell how much space an image would take",
    "compare": "tell whether two images show the same disk",
    "resize": "change the length of a disk",
    "bitmap": "add, change or remove persistent bitmaps",
    "amend": "change options of an existing image",
    "snapshot": "list, make, apply or delete internal snapshots",
    "overlay": "put a new, empty image on top of another one",
    "commit": "write an overlay's changes into an image below it",
    "rebase": "let an overlay stand on another backing file",
    "flatten": "let an image stand on its own",
    "delete-middle": "take one image out of a chain",
    "partitions": "list partitions, and how to reach them",
    "identify": "tell what a file holds: format, partitions, file systems",
    "ls": "list files inside an image",
    "cat": "print a file inside an image",
    "cp": "copy files out of an image, or into it",
    "tar": "write a tree inside an image as a tar archive",
}

DESCRIPTION = "Make, look into and change disk images; options and output follow qemu-img's."

EPILOG = """\
examples:
  nbdimg create disk.qcow2 20G
  nbdimg convert -p -O qcow2 -c disk.vhd disk.qcow2
  nbdimg info --backing-chain overlay.qcow2
  eval "$(nbdimg --completion bash)"           complete verbs and options in this shell

nbdimg VERB --help tells all about a verb.
"""


def module_of(verb: str) -> Any:
    """The module of a verb."""
    return import_module(f"{__package__}.{verb.replace('-', '_')}")


def build_parser(detailed: Iterable[str]) -> Parser:
    """The command line of the given verbs, in detail; without any, all verbs are known by name.

    Making a parser takes time, of which the user of one verb wants to wait for none that is not needed.
    """
    parser = Parser(
        prog=PROGRAM,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-V", "--version", action="version", version=f"%(prog)s {nbdserve.__version__}")
    parser.add_argument("--completion", choices=("bash", "zsh"), help="print what makes a shell complete this command")
    subparsers: Subparsers = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs", prog=PROGRAM)
    chosen = tuple(detailed)
    for verb in chosen:
        module_of(verb).add_parser(subparsers)
    for verb, summary in VERBS.items() if not chosen else ():
        subparsers.add_parser(verb, help=summary, add_help=False)
    return parser


def main() -> NoReturn:
    """The command `nbdimg`."""
    gc.disable()  # until the work begins: nothing of what is set up is garbage
    verb = sys.argv[1] if len(sys.argv) > 1 and sys.argv[1] in VERBS else None
    parser = build_parser([verb] if verb else [])
    options = parser.parse_args()
    if options.completion:
        from nbdserve.cli.img.completion import script

        run(PROGRAM, lambda: print(script(build_parser(VERBS), options.completion), end=""))
    if verb is None:
        parser.error(f"what is to be done? Give a verb first: {', '.join(VERBS)}")
    module = module_of(verb)
    gc.freeze()
    gc.enable()
    run(PROGRAM, lambda: module.run(options), failure=getattr(module, "FAILURE", 1))
