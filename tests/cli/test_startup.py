"""What a server loads before it is ready: everything counts, because each module costs its user milliseconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.reference import run
from tests.serving import COMMAND

CLIENT_ROLE = {f"nbdserve.protocol.{name}" for name in ("handshake_client", "outstanding", "transmission_client")}
FOR_SOME = {"construct", "cffi", "cryptography", "asyncio", "nbdserve.tls", "nbdserve.partitions"}


def imported(*command: str | Path) -> set[str]:
    """The modules that Python says it imports while a command runs to its end."""
    python = [COMMAND[0], "-X", "importtime", *COMMAND[1:]]
    result = subprocess.run([*python, *map(str, command)], capture_output=True, text=True, timeout=20)
    return {line.split("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}


def test_help_and_refusals_need_no_event_loop(tmp_path: Path) -> None:
    for command in (["--help"], [tmp_path / "missing"]):
        modules = imported(*command)
        assert "nbdserve.cli.serve" in modules
        assert not modules & ({"trio", "ssl"} | CLIENT_ROLE | FOR_SOME)


def test_a_raw_image_needs_nothing_that_other_formats_do(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    code = (
        "import sys, nbdserve.cli.serve, nbdserve.opening, nbdserve.server.serving, nbdserve.server.listen;"
        f"nbdserve.opening.open_image({str(path)!r}, format='raw').close();"
        "print(*sys.modules)"
    )
    modules = set(run(sys.executable, "-c", code).split())
    assert {"trio", "nbdserve.formats.raw"} <= modules
    assert not modules & (CLIENT_ROLE | FOR_SOME)


def test_the_collector_rests_only_until_the_server_runs(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    code = (
        "import gc, trio; trio.run = lambda *_: print(gc.isenabled(), gc.get_freeze_count() > 1000);"
        "from nbdserve.cli.serve import main; main()"
    )
    assert run(sys.executable, "-c", code, "-f", "raw", "-k", tmp_path / "socket", path) == "True True\n"
