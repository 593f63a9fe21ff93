"""What every test shares: the rule for tests that need other people's programs and modules."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked needs(...) where something is missing; on CI, where all is installed, that is a failure."""
    for mark in item.iter_markers("needs"):
        missing = [name for name in mark.args if not _is_there(name)]
        if missing:
            reason = f"needs {', '.join(missing)}"
            if os.environ.get("CI"):
                pytest.fail(f"{reason}: add the package to .ci/run", pytrace=False)
            pytest.skip(reason)


def _is_there(name: str) -> bool:
    """Whether a program or, with "module:" before its name, a module is installed."""
    if name.startswith("module:"):
        return find_spec(name.removeprefix("module:")) is not None
    return shutil.which(name) is not None
