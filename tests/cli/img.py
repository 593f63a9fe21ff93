"""Runs nbdimg as a user does, but for the process."""

from __future__ import annotations

import gc
import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from nbdserve.cli.img.main import main

NBDIMG = [sys.executable, "-c", "from nbdserve.cli.img.main import main; main()"]
"""The command as a process of its own."""


def nbdimg(*arguments: str | Path, status: int = 0) -> str:
    """What a command prints that ends with the expected status; after a failure with what it says on stderr."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["nbdimg", *map(str, arguments)]
    try:
        with patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code
    finally:
        gc.enable()
        gc.unfreeze()
    assert code == status, f"{argv} -> {code}\n{out.getvalue()}{err.getvalue()}"
    return out.getvalue() if status == 0 else out.getvalue() + err.getvalue()
