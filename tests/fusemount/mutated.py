"""Damaged images: a child process opens many of them, and must neither crash, nor hang, nor raise what it should not.

Each copy of an image gets some bytes changed, mostly of its metadata, and then everything is done with it that can be
done. Errors are fine, as long as they are OSError or those of nbdserve.

As a program: mutated.py KIND IMAGE COUNT SEED MODE, with the MODE "read" or "write".
"""

from __future__ import annotations

import random
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from fusemount.filesystems.base import Changes, FileSystem, Inode
from fusemount.filesystems.detect import Signature, detect
from fusemount.volumes import Volume, open_volume
from nbdserve.block import MemoryDevice
from nbdserve.errors import OpenError

ROOT = Path(__file__).parents[2]
_CPU_SECONDS = 10
_PATIENCE = 300  # seconds on a busy machine, for all of them
_MOST_FILES = 3000
_PIECE = 1 << 18
_INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_CUT_OFF = 0.03  # of the copies lose their end

Found = tuple[Inode, bytes, Inode, int]
"""A directory, a name in it, and the inode and type that this stands for."""


def survives(kind: str, image: Path, count: int, *, mode: str = "read", seed: int = 1) -> None:
    """Assert that `count` damaged copies of an image do no harm to a process that looks at (or writes to) them.

    Args:
        kind: of file system, as detect() calls it.
    """
    command = [sys.executable, "-m", "tests.fusemount.mutated", kind, str(image), str(count), str(seed), mode]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_PATIENCE)
    assert done.returncode == 0, f"exit {done.returncode}, last: {done.stdout[-300:]}\n{done.stderr[-3000:]}"
    assert done.stdout.split()[-1] == "done"


