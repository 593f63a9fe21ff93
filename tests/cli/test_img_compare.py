"""nbdimg map, compare, measure and resize beside qemu-img's, on the same images."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cli.img import nbdimg
from tests.imagetools.content import MIB, mixed
from tests.reference import needs, qemu_check, qemu_content, qemu_img_create, qemu_info, qemu_io, qemu_map, run


def both(*arguments: str | Path) -> tuple[Any, Any]:
    """What qemu-img and we print as JSON."""
    return json.loads(run("qemu-img", *arguments, "--output=json")), json.loads(nbdimg(*arguments, "--json"))


@needs("qemu-img", "qemu-io")
def test_maps_are_qemus(tmp_path: Path) -> None:
    mixed(tmp_path / "source.raw")
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", tmp_path / "source.raw", base)
    qemu_img_create(top, "20M", backing_file=base.name, backing_fmt="qcow2")
    qemu_io(top, "write -P 1 512k 1M", "write -z 4M 128k", "write -P 3 15M 64k", "write -c -P 3 2M 64k")
    run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", tmp_path / "source.raw", tmp_path / "disk.vmdk")
    run("qemu-img", "convert", "-f", "raw", "-O", "vdi", tmp_path / "source.raw", tmp_path / "disk.vdi")
    for format, path in (
        ("raw", tmp_path / "source.raw"),
        ("qcow2", base),
        ("qcow2", top),
        ("vmdk", tmp_path / "disk.vmdk"),
        ("vdi", tmp_path / "disk.vdi"),
    ):
        theirs, ours = both("map", "-f", format, path)
        assert ours == theirs
    theirs, ours = both("map", "--start-offset=1M", "--max-length=700k", base)
    assert ours == theirs
    assert nbdimg("map", base) == run("qemu-img", "map", base)
    assert "compressed" in nbdimg("map", top, status=1)


@needs("qemu-img", "qemu-io")
@pytest.mark.parametrize("options", [[], ["-s"]], ids=str)
def test_comparisons_end_as_qemus_do(tmp_path: Path, options: list[str]) -> None:
    mixed(tmp_path / "one.raw")
    one, two, longer = tmp_path / "one.qcow2", tmp_path / "two.vmdk", tmp_path / "longer.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", tmp_path / "one.raw", one)
    run("qemu-img", "convert", "-O", "vmdk", one, two)
    run("qemu-img", "convert", "-O", "qcow2", one, longer)
    run("qemu-img", "resize", "-q", longer, "20M")
    changed = tmp_path / "changed.qcow2"
    run("qemu-img", "convert", "-O", "qcow2", one, changed)
    qemu_io(changed, "write -P 99 5M 1k", "write -P 98 11M 1k")
    tail = tmp_path / "tail.qcow2"
    run("cp", longer, tail)
    qemu_io(tail, "write -P 1 16M 512")
    pairs = [(one, one), (one, longer), (one, changed), (changed, one), (one, tail), (tail, one)]
    for pair in pairs if options else (*pairs, (longer, tail)):
        theirs = subprocess.run(["qemu-img", "compare", *options, *pair], capture_output=True, text=True)
        assert nbdimg("compare", *options, *pair, status=theirs.returncode) == theirs.stdout, pair
    if not options:
        assert nbdimg("compare", one, two) == "Images are identical.\n"
    assert "no such file" in nbdimg("compare", one, tmp_path / "none", status=2)
    assert "Traceback" not in nbdimg("compare", one, status=2)


@needs("qemu-img")
@pytest.mark.parametrize(
    "options",
    ["", "cluster_size=4k", "cluster_size=2M,refcount_bits=1", "extended_l2=on", "preallocation=full", "compat=0.10"],
)
def test_measures_are_qemus(tmp_path: Path, options: str) -> None:
    mixed(tmp_path / "source.raw")
    image = tmp_path / "disk.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", tmp_path / "source.raw", image)
    run("qemu-img", "bitmap", "--add", image, "one")
    run("qemu-img", "bitmap", "--add", "-g", "512", image, "another")
    chosen = ["-O", "qcow2", *(["-o", options] if options else [])]
    for what in (["--size", "0"], ["--size", "512"], ["--size", "1G"], ["--size", "3T"], ["-f", "qcow2", image]):
        theirs, ours = both("measure", *chosen, *what)
        if image in what and options == "cluster_size=4k":  # we do not count holes inside clusters
            assert ours.pop("required") <= theirs.pop("required")
        assert ours == theirs
    assert nbdimg("measure", *chosen, "--size", "1G") == run("qemu-img", "measure", *chosen, "--size", "1G")


@needs("qemu-img", "qemu-io")
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_resized_disks_are_whole(tmp_path: Path, format: str) -> None:
    path = qemu_img_create(tmp_path / "disk", "4M", format)
    qemu_io(path, "write -P 1 0 4M", format=format)
    assert nbdimg("resize", "-f", format, path, "+2M") == "Image resized.\n"
    assert qemu_content(path, format) == b"\1" * (4 * MIB) + bytes(2 * MIB)
    assert "--shrink" in nbdimg("resize", "-f", format, path, "-3M", status=1)
    nbdimg("resize", "-f", format, "--shrink", path, "-3M")
    assert qemu_content(path, format) == b"\1" * (3 * MIB)
    nbdimg("resize", "-q", "-f", format, path, "8M")
    assert qemu_info(path, format)["virtual-size"] == 8 * MIB
    if format == "qcow2":
        qemu_check(path)
    assert "cannot have" in nbdimg("resize", "-f", format, path, "-9M", status=1)


@needs("qemu-img", "qemu-io")
@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("fill", ["metadata", "falloc", "full"])
def test_what_is_new_has_its_place(tmp_path: Path, format: str, fill: str) -> None:
    ours, theirs = (qemu_img_create(tmp_path / name, "4M", format) for name in ("ours", "theirs"))
    if (format, fill) == ("raw", "metadata"):
        assert "no metadata" in nbdimg("resize", "-f", format, "--preallocation", fill, ours, "+3M", status=1)
        return
    for path in (ours, theirs):
        qemu_io(path, "write -P 1 0 1M", "write -P 2 2M 2M", "discard 2M 2M", format=format)
    nbdimg("resize", "-f", format, "--preallocation", fill, ours, "+3M")
    run("qemu-img", "resize", "-f", format, f"--preallocation={fill}", theirs, "+3M")
    assert qemu_content(ours, format) == b"\1" * MIB + bytes(6 * MIB)
    told = [
        [data for each in qemu_map(path, format) for data in [each["data"]] * (each["length"] >> 16)]
        for path in (ours, theirs)
    ]
    assert told[0] == told[1]
    if fill != "metadata":
        assert ours.stat().st_blocks * 512 >= 4 * MIB
    if format == "qcow2":
        qemu_check(ours)


@needs("qemu-img")
@pytest.mark.parametrize("format", ["vdi", "vhdx", "vpc", "vmdk"])
def test_what_cannot_be_resized_stays(tmp_path: Path, format: str) -> None:
    path = qemu_img_create(tmp_path / "disk", "4M", format)
    before = path.read_bytes()
    message = nbdimg("resize", path, "8M", status=1)
    assert "convert" in message
    assert len(message.splitlines()) == 1
    assert path.read_bytes() == before
