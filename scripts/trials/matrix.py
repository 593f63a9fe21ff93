"""Images of all kinds and options, made and changed by QEMU and by us in turn: both must show the same.

What that means is said in tests.formats.matrix.
"""

from __future__ import annotations

from tests.formats import matrix
from trials.rounds import Round

KINDS = matrix.KINDS
ROUNDS = 400


def play(this: Round) -> None:
    """One image, or one chain of them."""
    for made in matrix.play(this.kind, this.folder, this.chosen):
        this.count(made.partition(": ")[2].partition(" ")[0])
