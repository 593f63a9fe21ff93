"""fusemount: the files in a disk image, for an ordinary user."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

import nbdserve
from nbdserve.cli.common import add_force_share, add_references, format_help, policy_of, run, say
from nbdserve.errors import NbdserveError, OpenError

if TYPE_CHECKING:
    from fusemount.assembly import View
    from fusemount.owners import Owners
    from fusemount.vfs import Tree
    from nbdserve.block import BlockDevice

PROGRAM = "fusemount"

EPILOG = """\
examples:
  fusemount disk.qcow2 mnt                     look into every partition: mnt/p1, mnt/p2, ...
  fusemount --rw --partition 2 --as-root-of-guest disk.qcow2 mnt
                                               change files of the second one, whoever owns them
  fusemount -i disk.qcow2 mnt                  the guest as it sees itself
  fusemount --overlay changes.qcow2 disk.qcow2 mnt
                                               write, but not into disk.qcow2
  fusemount --raw --rw disk.img mnt            partitions as files: mkfs.ext4 mnt/p1, fsck, dd
  fusemount --unmount mnt                      returns when everything is in the image
  fusemount --list disk.qcow2

in /etc/fstab (writable unless it says ro, as mount(8) has it):
  /srv/disk.qcow2  /mnt  fuse.fusemount  ro,noauto,partition=2  0 0
"""

# What -o may hold, besides ro and rw: options of ours, options for the kernel, and what mount(8) and fstab hand over
# that needs nothing of us (dev and suid are never granted).
_OURS = frozenset(
    """partition raw inspect snapshot raw-links format allow-path trust-references passphrase-file overlay force-share
    as-root-of-guest map-uid map-gid foreground""".split()  # noqa: SIM905
)
_HANDED_ON = frozenset(("noexec", "allow_other"))
_IGNORED = frozenset(
    """defaults auto noauto user nouser users nousers owner group nofail _netdev atime noatime diratime nodiratime
    relatime norelatime strictatime lazytime nolazytime exec suid nosuid dev nodev sync async dirsync silent
    loud""".split()  # noqa: SIM905
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog=PROGRAM,
        usage="%(prog)s [options] IMAGE MOUNTPOINT\n       %(prog)s --unmount MOUNTPOINT\n       %(prog)s --list IMAGE",
        description="Mount the files in a disk image, of any format or on a block device, without root.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("image", metavar="IMAGE", nargs="?", help="the image file or block device")
    result.add_argument("mountpoint", metavar="MOUNTPOINT", nargs="?", help="a directory of yours")
    result.add_argument("-V", "--version", action="version", version=f"%(prog)s {nbdserve.__version__}")
    result.add_argument("-u", "--unmount", metavar="MOUNTPOINT", help="unmount, and return when the image is closed")
    result.add_argument("-l", "--list", action="store_true", help="show what the image holds, and mount nothing")
    result.add_argument("--json", action="store_true", help="with --list: for programs")
    result.add_argument("-f", "--foreground", action="store_true", help="stay, and end with the mount")
    result.add_argument("-o", dest="mount_options", action="append", default=[], metavar="OPT,...", help=_O_HELP)

    what = result.add_argument_group("what to see")
    what.add_argument("-P", "--partition", metavar="N", help="only this one, at the mount point; or its label or UUID")
    what.add_argument("--raw", action="store_true", help="the disk and its partitions as files")
    what.add_argument("-i", "--inspect", action="store_true", help="the guest's root, with what its fstab mounts")
    what.add_argument("--snapshot", metavar="NAME", help="an internal snapshot (name or ID), read-only")
    what.add_argument("--raw-links", action="store_true", help="symbolic links as stored, even where they lead outside")

    image = result.add_argument_group("the image")
    image.add_argument("--format", metavar="FMT", help=format_help())
    add_references(image)
    add_force_share(image)

    writing = result.add_argument_group("writing")
    whether = writing.add_mutually_exclusive_group()
    whether.add_argument("-r", "--read-only", action="store_true", help="only read the image, which is the default")
    whether.add_argument("-w", "--rw", action="store_true", help="change the image")
    writing.add_argument(
        "--overlay",
        metavar="FILE",
        help="keep what is written in this qcow2 file instead (made if missing); 'discard' throws it away in the end",
    )

    owners = result.add_argument_group("whose files")
    owners.add_argument(
        "--as-root-of-guest",
        action="store_true",
        help="be allowed what the guest's root is; what is created belongs to it",
    )
    for kind in ("uid", "gid"):
        owners.add_argument(
            f"--map-{kind}",
            action="append",
            default=[],
            metavar="RANGE",
            help=f"GUEST:HOST:COUNT; show the guest's {kind}s from GUEST on as those from HOST on (may be repeated)",
        )
    return result


_O_HELP = "the options above without their dashes, ro, rw, allow_other, and what mount(8) and fstab know"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command `fusemount`."""
    command = parser()
    options = command.parse_args(arguments)
    handed_on = _apply_mount_options(command, options)
    if options.unmount is not None:
        run(PROGRAM, lambda: _unmount(options.unmount))
    if options.image is None:
        command.error("which image?")
    if options.list:
        run(PROGRAM, lambda: _list(options))
    if options.mountpoint is None:
        command.error("which mount point?")
    _check(command, options)
    run(PROGRAM, lambda: _mount(options, handed_on))


