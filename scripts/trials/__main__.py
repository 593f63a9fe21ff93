"""The command line of `scripts/trial`."""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from trials.playing import Outcome, play_rounds
from trials.rounds import Trial, all_trials

PROGRESS_SECONDS = 10.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/trial",
        description="Play rounds of a random trial until all are played, the time is up, or one fails. A round depends "
        "on the seed and its number alone; what repeats a failed one is printed, and its files are kept.",
    )
    parser.add_argument("name", nargs="?", help="which trial; see --list")
    parser.add_argument("--list", action="store_true", help="list the trials and what kinds of rounds they have")
    parser.add_argument("--seed", type=int, help="where all chance begins; default: by chance")
    parser.add_argument("--rounds", type=int, help="how many rounds to play; default: what the trial says")
    parser.add_argument("--seconds", type=float, help="begin no more rounds after so many seconds")
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER", help="the number of the first round (0)")
    parser.add_argument("--only", default="", metavar="WORD", help="only rounds of kinds whose names contain the word")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="rounds at a time (%(default)s)")
    parser.add_argument("--keep-going", action="store_true", help="play on after a failure")
    parser.add_argument("--directory", type=Path, help="where the files lie meanwhile; default: where TMPDIR says")
    return parser


def main() -> int:
    """Play, print; 0 if all rounds were good."""
    parser = _parser()
    options = parser.parse_args()
    trials = all_trials()
    if options.list or options.name is None:
        for trial in trials.values():
            print(f"{trial.name:16} {trial.title}")
            if any(trial.kinds):
                print(f"{'':16} kinds: {', '.join(trial.kinds)}")
        return 0 if options.list else 2
    if options.name not in trials:
        parser.error(f"no trial {options.name!r}; there are {', '.join(trials)}")
    trial = trials[options.name]
    if not any(options.only in kind for kind in trial.kinds):
        parser.error(f"no kind of {trial.name} contains {options.only!r}; there are {', '.join(trial.kinds)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        return _played(trial, options)
    except KeyboardInterrupt:
        return 130  # what there is to say has been said


def _played(trial: Trial, options: argparse.Namespace) -> int:
    seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    rounds = trial.rounds if options.rounds is None else options.rounds
    print(f"{trial.name}: seed {seed}, {rounds} rounds", flush=True)
    home = Path(tempfile.mkdtemp(prefix=f"trial-{trial.name}-", dir=options.directory))
    begun = shown = time.monotonic()
    numbers = _until(trial, options, rounds, begun)
    counts: Counter[str] = Counter()
    good = failed = 0
    try:
        with closing(play_rounds(trial, seed, numbers, home, options.jobs)) as outcomes:
            for outcome in outcomes:
                counts.update(outcome.counts)
                good += not outcome.failure
                if outcome.failure:
                    failed += 1
                    _tell(trial, seed, outcome)
                    if not options.keep_going:
                        break
                if time.monotonic() - shown > PROGRESS_SECONDS:
                    shown = time.monotonic()
                    print(f"{trial.name}: {_summary(good, failed, shown - begun)}", flush=True)
    finally:
        sums = "".join(f"\n  {number:8} {what}" for what, number in sorted(counts.items()))
        print(f"{trial.name}: seed {seed}: {_summary(good, failed, time.monotonic() - begun)}{sums}", flush=True)
        if not failed:
            shutil.rmtree(home)
    return 1 if failed else 0


def _until(trial: Trial, options: argparse.Namespace, rounds: int, begun: float) -> Iterator[int]:
    """The numbers of the rounds to play, as long as there is time."""
    for number in itertools.islice(trial.numbers(options.first, options.only), rounds):
        if options.seconds is not None and time.monotonic() - begun > options.seconds:
            return
        yield number


def _tell(trial: Trial, seed: int, outcome: Outcome) -> None:
    kind = trial.kind_of(outcome.number)
    print(
        f"{outcome.failure}{trial.name}: FAILED: seed {seed}, round {outcome.number}{kind and f' ({kind})'}\n"
        f"  its files:  {outcome.folder}\n"
        f"  repeat it:  scripts/trial {trial.name} --seed {seed} --first {outcome.number} --rounds 1",
        flush=True,
    )


def _summary(good: int, failed: int, seconds: float) -> str:
    played = good + failed
    pace = f", {1000 * seconds / played:.0f} s per 1000" if played else ""
    return f"{good} rounds good, {failed} failed, {seconds:.0f} s{pace}"


if __name__ == "__main__":
    sys.exit(main())
