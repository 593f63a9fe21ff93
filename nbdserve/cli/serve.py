"""nbdserve: serve a disk image over NBD."""

from __future__ import annotations

import argparse
import gc
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import nbdserve
from nbdserve.block import BlockDevice
from nbdserve.cli.certificates import add_certificate_options, make
from nbdserve.cli.common import (
    HelpFormatter,
    add_force_share,
    add_references,
    byte_size,
    format_help,
    policy_of,
    run,
    say,
)
from nbdserve.errors import NbdserveError

if TYPE_CHECKING:
    import ssl

PROGRAM = "nbdserve"

EPILOG = """\
examples:
  nbdserve disk.qcow2                          read and write, at nbd://localhost (port 10809)
  nbdserve -r -P 1 disk.vhd                    the first partition, read-only
  nbdserve -r -U disk.qcow2                    a look at the disk of a machine that is running
  nbdserve -k /tmp/disk.sock disk.qcow2        on a unix socket
  nbdserve --tls-certs pki --bind 0.0.0.0 disk.qcow2
                                               encrypted, for other machines
  nbdinfo [ nbdserve disk.qcow2 ]              for the time that another command runs
  nbdcopy [ nbdserve disk.qcow2 ] disk.raw

stop it with Ctrl-C or SIGTERM: requests in flight are finished and the image is flushed.
"""


def parser() -> argparse.ArgumentParser:
    """The command line; short options are qemu-nbd's."""
    result = argparse.ArgumentParser(
        prog=PROGRAM,
        usage="%(prog)s [options] IMAGE\n       %(prog)s --make-certs DIR [--host NAME]... [--client NAME]...",
        description="Serve a disk image, of any format or on a block device, over NBD.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument(
        "image", metavar="IMAGE", nargs="?", help="the image file, block device, or URI of an NBD server"
    )
    result.add_argument("-V", "--version", action="version", version=f"%(prog)s {nbdserve.__version__}")
    result.add_argument("-v", "--verbose", action="store_true", help="tell of clients that come and go")

    image = result.add_argument_group("the image")
    image.add_argument("-f", "--format", metavar="FMT", help=format_help())
    image.add_argument("-r", "--read-only", action="store_true", help="refuse writes, open nothing for writing")
    add_force_share(image)
    image.add_argument(
        "-P", "--partition", metavar="N", help="serve only partition N (logical ones from 5); or its UUID or label"
    )
    image.add_argument("-o", "--offset", type=byte_size, default=0, metavar="BYTES", help="serve from this offset on")
    image.add_argument("--size", type=byte_size, metavar="BYTES", help="serve only this many bytes")
    image.add_argument(
        "-l", "--snapshot", "--load-snapshot", metavar="NAME", help="serve an internal snapshot (name or ID), read-only"
    )
    add_references(image)

    where = result.add_argument_group("where to listen")
    where.add_argument("-p", "--port", type=_port, metavar="PORT", help="TCP port, 0 for any free one; default: 10809")
    where.add_argument(
        "-b",
        "--bind",
        metavar="ADDRESS",
        help="address to listen on; default: localhost, 0.0.0.0 for all of this machine's",
    )
    where.add_argument("-k", "--socket", metavar="PATH", help="listen on a unix socket instead")

    export = result.add_argument_group("the export")
    export.add_argument(
        "-x", "--export-name", type=_export_name, default="", metavar="NAME", help="default: the empty name"
    )
    export.add_argument("-D", "--description", default="", metavar="TEXT", help="a line for people who list exports")
    export.add_argument(
        "-e", "--shared", type=_count, default=100, metavar="N", help="clients at the same time; default: 100"
    )
    export.add_argument(
        "-t", "--persistent", action="store_true", help="go on when the last client has left (always so)"
    )

    tls = result.add_argument_group(
        "encryption", "by certificates; pre-shared keys are not served, because Python has none before 3.13"
    )
    tls.add_argument(
        "--tls-certs", metavar="DIR", help="directory with ca-cert.pem, server-cert.pem, server-key.pem[, ca-crl.pem]"
    )
    tls.add_argument(
        "--tls",
        choices=("off", "on", "require"),
        help="on: clients may encrypt, require: they must; default: require with --tls-certs, else off",
    )
    tls.add_argument("--tls-verify-peer", action="store_true", help="clients need a certificate that the CA has signed")
    add_certificate_options(result.add_argument_group("making certificates"))
    return result


def _export_name(text: str) -> str:
    from nbdserve.protocol.strings import encode

    try:
        encode(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"the name {error}; no client could ask for it") from None
    return text


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; give a number from 0 to 65535")
    return int(text)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of clients; give 1 or more")
    return int(text)


def main() -> NoReturn:
    """The command `nbdserve`."""
    gc.disable()  # until all is set up: nothing of that is garbage, and the collector would take a tenth of the time
    arguments = parser()
    options = arguments.parse_args()
    if options.make_certs is not None:
        if options.image is not None:
            arguments.error("--make-certs makes certificates and serves nothing; leave IMAGE out")
        run(PROGRAM, lambda: make(options))
    if options.host or options.client:
        arguments.error("--host and --client say whom --make-certs makes certificates for")
    if options.image is None:
        arguments.error("the following arguments are required: IMAGE")
    if options.tls in ("on", "require") and options.tls_certs is None:
        arguments.error(f"--tls {options.tls} needs --tls-certs DIR")
    if options.tls_verify_peer and options.tls_certs is None:
        arguments.error("--tls-verify-peer needs --tls-certs DIR")
    if options.socket is not None and (options.port is not None or options.bind is not None):
        arguments.error("--socket and --port/--bind exclude each other; start a second server for the other one")
    run(PROGRAM, lambda: _serve(options))