def mount_main() -> NoReturn:
    """The command `mount.fuse.fusemount`, which mount(8) calls: SPEC DIR [-sfnv] [-o options] [-t type] [-N ns]."""
    command = argparse.ArgumentParser(prog="mount.fuse.fusemount", allow_abbrev=False)
    command.add_argument("image")
    command.add_argument("mountpoint")
    for flag in "sfnv":
        command.add_argument(f"-{flag}", action="store_true")
    for option in "otN":
        command.add_argument(f"-{option}", action="append", default=[])
    given = command.parse_args()
    if given.f:
        sys.exit(0)
    main([given.image.removeprefix("fusemount#"), given.mountpoint, *(part for o in given.o for part in ("-o", o))])


def _apply_mount_options(command: argparse.ArgumentParser, options: argparse.Namespace) -> set[str]:
    """Let -o do what the option of the same name does; returns what is for the kernel."""
    handed_on = set()
    for each in ",".join(options.mount_options).split(","):
        name, separator, value = each.partition("=")
        if name in _HANDED_ON:
            handed_on.add(name)
        elif name in ("ro", "rw"):
            options.rw = name == "rw"
        elif name and name not in _IGNORED and not name.startswith(("x-", "X-", "comment")):
            ours = name.replace("_", "-")
            if ours not in _OURS:
                command.error(f"-o {name}: there is no such option")
            names = [each for each in (options.image, options.mountpoint) if each is not None]
            command.parse_args([f"--{ours}{separator}{value}", "--", *names], options)
    return handed_on


