"""nbdimg bitmap, judged by qemu-img."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.img import nbdimg
from tests.reference import needs, qemu_check, qemu_content, qemu_img_create, qemu_info, qemu_io, run


def bitmaps(path: Path) -> dict[str, Any]:
    """The bitmaps that qemu-img sees, by name."""
    qemu_check(path)
    found = qemu_info(path)["format-specific"]["data"].get("bitmaps", [])
    return {each["name"]: (each["granularity"], each["flags"]) for each in found}


def dirty(path: Path, name: str) -> list[tuple[int, int]]:
    """The ranges (start, length) that a bitmap of a qcow2 image shows as written to, as qemu-nbd tells."""
    shown = run(
        "nbdinfo",
        f"--map=qemu:dirty-bitmap:{name}",
        "--json",
        "--",
        "[",
        "qemu-nbd",
        "-r",
        "-f",
        "qcow2",
        "-B",
        name,
        path,
        "]",
    )
    return [(each["offset"], each["length"]) for each in json.loads(shown) if each["type"]]


@needs("qemu-img", "qemu-io")
@pytest.mark.parametrize("backing", [False, True])
def test_added_and_removed(tmp_path: Path, backing: bool) -> None:
    base = qemu_img_create(tmp_path / "base.qcow2", "8M")
    path = tmp_path / "disk.qcow2"
    if backing:
        qemu_img_create(path, None, backing_file=base.name, backing_fmt="qcow2")
    else:
        qemu_img_create(path, "8M")
    qemu_io(path, "write -P 1 0 1M")
    nbdimg("bitmap", "--add", path, "one")
    nbdimg("bitmap", "--add", "--disable", "-g", "4k", path, "two")
    assert bitmaps(path) == {"one": (65536, ["auto"]), "two": (4096, [])}
    assert "there is one of that name" in nbdimg("bitmap", "--add", path, "one", status=1)
    run("qemu-img", "bitmap", "--add", path, "three")
    nbdimg("bitmap", "--enable", path, "two")
    nbdimg("bitmap", "--remove", path, "one")
    assert bitmaps(path) == {"two": (4096, ["auto"]), "three": (65536, ["auto"])}
    for name in ("two", "three"):
        nbdimg("bitmap", "--remove", path, name)
    assert bitmaps(path) == {}
    assert "it has: none" in nbdimg("bitmap", "--clear", path, "two", status=1)
    assert qemu_info(path).get("backing-filename") == (base.name if backing else None)
    assert qemu_content(path, "qcow2")[: 1 << 20] == b"\1" * (1 << 20)


@needs("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")
def test_bits_are_kept_merged_and_cleared(tmp_path: Path) -> None:
    path, other = (qemu_img_create(tmp_path / name, "8M") for name in ("disk.qcow2", "other.qcow2"))
    for image, offset in ((path, "1M"), (other, "4M")):
        nbdimg("bitmap", "--add", image, "bits")
        qemu_io(image, f"write {offset} 64k")
    nbdimg("bitmap", "--add", path, "all")
    nbdimg("bitmap", "--disable", path, "bits")
    qemu_io(path, "write 2M 64k")
    assert dirty(path, "bits") == [(1 << 20, 65536)]
    assert dirty(path, "all") == [(2 << 20, 65536)]
    nbdimg("bitmap", "--merge", "bits", path, "all")
    nbdimg("bitmap", "--merge", "bits", "-b", other, path, "all")
    assert dirty(path, "all") == [(1 << 20, 65536), (2 << 20, 65536), (4 << 20, 65536)]
    nbdimg("bitmap", "--clear", path, "all")
    assert dirty(path, "all") == []
    assert dirty(path, "bits") == [(1 << 20, 65536)]
    qemu_check(path)
