"""Stories: random changes of a file system, all that is written recorded, and what of it has to survive a crash.

A killed process leaves a prefix of what was written; a loss of power any part of what was written since the last flush.
Files that were changed since the last sync may be as before or as after; nothing else may be touched.
"""

from __future__ import annotations

import copy
import random
import stat
from dataclasses import dataclass, field

from fusemount.filesystems.base import FileSystem, Inode
from fusemount.filesystems.detect import Signature
from fusemount.volumes import Opened, Volume, open_volume
from nbdserve.block import BlockDevice, MemoryDevice
from tests.fusemount.devices import Recorder
from tests.fusemount.model import pattern


def opened(kind: str, device: BlockDevice, *, writable: bool) -> Opened:
    """A file system as it is opened for a mount, with the cache that it has there."""
    return open_volume(Volume("disk", 0, device.size, device, None, Signature(kind)), writable=writable)


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
    """What is true after an operation; for a sync, what was true before it.

    Attributes:
        end: how much of the log had been written.
        replaced: a path that the operation has given other content in one stroke, and both contents.
    """

    end: int
    claims: list[Claim]
    replaced: tuple[str, bytes, bytes] | None = None


@dataclass
class Story:
    """Random operations on a recorded volume.

    Attributes:
        kind: of file system, as detect() calls it.
        begun: how much of the log had been written when something had been synced for the first time.
    """

    kind: str
    device: Recorder
    chosen: random.Random
    steps: int = 22
    beginning: int = 6
    files: dict[str, bytes] = field(default_factory=dict)
    claim_of: dict[str, Claim] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    counter: int = 0
    begun: int = 0

    def run(self) -> None:
        """Do everything."""
        self.fs: FileSystem = opened(self.kind, self.device, writable=True).fs
        self.directories = ["", "/sub directory", "/other"]
        for name in self.directories[1:]:
            self.fs.make_directory(self.fs.root, name[1:].encode(), 0o755, 0, 0)
        for _ in range(self.beginning):
            self.create()
        self.sync()
        self.begun = len(self.device.log)
        kinds = [self.create, self.append, self.append, self.overwrite, self.truncate, self.unlink, self.rename]
        kinds += [self.replace, self.replace, self.move_directory, self.sync]
        for _ in range(self.steps):
            act, before = self.chosen.choice(kinds), self.claims
            replaced = act()
            true = before if act == self.sync else self.claims
            self.moments.append(Moment(len(self.device.log), copy.deepcopy(true), replaced))

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
        # Where writes wait, only what was synced, as were its directories, has to be the one or the other.
        certain = self.kind == "vfat" or all(self.is_synced(each) for each in (path, target))
        replaced = (target, self.files[target], self.files[path]) if certain else None
        self.gone(target)
        self.rename_to(path, target)
        return replaced

    def is_synced(self, path: str) -> bool:
        claim = self.claim_of.get(path)
        return claim is not None and claim.paths == {path} and claim.least == self.files[path]

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


def tree(filesystem: FileSystem, directory: Inode, path: str = "") -> dict[str, bytes]:
    """The content of every file, by path."""
    found: dict[str, bytes] = {}
    for entry in filesystem.entries(directory):
        below = f"{path}/{entry.name.decode()}"
        inode = filesystem.lookup(directory, entry.name)
        if entry.type == stat.S_IFDIR:
            found |= tree(filesystem, inode, below)
        else:
            found[below] = bytes(filesystem.read(inode, 0, filesystem.attributes(inode).size))
    return found


def tell(kind: str, empty: bytes, chosen: random.Random, *, steps: int = 22, beginning: int = 6) -> Story:
    """A story that begins with an empty volume."""
    story = Story(kind, Recorder(MemoryDevice(bytearray(empty))), chosen, steps, beginning)
    story.run()
    return story


def stops(story: Story) -> list[int]:
    """How much of the log a killed process may have written, from the first sync on."""
    log = story.device.log
    return [end for end in range(story.begun + 1, story.moments[-1].end + 1) if log[end - 1] is not None]


def written(story: Story, empty: bytes, end: int) -> bytearray:
    """The volume when only the beginning of the log has been written."""
    content = bytearray(empty)
    for change in story.device.log[:end]:
        if change is not None:
            content[change[0] : change[0] + len(change[1])] = change[1]
    return content


def check_stop(story: Story, end: int, kind: str, repaired: bytes) -> None:
    """Assert that a volume, repaired after a process was killed there, has what it must have."""
    found = files_of(kind, repaired)
    before = 0  # the end of the log at the last moment
    for moment in story.moments:
        if end <= moment.end:
            claims = moment.claims
            if moment.replaced and before < end:
                path, old, new = moment.replaced
                assert found.get(path) in (old, new)
                if kind == "vfat":  # the old name of the new content may have gone before the new one had it
                    claims = [claim for claim in claims if path not in claim.paths]
            check_claims(found, claims)
            return
        before = moment.end


def files_of(kind: str, content: bytes) -> dict[str, bytes]:
    """What is on a volume."""
    fs = opened(kind, MemoryDevice(bytearray(content), read_only=True), writable=False).fs
    return tree(fs, fs.root)


def check_claims(found: dict[str, bytes], claims: list[Claim]) -> None:
    """Assert that what was synced is there."""
    for claim in claims:
        contents = [found.get(path, b"") for path in claim.paths]
        assert claim.may_go or any(content.startswith(claim.least) for content in contents), claim.paths