def _check(command: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Options that contradict each other."""
    if options.json:
        command.error("--json goes with --list")
    if options.force_share and (options.rw or options.overlay is not None):
        command.error("--force-share is only for looking at an image; leave --rw and --overlay out")
    if options.snapshot is not None and options.overlay is not None:
        command.error("--snapshot and --overlay exclude each other: an overlay cannot stand on a snapshot")
    if options.snapshot is not None and options.rw:
        command.error("--snapshot shows the past, which cannot be written; leave --rw out")
    if options.raw and options.inspect:
        command.error("--raw and --inspect exclude each other")


def _unmount(mountpoint: str) -> None:
    from fusemount import mounting
    from fusemount.state import MountEnd

    end = MountEnd(mountpoint)
    mounting.sync(mountpoint)
    try:
        mounting.unmount(os.path.realpath(mountpoint))
    except OSError as error:
        raise OpenError(
            f"{mountpoint}: {error.strerror}; close the files in it ('fuser -m' names who uses it)"
        ) from None
    end.wait()


def _list(options: argparse.Namespace) -> None:
    from fusemount.listing import as_json, as_table, describe

    with _open_image(options, read_only=True) as device:
        try:
            description = describe(options.image, device, lambda line: say(PROGRAM, f"{options.image}: {line}"))
        except NbdserveError as error:
            raise type(error)(f"{options.image}: {error}") from None
    print(as_json(description) if options.json else as_table(description))


def _open_image(options: argparse.Namespace, *, read_only: bool) -> BlockDevice:
    from nbdserve.opening import open_image

    policy = policy_of(options)

    def warn(line: str) -> None:
        say(PROGRAM, line)

    if options.overlay is not None and not read_only:
        from fusemount.overlay import open_overlay

        return open_overlay(options.image, options.overlay, options.format, policy, warn)
    return open_image(
        options.image,
        format=options.format,
        read_only=read_only,
        snapshot=options.snapshot,
        policy=policy,
        force_share=options.force_share,
        warn=warn,
    )


def _mount(options: argparse.Namespace, handed_on: set[str]) -> None:
    """In the foreground here; otherwise in a child, of which we only await that it has mounted."""
    gc.disable()  # until all is set up: nothing of that is garbage
    from fusemount import mounting

    mounting.check_host()
    mountpoint = mounting.check_mountpoint(options.mountpoint)
    if options.foreground:
        _serve(options, mountpoint, handed_on, lambda: None, lambda line: say(PROGRAM, line))
        return
    from fusemount.background import in_background

    if options.passphrase is not None:
        options.passphrase.ask_now()
    in_background(lambda ready, log: _serve(options, mountpoint, handed_on, ready, log))


def _serve(
    options: argparse.Namespace,
    mountpoint: str,
    handed_on: set[str],
    ready: Callable[[], None],
    log: Callable[[str], None],
) -> None:
    """Open, mount, serve, close; leaves word of how it ended for whoever unmounts.

    Raises:
        NbdserveError, OSError: something failed, at the beginning or in the end.
    """
    from fusemount.assembly import Assembly
    from fusemount.state import MountState

    owners = _owners(options)
    view = _view(options, mountpoint)
    assembly = Assembly(_open_image(options, read_only=not view.writable), view, lambda line: say(PROGRAM, line))
    state = MountState()
    failure: str | None = "it was interrupted"
    try:
        try:
            from fusemount.serving import mount_and_serve

            mount_options = _mount_options(options.image, assembly.tree, owners) | handed_on
            mount_and_serve(assembly.tree, owners, state, mountpoint, mount_options, ready, log)
        finally:
            assembly.close()
        failure = None
    except (NbdserveError, OSError) as error:
        failure = str(error)
        raise
    except ImportError as error:
        raise OpenError(f"pyfuse3 cannot be loaded: {error}; pip install 'nbdserve[fuse]'") from None
    finally:
        state.finish(failure)


def _owners(options: argparse.Namespace) -> Owners:
    from fusemount.owners import IdMap, Owners, id_range

    return Owners(
        os.geteuid(),
        os.getegid(),
        options.as_root_of_guest,
        IdMap(tuple(map(id_range, options.map_uid))),
        IdMap(tuple(map(id_range, options.map_gid))),
    )


def _view(options: argparse.Namespace, mountpoint: str) -> View:
    from fusemount.assembly import View

    return View(
        name=options.image,
        writable=options.rw or options.overlay is not None,
        partition=options.partition,
        raw=options.raw,
        inspect=options.inspect,
        raw_links=options.raw_links,
        path=mountpoint,
    )


def _mount_options(image: str, tree: Tree, owners: Owners) -> set[str]:
    """What the kernel and fusermount3 are told; commas and backslashes would end an option there."""
    shown = "".join(c if c.isascii() and c.isprintable() and c not in ",\\" else "_" for c in image)
    result = {f"fsname={shown}", "subtype=fusemount", "nosuid", "nodev"}
    if all(member.fs.read_only for member in tree.members):
        result.add("ro")
    if not owners.root_of_guest:
        result.add("default_permissions")
    return result
