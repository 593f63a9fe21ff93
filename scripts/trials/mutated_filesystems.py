"""Damaged file systems: whatever is done with them, no crash, no hang, bounded memory, and only proper errors.

A round is a process with 20 damaged copies of one small image, read and (where that is possible) changed in memory.
"""

from __future__ import annotations

import random
from pathlib import Path

from tests.fusemount.mutated import pages_of, use_damaged
from tests.fusemount.small_images import ORIGINALS
from trials.rounds import Round

KINDS = tuple(ORIGINALS)
COPIES = 20
ROUNDS = 100 * len(KINDS)
SECONDS = 900.0
MEMORY = 1 << 30


def play(this: Round) -> None:
    """Use some damaged copies; which one it is when something goes wrong stands in the round's files."""
    name = this.kind
    content = original(this, name)
    pages = pages_of(content)
    for _ in range(COPIES):
        seed = this.chosen.getrandbits(64)
        writable = ORIGINALS[name].writable and this.chosen.random() < 0.5
        (this.folder / "last").write_text(f"{name}: seed {seed}, {'changed' if writable else 'read'}\n")
        use_damaged(ORIGINALS[name].kind, content, pages, random.Random(seed), writable=writable)
        this.count(f"copies of {name}")


def original(this: Round, name: str) -> bytes:
    """The image that all rounds of a kind damage, made by the first of them."""
    kept = this.folder.parent / f"original-{name}"
    if not kept.exists():
        folder = this.folder / "original"
        folder.mkdir()
        ORIGINALS[name].make(folder / "image").rename(kept)
    return Path(kept).read_bytes()
