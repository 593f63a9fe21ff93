"""Rounds, each in a forked process of its own: one that hangs, eats memory or dies costs a round and not the trial."""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from trials.rounds import Trial


@dataclass(frozen=True)
class Outcome:
    """How a round ended; `failure` is "" for a good one, and `folder` then gone."""

    number: int
    failure: str
    folder: Path
    counts: dict[str, int]


@dataclass(frozen=True)
class _Running:
    """A round in its process; `said` is the file into which the process writes what there is to say."""

    number: int
    process: int
    pidfd: int
    folder: Path
    said: TextIO
    deadline: float


def play_rounds(trial: Trial, seed: int, numbers: Iterator[int], home: Path, jobs: int) -> Iterator[Outcome]:
    """Play rounds, up to `jobs` at a time, in directories made in `home`; ends when the numbers do.

    Closing the iterator ends the processes that are still running.
    """
    running: list[_Running] = []
    try:
        while True:
            while len(running) < jobs and (number := next(numbers, None)) is not None:
                running.append(_begin(trial, seed, number, home))
            if not running:
                return
            for each in _ended(running):
                running.remove(each)
                yield _outcome(each, trial)
    finally:
        for each in running:
            _kill(each.process)
            os.waitpid(each.process, 0)
            os.close(each.pidfd)


def _begin(trial: Trial, seed: int, number: int, home: Path) -> _Running:
    folder = home / f"round-{number}"
    folder.mkdir()
    said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by _outcome()
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        os.setpgid(0, 0)
        _play_here(trial, seed, number, folder, said)
    with suppress(PermissionError, ProcessLookupError):  # the child does it as well; whoever comes first
        os.setpgid(process, process)
    return _Running(number, process, os.pidfd_open(process), folder, said, time.monotonic() + trial.seconds)


def _play_here(trial: Trial, seed: int, number: int, folder: Path, said: TextIO) -> None:
    """Play a round in this process and end it: status 0 with the counts written, else with what went wrong."""
    status = 1
    try:
        faulthandler.enable(said)  # SIGABRT, with which the parent ends what hangs, tells where that was
        if trial.memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, (trial.memory, trial.memory))
        this = trial.round(seed, number, folder)
        trial.play(this)
        json.dump(this.counts, said)
        status = 0
    except BaseException:
        traceback.print_exc(file=said)
    finally:
        said.flush()
        os._exit(status)


def _ended(running: list[_Running]) -> list[_Running]:
    """Wait for rounds to end; those that take too long are ended here."""
    waiting = select.poll()
    for each in running:
        waiting.register(each.pidfd, select.POLLIN)
    ready = {fd for fd, _ in waiting.poll(5000)}
    late = [each for each in running if each.pidfd not in ready and time.monotonic() > each.deadline]
    for each in late:
        os.kill(each.process, signal.SIGABRT)
        select.select([each.pidfd], [], [], 10)
    return [each for each in running if each.pidfd in ready or each in late]


def _outcome(ended: _Running, trial: Trial) -> Outcome:
    _kill(ended.process)
    _, status = os.waitpid(ended.process, 0)
    os.close(ended.pidfd)
    with ended.said as said:
        said.seek(0)
        text = said.read()
    if status == 0:
        shutil.rmtree(ended.folder)
        return Outcome(ended.number, "", ended.folder, Counter(json.loads(text)))
    end = os.waitstatus_to_exitcode(status)
    if end == -signal.SIGABRT and time.monotonic() > ended.deadline:
        text += f"ended after {trial.seconds:.0f} seconds\n"
    elif end < 0:
        text += f"died of signal {-end} ({signal.strsignal(-end)})\n"
    return Outcome(ended.number, text, ended.folder, {})


def _kill(group: int) -> None:
    """End a round and the programs it has left behind."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
