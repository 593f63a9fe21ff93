"""What every test shares: the rule for tests that need other people's programs."""

from __future__ import annotations

import os
import shutil

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked needs(...) where a program is missing; on CI, where all are installed, that is a failure."""
    for mark in item.iter_markers("needs"):
        missing = [program for program in mark.args if shutil.which(program) is None]
        if missing:
            reason = f"needs {', '.join(missing)}"
            if os.environ.get("CI"):
                pytest.fail(f"{reason}: add the package to .ci/run", pytrace=False)
            pytest.skip(reason)
