"""Crash a FAT volume everywhere: fsck.vfat -a must be able to repair it, and what was synced must be there.

All that is written to the device is recorded. A killed process leaves a prefix of that; a loss of power any part of
what was written since the last flush. Files that were changed since the last sync may be as before or as after; nothing
else may be touched.
"""

from __future__ import annotations

import copy
import random
import stat
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fusemount.filesystems.base import Inode
from fusemount.filesystems.fat import open_filesystem
from nbdserve.block import MemoryDevice
from tests.fusemount.devices import Recorder
from tests.fusemount.fat_images import MIB, Shape, fsck
from tests.fusemount.model import pattern
from tests.fusemount.test_fat import tree
from tests.reference import needs

pytestmark = needs("mkfs.fat", "fsck.vfat")
SHAPES = (Shape(12, 512, 1, MIB), Shape(16, 512, 1, 3 * MIB), Shape(32, 512, 1, MIB))
STEPS = 22
POWER_LOSSES = 25


@dataclass
class Claim:
    """Content that was synced, and where it may be found.

    Attributes:
        least: what there has to be of it.
        paths: one of these must have it.
        may_go: it was unlinked meanwhile, or replaced.
    """

    least: bytes
    paths: set[str]
    may_go: bool = False


@dataclass
class Moment:
    """What is true after an operation.

    Attributes:
        end: how much of the log had been written.
        replaced: a path that the operation has given other content in one stroke, and both contents.
    """

    end: int
    claims: list[Claim]
    replaced: tuple[str, bytes, bytes] | None = None


@dataclass
class Story:
    """Random operations on a recorded volume."""

    device: Recorder
    chosen: random.Random
    files: dict[str, bytes] = field(default_factory=dict)
    claim_of: dict[str, Claim] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    counter: int = 0

    def run(self) -> None:
        self.fs = open_filesystem(self.device, writable=True)
        self.directories = ["", "/sub directory", "/other"]
        for name in self.directories[1:]:
            self.fs.make_directory(self.fs.root, name[1:].encode(), 0o755, 0, 0)
        for _ in range(6):
            self.create()
        self.sync()
        kinds = [self.create, self.append, self.append, self.overwrite, self.truncate, self.unlink, self.rename]
        kinds += [self.replace, self.replace, self.move_directory, self.sync]
        for _ in range(STEPS):
            replaced = self.chosen.choice(kinds)()
            self.moments.append(Moment(len(self.device.log), copy.deepcopy(self.claims), replaced))

    def inode(self, path: str) -> Inode:
        inode = self.fs.root
        for name in path.split("/")[1:]:
            inode = self.fs.lookup(inode, name.encode())
        return inode

    def split(self, path: str) -> tuple[Inode, bytes]:
        parent, _, name = path.rpartition("/")
        return self.inode(parent), name.encode()

    def new_path(self) -> str:
        self.counter += 1
        name = self.chosen.choice(("F%d", "a rather long name, number %d", "mixed Case %d")) % self.counter
        return f"{self.chosen.choice(self.directories)}/{name}"

    def content(self) -> bytes:
        return pattern(self.counter, self.chosen.choice((0, 1, 500, 512, 3000, 9000)))

    def create(self) -> None:
        path, content = self.new_path(), self.content()
        self.fs.write(self.fs.create(*self.split(path), stat.S_IFREG | 0o644, 0, 0), 0, content)
        self.files[path] = content

    def append(self) -> None:
        path, content = self.chosen.choice(list(self.files)), self.content()
        gap = self.chosen.choice((0, 0, 700))
        self.fs.write(self.inode(path), len(self.files[path]) + gap, content)
        self.files[path] += bytes(gap if content else 0) + content

    def overwrite(self) -> None:
        path, content = self.chosen.choice(list(self.files)), self.content()
        old = self.files[path]
        at = len(old) // 2
        self.fs.write(self.inode(path), at, content)
        self.files[path] = old[:at] + content + old[at + len(content) :]
        self.shorten(path, at)

    def truncate(self) -> None:
        path = self.chosen.choice(list(self.files))
        size = len(self.files[path]) * self.chosen.choice((0, 1, 2, 3)) // 4
        self.fs.truncate(self.inode(path), size)
        self.files[path] = self.files[path][:size]
        self.shorten(path, size)

    def shorten(self, path: str, size: int) -> None:
        if path in self.claim_of:
            self.claim_of[path].least = self.claim_of[path].least[:size]

    def unlink(self) -> None:
        if len(self.files) > 4:
            path = self.chosen.choice(list(self.files))
            self.fs.unlink(*self.split(path))
            del self.files[path]
            self.gone(path)

    def gone(self, path: str) -> None:
        if path in self.claim_of:
            self.claim_of.pop(path).may_go = True

    def rename(self) -> None:
        self.rename_to(self.chosen.choice(list(self.files)), self.new_path())

    def replace(self) -> tuple[str, bytes, bytes] | None:
        """Over a file, in the same directory, as programs do it that want to replace a file's content."""
        path, target = self.chosen.choices(list(self.files), k=2)
        if path == target or len(self.files) < 5 or path.rpartition("/")[0] != target.rpartition("/")[0]:
            return None
        replaced = target, self.files[target], self.files[path]
        self.gone(target)
        self.rename_to(path, target)
        return replaced

    def rename_to(self, path: str, new: str) -> None:
        self.fs.rename(*self.split(path), *self.split(new))
        self.moved(path, new)

    def moved(self, path: str, new: str) -> None:
        self.files[new] = self.files.pop(path)
        if path in self.claim_of:
            claim = self.claim_of[new] = self.claim_of.pop(path)
            claim.paths.add(new)

    def move_directory(self) -> None:
        """The last directory, to somewhere else."""
        old = self.directories.pop()
        self.counter += 1
        new = f"{self.chosen.choice(self.directories)}/moved {self.counter}"
        self.fs.rename(*self.split(old), *self.split(new))
        self.directories.append(new)
        for path in list(self.files):
            if path.startswith(old + "/"):
                self.moved(path, new + path[len(old) :])

    def sync(self) -> None:
        self.fs.sync()
        self.claim_of = {path: Claim(content, {path}) for path, content in self.files.items()}
        self.claims = list(self.claim_of.values())


