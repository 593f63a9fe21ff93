"""nbdattach: a disk image as /dev/nbdN, with its partitions, by the kernel's own NBD client."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import nbdserve
from nbdserve.cli.common import HelpFormatter, format_help, run, say, short_size
from nbdserve.errors import OpenError

if TYPE_CHECKING:
    from nbdserve.kernel.backends import Request
    from nbdserve.kernel.detaching import Attached
    from nbdserve.kernel.system import System

PROGRAM = "nbdattach"

EPILOG = """\
examples:
  nbdattach disk.qcow2                         as the next free /dev/nbdN; prints its partitions
  nbdattach --read-only --partition 1 --mount /mnt disk.vhd
  nbdattach --list
  nbdattach --detach /dev/nbd0                 unmounts, flushes, disconnects, ends the server
  nbdattach loop disk.raw 1                    one partition of a raw image, without NBD

all this needs root and the kernel module nbd, which is loaded if need be;
'fusemount disk.qcow2 /mnt' needs neither.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog=PROGRAM,
        usage="%(prog)s [options] IMAGE\n       %(prog)s --detach DEVICE | --detach --all\n"
        "       %(prog)s --list [--json]\n       %(prog)s --reconnect DEVICE\n"
        "       %(prog)s loop [--mount DIR] [--read-only] IMAGE PARTITION",
        description="Attach a disk image, of any format, to a device of the kernel, with its partitions.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("image", metavar="IMAGE", nargs="?", help="the image file, or the URI of an NBD server")
    result.add_argument("-V", "--version", action="version", version=f"%(prog)s {nbdserve.__version__}")
    result.add_argument("-n", "--dry-run", action="store_true", help="print what would be done, as commands")

    image = result.add_argument_group("attaching")
    image.add_argument("-c", "--device", type=_device, metavar="DEVICE", help="/dev/nbdN; default: any that is free")
    image.add_argument("-f", "--format", metavar="FMT", help=format_help())
    image.add_argument("-r", "--read-only", action="store_true", help="let nothing write to it")
    image.add_argument("-l", "--snapshot", metavar="NAME", help="an internal snapshot (name or ID), read-only")
    image.add_argument(
        "--passphrase-file", metavar="FILE", help="holds the passphrase of images encrypted with LUKS (native)"
    )
    image.add_argument("-m", "--mount", metavar="DIR", help="mount a partition there")
    image.add_argument("-P", "--partition", type=_count, metavar="N", help="which; default: the only one")
    image.add_argument(
        "--backend",
        choices=("native", "qemu"),
        help="who serves: nbdserve, connected by netlink, or qemu-nbd -c; default: native where it works",
    )
    image.add_argument(
        "--connections", type=_count, default=2, metavar="N", help="between the kernel and nbdserve; default: 2"
    )
    image.add_argument(
        "--timeout",
        type=_count,
        default=60,
        metavar="SECONDS",
        help="after which a server that does not answer is given up, and requests fail (native); default: 60",
    )

    other = result.add_argument_group("what is attached")
    other.add_argument("-d", "--detach", type=_device, nargs="?", const=False, metavar="DEVICE", help="undo all of it")
    other.add_argument("--all", action="store_true", help="with --detach: all that nbdattach has attached")
    other.add_argument("--list", action="store_true", help="show devices, partitions, mounts and serving processes")
    other.add_argument("--json", action="store_true", help="with --list: for programs")
    other.add_argument(
        "--reconnect", type=_device, metavar="DEVICE", help="start the server of a device again, if it has died"
    )
    return result


def loop_parser() -> argparse.ArgumentParser:
    """The command line of `nbdattach loop`."""
    result = argparse.ArgumentParser(
        prog=f"{PROGRAM} loop",
        description="One partition of a raw image as a loop device, without NBD.",
        allow_abbrev=False,
    )
    result.add_argument("image", metavar="IMAGE", help="a raw image")
    result.add_argument("partition", metavar="PARTITION", help="its number, UUID or label")
    result.add_argument("-n", "--dry-run", action="store_true", help="only print the command")
    result.add_argument("-r", "--read-only", action="store_true", help="let nothing write to it")
    result.add_argument("-m", "--mount", metavar="DIR", help="mount it there")
    return result


