"""What tests with other people's programs share: a server of its own process, and certificates."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.interop.certificates import Certificates, make_certificates

READY_SECONDS = 20.0
STOP_SECONDS = 20.0

Serve = Callable[..., AbstractContextManager[str]]


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificate directories, good ones and bad ones."""
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def serve() -> Serve:
    """`with serve(image, *options) as uri:` runs nbdserve on a free port of localhost, and ends it with SIGTERM.

    Error handling:
        AssertionError if the server does not tell its URI in `READY_SECONDS`, or does not end with status 0 in
        `STOP_SECONDS`. Its stderr is the test's.
    """
    return _serving


@contextmanager
def _serving(image: Path, *options: str) -> Iterator[str]:
    command = [sys.executable, "-m", "nbdserve", str(image), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            impatience = threading.Timer(READY_SECONDS, process.kill)
            impatience.start()
            line = process.stdout.readline()
            impatience.cancel()
            uri = re.search(r"nbds?://\S+", line)
            assert uri, f"no URI in the server's first line, {line!r} (it has {READY_SECONDS:.0f} s to print it)"
            yield uri[0]
            process.terminate()
            assert process.wait(STOP_SECONDS) == 0
        finally:
            process.kill()
