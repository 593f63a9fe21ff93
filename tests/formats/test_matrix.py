"""A few images of all kinds, by chance, as matrix.py makes them; `scripts/trial matrix` tries more."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.formats import matrix
from tests.reference import needs

pytestmark = needs("qemu-img", "qemu-io")


@pytest.mark.parametrize("kind", matrix.KINDS)
def test_qemu_and_we_show_the_same(tmp_path: Path, kind: str) -> None:
    assert matrix.play(kind, tmp_path, random.Random(1), batches=1)
