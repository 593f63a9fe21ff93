"""The command nbdimg itself: help, completion, wrong usage, and how little it loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nbdserve.cli.img.main import VERBS
from tests.cli.img import NBDIMG, nbdimg
from tests.reference import needs, run


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    text = nbdimg(verb, "--help")
    assert f"usage: nbdimg {verb}" in text
    assert f"nbdimg {verb}" in text[text.index("examples:") :]


def test_help_names_all_verbs_and_loads_none_of_them() -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *NBDIMG[1:], "--help"], capture_output=True, text=True, timeout=20
    )
    for verb in VERBS:
        assert verb in result.stdout
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert not [name for name in loaded if name.startswith(("nbdserve.formats", "nbdserve.imagetools", "construct"))]


def test_wrong_usage_is_one_line() -> None:
    for arguments in ([], ["frobnicate"], ["check"], ["info", "--nonsense", "x"]):
        assert len(nbdimg(*arguments, status=1).splitlines()) == 1


def completed(script: Path, *words: str) -> list[str]:
    """What bash would offer for the last word."""
    line = " ".join(f"'{word}'" for word in words)
    code = (
        f"source {script}; compopt() {{ :; }}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _nbdimg; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    return run("bash", "-c", code).split()


@needs("bash")
def test_completion(tmp_path: Path) -> None:
    script = tmp_path / "completion.bash"
    script.write_text(nbdimg("--completion", "bash"))
    assert completed(script, "nbdimg", "co") == ["convert", "compare", "commit"]
    assert completed(script, "nbdimg", "info", "--back") == ["--backing-chain"]
    assert completed(script, "nbdimg", "check", "-r", "") == ["leaks", "all"]
    assert completed(script, "nbdimg", "convert", "-O", "v") == ["vpc", "vhdx", "vdi", "vmdk"]
    assert completed(script, "nbdimg", "info", "disk") == []
    assert "bashcompinit" in nbdimg("--completion", "zsh")
