"""What a trial is given to play a round, and what is known of a trial."""

from __future__ import annotations

import importlib
import pkgutil
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import trials


@dataclass(frozen=True)
class Round:
    """One round of a trial.

    Attributes:
        number: from 0.
        kind: of the trial's KINDS; "" for a trial without.
        chosen: where all chance comes from; it depends on the trial, the seed and the number, and on nothing else.
        folder: an empty directory, removed after the round unless it fails.
        counts: sums over all rounds, for the report.
    """

    number: int
    kind: str
    chosen: random.Random
    folder: Path
    counts: Counter[str] = field(default_factory=Counter)

    def count(self, what: str, number: int = 1) -> None:
        """Add to one of the sums that are reported at the end."""
        self.counts[what] += number


@dataclass(frozen=True)
class Trial:
    """A module of this package that can be played.

    Attributes:
        seconds: after which a round is taken to hang; generous, because the machine may be busy with other things.
        memory: bytes of address space a round may use; None for no limit.
    """

    name: str
    title: str
    play: Callable[[Round], None]
    kinds: tuple[str, ...]
    rounds: int
    seconds: float
    memory: int | None

    def round(self, seed: int, number: int, folder: Path) -> Round:
        """The round with this number."""
        chosen = random.Random(f"{self.name} {seed} {number}")
        return Round(number, self.kind_of(number), chosen, folder)

    def kind_of(self, number: int) -> str:
        """Which kind the round with this number is of."""
        return self.kinds[number % len(self.kinds)]

    def numbers(self, first: int, only: str) -> Iterator[int]:
        """The numbers of all rounds from `first` on whose kind contains `only`."""
        number = first
        while True:
            if only in self.kind_of(number):
                yield number
            number += 1


def all_trials() -> dict[str, Trial]:
    """The trials of this package, by name: a module's name with hyphens."""
    found = {}
    for info in pkgutil.iter_modules(trials.__path__):
        if info.name == "__main__":
            continue
        module = importlib.import_module(f"trials.{info.name}")
        if hasattr(module, "play"):
            name = info.name.replace("_", "-")
            found[name] = Trial(
                name,
                (module.__doc__ or "").partition("\n")[0],
                module.play,
                tuple(getattr(module, "KINDS", ("",))),
                getattr(module, "ROUNDS", 100),
                getattr(module, "SECONDS", 600.0),
                getattr(module, "MEMORY", None),
            )
    return found