def _device(text: str) -> str:
    """The name of a device, from its path too."""
    name = text.removeprefix("/dev/")
    if not re.fullmatch(r"nbd\d{1,6}", name):
        raise argparse.ArgumentTypeError(f"{text!r} is no device; give one like /dev/nbd0")
    return name


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command `nbdattach`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["loop"]:
        loop_options = loop_parser().parse_args(words[1:])
        run(PROGRAM, lambda: _loop(loop_options))
    command = parser()
    options = command.parse_args(words)
    _check(command, options)
    if options.list:
        run(PROGRAM, lambda: _list(options))
    if options.detach is not None:
        run(PROGRAM, lambda: _detach(options))
    if options.reconnect is not None:
        run(PROGRAM, lambda: _reconnect(options))
    run(PROGRAM, lambda: _attach(options))


def _check(command: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    actions = [options.image is not None, options.list, options.detach is not None, options.reconnect is not None]
    if sum(actions) != 1:
        command.error("give an IMAGE, or one of --detach, --list and --reconnect")
    if options.detach is not None and bool(options.detach) == options.all:
        command.error("--detach takes a DEVICE or --all")
    if options.all and options.detach is None:
        command.error("--all belongs to --detach")
    if options.dry_run and options.reconnect is not None:
        command.error("--dry-run has nothing to show for --reconnect")
    if options.passphrase_file is not None and options.backend == "qemu":
        command.error("--passphrase-file needs the native backend; with qemu-nbd, see its option --object secret")
    if options.passphrase_file == "-":
        command.error("--passphrase-file takes a file here: the server in the background has nobody to ask")
    if options.json and not options.list:
        command.error("--json belongs to --list")


def _tell(line: str) -> None:
    say(PROGRAM, line)


# Attaching


def _request(options: argparse.Namespace) -> Request:
    from nbdserve.kernel.backends import Request

    is_uri = re.match(r"nbds?(\+\w+)?://", options.image)
    if not is_uri and not os.path.exists(options.image):
        raise OpenError(f"{options.image}: No such file or directory")
    return Request(
        image=options.image if is_uri else os.path.abspath(options.image),
        format=options.format,
        read_only=options.read_only or options.snapshot is not None,
        snapshot=options.snapshot,
        device=options.device,
        connections=options.connections,
        seconds=options.timeout,
        passphrase_file=options.passphrase_file and os.path.abspath(options.passphrase_file),
    )


def _attach(options: argparse.Namespace) -> None:
    from nbdserve.kernel.attaching import attach
    from nbdserve.kernel.system import System

    request = _request(options)
    if options.dry_run:
        print("\n".join(_plan(options, request)))
        return
    mountpoint = options.mount and os.path.abspath(options.mount)
    device = attach(request, options.backend, mountpoint, options.partition, System(), _tell)
    print(f"{device.path}\t{short_size(device.size)}")
    for partition in device.partitions:
        print(f"{partition.path}\t{short_size(partition.size)}")
    if mountpoint:
        print(f"mounted at {mountpoint}")


def _plan(options: argparse.Namespace, request: Request) -> list[str]:
    """What _attach would do, as commands."""
    from nbdserve.kernel import backends, module
    from nbdserve.kernel.attaching import mount_command
    from nbdserve.kernel.system import Partition, System

    system = System()
    lines = [shlex.join(command) for command in module.preparation(system)]
    name = request.device or next((each.name for each in system.devices() if not each.is_connected), "nbd0")
    if (options.backend or _backend_to_come()) == "native":
        serve = shlex.join(["nbdserve", *backends.nbdserve_options(request, f"/run/nbdserve/{name}.sock")])
        connect = ["nbd-client", "-unix", f"/run/nbdserve/{name}.sock", f"/dev/{name}", "-C", str(request.connections)]
        lines += [f"{serve} &", f"{shlex.join([*connect, '-timeout', str(request.seconds)])}  # by netlink, ourselves"]
    else:
        lines.append(shlex.join(backends.qemu_nbd_command(request, name)))
    lines.append(f"blockdev --rereadpt /dev/{name}  # if the kernel has not read the table when it opened the device")
    if options.mount:
        number = options.partition or 1
        partition = Partition(f"{name}p{number}", number, 0, 0)
        which = "" if options.partition else "  # if that is the only partition; --partition chooses"
        lines.append(shlex.join(mount_command(partition, options.mount, request.read_only)) + which)
    return lines


def _backend_to_come() -> str:
    """The backend that will be chosen when the module is loaded, which a dry run does not do."""
    from nbdserve.kernel.backends import choose_backend
    from nbdserve.kernel.system import System

    return choose_backend() if System().module() is not None else "native"


# What is attached


def _detach(options: argparse.Namespace) -> None:
    from nbdserve.kernel.detaching import detach, detach_all
    from nbdserve.kernel.module import check_rights
    from nbdserve.kernel.system import System

    if options.dry_run:
        print("\n".join(_detach_plan(options, System())))
        return
    check_rights()
    if not options.all:
        for line in detach(options.detach, System()):
            _tell(line)
        return
    told, failures = detach_all(System())
    for line in [*told, *map(str, failures[:-1])]:
        _tell(line)
    if failures:
        raise failures[-1]


def _detach_plan(options: argparse.Namespace, system: System) -> list[str]:
    from nbdserve.kernel.detaching import attached

    lines = []
    for state in attached(system):
        if state.device.name == options.detach or (options.all and state.record is not None):
            path = state.device.path
            lines += [shlex.join(["umount", mount.target]) for mount in reversed(state.mounts)]
            lines.append(f"blockdev --flushbufs {path}")
            is_qemu = state.record is not None and state.record.backend == "qemu"
            lines.append(
                f"qemu-nbd --disconnect {path}" if is_qemu else f"nbd-client -d {path}  # by netlink, ourselves"
            )
            if state.record is not None and not is_qemu:
                lines.append(f"kill {state.record.server.pid}")
    return lines


def _reconnect(options: argparse.Namespace) -> None:
    from nbdserve.kernel.attaching import reconnect
    from nbdserve.kernel.system import System

    reconnect(options.reconnect, System(), _tell)


def _list(options: argparse.Namespace) -> None:
    from nbdserve.kernel.detaching import attached
    from nbdserve.kernel.system import System

    found = [_description(state) for state in attached(System())]
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for each in found:
        server = f"{each['backend']}, process {each['pid']}" if each["backend"] else f"process {each['pid']}"
        stale = f"  stale: its server is dead; 'nbdattach --detach {each['device']}'" if each["stale"] else ""
        access = "read-only" if each["read_only"] else "read-write"
        print(f"{each['device']}  {short_size(each['size'])}  {access}  {each['image'] or '?'}  ({server}){stale}")
        for mount in each["mounts"]:
            print(f"  mounted at {mount}")
        for part in each["partitions"]:
            print(
                "  "
                + "  ".join([part["device"], short_size(part["size"]), *(f"mounted at {m}" for m in part["mounts"])])
            )


def _description(state: Attached) -> dict[str, Any]:
    device, record = state.device, state.record
    mounts = {path: [mount.target for mount in state.mounts if mount.source == path] for path in _paths(state)}
    return {
        "device": device.path,
        "image": record.image if record else device.backend.removeprefix("nbdserve ") or None,
        "backend": record.backend if record else None,
        "pid": record.server.pid if record else device.pid,
        "stale": state.is_stale,
        "size": device.size,
        "read_only": device.read_only,
        "mounts": mounts[device.path],
        "partitions": [
            {
                "device": partition.path,
                "number": partition.number,
                "offset": partition.offset,
                "size": partition.size,
                "mounts": mounts[partition.path],
            }
            for partition in device.partitions
        ],
    }


def _paths(state: Attached) -> list[str]:
    return [state.device.path, *(partition.path for partition in state.device.partitions)]


# Without NBD


def _loop(options: argparse.Namespace) -> None:
    from nbdserve.kernel.system import Unavailable

    command = _loop_command(options)
    if options.dry_run:
        print(shlex.join(command))
        return
    if os.geteuid() != 0:
        raise Unavailable(f"only root may use loop devices; as root it would be '{shlex.join(command)}'")
    sys.stdout.flush()
    try:
        os.execvp(command[0], command)
    except FileNotFoundError:
        raise Unavailable(
            f"{command[0]} is not installed (package {'mount' if options.mount else 'util-linux'})"
        ) from None


def _loop_command(options: argparse.Namespace) -> list[str]:
    """What makes a loop device of a partition, and mounts it if that is asked for."""
    from nbdserve.block import Window
    from nbdserve.opening import open_image, select_partition

    image = options.image
    with open_image(image, read_only=True) as device, open_image(image, format="raw", read_only=True) as raw:
        if type(device) is not type(raw):
            raise OpenError(f"{image}: not a raw image, and loop devices know no other; use 'nbdattach' for it")
        partition = select_partition(device, options.partition, image, _tell)
        assert isinstance(partition, Window)
        offset, size = partition.start, partition.size
    image = str(Path(image).absolute())
    if options.mount:
        chosen = ["loop", f"offset={offset}", f"sizelimit={size}", *(["ro"] if options.read_only else [])]
        return ["mount", "-o", ",".join(chosen), image, options.mount]
    read_only = ["--read-only"] if options.read_only else []
    return ["losetup", "--find", "--show", *read_only, f"--offset={offset}", f"--sizelimit={size}", image]


if __name__ == "__main__":
    main()
