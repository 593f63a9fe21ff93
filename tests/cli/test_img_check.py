"""nbdimg check beside qemu-img check, on sound and on damaged images."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cli.img import nbdimg
from tests.imagetools.content import mixed
from tests.reference import needs, qemu_check, qemu_content, qemu_img_create, qemu_io, run


def both(path: Path, *options: str, format: str = "qcow2") -> tuple[int, Any, Any]:
    """The exit status of qemu-img, and what it and we find, as JSON."""
    command = ["check", "-f", format, "--output=json", *options, str(path)]
    theirs = subprocess.run(["qemu-img", *command], capture_output=True, text=True)
    ours = nbdimg(*command, status=theirs.returncode)
    return theirs.returncode, json.loads(theirs.stdout), json.loads(ours[: ours.rindex("}") + 1])


def numbers(path: Path, offset: int, count: int) -> list[int]:
    """Big-endian 64-bit numbers of a file."""
    with open(path, "rb") as file:
        file.seek(offset)
        content = file.read(8 * count)
    return [int.from_bytes(content[at : at + 8], "big") for at in range(0, len(content), 8)]


def put(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


@needs("qemu-img", "qemu-io")
@pytest.mark.parametrize(
    "options",
    ["", "cluster_size=4k,compat=0.10", "refcount_bits=1", "refcount_bits=64,extended_l2=on", "compression_type=zstd"],
)
def test_sound_images(tmp_path: Path, options: str) -> None:
    mixed(tmp_path / "source.raw")
    chosen = ["-o", options] if options else []
    plain, packed = tmp_path / "plain.qcow2", tmp_path / "packed.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *chosen, tmp_path / "source.raw", plain)
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", *chosen, tmp_path / "source.raw", packed)
    qemu_io(plain, "write -z 3M 256k", "write 2M 128k")
    if "refcount_bits=1" not in options:
        run("qemu-img", "snapshot", "-c", "one", plain)
    qemu_io(plain, "write 3M 1M", "discard 9M 512k")
    if "compat" not in options:
        run("qemu-img", "bitmap", "--add", plain, "bits")
    for path in (plain, packed):
        status, theirs, ours = both(path)
        assert status == 0
        assert ours == theirs
        assert nbdimg("check", path) == run("qemu-img", "check", path)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = qemu_img_create(tmp_path / "disk.qcow2", "8M")
    qemu_io(path, "write -P 1 0 2M", "write -P 2 4M 1M")
    return path


@needs("qemu-img", "qemu-io")
def test_leaks(image: Path) -> None:
    block = numbers(image, 65536, 1)[0]
    put(image, block + 2 * 2000, b"\0\1")  # a cluster behind the end of the file
    put(image, block + 2 * 5, b"\0\1")
    l2 = numbers(image, numbers(image, 40, 1)[0], 1)[0] & ~(1 << 63)
    put(image, l2 + 8 * 3, bytes(8))  # a cluster without a reference
    before = qemu_content(image, "qcow2")
    status, theirs, ours = both(image)
    assert status == 3
    assert ours["leaks"] == theirs["leaks"]
    assert "repaired" in nbdimg("check", "-r", "leaks", image)
    qemu_check(image)
    assert qemu_content(image, "qcow2") == before


@needs("qemu-img", "qemu-io")
def test_refcounts_that_are_too_low(image: Path) -> None:
    block = numbers(image, 65536, 1)[0]
    put(image, block + 2 * 6, bytes(4))
    before = qemu_content(image, "qcow2")
    status, theirs, ours = both(image)
    assert status == 2
    assert ours["corruptions"] == theirs["corruptions"]
    assert "errors were found" in nbdimg("check", "-r", "leaks", image, status=2)
    nbdimg("check", "-r", "all", image)
    qemu_check(image)
    assert qemu_content(image, "qcow2") == before


@needs("qemu-img", "qemu-io")
def test_two_guest_clusters_at_one_place(image: Path) -> None:
    l2 = numbers(image, numbers(image, 40, 1)[0], 1)[0] & ~(1 << 63)
    first = numbers(image, l2, 1)[0]
    put(image, l2 + 8, first.to_bytes(8, "big"))
    status, theirs, ours = both(image)
    assert status == 2
    assert (ours["corruptions"], ours["leaks"]) == (theirs["corruptions"], theirs["leaks"])
    nbdimg("check", "-r", "all", image)
    qemu_check(image)


@needs("qemu-img", "qemu-io")
def test_entries_that_lead_nowhere_stay(image: Path) -> None:
    l2 = numbers(image, numbers(image, 40, 1)[0], 1)[0] & ~(1 << 63)
    put(image, l2 + 16, (1 << 63 | 1 << 45).to_bytes(8, "big"))
    assert "leads nowhere" in nbdimg("check", image, status=2)
    before = image.read_bytes()[l2 : l2 + 65536]
    nbdimg("check", "-r", "all", image, status=1)
    assert image.read_bytes()[l2 : l2 + 65536] == before


@needs("qemu-img", "qemu-io")
def test_a_mark_of_corruption_goes_when_all_is_well(image: Path) -> None:
    put(image, 79, b"\3")  # dirty and corrupt
    nbdimg("check", image)
    assert image.read_bytes()[79] == 3
    nbdimg("check", "-r", "all", image)
    assert image.read_bytes()[79] == 0
    qemu_check(image)


@needs("qemu-img", "qemu-io")
@pytest.mark.parametrize("format", ["vdi", "vhdx", "vmdk", "vpc"])
def test_other_formats(tmp_path: Path, format: str) -> None:
    path = qemu_img_create(tmp_path / "disk", "10M", format)
    qemu_io(path, "write 1M 1M", format=format)
    assert nbdimg("check", "-f", format, path) == "No errors were found on the image.\n"
    if format == "vdi":
        put(path, 512 + 4, (77).to_bytes(4, "little"))
        assert "errors were found" in nbdimg("check", "-f", format, path, status=2)
    assert "nothing that could be checked" in nbdimg("check", "-f", "raw", path, status=63)