def _serve(options: argparse.Namespace) -> None:
    """Open, listen, serve; whatever was opened is closed again, in the reverse order."""
    warnings: list[str] = []  # shown once all is well: an error has its one line for itself
    keys = _keys(options)
    device = _open_device(options, warnings.append)
    try:
        listeners, activated = _listen(options)
        try:
            warnings += _exposure(options, listeners)
            for line in warnings:
                say(PROGRAM, line)
            _run_server(options, device, listeners, activated, keys)
        finally:
            _close_listeners(options, listeners)
    except BaseException:
        _close_after_failure(device)
        raise
    device.close()


def _close_after_failure(device: BlockDevice) -> None:
    """The failure that ended us is what the user has to hear; that closing failed as well is said beside it."""
    try:
        device.close()
    except (NbdserveError, OSError) as error:
        say(PROGRAM, f"closing the image: {error}")


def _open_device(options: argparse.Namespace, warn: Callable[[str], None]) -> BlockDevice:
    from nbdserve.opening import open_image, select_partition, select_range

    device = open_image(
        options.image,
        format=options.format,
        read_only=options.read_only,
        force_share=options.force_share,
        snapshot=_snapshot_name(options.snapshot),
        policy=policy_of(options),
        warn=warn,
    )
    try:
        chosen = device
        if options.partition is not None:
            chosen = select_partition(device, options.partition, options.image, warn)
        return select_range(chosen, options.offset, options.size)
    except BaseException:
        device.close()
        raise


def _snapshot_name(text: str | None) -> str | None:
    """qemu-nbd also spells it snapshot.id=ID or snapshot.name=NAME."""
    return text and text.removeprefix("snapshot.id=").removeprefix("snapshot.name=")


def _listen(options: argparse.Namespace) -> tuple[list[socket.socket], bool]:
    """The listening sockets, and whether someone else had opened them for us."""
    from nbdserve.server.listen import DEFAULT_PORT, ListenError, activated_sockets, listen_tcp, listen_unix

    handed_over = activated_sockets()
    if handed_over:
        if options.socket is not None or options.port is not None or options.bind is not None:
            raise ListenError("the caller has opened the socket (LISTEN_FDS): leave --port, --bind and --socket out")
        return handed_over, True
    if options.socket is not None:
        return [listen_unix(options.socket)], False
    port = DEFAULT_PORT if options.port is None else options.port
    return listen_tcp(options.bind or "localhost", port), False


def _close_listeners(options: argparse.Namespace, listeners: list[socket.socket]) -> None:
    for listener in listeners:
        listener.close()
    if options.socket is not None:
        Path(options.socket).unlink(missing_ok=True)


def _exposure(options: argparse.Namespace, listeners: list[socket.socket]) -> list[str]:
    """The warning that is due when other machines can read everything without a key."""
    from nbdserve.server.listen import is_beyond_loopback

    if _tls_mode(options) == "require" or not any(is_beyond_loopback(listener) for listener in listeners):
        return []
    return ["warning: other machines can reach this server without encryption; see --tls-certs"]


def _tls_mode(options: argparse.Namespace) -> str:
    return str(options.tls or ("require" if options.tls_certs else "off"))


def _keys(options: argparse.Namespace) -> ssl.SSLContext | None:
    """What TLS needs, checked before anything is opened; None without it."""
    if _tls_mode(options) == "off":
        return None
    from nbdserve.tls import server_context

    return server_context(options.tls_certs, verify_peer=options.tls_verify_peer)


def _run_server(
    options: argparse.Namespace,
    device: BlockDevice,
    listeners: list[socket.socket],
    activated: bool,
    keys: ssl.SSLContext | None,
) -> None:
    import trio

    from nbdserve.protocol.handshake_server import TlsMode
    from nbdserve.server.connection import Policy
    from nbdserve.server.exports import Export, ExportTable
    from nbdserve.server.listen import nbd_uri
    from nbdserve.server.serving import WORKER_THREADS, Server

    mode = TlsMode(_tls_mode(options))
    uri = nbd_uri(listeners[0], options.export_name, tls=mode is TlsMode.REQUIRE)
    policy = Policy(
        exports=ExportTable([Export(options.export_name, device, options.description)]),
        tls=mode,
        tls_context=keys,
        workers=trio.CapacityLimiter(WORKER_THREADS),
        report=lambda line: say(PROGRAM, line),
        debug=(lambda line: say(PROGRAM, line)) if options.verbose else (lambda line: None),
    )

    def ready() -> None:
        if not activated:  # then stdout belongs to the command that has started us
            print(uri, flush=True)

    gc.freeze()  # modules live to the end; looking at them in each full collection would hold up requests
    gc.enable()
    trio.run(Server(listeners, policy, options.shared).run, ready)
