"""Damaged images: a child process opens many of them, and must neither crash, nor hang, nor raise what it should not.

As a program: mutated.py ADAPTER IMAGE COUNT SEED MODE, with the MODE "read" or "write".
"""

from __future__ import annotations

import random
import signal
import stat
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from fusemount.filesystems.base import FileSystem, Inode
from nbdserve.block import MemoryDevice
from nbdserve.errors import OpenError

ROOT = Path(__file__).parents[2]
_CPU_SECONDS = 10
_PATIENCE = 300  # seconds on a busy machine, for all of them
_MOST_FILES = 3000
_PIECE = 1 << 18
_INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def survives(adapter: str, image: Path, count: int, *, mode: str = "read", seed: int = 1) -> None:
    """Assert that `count` damaged copies of an image do no harm to a process that looks at (or writes to) them."""
    command = [sys.executable, "-m", "tests.fusemount.mutated", adapter, str(image), str(count), str(seed), mode]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_PATIENCE)
    assert done.returncode == 0, f"exit {done.returncode}, last: {done.stdout[-300:]}\n{done.stderr[-3000:]}"
    assert done.stdout.split()[-1] == "done"


def mutate(content: bytearray, randomness: random.Random, pages: list[int]) -> None:
    """Change a few bytes in pages that hold something."""
    for _ in range(randomness.choice((1, 2, 5, 20))):
        place = randomness.choice(pages) * 512 + randomness.randrange(512)
        if randomness.random() < 0.3:
            place -= place % 4
            content[place : place + 4] = randomness.choice(_INTERESTING).to_bytes(4, "little")
        else:
            content[place] = randomness.choice((randomness.randrange(256), 0, 0xFF, content[place] ^ 1))


def walk(filesystem: FileSystem) -> list[tuple[Inode, bytes, Inode]]:
    """Look at everything that can be reached, as (directory, name, inode)."""
    found: list[tuple[Inode, bytes, Inode]] = []
    seen = {filesystem.root}
    waiting = [filesystem.root]
    while waiting and len(found) < _MOST_FILES:
        directory = waiting.pop()
        with suppress(OSError):
            for entry in filesystem.entries(directory):
                assert 0 < len(entry.name) <= 765 and b"/" not in entry.name and b"\0" not in entry.name
                assert entry.name not in (b".", b"..") and 0 < entry.inode < 1 << 48 and entry.position > 0
                with suppress(OSError):
                    inode = filesystem.lookup(directory, entry.name)
                    found.append((directory, entry.name, inode))
                    look_at(filesystem, inode)
                    if entry.type == stat.S_IFDIR and inode not in seen:
                        seen.add(inode)
                        waiting.append(inode)
    with suppress(OSError):
        filesystem.space()
    return found


def look_at(filesystem: FileSystem, inode: Inode) -> None:
    """Ask for everything about one file, and read its start and end."""
    found = filesystem.attributes(inode)
    if stat.S_ISREG(found.mode):
        for offset in {0, max(0, found.size - _PIECE)}:
            with suppress(OSError):
                assert len(filesystem.read(inode, offset, _PIECE)) <= _PIECE
    elif stat.S_ISLNK(found.mode):
        filesystem.read_link(inode)
    for name in filesystem.xattr_names(inode):
        with suppress(OSError):
            filesystem.xattr(inode, name)


def change(filesystem: FileSystem, found: list[tuple[Inode, bytes, Inode]], randomness: random.Random) -> None:
    """Some changes all over the place."""
    root = filesystem.root
    for directory, name, inode in randomness.sample(found, min(len(found), 20)):
        for act in randomness.sample(range(6), 3):
            with suppress(OSError):
                match act:
                    case 0:
                        filesystem.write(inode, randomness.randrange(100_000), b"w" * randomness.randrange(50_000))
                    case 1:
                        filesystem.truncate(inode, randomness.randrange(100_000))
                    case 2:
                        filesystem.unlink(directory, name)
                    case 3:
                        filesystem.rename(directory, name, root, b"renamed")
                    case 4:
                        filesystem.create(directory, b"new" + name[:50], stat.S_IFREG | 0o644, 0, 0)
                    case 5:
                        filesystem.set_xattr(inode, b"user.x", b"x" * randomness.randrange(3000))


def main(adapter: str, image: str, count: str, seed: str, mode: str) -> None:
    module = import_module(adapter)
    original = Path(image).read_bytes()
    pages = [page for page in range(len(original) // 512) if any(original[page * 512 : page * 512 + 512])]
    for number in range(int(count)):
        print(seed, number, flush=True)
        randomness = random.Random(f"{seed} {number}")
        content = bytearray(original)
        mutate(content, randomness, pages)
        signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS)  # kills, even inside a library
        device = MemoryDevice(content, read_only=mode == "read")
        module.examine(device)
        with suppress(OpenError):
            use(module.open_filesystem(device, writable=mode == "write"), randomness)
    print("done")


def use(filesystem: FileSystem, randomness: random.Random) -> None:
    """Look at everything, and change some of it where that is possible."""
    found = walk(filesystem)
    if not filesystem.read_only:
        change(filesystem, found, randomness)
        walk(filesystem)
    with suppress(OSError):
        filesystem.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
