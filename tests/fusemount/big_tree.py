"""A tree of many files, and a large one with holes, read right through a mount, whose process stays small."""

from __future__ import annotations

import os
import random
import re
import stat
from dataclasses import replace
from pathlib import Path

from fusemount.state import FACT
from tests.fusemount.mounted import mounted
from tests.fusemount.trees import Tree, host_tree_of
from tests.reference import run

MOST_MEMORY = 256 << 20
"""Bytes that the process behind a mount may have resident at any time, however large the tree."""

_PER_DIRECTORY = 1000


def make_tree(root: Path, chosen: random.Random, count: int, large: int) -> None:
    """`count` small files in directories of a thousand, and one of `large` bytes, most of it holes."""
    root.mkdir()
    for number in range(count):
        group, place = divmod(number, _PER_DIRECTORY)
        directory = root / f"group {group % 10}" / f"directory {group}"
        if place == 0:
            directory.mkdir(parents=True)
        length = chosen.choice((0, 1, 60, 500, 4096, 5000))
        (directory / f"file number {number}").write_bytes(chosen.randbytes(length))
        if place % 100 == 1:
            os.symlink(f"file number {number}", directory / f"link to {number}")
    with (root / "with holes").open("wb") as file:
        file.truncate(large)
        for _ in range(300):
            os.pwrite(file.fileno(), chosen.randbytes(chosen.randrange(1, 100_000)), chosen.randrange(large - 100_000))


def make_image(image: Path, source: Path, size: int) -> None:
    """A qcow2 image with an ext4 file system that mkfs.ext4 fills from a directory."""
    raw = image.with_suffix(".raw")
    run("truncate", "-s", str(size), raw)
    run("mkfs.ext4", "-q", "-F", "-d", source, raw, timeout=3000)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image, timeout=3000)
    raw.unlink()


def check_mount(image: Path, mountpoint: Path, source: Path) -> int:
    """Assert that the mount shows what the directory holds; the most memory that its process has used, in bytes."""
    mountpoint.mkdir(exist_ok=True)
    with mounted(image, mountpoint):
        seen, expected = comparable(host_tree_of(mountpoint)), comparable(host_tree_of(source))
        assert len(seen) == len(expected)
        assert seen == expected
        with (mountpoint / "with holes").open("rb") as file:
            end = os.lseek(file.fileno(), 0, os.SEEK_END)
            assert os.lseek(file.fileno(), 0, os.SEEK_DATA) < end  # no file of the tree begins with nothing but holes
            assert os.lseek(file.fileno(), end - 1, os.SEEK_HOLE) == end
        process = int(os.getxattr(mountpoint, FACT).split()[0])
        status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    assert found
    used = int(found[1]) << 10
    assert used < MOST_MEMORY, f"{used >> 20} MiB"
    return used


def comparable(tree: Tree) -> Tree:
    """Directories have no size and count of links in common, and mkfs.ext4 stores whole seconds."""
    return {
        path: replace(
            facts,
            mtime_ns=facts.mtime_ns // 10**9,
            **({"size": 0, "links": 1} if stat.S_ISDIR(facts.mode) else {}),
        )
        for path, facts in tree.items()
        if path != b"lost+found"
    }
