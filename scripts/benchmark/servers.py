"""How each server is started, watched and stopped. One that is not installed is left out."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmark.images import Image

_READY_SECONDS = 20.0
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Place:
    """Where a server has to listen: on a unix socket or, if `port` is set, on localhost; with TLS if there are
    certificates."""

    socket: Path
    port: int = 0
    certificates: Path | None = None
    export: str = ""

    @property
    def pid_file(self) -> Path:
        """Where a server that leaves the foreground writes its process number."""
        return self.socket.with_suffix(".pid")

    @property
    def plain_uri(self) -> str:
        """How clients name it that know by other means whom to trust."""
        scheme = "nbds" if self.certificates else "nbd"
        return (
            f"{scheme}://localhost:{self.port}/{self.export}"
            if self.port
            else f"{scheme}+unix:///?socket={self.socket}"
        )

    @property
    def uri(self) -> str:
        """How clients name it."""
        if not self.certificates:
            return self.plain_uri
        return f"{self.plain_uri}{'?' if self.port else '&'}tls-certificates={self.certificates}"


Command = Callable[[Image, Place], list[str] | None]
"""The words that start a server in the foreground; None when it cannot serve such an image in such a place."""


@dataclass(frozen=True)
class Server:
    """A program that serves images, and the name under which it exports them."""

    name: str
    command: Command
    export: str = ""


class Running:
    """A server that has been started.

    Attributes:
        seconds_to_ready: from the start of the process to the first byte that a client received.
    """

    def __init__(self, pid: int, place: Place, seconds_to_ready: float) -> None:
        self._pid = pid
        self.place = place
        self.seconds_to_ready = seconds_to_ready

    def processor_seconds(self) -> float:
        """What it has used so far."""
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def memory(self) -> int:
        """Resident bytes."""
        return int(Path(f"/proc/{self._pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def running(server: Server, image: Image, place: Place) -> Iterator[Running | None]:
    """Start a server, wait until it answers, and stop it at the end; None if it cannot do what is asked."""
    command = server.command(image, place)
    if command is None:
        yield None
        return
    place.socket.unlink(missing_ok=True)
    place.pid_file.unlink(missing_ok=True)
    # An installed program has its bytecode beside it; here the first run has to be allowed to write it.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        pid = process.pid
        try:
            _wait_for_greeting(process, place)
            seconds = time.perf_counter() - started
            if place.pid_file.exists():
                pid = int(place.pid_file.read_text())
            yield Running(pid, place, seconds)
        finally:
            _stop(process, pid)


def _stop(process: subprocess.Popen[bytes], pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()


def greeted(place: Place) -> socket.socket:
    """A connection on which the server has said its first word."""
    connection = socket.socket(socket.AF_INET if place.port else socket.AF_UNIX)
    try:
        connection.settimeout(_READY_SECONDS)
        connection.connect(("127.0.0.1", place.port) if place.port else os.fspath(place.socket))
        if not connection.recv(1):
            raise ConnectionError("hung up")
    except OSError:
        connection.close()
        raise
    return connection


def _wait_for_greeting(process: subprocess.Popen[bytes], place: Place) -> None:
    deadline = time.perf_counter() + _READY_SECONDS
    while True:
        try:
            greeted(place).close()
            return
        except OSError:
            if process.poll():
                assert process.stderr is not None
                raise SystemExit(f"{process.args!r} ended: {process.stderr.read().decode().strip()}") from None
            if time.perf_counter() > deadline:
                process.kill()
                raise SystemExit(f"{process.args!r} does not answer") from None
            time.sleep(0.002)


def _nbdserve(image: Image, place: Place) -> list[str]:
    command = [sys.executable, "-m", "nbdserve", os.fspath(image.path), "--format", image.format, "--persistent"]
    if place.port:
        command += ["--bind", "127.0.0.1", "--port", str(place.port)]
    else:
        command += ["--socket", os.fspath(place.socket)]
    return command + (["--tls-certs", os.fspath(place.certificates)] if place.certificates else [])


def _qemu_nbd(image: Image, place: Place) -> list[str]:
    command = ["qemu-nbd", "-f", image.format, "--cache=writeback", "-t", "-e", "200"]
    if place.certificates:
        command += [
            "--object",
            f"tls-creds-x509,id=tls0,endpoint=server,verify-peer=no,dir={place.certificates}",
            "--tls-creds",
            "tls0",
        ]
    command += ["-b", "127.0.0.1", "-p", str(place.port)] if place.port else ["-k", os.fspath(place.socket)]
    return [*command, os.fspath(image.path)]


def _nbdkit(image: Image, place: Place) -> list[str] | None:
    if image.format != "raw":
        return None
    command = ["nbdkit", "-f"]
    if place.certificates:
        command += ["--tls=require", f"--tls-certificates={place.certificates}"]
    command += ["-i", "127.0.0.1", "-p", str(place.port)] if place.port else ["-U", os.fspath(place.socket)]
    return [*command, "file", os.fspath(image.path)]


def _nbd_server(image: Image, place: Place) -> list[str] | None:
    if image.format != "raw" or place.certificates or not place.port:
        return None
    configuration = place.socket.with_suffix(".conf")
    configuration.write_text(
        f"[generic]\nlistenaddr = 127.0.0.1\nport = {place.port}\nallowlist = true\n"
        f"[disk]\nexportname = {image.path}\nflush = true\nfua = true\ntrim = true\n"
    )
    return ["nbd-server", "-C", os.fspath(configuration), "-p", os.fspath(place.pid_file)]


def installed(wanted: Sequence[str]) -> list[Server]:
    """Our server, then those of the wanted ones that this machine has."""
    peers = [Server("qemu-nbd", _qemu_nbd), Server("nbdkit", _nbdkit), Server("nbd-server", _nbd_server, "disk")]
    return [Server("nbdserve", _nbdserve), *(peer for peer in peers if peer.name in wanted and shutil.which(peer.name))]


def free_port() -> int:
    """A TCP port of localhost that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
