"""Runs nbdimg as a user does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

NBDIMG = [sys.executable, "-c", "from nbdserve.cli.img.main import main; main()"]


def nbdimg(*arguments: str | Path, status: int = 0, timeout: float = 60) -> str:
    """The standard output of a command that ends with the expected status; after a failure, its one line on stderr."""
    result = subprocess.run([*NBDIMG, *map(str, arguments)], capture_output=True, text=True, timeout=timeout)
    assert result.returncode == status, f"{arguments} -> {result.returncode}\n{result.stdout}{result.stderr}"
    assert "Traceback" not in result.stderr, result.stderr
    return result.stdout if status == 0 else result.stdout + result.stderr
