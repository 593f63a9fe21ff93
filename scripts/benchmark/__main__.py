"""The command line of `scripts/bench`."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path

from benchmark import mounts, report
from benchmark.cases import Case, all_cases
from benchmark.images import MIB, Images
from benchmark.servers import Place, Server, free_port, installed, running
from benchmark.tools import TOOL_CASES, measured
from nbdserve.certificates import make_certificates

_PEERS = ("qemu-nbd", "nbdkit", "nbd-server", *mounts.PEERS)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measure nbdserve beside qemu-nbd, nbdkit and nbd-server, as far as they are installed, nbdimg "
        "beside qemu-img, and fusemount beside fuse2fs, guestmount, qemu-storage-daemon and nbdfuse; fio with its nbd "
        "engine, qemu-img, nbdcopy and mkfs.ext4 have to be there. What counts are ratios: how many times better ours "
        "is.",
    )
    parser.add_argument("-r", "--rounds", type=int, default=5, help="measurements of each program in a case (5)")
    parser.add_argument("-s", "--seconds", type=float, default=2.0, help="length of one measurement with fio (2)")
    parser.add_argument("-c", "--cases", metavar="REGEX", default="", help="only cases whose names match")
    parser.add_argument("-p", "--peers", nargs="*", default=_PEERS, choices=_PEERS, help="measure only these peers")
    parser.add_argument("--size", type=int, default=256, help="MiB of the disks that are served (256)")
    parser.add_argument("--files", type=int, default=2000, help="files in the tree that is mounted (2000)")
    parser.add_argument("--directory", type=Path, help="where to put the disks; default: a temporary directory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw the ratios there")
    parser.add_argument("--list", action="store_true", help="only list the cases")
    return parser


def main() -> int:
    """Measure, print, write."""
    options = _parser().parse_args()
    cases = [case for case in all_cases(options.size * MIB) if re.search(options.cases, case.name)]
    tools = [case for case in TOOL_CASES if re.search(options.cases, case.name)]
    mounting = [case for case in mounts.all_cases(options.files) if re.search(options.cases, case.name)]
    if options.list:
        print("\n".join(case.name for case in (*cases, *tools, *mounting)))
        return 0
    wanted = {"fio", "qemu-img", "nbdcopy"} if cases else {"qemu-img"} if tools else set()
    wanted |= {"mkfs.ext4", "fusermount3"} if mounting else set()
    if missing := [tool for tool in sorted(wanted) if not shutil.which(tool)]:
        print(f"scripts/bench: {', '.join(missing)} not found; install it first", file=sys.stderr)
        return 1
    servers = installed(options.peers)
    print(report.machine(), file=sys.stderr)
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.directory) as folder:
        images = Images(Path(folder), options.size * MIB)
        for case in cases:
            row = _measured(case, servers, images, options.rounds, options.seconds)
            if row.samples:
                rows.append(row)
                print(report.line(row), flush=True)
        for row in measured(tools, images, options.rounds):
            rows.append(row)
            print(report.line(row), flush=True)
        for row in mounts.measured(mounting, options.peers, Path(folder), options.files, options.rounds):
            rows.append(row)
            print(report.line(row), flush=True)
    if options.json:
        options.json.write_text(report.as_json(rows, options.rounds))
    if options.picture:
        options.picture.write_text(report.picture(rows))
    return 0


def _measured(case: Case, servers: list[Server], images: Images, rounds: int, seconds: float) -> report.Row:
    row = report.Row(case)
    certificates = images.folder / "pki"
    if case.transport == "tls" and not certificates.exists():
        make_certificates(certificates)
    for _ in range(rounds):
        for server in servers:
            image = images.renew(case.image) if case.fills else images.get(case.image)
            image.path.read_bytes()  # everything is measured from the page cache
            place = Place(
                images.folder / "socket",
                free_port() if case.transport != "unix" or server.name == "nbd-server" else 0,
                certificates if case.transport == "tls" else None,
                server.export,
            )
            with running(server, image, place) as started:
                if started is not None:
                    row.samples.setdefault(server.name, []).append(case.measure(started, seconds))
    return row


if __name__ == "__main__":
    sys.exit(main())
