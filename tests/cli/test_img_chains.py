"""nbdimg overlay, commit, rebase, flatten and delete-middle as a user types them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.img import nbdimg
from tests.imagetools.chains import MIB, contents, make_chain
from tests.reference import needs, qemu_check, qemu_content, qemu_img_create, qemu_info, qemu_io, run

pytestmark = needs("qemu-img", "qemu-io")


def test_an_overlay_finds_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From wherever the command is given: the recorded name starts in the overlay's folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clones").mkdir()
    qemu_img_create(tmp_path / "base", 3 * MIB, "vhdx")
    qemu_io(tmp_path / "base", "write -P 5 1M 1M", format="vhdx")
    assert nbdimg("overlay", "a", "base") == "a (qcow2) -> base (vhdx)\n"
    nbdimg("overlay", "clones/b", "a", "5M", "--allow-path", ".")
    nbdimg("overlay", "-q", "clones/c", tmp_path / "a", "--cluster-size", "4k")
    for name, backing, format, size in (
        ("a", "base", "vhdx", 3 * MIB),
        ("clones/b", "../a", "qcow2", 5 * MIB),
        ("clones/c", str(tmp_path / "a"), "qcow2", 3 * MIB),
    ):
        info = qemu_info(tmp_path / name)
        assert (info["backing-filename"], info["backing-filename-format"]) == (backing, format)
        assert info["virtual-size"] == size
        qemu_check(tmp_path / name)
        assert qemu_content(tmp_path / name, "qcow2")[MIB : 2 * MIB] == b"\5" * MIB
    assert "exists already" in nbdimg("overlay", "a", "base", status=1)
    assert "absent" in nbdimg("overlay", "d", "absent", status=1)
    assert not (tmp_path / "d").exists()


def test_commit_and_rebase_beside_qemu(tmp_path: Path) -> None:
    for tool in ("ours", "theirs"):
        (tmp_path / tool).mkdir()
    ours = make_chain(tmp_path / "ours", *[2 * MIB] * 4)
    theirs = make_chain(tmp_path / "theirs", *[2 * MIB] * 4)
    assert nbdimg("commit", ours[3]) == run("qemu-img", "commit", theirs[3])
    assert contents(ours) == contents(theirs)
    for arguments in (("-b", "sn1", "-F", "qcow2"), ("-u", "-b", "base", "-F", "qcow2"), ("-b", "")):
        assert nbdimg("rebase", *arguments, ours[3]) == run("qemu-img", "rebase", *arguments, theirs[3])
        assert contents(ours) == contents(theirs)
        for key in ("backing-filename", "backing-filename-format"):
            assert qemu_info(ours[3]).get(key) == qemu_info(theirs[3]).get(key)
    nbdimg("flatten", ours[2])
    assert contents(ours) == contents(theirs)
    for path in ours:
        qemu_check(path)


def test_delete_middle(tmp_path: Path) -> None:
    paths = make_chain(tmp_path, *[2 * MIB] * 4)
    before = contents(paths)
    other = qemu_img_create(tmp_path / "other", None, backing_file="sn1", backing_fmt="qcow2")
    printed = nbdimg("delete-middle", "--into", "below", paths[2], paths[3], status=1)
    assert f"{other}: stands on {paths[1]}, too" in printed and len(printed.splitlines()) == 1
    nbdimg("delete-middle", paths[2], paths[3])
    assert not paths[2].exists()
    assert bytes(qemu_content(paths[3], "qcow2")) == before[3]
    assert "other" in nbdimg("commit", paths[3], status=1)