def pages_of(content: bytes | bytearray) -> list[int]:
    """The numbers of the pages of 512 bytes that hold something, where damage is worth while."""
    return [page for page in range(len(content) // 512) if any(content[page * 512 : page * 512 + 512])]


def mutate(content: bytearray, chosen: random.Random, pages: Sequence[int]) -> None:
    """Change a few bytes in pages that hold something, half the time in the first of them."""
    for _ in range(chosen.choice((1, 2, 5, 20, 100))):
        page = chosen.choice(pages[: chosen.choice((2, 8, 128, len(pages), len(pages), len(pages)))])
        place = page * 512 + chosen.randrange(512)
        word = slice(place & ~3, (place & ~3) + 4)
        match chosen.randrange(5):
            case 0:
                content[place] ^= 1 << chosen.randrange(8)
            case 1:
                content[place] = chosen.choice((chosen.randrange(256), 0, 0xFF))
            case 2:
                content[word] = chosen.choice((*_INTERESTING, chosen.randrange(1 << 32))).to_bytes(4, "little")
            case 3:
                number = int.from_bytes(content[word], "little") + chosen.choice((-1, 1))
                content[word] = (number & 0xFFFFFFFF).to_bytes(4, "little")
            case 4:
                other = chosen.choice(pages) * 512 + chosen.randrange(0, 496, 4)
                place &= ~15
                content[place : place + 16] = content[other : other + 16]
    if chosen.random() < _CUT_OFF:
        del content[chosen.randrange(len(content)) & ~511 :]


def use_damaged(kind: str, original: bytes, pages: Sequence[int], chosen: random.Random, *, writable: bool) -> None:
    """Mutate a copy of an image and do everything with it: list, walk, read, and change it in memory."""
    content = bytearray(original)
    mutate(content, chosen, pages)
    signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS)  # kills, even inside a library
    device = MemoryDevice(content, read_only=not writable)
    detect(device)
    volume = Volume("disk", 0, device.size, device, None, Signature(kind))
    assert isinstance(volume.condition.readable, bool)
    with suppress(OpenError):
        filesystem, _, cache = open_volume(volume, writable=writable)
        use(filesystem, chosen)
        if cache is not None:
            cache.close()
    signal.setitimer(signal.ITIMER_PROF, 0)


def use(filesystem: FileSystem, chosen: random.Random) -> None:
    """Look at everything, and change some of it where that is possible."""
    found = walk(filesystem)
    if not filesystem.read_only:
        change(filesystem, found, chosen)
        walk(filesystem)
        with suppress(OSError):
            filesystem.sync()
    with suppress(OSError):
        filesystem.close()


def walk(filesystem: FileSystem) -> list[Found]:
    """Look at everything that can be reached."""
    found: list[Found] = []
    seen = {filesystem.root}
    waiting = [filesystem.root]
    while waiting and len(found) < _MOST_FILES:
        directory = waiting.pop()
        with suppress(OSError):
            for entry in filesystem.entries(directory):
                assert 0 < len(entry.name) <= 765 and b"/" not in entry.name and b"\0" not in entry.name
                assert entry.name not in (b".", b"..") and 0 < entry.inode < 1 << 48 and entry.position > 0
                if len(found) >= _MOST_FILES:
                    break
                with suppress(OSError):
                    inode = filesystem.lookup(directory, entry.name)
                    found.append((directory, entry.name, inode, entry.type))
                    look_at(filesystem, inode)
                    if entry.type == stat.S_IFDIR and inode not in seen:
                        seen.add(inode)
                        waiting.append(inode)
    with suppress(OSError):
        filesystem.space()
    return found


def look_at(filesystem: FileSystem, inode: Inode) -> None:
    """Ask for everything about one file, and read its start, middle and end."""
    found = filesystem.attributes(inode)
    if stat.S_ISREG(found.mode):
        for offset in {0, found.size // 2, max(0, found.size - _PIECE)}:
            with suppress(OSError):
                assert len(filesystem.read(inode, offset, _PIECE)) <= _PIECE
    elif stat.S_ISLNK(found.mode):
        with suppress(OSError):
            filesystem.read_link(inode)
    for name in filesystem.xattr_names(inode):
        with suppress(OSError):
            filesystem.xattr(inode, name)


def change(filesystem: FileSystem, found: Sequence[Found], chosen: random.Random) -> None:
    """A few of all possible changes, all over the place."""
    for one in chosen.sample(found, min(len(found), 60)):
        with suppress(OSError):
            filesystem.hold(one[2])
        for act in chosen.sample(possible_changes(filesystem, one, chosen), 3):
            with suppress(OSError):
                act()
        for give_back in (filesystem.let_go, filesystem.forget):
            with suppress(OSError):
                give_back(one[2])


def possible_changes(filesystem: FileSystem, one: Found, chosen: random.Random) -> list[Callable[[], object]]:
    """What can be done to an inode and next to it."""
    directory, name, inode, kind = one
    root, regular, beginning = filesystem.root, stat.S_IFREG | 0o644, name[:50]
    place, length = chosen.randrange(100_000), chosen.randrange(50_000)
    acts: list[Callable[[], object]] = [
        lambda: filesystem.write(inode, place, b"w" * length),
        lambda: filesystem.truncate(inode, place),
        lambda: filesystem.unlink(directory, name),
        lambda: filesystem.remove_directory(directory, name),
        lambda: filesystem.rename(directory, name, root, b"renamed"),
        lambda: filesystem.rename(directory, name, directory, b"moved " + beginning, replace=False),
        lambda: filesystem.create(directory, b"new" + beginning, regular, 0, 0),
        lambda: filesystem.make_directory(directory, b"made" + beginning, 0o755, 0, 0),
        lambda: filesystem.make_symlink(directory, b"link" + beginning, b"t" * (length % 300 + 1), 0, 0),
        lambda: filesystem.link(inode, root, b"linked" + beginning),
        lambda: filesystem.set_xattr(inode, b"user.x", b"x" * (length % 3000)),
        lambda: filesystem.change(inode, Changes(mode=0o600, mtime_ns=5)),
    ]
    if kind == stat.S_IFDIR:
        acts += [lambda: filesystem.create(inode, b"inside %d" % place, regular, 0, 0)] * 5
    return acts


def main(kind: str, image: str, count: str, seed: str, mode: str) -> None:
    """Print the number of each copy before it is used, and "done" in the end."""
    original = Path(image).read_bytes()
    pages = pages_of(original)
    for number in range(int(count)):
        print(seed, number, flush=True)
        use_damaged(kind, original, pages, random.Random(f"{seed} {number}"), writable=mode == "write")
    print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
