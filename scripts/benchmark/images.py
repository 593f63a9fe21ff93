"""The disks that are served: made once a run, in one directory, by qemu-img."""

from __future__ import annotations

import random
import subprocess
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20


@dataclass(frozen=True)
class Image:
    """A file to serve, and its format in qemu's words."""

    path: Path
    format: str


class Images:
    """Makes images on demand; every one holds `size` bytes."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.size = size
        self._made: dict[str, Image] = {}

    def get(self, kind: str) -> Image:
        """An image of a kind; the same one each time, except for kinds that are `fresh`."""
        if kind not in self._made:
            self._made[kind] = getattr(self, "_" + kind.replace("-", "_"))(self.folder / kind)
        return self._made[kind]

    def renew(self, kind: str) -> Image:
        """The image made anew, for cases that fill it."""
        self._made.pop(kind, None)
        (self.folder / kind).unlink(missing_ok=True)
        return self.get(kind)

    def _raw(self, path: Path) -> Image:
        chance = random.Random(1)
        with path.open("wb") as file:
            for _ in range(self.size // MIB):
                file.write(chance.randbytes(MIB))
        return Image(path, "raw")

    def _sparse(self, path: Path) -> Image:
        """Nine tenths of it are holes, in runs of 9 MiB."""
        content = self.get("raw").path.read_bytes()
        with path.open("wb") as file:
            for offset in range(0, self.size, 10 * MIB):
                file.seek(offset)
                file.write(content[offset : offset + MIB])
            file.truncate(self.size)
        return Image(path, "raw")

    def _text(self, path: Path) -> Image:
        """Content that compresses to about a third, as programs and documents do."""
        chance = random.Random(2)
        words = [chance.randbytes(chance.randrange(3, 12)) for _ in range(2000)]
        with path.open("wb") as file:
            while (missing := self.size - file.tell()) > 0:
                file.write(b"".join(chance.choices(words, k=4000))[:missing])
        return Image(path, "raw")

    def _mixed(self, path: Path) -> Image:
        """Runs of what disks hold: nothing, what compresses and what does not, of 64 KiB to 8 MiB each."""
        random_bytes, text = (self.get(kind).path.read_bytes() for kind in ("raw", "text"))
        chance = random.Random(3)
        with path.open("wb") as file:
            while (missing := self.size - file.tell()) > 0:
                start = file.tell()
                length = min(missing, (64 << 10) << chance.randrange(8))
                content = chance.choices((b"", random_bytes, text), (4, 2, 4))[0]
                file.write(content[start : start + length])
                file.seek(start + length)
            file.truncate(self.size)
        return Image(path, "raw")

    def _mixed_qcow2(self, path: Path) -> Image:
        return self._converted(self.get("mixed"), path, "qcow2")

    def _mixed_compressed(self, path: Path) -> Image:
        return self._converted(self.get("mixed"), path, "qcow2", "-c")

    def _qcow2(self, path: Path) -> Image:
        return self._converted(self.get("raw"), path, "qcow2")

    def _compressed(self, path: Path) -> Image:
        return self._converted(self.get("text"), path, "qcow2", "-c")

    def _vpc(self, path: Path) -> Image:
        return self._converted(self.get("raw"), path, "vpc")

    def _vhdx(self, path: Path) -> Image:
        return self._converted(self.get("raw"), path, "vhdx")

    def _fresh(self, path: Path) -> Image:
        _run("qemu-img", "create", "-q", "-f", "qcow2", path, str(self.size))
        return Image(path, "qcow2")

    def _overlay(self, path: Path) -> Image:
        base = self.get("qcow2")
        _run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base.path, "-F", base.format, path)
        return Image(path, "qcow2")

    def _converted(self, source: Image, path: Path, format: str, *options: str) -> Image:
        _run("qemu-img", "convert", "-f", source.format, "-O", format, *options, source.path, path)
        return Image(path, format)


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True)