def tell(shape: Shape, directory: Path) -> tuple[bytes, Story]:
    """A story, and the volume before it began."""
    empty = shape.make(directory).read_bytes()
    story = Story(Recorder(MemoryDevice(bytearray(empty))), random.Random(str(shape)))
    story.run()
    return empty, story


def repaired(image: Path) -> dict[str, bytes | None]:
    """What is on a volume after fsck.vfat has repaired it."""
    for _ in range(3):  # of a directory in two places it first empties one, then removes it, then its long name
        result = fsck(image, "-a")
        assert result.returncode in (0, 1), result.stdout + result.stderr
    result = fsck(image, "-n")
    assert result.returncode == 0, result.stdout + result.stderr
    fs = open_filesystem(MemoryDevice(bytearray(image.read_bytes())), writable=False)
    return dict(tree(fs, fs.root))


def check_claims(found: dict[str, bytes | None], claims: list[Claim]) -> None:
    for claim in claims:
        contents = [found.get(path) or b"" for path in claim.paths]
        assert claim.may_go or any(content.startswith(claim.least) for content in contents), claim.paths


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_killed_anywhere(tmp_path: Path, shape: Shape) -> None:
    empty, story = tell(shape, tmp_path)
    image, content = tmp_path / "crashed.img", bytearray(empty)
    waiting = list(story.moments)
    before = 0
    synced = story.device.log.index(None, story.device.log.index(None) + 1)
    for count, change in enumerate(story.device.log, 1):
        if change is not None:
            content[change[0] : change[0] + len(change[1])] = change[1]
        while waiting and waiting[0].end < count:
            before = waiting.pop(0).end
        if not waiting or count <= synced or change is None:
            continue
        image.write_bytes(content)
        found = repaired(image)
        check_claims(found, waiting[0].claims)
        if waiting[0].replaced and before < count:
            path, old, new = waiting[0].replaced
            assert found.get(path) in (old, new)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_power_lost_anywhere(tmp_path: Path, shape: Shape) -> None:
    """Any part of what was written since the last flush may be missing."""
    empty, story = tell(shape, tmp_path)
    image, log = tmp_path / "crashed.img", story.device.log
    for _ in range(POWER_LOSSES):
        moment = story.chosen.choice(story.moments[1:])
        flushed = max(i for i in range(moment.end) if log[i] is None)
        content = bytearray(empty)
        for i in range(moment.end):
            change = log[i]
            if change and (i < flushed or story.chosen.random() < 0.5):
                content[change[0] : change[0] + len(change[1])] = change[1]
        image.write_bytes(content)
        found = repaired(image)
        check_claims(found, [claim for claim in moment.claims if len(claim.paths) == 1])
