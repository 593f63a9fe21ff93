"""Damaged headers and tables: an error in one line, or reads of the right length; 100 images a round.

What is held against every one of them, opened for reading or for writing:

- Opening it gives a device or an OpenError, whose message is one line that names a file; so do checking, repairing and
  describing it.
- Requests are done, or fail with EIO, EFBIG or ENOSPC.
- It takes no more than CPU_SECONDS and MOST_MEMORY of address space, and leaves no file open.
- Opened for reading it does not change.
"""

from __future__ import annotations

import os
import random
import resource
import signal
from pathlib import Path

from nbdserve.cli.img.info import info_lines
from nbdserve.errors import OpenError
from nbdserve.imagetools.checking import Repair, check
from nbdserve.imagetools.describing import describe
from nbdserve.opening import open_image
from tests.formats.usage import assert_one_line, mutate
from trials import samples
from trials.rounds import Round
from trials.samples import Sample

KINDS = tuple(samples.KINDS)
IMAGES = 100
ROUNDS = len(KINDS) * 100  # 10,000 images of each kind
SECONDS = 900.0
CPU_SECONDS = 20
MOST_MEMORY = 512 << 20


def play(this: Round) -> None:
    """Damage a sample again and again."""
    signal.signal(signal.SIGPROF, _impatient)
    sample = samples.make(this.kind, this.folder, this.chosen)
    resource.setrlimit(
        resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY)
    )  # now that the tools of others have done their work
    before = {path: path.read_bytes() for path in this.folder.iterdir() if path.is_file()}
    for number in range(IMAGES):
        content = bytearray(before[sample.part])
        mutate(content, sample.places, this.chosen)
        if this.chosen.random() < 0.8:
            sample.seal(content, this.chosen)
        for path, sound in before.items():
            _put(path, content if path == sample.part else sound)
        try:
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            this.count(f"{this.kind}: {_tried(sample, this.chosen)}")
        except BaseException:
            kept = this.folder / "damaged"
            kept.write_bytes(content)
            print(f"image {number} of the round; as it was before it was used: {kept}, to be put in {sample.part}")
            raise
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)


def _put(path: Path, content: bytes | bytearray) -> None:
    """Let a file have this content; it is a new file if it has another now."""
    if path.exists() and path.stat().st_size == len(content) and path.read_bytes() == content:
        return
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def _tried(sample: Sample, chosen: random.Random) -> str:
    """Do something with a damaged image; how that went, for the report."""
    read_only = chosen.random() < 0.4
    before = sample.part.read_bytes() if read_only else b""
    files = _open_files()
    try:
        outcome = chosen.choice((_used, _used, _used, _checked, _described))(sample, chosen, read_only)
    except OpenError as error:
        outcome = "refused"
        assert_one_line(error, Path("/"))  # of the image, or of the file that it refers to by mistake
    assert not read_only or sample.part.read_bytes() == before, "opened for reading, and yet changed"
    assert _open_files() == files, "a file was left open"
    return outcome


def _used(sample: Sample, chosen: random.Random, read_only: bool) -> str:
    snapshot = "before" if sample.format == "qcow2" and chosen.random() < 0.2 else None
    device = open_image(sample.image, format=sample.format, read_only=read_only, snapshot=snapshot)
    try:
        failures = sample.use(device, chosen)
    except BaseException:
        device.close()
        raise
    try:
        device.close()
    except OSError:  # what was written could not be flushed
        failures += 1
    return "used with errors" if failures else "used"


def _checked(sample: Sample, chosen: random.Random, read_only: bool) -> str:
    repair: Repair | None = None if read_only else chosen.choice(("leaks", "all"))
    report = check(str(sample.image), format=sample.format, repair=repair)
    return "checked" if report is None or report.corruptions == 0 else "checked, corrupt"


def _described(sample: Sample, chosen: random.Random, read_only: bool) -> str:
    for each in describe(str(sample.image), format=sample.format, whole_chain=read_only):
        assert list(info_lines(each))
    return "described"


def _open_files() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def _impatient(*_: object) -> None:
    raise TimeoutError(f"took more than {CPU_SECONDS} seconds of processor time")
