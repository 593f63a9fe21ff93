"""Boot a guest from an image that nbdserve serves; prints the two commands that do it.

scripts/boot-guest [--tcp | --tls] IMAGE [QEMU's options]
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from nbdserve.errors import NbdserveError
from nbdserve.server.listen import DEFAULT_PORT

STOP_SECONDS = 60.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="scripts/boot-guest",
        description="Serve an image with nbdserve and boot a guest from it, in QEMU. What follows IMAGE is for QEMU: "
        "scripts/boot-guest disk.qcow2 -m 2G -nographic",
        allow_abbrev=False,
    )
    result.add_argument("-f", "--format", metavar="FMT", help="of the image; default: recognised by content")
    result.add_argument("-r", "--read-only", action="store_true", help="serve it read-only; the guest writes to memory")
    result.add_argument("--tcp", action="store_true", help="over TCP; default: a unix socket")
    result.add_argument("--tls", action="store_true", help="over TCP with TLS; makes certificates for both")
    result.add_argument("-n", "--dry-run", action="store_true", help="only print commands that do the same here")
    result.add_argument("image", metavar="IMAGE")
    result.add_argument("qemu", metavar="...", nargs=argparse.REMAINDER, help="options for qemu-system-x86_64")
    return result


def server_command(options: argparse.Namespace, folder: Path) -> list[str]:
    """The words that start nbdserve."""
    port = DEFAULT_PORT if options.dry_run else 0
    where = ["--port", str(port)] if options.tcp or options.tls else ["--socket", str(folder / "disk.sock")]
    return [
        "nbdserve",
        *(["--format", options.format] if options.format else []),
        *(["--read-only"] if options.read_only else []),
        *where,
        *(["--tls-certs", str(folder / "pki"), "--tls-verify-peer"] if options.tls else []),
        *("--", options.image),
    ]


def qemu_command(options: argparse.Namespace, uri: str, folder: Path) -> list[str]:
    """The words that start QEMU (7.2 and later) with the export as its disk."""
    parts = urlsplit(uri)
    if options.tcp or options.tls:
        where = f"host={parts.hostname},port={parts.port}"
    else:
        where = f"server.type=unix,server.path={str(folder / 'disk.sock').replace(',', ',,')}"
    pki = str(folder / "pki").replace(",", ",,")
    return [
        *("qemu-system-x86_64", "-machine", "accel=kvm:tcg", "-m", "1G"),
        *(["-object", f"tls-creds-x509,id=tls0,dir={pki},endpoint=client"] if options.tls else []),
        "-drive",
        f"driver=nbd,{where}"
        + (",tls-creds=tls0" if options.tls else "")
        + (",snapshot=on" if options.read_only else ",discard=unmap")
        + (",open-timeout=30" if options.dry_run else "")  # whoever pastes all lines at once does not wait
        + ",if=virtio",
        *options.qemu,
    ]


def main() -> int:
    """Do what the command line says; QEMU's exit status, or the server's if that failed."""
    options = parser().parse_args()
    program = shutil.which("qemu-system-x86_64")
    if program is None and not options.dry_run:
        print("scripts/boot-guest: qemu-system-x86_64 is not installed (package qemu-system-x86)", file=sys.stderr)
        return 1
    if options.dry_run:
        here = Path()
        _tell_server(options, here)
        print(shlex.join(qemu_command(options, f"nbd://localhost:{DEFAULT_PORT}", here)), file=sys.stderr)
        return 0
    with tempfile.TemporaryDirectory(prefix="boot-guest-") as name:
        try:
            return _boot(options, Path(name))
        except NbdserveError as error:
            print(f"scripts/boot-guest: {error}", file=sys.stderr)
            return 1


def _tell_server(options: argparse.Namespace, folder: Path) -> None:
    if options.tls:
        print(f"nbdserve --make-certs {folder / 'pki'}", file=sys.stderr)
    print(f"{shlex.join(server_command(options, folder))} &", file=sys.stderr)


def _boot(options: argparse.Namespace, folder: Path) -> int:
    _tell_server(options, folder)
    serve = server_command(options, folder)
    if options.tls:
        from nbdserve.certificates import make_certificates

        make_certificates(folder / "pki")
    with subprocess.Popen([sys.executable, "-m", *serve], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        uri = server.stdout.readline().strip()
        if not uri:
            return server.wait()
        qemu = qemu_command(options, uri, folder)
        print(shlex.join(qemu), file=sys.stderr, flush=True)
        try:
            status = subprocess.run(qemu).returncode
        finally:
            server.terminate()
        return server.wait(STOP_SECONDS) or status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
