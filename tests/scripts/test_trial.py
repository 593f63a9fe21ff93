"""scripts/trial: rounds that fail, die or hang are told of with what repeats them, and the rest goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

TRIAL = """
import os, sys, time
from trials import __main__ as command
from trials.rounds import Trial

def play(this):
    (this.folder / "image").write_text(this.kind)
    this.count("drawn", this.chosen.randrange(1000))
    assert this.number != 3, "wrong bytes"
    if this.number == 4:
        os.abort()
    if this.number == 5:
        time.sleep(1000)

trial = Trial("demo", "", play, ("a", "b"), 6, 2.0, None)
command.all_trials = lambda: {"demo": trial}
sys.exit(command.main())
"""


def trial(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run the trial above; its status, and what it prints."""
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"}
    command = [sys.executable, "-c", TRIAL, "demo", "--seed", "7", "--directory", str(folder), *arguments]
    done = subprocess.run(command, cwd=folder, env=os.environ | paths, capture_output=True, text=True, timeout=300)
    assert not done.stderr
    return done.returncode, done.stdout


def test_good_rounds_leave_nothing_and_draw_the_same_again(tmp_path: Path) -> None:
    status, printed = trial(tmp_path, "--rounds", "3")
    assert status == 0
    assert "3 rounds good, 0 failed" in printed
    assert not list(tmp_path.iterdir())
    assert trial(tmp_path, "--rounds", "3")[1].splitlines()[-1] == printed.splitlines()[-1]


def test_the_first_failure_ends_it_and_keeps_its_files(tmp_path: Path) -> None:
    status, printed = trial(tmp_path, "--jobs", "1")
    assert status == 1
    assert "AssertionError: wrong bytes" in printed
    assert "FAILED: seed 7, round 3 (b)" in printed
    assert "scripts/trial demo --seed 7 --first 3 --rounds 1" in printed
    (kept,) = tmp_path.glob("trial-demo-*/*")
    assert str(kept) in printed
    assert (kept / "image").read_text() == "b"


def test_what_dies_or_hangs_is_a_failure(tmp_path: Path) -> None:
    status, printed = trial(tmp_path, "--keep-going")
    assert status == 1
    assert "3 rounds good, 3 failed" in printed
    assert printed.count("FAILED") == 3
    assert printed.count("died of signal 6") == printed.count("ended after 2 seconds") == 1
    assert 'File "<string>", line 13 in play' in printed, "where it hung"
