"""The image tools, killed at any moment: inputs are whole, outputs absent or complete, and a rerun comes to the end.

What is done, and what has to hold, is said in tests.imagetools.killing.
"""

from __future__ import annotations

from tests.imagetools import killing
from trials.rounds import Round

KINDS = killing.KINDS
ROUNDS = 400


def play(this: Round) -> None:
    """One kind of work on one chain of images, killed at a few moments."""
    for done in killing.play(this.kind, this.folder, this.chosen):
        this.count(done)
