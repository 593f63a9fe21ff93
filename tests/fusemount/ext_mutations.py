"""Damaged images, to be run in a process of its own: python -m tests.fusemount.ext_mutations IMAGE SEED COUNT.

Each round changes some bytes of the image's metadata and then does everything that can be done with it. Errors are
fine, as long as they are OSError or NbdserveError; anything else ends the process, which prints the seed first.
"""

from __future__ import annotations

import random
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fusemount.filesystems import ext
from fusemount.filesystems.base import Changes, FileSystem, Inode
from nbdserve.block import MemoryDevice
from nbdserve.errors import NbdserveError

_MOST_ENTRIES = 3000
_MOST_READ = 1 << 20


def main(image: str, seed: str, count: str) -> None:
    original = Path(image).read_bytes()
    for number in range(int(seed), int(seed) + int(count)):
        print(number, flush=True)
        content = bytearray(original)
        mutate(content, random.Random(number))
        use(content)
    print("done")


def mutate(content: bytearray, chance: random.Random) -> None:
    """Change a few numbers somewhere among those bytes that are not zero, half the time in the first blocks."""
    end = len(content)
    for _ in range(chance.choice((1, 2, 5, 20, 100))):
        while True:
            place = chance.randrange(1024, chance.choice((2048, 4096, 64 << 10, end)))
            if content[place] or chance.random() < 0.01:
                break
        match chance.randrange(4):
            case 0:
                content[place] ^= 1 << chance.randrange(8)
            case 1:
                content[place] = chance.randrange(256)
            case 2:
                content[place & ~3 : (place & ~3) + 4] = chance.choice((bytes(4), b"\xff" * 4, chance.randbytes(4)))
            case 3:
                other = chance.randrange(1024, end - 64)
                content[place & ~3 : (place & ~3) + 16] = content[other & ~3 : (other & ~3) + 16]
    del content[end:]


def use(content: bytearray) -> None:
    """Read all of it, then change what can be changed."""
    readable = MemoryDevice(content, read_only=True)
    before = bytes(content)
    with suppress(NbdserveError):
        ext.examine(readable)
        look(ext.open_filesystem(readable, writable=False))
    assert content == before
    with suppress(NbdserveError):
        filesystem = ext.open_filesystem(MemoryDevice(content), writable=True)
        change(filesystem)
        with suppress(OSError):
            filesystem.close()


def look(filesystem: FileSystem) -> list[tuple[Inode, bytes, Inode, int]]:
    """Walk through everything; the names found, with their directories."""
    found: list[tuple[Inode, bytes, Inode, int]] = []
    waiting = [filesystem.root]
    seen = set(waiting)
    while waiting and len(found) < _MOST_ENTRIES:
        directory = waiting.pop()
        with suppress(OSError):
            for entry in filesystem.entries(directory):
                assert b"/" not in entry.name and b"\0" not in entry.name and entry.name not in (b"", b".", b"..")
                if len(found) >= _MOST_ENTRIES:
                    break
                with suppress(OSError):
                    inode = filesystem.lookup(directory, entry.name)
                    mode = filesystem.attributes(inode).mode
                    found.append((directory, entry.name, inode, mode))
                    look_at(filesystem, inode)
                    if stat.S_ISDIR(mode) and inode not in seen:
                        seen.add(inode)
                        waiting.append(inode)
    filesystem.space()
    return found


def look_at(filesystem: FileSystem, inode: Inode) -> None:
    attributes = filesystem.attributes(inode)
    with suppress(OSError):
        filesystem.read_link(inode)
    with suppress(OSError):
        for name in filesystem.xattr_names(inode):
            filesystem.xattr(inode, name)
    for offset in (0, attributes.size // 2, attributes.size - 5):
        with suppress(OSError):
            assert len(filesystem.read(inode, max(offset, 0), _MOST_READ)) <= _MOST_READ


def change(filesystem: FileSystem) -> None:
    """Do one thing or another to every file."""
    for index, (directory, name, inode, mode) in enumerate(look(filesystem)):
        actions: list[Callable[[], object]] = [
            lambda d=directory, n=name: filesystem.unlink(d, n),
            lambda i=inode: filesystem.write(i, 5000, b"w" * 20_000),
            lambda i=inode: filesystem.truncate(i, 1234),
            lambda d=directory, n=name: filesystem.rename(d, n, filesystem.root, b"moved " + n),
            lambda i=inode: filesystem.set_xattr(i, b"user.new", b"v" * 200),
            lambda d=directory: filesystem.create(d, b"created", stat.S_IFREG | 0o600, 0, 0),
            lambda d=directory: filesystem.make_directory(d, b"made", 0o700, 0, 0),
            lambda d=directory, n=name: filesystem.remove_directory(d, n),
            lambda i=inode: filesystem.change(i, Changes(mode=0o600, mtime_ns=5)),
            lambda i=inode, d=directory: filesystem.link(i, d, b"linked"),
        ]
        if stat.S_ISDIR(mode):
            actions += [lambda i=inode: filesystem.create(i, b"inside", stat.S_IFREG | 0o600, 0, 0)] * 5
        for action in (actions[index % len(actions)], actions[index * 7 % len(actions)]):
            with suppress(OSError):
                action()
        if index % 3 == 0:
            with suppress(OSError):
                filesystem.forget(inode, 5)
    with suppress(OSError):
        filesystem.sync()


if __name__ == "__main__":
    main(*sys.argv[1:])
