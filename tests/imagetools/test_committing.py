"""commit, judged by QEMU: the base shows what the overlay did, and so does the overlay, at every moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdserve.errors import OpenError
from nbdserve.imagetools.committing import commit
from tests.imagetools.chains import KIB, MIB, contents, killed_at_random, make_chain
from tests.reference import needs, qemu_check, qemu_content, qemu_img_create, qemu_info, qemu_io, qemu_map, run

pytestmark = needs("qemu-img", "qemu-io")


@pytest.mark.parametrize("base", ["qcow2", "raw", "vpc", "vdi", "vhdx", "vmdk"])
def test_into_a_base_of_any_format(tmp_path: Path, base: str) -> None:
    paths = make_chain(tmp_path, 8 * MIB, 8 * MIB, base=base)
    before = contents(paths, base)
    assert commit(str(paths[1])) == str(paths[0])
    after = contents(paths, base)
    assert after[0][: 8 * MIB] == after[1] == before[1]
    qemu_check(paths[1])
    end = qemu_info(paths[0])["virtual-size"]  # what lies behind the base's end qemu-img counts as the overlay's
    assert all(extent["depth"] or extent["start"] >= end for extent in qemu_map(paths[1], "qcow2")), "it is empty now"


@pytest.mark.parametrize("options", [{"compat": "0.10"}, {"cluster_size": 512}, {"extended_l2": "on"}], ids=str)
def test_overlays_of_all_kinds(tmp_path: Path, options: dict[str, str | int]) -> None:
    paths = make_chain(tmp_path, 4 * MIB, 4 * MIB, seed=3, **options)
    before = contents(paths)
    commit(str(paths[1]))
    assert contents(paths) == [before[1]] * 2
    for path in paths:
        qemu_check(path)


@pytest.mark.parametrize("base", ["qcow2", "raw"])
@pytest.mark.parametrize("sizes", [(2 * MIB, 3 * MIB), (3 * MIB, 2 * MIB)])
def test_other_lengths(tmp_path: Path, base: str, sizes: tuple[int, int]) -> None:
    """As qemu-img has it: a short base becomes as long as the overlay, and a long one keeps its end."""
    ours, theirs = tmp_path / "a", tmp_path / "b"
    for folder in (ours, theirs):
        folder.mkdir()
        make_chain(folder, *sizes, base=base)
    commit(str(ours / "sn1"))
    run("qemu-img", "commit", "-q", theirs / "sn1")
    assert contents([ours / "base", ours / "sn1"], base) == contents([theirs / "base", theirs / "sn1"], base)


def test_down_to_a_named_base(tmp_path: Path) -> None:
    paths = make_chain(tmp_path, 2 * MIB, 4 * MIB, 3 * MIB, 4 * MIB)
    before = contents(paths)
    told: list[str] = []
    commit(str(paths[3]), base="sn1", warn=told.append)
    assert any(f"{paths[2]}: lay between" in line for line in told)
    after = contents(paths)
    assert after[0] == before[0]
    assert after[1] == after[3] == before[3]
    commit(str(paths[3]), base=str(paths[0]))
    assert bytes(qemu_content(paths[0], "qcow2")) == before[3] == bytes(qemu_content(paths[3], "qcow2"))
    for path in paths:
        qemu_check(path)


def test_who_depends_on_the_base_is_named(tmp_path: Path) -> None:
    paths = make_chain(tmp_path, MIB, MIB)
    other = qemu_img_create(tmp_path / "other", None, backing_file=str(paths[0]), backing_fmt="qcow2")
    before = contents(paths)
    with pytest.raises(OpenError, match=f"{other}: stands on {paths[0]}, too"):
        commit(str(paths[1]))
    assert contents(paths) == before
    commit(str(paths[1]), force=True)
    assert contents(paths) == [before[1]] * 2


def test_snapshots_of_the_overlay_are_not_spoilt(tmp_path: Path) -> None:
    paths = make_chain(tmp_path, MIB, MIB)
    run("qemu-img", "snapshot", "-c", "s", paths[1])
    with pytest.raises(OpenError, match="internal snapshots"):
        commit(str(paths[1]))
    before = contents(paths)
    commit(str(paths[1]), force=True)
    assert contents(paths) == [before[1]] * 2
    qemu_check(paths[1])


def test_what_cannot_be_done_says_so(tmp_path: Path) -> None:
    paths = make_chain(tmp_path, MIB, MIB)
    for path, base, said in (
        (paths[0], None, "stands on no other image"),
        (paths[1], str(paths[1]), "does not stand on"),
        (paths[1], "nowhere", "No such file"),
    ):
        with pytest.raises(OpenError, match=said):
            commit(str(path), base=base)


def test_killed_at_any_time(tmp_path: Path) -> None:
    base = qemu_img_create(tmp_path / "base", 64 * MIB)
    qemu_io(base, "write -P 1 0 32M")
    overlay = qemu_img_create(tmp_path / "top", None, backing_file="base", backing_fmt="qcow2")
    qemu_io(overlay, *(f"write -P {number + 2} {number * 640 * KIB} 300k" for number in range(100)))
    before = qemu_content(overlay, "qcow2")

    def check() -> None:
        assert qemu_content(overlay, "qcow2") == before
        for path in (base, overlay):
            qemu_check(path, leaks_allowed=True)

    assert killed_at_random(lambda: commit(str(overlay)), check, times=6) > 0
    assert qemu_content(base, "qcow2") == before
    assert qemu_info(overlay)["backing-filename"] == "base"
