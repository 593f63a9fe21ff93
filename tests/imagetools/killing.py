"""The image tools killed with SIGKILL at a chosen system call: what was there is there, and a rerun comes to the end.

Every moment between two calls that change a file is a moment at which a process can be killed. A first run on a copy
counts those calls; then the same work is done on further copies, where the process kills itself before one of them.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from nbdserve.imagetools.amending import amend
from nbdserve.imagetools.committing import commit
from nbdserve.imagetools.converting import Target, convert
from nbdserve.imagetools.lengthening import resize
from nbdserve.imagetools.middle import Into, delete_middle
from nbdserve.imagetools.rebasing import rebase
from nbdserve.imagetools.snapshots import Change, change_snapshots
from nbdserve.opening import open_image
from tests.imagetools.chains import MIB, make_chain
from tests.reference import qemu_check, qemu_content, qemu_info, run

_CHANGES = ("pwrite", "pwritev", "ftruncate", "fsync", "fdatasync", "rename", "link", "unlink", "mkdir", "rmdir")
_MOMENTS = 4  # of one round
_SIZE = 2 * MIB
_TARGETS: tuple[tuple[str, dict[str, Any], bool], ...] = (
    ("raw", {}, False),
    ("qcow2", {}, False),
    ("qcow2", {}, True),
    ("vhdx", {}, False),
    ("vmdk", {"subformat": "twoGbMaxExtentSparse"}, False),
    ("vmdk", {"subformat": "streamOptimized"}, False),
)


def killed_at(work: Callable[[], object], moment: int | None) -> int | None:
    """Do the work in another process, which kills itself before the change to a file that has this number.

    Returns:
        How many changes there were; None when it was killed.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            count = _counting(moment)
            work()
            os.write(writing, str(count()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with open(reading) as told:
        answer = told.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and moment is not None:
        return None
    assert status == 0, f"ended with {status}"
    return int(answer)


def _counting(moment: int | None) -> Callable[[], int]:
    """Let this process count its changes to files, and end before one of them."""
    lock, done = threading.Lock(), 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def change(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            with lock:
                if done == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1
            return call(*arguments, **options)

        return change

    for name in _CHANGES:
        setattr(os, name, counted(getattr(os, name)))
    return lambda: done


class _Subject:
    """What is done to the images of a folder, and what holds at every moment and at the end.

    Attributes:
        images: made by QEMU: base <- sn1 <- sn2 <- sn3.
    """

    def __init__(self, folder: Path, chosen: Random) -> None:
        self.images = make_chain(folder, _SIZE, _SIZE, _SIZE, _SIZE, seed=chosen.randrange(1 << 30), cluster_size=4096)
        self.chosen = chosen
        self.contents = {path.name: bytes(qemu_content(path, "qcow2")) for path in self.images}

    def work(self, folder: Path) -> None:
        """Do it, or what is left of it."""
        raise NotImplementedError

    def check(self, folder: Path) -> None:
        """What holds at every moment: unless more is known, all images show what they did."""
        self._show(folder, *self.contents)

    def check_end(self, folder: Path) -> None:
        """What holds when it is done."""
        self.check(folder)

    def _show(self, folder: Path, *names: str) -> None:
        for name in names:
            path = folder / name
            qemu_check(path, leaks_allowed=True)
            assert bytes(qemu_content(path, "qcow2"))[:_SIZE] == self.contents[name], name


class _Convert(_Subject):
    def __init__(self, folder: Path, chosen: Random) -> None:
        super().__init__(folder, chosen)
        self.format, self.values, self.compress = chosen.choice(_TARGETS)
        self.there_before = chosen.random() < 0.5
        if self.there_before:
            run("qemu-img", "create", "-q", "-f", "raw", folder / "target", "1M")

    def work(self, folder: Path) -> None:
        with open_image(folder / "sn3", read_only=True) as source:
            target = Target(str(folder / "target"), self.format, self.values, self.compress, workers=2)
            convert(source, target)

    def check(self, folder: Path) -> None:
        super().check(folder)
        target = folder / "target"
        if self.there_before and target.stat().st_size == MIB and not any(target.read_bytes()):
            return
        if self.there_before or target.exists():
            self.check_end(folder)

    def check_end(self, folder: Path) -> None:
        assert bytes(qemu_content(folder / "target", self.format))[:_SIZE] == self.contents["sn3"]


class _Commit(_Subject):
    def work(self, folder: Path) -> None:
        commit(str(folder / "sn3"))

    def check(self, folder: Path) -> None:
        self._show(folder, "base", "sn1", "sn3")

    def check_end(self, folder: Path) -> None:
        self.check(folder)
        assert bytes(qemu_content(folder / "sn2", "qcow2")) == self.contents["sn3"]


class _Rebase(_Subject):
    backing: str | None = "sn1"

    def work(self, folder: Path) -> None:
        rebase(str(folder / "sn3"), self.backing)

    def check_end(self, folder: Path) -> None:
        self.check(folder)
        assert qemu_info(folder / "sn3").get("backing-filename") == self.backing


class _Flatten(_Rebase):
    backing = None


class _Snapshot(_Subject):
    """Deletes one of three snapshots of the last image."""

    def __init__(self, folder: Path, chosen: Random) -> None:
        super().__init__(folder, chosen)
        image = folder / "sn3"
        self.names = ["first", "second", "third"]
        self.kept: dict[str, bytes] = {}
        for name in self.names:
            run("qemu-img", "snapshot", "-c", name, image)
            run("qemu-io", "-c", f"write -P {chosen.randrange(255)} {chosen.randrange(300)}k 700k", image)
        for name in self.names:
            self.kept[name] = bytes(qemu_content(image, "qcow2", "-l", name))
        self.contents["sn3"] = bytes(qemu_content(image, "qcow2"))
        self.deleted = chosen.choice(self.names)

    def _left(self, folder: Path) -> list[str]:
        return [each["name"] for each in qemu_info(folder / "sn3").get("snapshots", [])]

    def work(self, folder: Path) -> None:
        if self.deleted in self._left(folder):
            change_snapshots(str(folder / "sn3"), Change.DELETE, self.deleted)

    def check(self, folder: Path) -> None:
        super().check(folder)
        for name in self.names:
            if name != self.deleted:
                assert bytes(qemu_content(folder / "sn3", "qcow2", "-l", name)) == self.kept[name]

    def check_end(self, folder: Path) -> None:
        self.check(folder)
        assert self._left(folder) == [name for name in self.names if name != self.deleted]


class _DeleteMiddle(_Subject):
    into = Into.ABOVE

    def work(self, folder: Path) -> None:
        if (folder / "sn2").exists():  # else all is done
            delete_middle(str(folder / "sn2"), [str(folder / "sn3")], self.into)

    def check(self, folder: Path) -> None:
        self._show(folder, "base", "sn3", *(["sn1"] if self.into is Into.ABOVE else []))

    def check_end(self, folder: Path) -> None:
        self.check(folder)
        assert not (folder / "sn2").exists()
        assert qemu_info(folder / "sn3")["backing-filename"] == "sn1"


class _DeleteMiddleDown(_DeleteMiddle):
    into = Into.BELOW


class _Amend(_Subject):
    def __init__(self, folder: Path, chosen: Random) -> None:
        super().__init__(folder, chosen)
        self.values = chosen.choice(
            [{"compat": "0.10"}, {"refcount_bits": 64}, {"refcount_bits": 8, "size": 3 * MIB}, {"lazy_refcounts": True}]
        )

    def work(self, folder: Path) -> None:
        amend(str(folder / "sn3"), self.values)


class _Resize(_Subject):
    def work(self, folder: Path) -> None:
        with open_image(folder / "sn3") as image:
            resize(image, "sn3", 700 * MIB)

    def check_end(self, folder: Path) -> None:
        assert qemu_info(folder / "sn3")["virtual-size"] == 700 * MIB
        run("qemu-io", "-r", "-c", f"read -P 0 {_SIZE} 64M", folder / "sn3")


_SUBJECTS: dict[str, type[_Subject]] = {
    "convert": _Convert,
    "commit": _Commit,
    "rebase": _Rebase,
    "flatten": _Flatten,
    "snapshot": _Snapshot,
    "delete-middle": _DeleteMiddle,
    "delete-middle-down": _DeleteMiddleDown,
    "amend": _Amend,
    "resize": _Resize,
}
KINDS = tuple(_SUBJECTS)


def play(kind: str, folder: Path, chosen: Random) -> Iterator[str]:
    """Kill one kind of work at a few moments; yields what was done."""
    pristine = folder / "pristine"
    pristine.mkdir()
    subject = _SUBJECTS[kind](pristine, chosen)
    total = killed_at(lambda: subject.work(_fresh(pristine)), None)
    assert total
    for moment in sorted(chosen.sample(range(total), min(total, _MOMENTS))):
        copy = _fresh(pristine)
        ended = killed_at(lambda copy=copy: subject.work(copy), moment)
        subject.check(copy)
        killed_at(lambda copy=copy: subject.work(copy), None)
        subject.check_end(copy)
        yield f"{kind}: {'killed' if ended is None else 'ended'}"


def _fresh(pristine: Path) -> Path:
    copy = pristine.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    return Path(shutil.copytree(pristine, copy))
