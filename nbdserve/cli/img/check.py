"""nbdimg check: damage, and what can be done about it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nbdserve.cli.common import policy_of
from nbdserve.cli.img.common import Subparsers, add_format, add_opening, add_output, add_verb, print_json, warn

if TYPE_CHECKING:
    from nbdserve.imagetools.checking import Report

_CORRUPT, _LEAKS, _NOT_CHECKED = 2, 3, 63

EXAMPLES = """\
  nbdimg check disk.qcow2
  nbdimg check -r leaks disk.qcow2             give leaked space back
  nbdimg check -r all disk.qcow2               repair all that can be repaired

exit status: 0 sound, 1 not checked, 2 damaged, 3 only leaks, 63 the format has nothing to check
"""


def add_parser(subparsers: Subparsers) -> None:
    """The verb's command line."""
    parser = add_verb(subparsers, "check", "Look for damage in an image, and repair it.", EXAMPLES)
    parser.add_argument("image", metavar="IMAGE", help="the image; those that it stands on are not looked at")
    add_format(parser)
    parser.add_argument("-r", "--repair", choices=("leaks", "all"), help="what to repair")
    add_output(parser)
    add_opening(parser)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says."""
    from nbdserve.imagetools.checking import check

    report = check(
        options.image,
        format=options.format,
        repair=options.repair,
        force_share=options.force_share,
        policy=policy_of(options),
    )
    if report is None:
        warn(f"{options.image}: images of this format have nothing that could be checked")
        return _NOT_CHECKED
    if options.output == "json":
        print_json(_as_json(options.image, report))
    elif not options.quiet:
        _print(report)
    return _CORRUPT if report.corruptions else _LEAKS if report.leaks else 0


def _as_json(name: str, report: Report) -> dict[str, object]:
    """QEMU's ImageCheck, which leaves out what is 0."""
    numbers = {
        "image-end-offset": report.end,
        "total-clusters": report.total,
        "allocated-clusters": report.allocated,
        "fragmented-clusters": report.fragmented,
        "compressed-clusters": report.compressed,
        "corruptions": report.corruptions,
        "leaks": report.leaks,
        "corruptions-fixed": report.corruptions_fixed,
        "leaks-fixed": report.leaks_fixed,
    }
    found: dict[str, object] = {"filename": name, "format": report.format, "check-errors": 0}
    return found | {key: number for key, number in numbers.items() if number}


def _print(report: Report) -> None:
    for line in report.problems:
        warn(line)
    if report.leaks_fixed or report.corruptions_fixed:
        print("The following inconsistencies were found and repaired:\n")
        print(f"    {report.leaks_fixed} leaked clusters\n    {report.corruptions_fixed} corruptions\n")
    if report.corruptions:
        print(f"{report.corruptions} errors were found on the image.")
        print("Data may be corrupted, or further writes to the image may corrupt it.")
    if report.leaks:
        print(f"{report.leaks} leaked clusters were found on the image.")
        print("This means waste of disk space, but no harm to data.")
    if not report.corruptions and not report.leaks:
        print("No errors were found on the image.")
    if report.total:
        shares = [100 * count / (report.allocated or 1) for count in (report.fragmented, report.compressed)]
        print(
            f"{report.allocated}/{report.total} = {100 * report.allocated / report.total:.2f}% allocated, "
            f"{shares[0]:.2f}% fragmented, {shares[1]:.2f}% compressed clusters"
        )
        print(f"Image end offset: {report.end}")
