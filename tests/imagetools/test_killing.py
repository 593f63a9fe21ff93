"""A few moments of each kind of work at which it is killed; `scripts/trial killed-tools` tries many."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from tests.imagetools.killing import KINDS, play
from tests.reference import needs


@needs("qemu-img", "qemu-io")
@pytest.mark.parametrize("kind", KINDS)
def test_killed_between_two_changes(tmp_path: Path, kind: str) -> None:
    assert f"{kind}: killed" in list(play(kind, tmp_path, Random(kind)))
