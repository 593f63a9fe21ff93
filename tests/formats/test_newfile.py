"""Files appear under their names only when they are complete."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from nbdserve.formats.newfile import new_file


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_name_only_at_the_end(tmp_path: Path) -> None:
    with new_file(tmp_path / "a") as file:
        file.write(b"content")
        assert not (tmp_path / "a").exists()
        (partial,) = names(tmp_path)
        assert partial.startswith(".a.") and partial.endswith(".partial")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"content"
    assert not stat.S_IMODE((tmp_path / "a").stat().st_mode) & 0o111


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), new_file(tmp_path / "a"):
        raise ValueError("no")
    assert names(tmp_path) == []


def test_relative_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with new_file("a") as file:
        file.write(b"x")
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("moment", ["before", "meanwhile"])
@pytest.mark.parametrize("links", [True, False])
def test_nothing_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, links: bool) -> None:
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    if moment == "before":
        (tmp_path / "a").write_bytes(b"precious")

    def create() -> None:
        with new_file(tmp_path / "a") as file:
            file.write(b"new")
            (tmp_path / "a").write_bytes(b"precious")

    with pytest.raises(FileExistsError):
        create()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"precious"


def no_links(*_: object) -> None:
    raise OSError(errno.EPERM, "this file system has no hard links")


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", no_links)
    with new_file(tmp_path / "a") as file:
        file.write(b"content")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"content"
