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
    out, err = _stream(), _stream()
    argv = ["nbdimg", *map(str, arguments)]
    try:
        with patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code
    finally:
        gc.enable()
        gc.unfreeze()
    printed, said = _text(out), _text(err)
    assert code == status, f"{argv} -> {code}\n{printed}{said}"
    return printed if status == 0 else printed + said


def _stream() -> io.TextIOWrapper:
    """What takes text and, as its buffer, the bytes of files."""
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="surrogateescape", newline="")


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode("utf-8", "surrogateescape")
