"""rebase and flatten, judged by QEMU: the overlay shows the same on the new backing file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nbdserve.errors import OpenError
from nbdserve.imagetools.rebasing import rebase
from tests.imagetools.chains import KIB, MIB, contents, killed_at_random, make_chain
from tests.reference import needs, qemu_check, qemu_content, qemu_img_create, qemu_info, qemu_io, run

pytestmark = needs("qemu-img", "qemu-io")


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((4, 4, 4), {}),
        ((2, 3, 4), {"compat": "0.10"}),
        ((4, 3, 2), {"cluster_size": 4096}),
        ((3, 2, 4), {}),
        ((3, 2, 4), {"compat": "0.10"}),
        ((3, 2, 4), {"extended_l2": "on"}),
    ],
    ids=str,
)
def test_past_the_image_in_between(tmp_path: Path, sizes: tuple[int, ...], options: dict[str, str | int]) -> None:
    paths = make_chain(tmp_path, *(size * MIB for size in sizes), **options)
    before = contents(paths)
    rebase(str(paths[2]), "base")
    paths[1].unlink()
    assert bytes(qemu_content(paths[2], "qcow2")) == before[2]
    assert bytes(qemu_content(paths[0], "qcow2")) == before[0]
    qemu_check(paths[2])
    info = qemu_info(paths[2])
    assert (info["backing-filename"], info["backing-filename-format"]) == ("base", "qcow2")


def test_only_what_differs_is_copied(tmp_path: Path) -> None:
    paths = make_chain(tmp_path, 8 * MIB, 8 * MIB, 8 * MIB)
    twin = tmp_path / "twin"
    twin.mkdir()
    theirs = make_chain(twin, 8 * MIB, 8 * MIB, 8 * MIB)
    rebase(str(paths[2]), "base")
    run("qemu-img", "rebase", "-b", "base", "-F", "qcow2", theirs[2])

    def allocated(path: Path) -> int:
        extents = json.loads(run("qemu-img", "map", "--output=json", path))
        return sum(extent["length"] for extent in extents if extent["depth"] == 0 and extent.get("present", True))

    assert allocated(paths[2]) <= allocated(theirs[2])


@pytest.mark.parametrize("format", ["raw", "vhdx", "vmdk"])
def test_onto_another_format(tmp_path: Path, format: str) -> None:
    paths = make_chain(tmp_path, 4 * MIB, 4 * MIB)
    before = contents(paths)
    run("qemu-img", "convert", "-O", format, paths[0], tmp_path / "other")
    size = qemu_info(paths[1])["actual-size"]
    rebase(str(paths[1]), str(tmp_path / "other"), backing_format=format)
    paths[0].unlink()
    assert bytes(qemu_content(paths[1], "qcow2")) == before[1]
    assert qemu_info(paths[1])["actual-size"] - size <= 128 * KIB, "nothing had to be copied"
    assert qemu_info(paths[1])["backing-filename-format"] == format


@pytest.mark.parametrize("options", [{}, {"compat": "0.10"}, {"cluster_size": 512}], ids=str)
def test_flatten(tmp_path: Path, options: dict[str, str | int]) -> None:
    paths = make_chain(tmp_path, 2 * MIB, 3 * MIB, 4 * MIB, **options)
    before = contents(paths)
    rebase(str(paths[2]), None)
    assert contents(paths)[:2] == before[:2]
    paths[0].unlink()
    paths[1].unlink()
    assert bytes(qemu_content(paths[2], "qcow2")) == before[2]
    assert "backing-filename" not in qemu_info(paths[2])
    qemu_check(paths[2])


@pytest.mark.parametrize("cluster_size", [512, 1024, 65536])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_names_of_all_lengths(tmp_path: Path, cluster_size: int, compat: str) -> None:
    image = qemu_img_create(tmp_path / "a", MIB, cluster_size=cluster_size, compat=compat)
    names = ["b", "c" * 30, "folder/" + "d" * 200, "x/" * 250 + "y", "e" * 400, "f", None, "g" * 40]
    for name in names:
        if cluster_size <= 1024 and len(name or "") > 300:
            with pytest.raises(OpenError, match="no room"):
                rebase(str(image), name * 2, backing_format="raw", unsafe=True)
            continue
        rebase(str(image), name, backing_format=None if name is None else "raw", unsafe=True)
        info = json.loads(run("qemu-img", "info", "--output=json", image))
        assert info.get("backing-filename") == name
        assert info.get("backing-filename-format") == (None if name is None else "raw")
    rebase(str(image), None, unsafe=True)
    qemu_check(image)


def test_what_else_the_header_holds_stays(tmp_path: Path) -> None:
    """The external data file, bitmaps and the names of features."""
    base = qemu_img_create(tmp_path / "base", MIB)
    image = qemu_img_create(
        tmp_path / "a", None, backing_file="base", backing_fmt="qcow2", data_file=str(tmp_path / "data")
    )
    qemu_io(image, "write -P 7 64k 64k")
    run("qemu-img", "bitmap", "--add", image, "since")
    before, facts = qemu_content(image, "qcow2"), qemu_info(image)["format-specific"]
    rebase(str(image), str(base))
    rebase(str(image), None)
    assert qemu_content(image, "qcow2") == before
    assert qemu_info(image)["format-specific"] == facts
    qemu_check(image)


def test_a_loop_is_refused(tmp_path: Path) -> None:
    paths = make_chain(tmp_path, MIB, MIB, MIB)
    with pytest.raises(OpenError, match=r"stands on .*base itself"):
        rebase(str(paths[0]), "sn2")
    with pytest.raises(OpenError, match="itself"):
        rebase(str(paths[1]), "sn1")


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = make_chain(tmp_path, MIB, MIB)
    run("qemu-img", "snapshot", "-c", "s", paths[1])
    folder = tmp_path / "folder"
    folder.mkdir()
    inner = qemu_img_create(folder / "inner", None, backing_file="../base", backing_fmt="qcow2")
    monkeypatch.chdir(tmp_path)
    for path, backing, said in (
        (paths[1], None, "internal snapshots"),
        (paths[1], "absent", "no such file"),
        (inner, "base", "start in the folder of the image"),
    ):
        with pytest.raises(OpenError, match=said):
            rebase(str(path), backing)
    with pytest.raises(OpenError, match="--format nope"):
        rebase(str(paths[1]), "base", backing_format="nope", unsafe=True)
    run("qemu-img", "create", "-q", "-f", "vdi", tmp_path / "vdi", "1M")
    with pytest.raises(OpenError, match="only qcow2"):
        rebase(str(tmp_path / "vdi"), "base")


def test_killed_at_any_time(tmp_path: Path) -> None:
    base = qemu_img_create(tmp_path / "base", 64 * MIB)
    qemu_io(base, "write -P 1 0 32M")
    middle = qemu_img_create(tmp_path / "middle", None, backing_file="base", backing_fmt="qcow2")
    qemu_io(middle, *(f"write -P {number + 2} {number * 640 * KIB} 500k" for number in range(100)))
    top = qemu_img_create(tmp_path / "top", None, backing_file="middle", backing_fmt="qcow2")
    qemu_io(top, "write -P 9 1M 1M")
    before = qemu_content(top, "qcow2")

    def check() -> None:
        assert qemu_content(top, "qcow2") == before
        qemu_check(top, leaks_allowed=True)

    for backing in ("base", None):
        assert killed_at_random(lambda backing=backing: rebase(str(top), backing), check, times=4) > 0
        assert qemu_info(top).get("backing-filename") == backing
        rebase(str(top), "middle")
