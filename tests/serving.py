"""nbdserve as a user runs it: a process of its own, with its URI, its stderr and its orderly end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qs, urlsplit

COMMAND = [sys.executable, "-m", "nbdserve"]

READY_SECONDS = 20.0
STOP_SECONDS = 20.0

Argument = str | os.PathLike[str]


class Served:
    """`with Served(image, *options) as server:` runs nbdserve, and ends it with SIGTERM.

    Without --port or --socket among the options it listens on a free port of localhost.

    Attributes:
        uri: the line that the server printed when it was ready.
        process: the server.
        stderr: the lines it has written there so far.

    Error handling:
        AssertionError if no URI comes in READY_SECONDS, if the end takes longer than STOP_SECONDS or has another
        status than 0, and if a traceback was printed.
    """

    def __init__(self, image: Argument, *options: Argument) -> None:
        somewhere = {"--port", "-p", "--socket", "-k"}.isdisjoint(options)
        self.command = [*COMMAND, os.fspath(image), *map(os.fspath, options), *(["--port", "0"] if somewhere else [])]
        self.uri = ""
        self.stderr: list[str] = []

    def __enter__(self) -> Served:
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self._collector = threading.Thread(target=self._collect, daemon=True)
        self._collector.start()
        impatience = threading.Timer(READY_SECONDS, self.process.kill)
        impatience.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        impatience.cancel()
        found = re.fullmatch(r"(nbds?(?:\+unix)?://\S*)\n", line)
        if not found:
            self._end()
            raise AssertionError(f"no URI in the server's first line {line!r}; stderr: {self.stderr}")
        self.uri = found[1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self.process.poll() is None:
                self.stop()
        finally:
            self._end()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End the server as a user does, and see that it ends well."""
        self.process.send_signal(number)
        self.wait()

    def wait(self) -> None:
        """Wait for the orderly end of a server that has been told to stop."""
        status = self.process.wait(STOP_SECONDS)
        self._collector.join(STOP_SECONDS)
        assert status == 0, f"status {status}; stderr: {self.stderr}"
        assert not any("Traceback" in line for line in self.stderr), self.stderr

    def wait_for_line(self, text: str, count: int = 1, seconds: float = 10.0) -> None:
        """Return once that many lines of stderr contain the text."""
        deadline = time.monotonic() + seconds
        while sum(text in line for line in self.stderr) < count:
            assert time.monotonic() < deadline, f"{count} x {text!r} did not appear; stderr: {self.stderr}"
            assert self.process.poll() is None, f"the server has ended; stderr: {self.stderr}"
            time.sleep(0.01)

    def connect(self, seconds: float = 20.0) -> socket.socket:
        """A plain connected socket; everything on it takes at most this many seconds."""
        parts = urlsplit(self.uri)
        if "+unix" in parts.scheme:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(seconds)
            sock.connect(parse_qs(parts.query)["socket"][0])
            return sock
        return socket.create_connection((parts.hostname, parts.port or 10809), timeout=seconds)

    def _collect(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.stderr.append(line.rstrip("\n"))

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._collector.join(STOP_SECONDS)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


def run_nbdserve(*arguments: Argument, timeout: float = 20.0) -> subprocess.CompletedProcess[str]:
    """Run a command line that is expected to end by itself."""
    return subprocess.run([*COMMAND, *map(os.fspath, arguments)], capture_output=True, text=True, timeout=timeout)


def refusal(*arguments: Argument) -> str:
    """The one line in which nbdserve refuses a command line, without "nbdserve: "; it must end with status 1."""
    result = run_nbdserve(*arguments)
    assert result.returncode == 1, result
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("nbdserve: "), result.stderr
    return lines[0].removeprefix("nbdserve: ")


def resident_bytes(process: subprocess.Popen[str]) -> int:
    """How much memory a process uses at this moment."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")
