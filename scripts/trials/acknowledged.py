"""A story of random changes in a mounted directory, and what of them was acknowledged and must survive.

fsync(2) of a file acknowledges its content, and with it everything that was done to names before. Whatever is begun
afterwards may have happened or not: a file that is overwritten, cut, moved or removed is then only what it was before
or what it is to become.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from pathlib import Path

_LENGTHS = (0, 1, 500, 4096, 9000, 70_000, 300_000)
_MOST_BYTES = 30 << 20
_FEWEST_FILES = 6


@dataclass
class Claim:
    """Content that was acknowledged, and where it may be found.

    Attributes:
        least: how the file has to begin, at least.
        paths: one of these has it.
    """

    least: bytes
    paths: set[str]


@dataclass
class Story:
    """Changes in a directory.

    Attributes:
        told: one line for each.
        count, syncs: how many there were, and how many fsyncs have returned.
    """

    root: Path
    chosen: random.Random
    told: list[str] = field(default_factory=list)
    count: int = 0
    syncs: int = 0
    _files: dict[str, bytes] = field(default_factory=dict)
    _claims: dict[str, Claim] = field(default_factory=dict)  # by the path where the content should be
    _replaced: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)
    _directories: list[str] = field(default_factory=lambda: [""])

    def go_on(self) -> None:
        """Change one thing after another until something fails."""
        for name in ("sub directory", "other", "third"):
            self._note(f"mkdir {name}")
            (self.root / name).mkdir()
            self._directories.append(name)
        acts = [self._create] * 6 + [self._append] * 3 + [self._overwrite, self._truncate, self._remove, self._move]
        acts += [self._replace, self._replace, self._move_directory, *[self._sync] * 4]
        while True:
            if sum(map(len, self._files.values())) > _MOST_BYTES:
                self._remove()
            self.chosen.choice(acts)()

    def check(self) -> None:
        """Assert that what was acknowledged is there."""
        for path, claim in self._claims.items():
            # FAT may take away the old name of what replaces a file before the new name has its content.
            assert path in self._replaced or any(self._begins(each, claim.least) for each in claim.paths), (
                f"lost: {claim.paths}, {len(claim.least)} bytes; there is {[self._seen(each) for each in claim.paths]}"
            )
        for path, (old, new) in self._replaced.items():
            assert self._begins(path, old) or self._begins(path, new), f"{path} is neither old nor new"

    # The changes. What is begun is noted first: when it fails, nobody knows how far it came.

    def _create(self) -> None:
        path, content = self._new_path(), self._content()
        self._note(f"create {path} {len(content)}")
        (self.root / path).write_bytes(content)
        self._files[path] = content
        if self.chosen.random() < 0.3:
            self._fsync(path)

    def _append(self) -> None:
        if path := self._any_file():
            content = self._content()
            self._note(f"append {path} {len(content)}")
            with (self.root / path).open("ab") as file:
                file.write(content)
            self._files[path] += content
            if self.chosen.random() < 0.3:
                self._fsync(path)

    def _overwrite(self) -> None:
        if path := self._any_file():
            content, old = self._content(), self._files[path]
            at = len(old) // 2
            self._note(f"overwrite {path} at {at} {len(content)}")
            self._shorten(path, at)
            with (self.root / path).open("r+b") as file:
                file.seek(at)
                file.write(content)
            self._files[path] = old[:at] + content + old[at + len(content) :]

    def _truncate(self) -> None:
        if path := self._any_file():
            size = len(self._files[path]) * self.chosen.randrange(4) // 4
            self._note(f"truncate {path} {size}")
            self._shorten(path, size)
            os.truncate(self.root / path, size)
            self._files[path] = self._files[path][:size]

    def _remove(self) -> None:
        path = self._any_file()
        if path and len(self._files) > _FEWEST_FILES:
            self._note(f"remove {path}")
            self._give_up(path)
            (self.root / path).unlink()
            del self._files[path]

    def _move(self) -> None:
        if path := self._any_file():
            self._rename(path, self._new_path())

    def _replace(self) -> None:
        """As programs do it that want to replace a file's content: a new file, fsynced, is renamed over it."""
        target = self._any_file()
        if not target or target not in self._claims or len(self._claims[target].paths) > 1:
            return
        path, content = self._new_path(os.path.dirname(target)), self._content()
        self._note(f"create {path} {len(content)} to replace")
        (self.root / path).write_bytes(content)
        self._files[path] = content
        self._fsync(path)
        self._replaced[target] = self._claims[target].least, content
        del self._claims[target]
        self._rename(path, target)

    def _move_directory(self) -> None:
        if len(self._directories) < 3:
            return
        old = self._directories.pop()
        new = os.path.join(self.chosen.choice(self._directories), f"moved {self.count}")
        self._note(f"rename {old} {new}")
        for path in list(self._claims):
            if path.startswith(old + "/"):
                self._claims[path].paths.add(new + path[len(old) :])
        self._replaced.clear()
        (self.root / old).rename(self.root / new)
        self._directories.append(new)
        for path in list(self._files):
            if path.startswith(old + "/"):
                self._moved(path, new + path[len(old) :])

    def _sync(self) -> None:
        if path := self._any_file():
            self._fsync(path)

    # What they do

    def _rename(self, path: str, new: str) -> None:
        self._note(f"rename {path} {new}")
        if path in self._claims:
            self._claims[path].paths.add(new)
        self._replaced.pop(path, None)
        (self.root / path).rename(self.root / new)
        self._moved(path, new)

    def _moved(self, path: str, new: str) -> None:
        self._files[new] = self._files.pop(path)
        if path in self._claims:
            self._claims[new] = self._claims.pop(path)

    def _fsync(self, path: str) -> None:
        self._note(f"fsync {path}")
        fd = os.open(self.root / path, os.O_RDWR)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        self.syncs += 1
        self._claims[path] = Claim(self._files[path], {path})
        for settled, claim in self._claims.items():
            claim.paths = {settled}
        self._replaced.clear()

    def _shorten(self, path: str, size: int) -> None:
        self._replaced.pop(path, None)
        if path in self._claims:
            self._claims[path].least = self._claims[path].least[:size]

    def _give_up(self, path: str) -> None:
        self._replaced.pop(path, None)
        self._claims.pop(path, None)

    def _note(self, line: str) -> None:
        self.count += 1
        self.told.append(line)

    # Chance, and looking

    def _new_path(self, directory: str | None = None) -> str:
        name = self.chosen.choice(("F%d", "a rather long name, number %d " + "x" * 60, "mixed Case %d")) % self.count
        return os.path.join(self.chosen.choice(self._directories) if directory is None else directory, name)

    def _content(self) -> bytes:
        return self.chosen.randbytes(8).hex().encode() * (self.chosen.choice(_LENGTHS) // 16 + 1)

    def _any_file(self) -> str | None:
        return self.chosen.choice(list(self._files)) if self._files else None

    def _seen(self, path: str) -> str:
        try:
            return f"{(self.root / path).stat().st_size} bytes in {path}"
        except OSError as error:
            return str(error)

    def _begins(self, path: str, least: bytes) -> bool:
        try:
            return (self.root / path).read_bytes().startswith(least)
        except OSError:
            return False
