"""The workflow that tutorials teach, in their order, once with qemu-img (and a loop mount) and once with nbdimg.

After every step both have to show the same; the contents of images are always read by QEMU.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.img import nbdimg
from tests.reference import needs, qemu_check, run

MIB = 1 << 20
SIZE = 12 * MIB
TABLE = "label: dos\nlabel-id: 0x12345678\nstart=2048, type=83, bootable\n"
START, LENGTH = 2048 * 512, SIZE - 2048 * 512

pytestmark = [
    needs("qemu-img", "sfdisk", "mkfs.ext4", "e2fsck", "debugfs"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, whose files the guest's are"),
]


class Lesson:
    """One run through the tutorial, in a folder of its own.

    Args:
        img: runs qemu-img or nbdimg, whose verbs are called alike.
        ours: whether it is nbdimg, for what qemu-img has no verb for.
    """

    def __init__(self, folder: Path, img: Callable[..., str], *, ours: bool) -> None:
        folder.mkdir()
        self.folder = folder
        self.img = img
        self.ours = ours

    def path(self, name: str) -> Path:
        """A file of this run."""
        return self.folder / name

    def content(self, name: str, format: str) -> bytes:
        """What QEMU reads."""
        raw = self.path("reference")
        run("qemu-img", "convert", "-f", format, "-O", "raw", self.path(name), raw)
        return raw.read_bytes()[:SIZE]

    def file(self, name: str, format: str, path: str) -> str:
        """A file of the guest, as debugfs finds it in what QEMU reads; "" when there is none."""
        part = self.path("part")
        part.write_bytes(self.content(name, format)[START:])
        return subprocess.run(["debugfs", "-R", f"cat {path}", part], capture_output=True, text=True).stdout

    def put(self, name: str, format: str, text: str, path: str) -> None:
        """Put a file into the image, whose disk stays sound: with cp, or as tutorials do it, through a raw copy."""
        source = self.path("source")
        source.write_text(text)
        if self.ours:
            self.img("cp", "-f", format, "--owner", "0:0", source, f"{self.path(name)}:/p1{path}")
        else:
            part, raw = self.path("part"), self.path("raw copy")
            raw.write_bytes(self.content(name, format))
            part.write_bytes(raw.read_bytes()[START:])
            run("debugfs", "-w", "-R", f"write {source} {path}", part)
            run("qemu-io", "-f", format, "-c", f"write -q -s {part} {START} {LENGTH}", self.path(name))
        part = self.path("checked")
        part.write_bytes(self.content(name, format)[START:])
        result = subprocess.run(["e2fsck", "-fn", part], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout


def whole_tutorial(lesson: Lesson) -> list[object]:
    """Every step; returns what was seen, for the comparison of two runs."""
    img, path = lesson.img, lesson.path
    seen: list[object] = []

    # A disk with a partition and a file system, as an installation leaves it.
    disk = path("disk.raw")
    disk.write_bytes(bytes(SIZE))
    run("sfdisk", "--quiet", disk, stdin=TABLE)
    part = path("fresh")
    run("mkfs.ext4", "-q", "-E", "hash_seed=11111111-1111-4111-8111-111111111111", part, f"{LENGTH >> 10}k")
    with disk.open("r+b") as file:
        file.seek(START)
        file.write(part.read_bytes())
    img("create", "-q", "-f", "vpc", "-o", "subformat=dynamic,force_size=on", path("first.vhd"), str(SIZE))
    assert json.loads(img("info", "--output=json", path("first.vhd")))["virtual-size"] == SIZE
    img("convert", "-f", "raw", "-O", "vpc", "-o", "subformat=dynamic,force_size=on", disk, path("disk.vhd"))
    lesson.put("disk.vhd", "vpc", "installed\n", "/installed")

    # vhd -> qcow2, an internal snapshot, a change, back again.
    img("convert", "-f", "vpc", "-O", "qcow2", path("disk.vhd"), path("base.qcow2"))
    img("snapshot", "-c", "clean", path("base.qcow2"))
    lesson.put("base.qcow2", "qcow2", "a mistake\n", "/mistake")
    seen.append(lesson.file("base.qcow2", "qcow2", "/mistake"))
    img("snapshot", "-a", "clean", path("base.qcow2"))
    seen.append(lesson.file("base.qcow2", "qcow2", "/mistake"))
    img("snapshot", "-d", "clean", path("base.qcow2"))
    assert img("snapshot", "-l", path("base.qcow2")) == ""
    qemu_check(path("base.qcow2"))

    # base <- sn1 <- sn2 <- sn3, with a file from each.
    below = "base.qcow2"
    for number in (1, 2, 3):
        name = f"sn{number}"
        img("create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", path(name))
        lesson.put(name, "qcow2", f"{name}\n", f"/{name}")
        below = name
    files = ("/installed", "/sn1", "/sn2", "/sn3")
    seen.append([lesson.file("sn3", "qcow2", file) for file in files])

    # The one in the middle goes, into the one above it; then the lowest is committed.
    before = lesson.content("sn3", "qcow2")
    if lesson.ours:
        img("delete-middle", path("sn2"), path("sn3"))
    else:
        img("rebase", "-b", "sn1", "-F", "qcow2", path("sn3"))
        path("sn2").unlink()
    assert lesson.content("sn3", "qcow2") == before
    img("commit", path("sn3"))
    assert lesson.content("sn1", "qcow2") == before
    img("commit", "-d", path("sn1"))
    assert lesson.content("base.qcow2", "qcow2") == before
    img("rebase", "-u", "-b", "base.qcow2", "-F", "qcow2", path("sn3"))
    for name in ("base.qcow2", "sn1", "sn3"):
        qemu_check(path(name))
    seen.append([lesson.file("sn3", "qcow2", file) for file in files])
    seen.append([name for name in sorted(os.listdir(lesson.folder)) if name.startswith("sn")])

    # qcow2 -> vpc -> raw, and all of them show the same disk.
    img("convert", "-f", "qcow2", "-O", "vpc", "-o", "force_size=on", path("sn3"), path("last.vhd"))
    img("convert", "-f", "vpc", "-O", "raw", path("last.vhd"), path("last.raw"))
    seen.append(img("compare", "-f", "qcow2", "-F", "raw", path("base.qcow2"), path("last.raw")))
    assert path("last.raw").read_bytes()[:SIZE] == before
    seen.append([lesson.file("last.raw", "raw", file) for file in files])
    return seen


def test_both_tools_take_the_tutorial(tmp_path: Path) -> None:
    def qemu_img(*arguments: str | Path) -> str:
        return run("qemu-img", *arguments)

    theirs = whole_tutorial(Lesson(tmp_path / "theirs", qemu_img, ours=False))
    ours = whole_tutorial(Lesson(tmp_path / "ours", nbdimg, ours=True))
    assert ours == theirs
    all_files = ["installed\n", "sn1\n", "sn2\n", "sn3\n"]
    assert ours == ["a mistake\n", "", all_files, all_files, ["sn1", "sn3"], "Images are identical.\n", all_files]
