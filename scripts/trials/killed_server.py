"""A server with several writers that is killed at some moment: nothing that was flushed is lost, and nothing is wrong.

Every sector that is written holds a number. A writer has a share of the disk for itself and waits for each reply, so
what it wrote before a flush that has returned must be there after the kill; of what it wrote since, each sector may
hold the number from before or any that was written to it. QEMU judges the image (leaks are allowed after a kill), and
reads the same as we do. Then another server is started on what is left, and killed as well.
"""

from __future__ import annotations

import random
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from nbdserve.block import BlockDevice
from nbdserve.client import connect
from nbdserve.imagetools.creating import create
from nbdserve.opening import open_image
from tests import serving
from tests.formats.crashes import SECTOR, numbers_in, sector_of
from tests.formats.operations import assert_equal
from tests.reference import qemu_content, qemu_img_create, qemu_io, run
from trials.rounds import Round

ROUNDS = 110
KILLS = 2  # of a round
WRITERS = 4
SIZE = 8 << 20

serving.READY_SECONDS = serving.STOP_SECONDS = 300.0  # the machine may be very busy


@dataclass(frozen=True)
class Subject:
    """An image to be served, of a format; `snapshot` names one that must stay as it is."""

    path: Path
    format: str
    snapshot: str = ""


@dataclass
class Writer:
    """Writes to its share of a disk until the server is gone, and knows what each sector may hold then."""

    share: range
    chosen: random.Random
    now: dict[int, int]
    flushed: dict[int, int] = field(default_factory=dict)
    since: list[tuple[int, int]] = field(default_factory=list)  # sector and number, from the last flush on

    def work(self, device: BlockDevice, done: Callable[[], None]) -> None:
        """Write, zero, trim and flush; returns when the connection is lost."""
        try:
            while True:
                self._step(device)
                done()
        except OSError as error:
            if "connection is lost" not in str(error):
                raise

    def _step(self, device: BlockDevice) -> None:
        start = self.chosen.choice(self.share)
        sectors = range(start, min(start + self.chosen.choice((1, 2, 8, 64, 500)), self.share.stop))
        number = self.chosen.randrange(1, 1 << 32)
        match self.chosen.randrange(12):
            case 0:
                self._note(sectors, 0)
                device.zero(sectors.start * SECTOR, len(sectors) * SECTOR, unmap=number % 2 == 0)
            case 1:
                self._note(sectors, 0)
                device.discard(sectors.start * SECTOR, len(sectors) * SECTOR)
                self.now.update(zip(sectors, numbers_in(device, sectors), strict=True))
            case 2:
                before = dict(self.now)
                device.flush()
                self.flushed = before
                self.since.clear()
            case _:
                self._note(sectors, number)
                device.write(sectors.start * SECTOR, sector_of(number) * len(sectors))

    def _note(self, sectors: range, number: int) -> None:
        """Sectors may get a number from now on. One that they have got by a trim, or keep, is in `now` in any case."""
        self.since += [(sector, number) for sector in sectors]
        self.now.update(dict.fromkeys(sectors, number))

    def check(self, numbers: dict[int, int]) -> None:
        """What a kill has left of the share is what may be there."""
        allowed = {sector: {number} for sector, number in self.flushed.items()}
        for sector, number in self.since:
            allowed[sector].add(number)
        for sector in self.share:
            number = numbers[sector]
            assert number in allowed[sector], f"sector {sector} holds {number}, not one of {allowed[sector]}"


def play(this: Round) -> None:
    """Make an image, and kill servers of it."""
    subject = MAKERS[this.kind](this.folder)
    kept = qemu_content(subject.path, subject.format, "-l", subject.snapshot) if subject.snapshot else b""
    base = (this.folder / "base").read_bytes() if (this.folder / "base").exists() else b""
    for _ in range(KILLS):
        writers = _writers(subject, this.chosen)
        requests = _killed(subject, writers, this.chosen.randrange(1, 300))
        this.count("requests", requests)
        this.count("kills")
        content = _judged(subject)
        numbers = dict(enumerate(_numbers(content)))
        for writer in writers:
            writer.check(numbers)
    with open_image(subject.path, format=subject.format) as device:  # there may be rubbish in what is not in use
        device.write(0, sector_of(7) * (device.size // SECTOR))
    assert_equal(_judged(subject), sector_of(7) * (len(content) // SECTOR), "QEMU reads")
    if subject.snapshot:
        assert qemu_content(subject.path, subject.format, "-l", subject.snapshot) == kept
    assert not base or (this.folder / "base").read_bytes() == base


def _writers(subject: Subject, chosen: random.Random) -> list[Writer]:
    with open_image(subject.path, format=subject.format, read_only=True) as device:
        sectors = device.size // SECTOR
        numbers = numbers_in(device, range(sectors))
    share = sectors // WRITERS
    writers = []
    for start in range(0, share * WRITERS, share):
        # A part of the share is enough, so that much is written over and over.
        sectors_of_it = range(start, start + chosen.choice((share // 8, share)))
        now = {sector: numbers[sector] for sector in sectors_of_it}
        writers.append(Writer(sectors_of_it, random.Random(chosen.random()), now, dict(now)))
    return writers


def _killed(subject: Subject, writers: list[Writer], after: int) -> int:
    """Serve the image to the writers until so many requests are done, then kill the server; return how many were."""
    enough, counting, count = threading.Event(), threading.Lock(), 0

    def done() -> None:
        nonlocal count
        with counting:
            count += 1
            if count >= after:
                enough.set()

    failures: list[BaseException] = []

    def work(writer: Writer, device: BlockDevice) -> None:
        try:
            writer.work(device, done)
        except BaseException as error:
            failures.append(error)
        finally:
            enough.set()

    socket = subject.path.with_name("socket")
    with serving.Served(subject.path, "-f", subject.format, "-k", socket) as server:
        devices = [connect(server.uri) for _ in range(2)]
        threads = [
            threading.Thread(target=work, args=(writer, devices[number % len(devices)]))
            for number, writer in enumerate(writers)
        ]
        for thread in threads:
            thread.start()
        enough.wait()
        server.process.kill()
        server.process.wait()
        for thread in threads:
            thread.join()
        for device in devices:
            device.close()
    assert not any("Traceback" in line for line in server.stderr), server.stderr
    if failures:
        raise failures[0]
    return count


def _judged(subject: Subject) -> bytearray:
    """The content, as QEMU and we read it, of an image with which QEMU finds nothing worse than leaks."""
    command = ["qemu-img", "check", "-f", subject.format, subject.path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode in (0, 3) or "does not support checks" in result.stderr, result.stdout + result.stderr
    content = qemu_content(subject.path, subject.format)
    with open_image(subject.path, format=subject.format, read_only=True) as device:
        assert_equal(device.read(0, device.size), content, "QEMU does not read, but we")
    return content


def _numbers(content: bytearray) -> list[int]:
    numbers = []
    for start in range(0, len(content), SECTOR):
        sector = content[start : start + SECTOR]
        numbers.append(int.from_bytes(sector[:4], "big"))
        assert sector == sector_of(numbers[-1]), f"sector {start // SECTOR} is torn: {bytes(sector)!r}"
    return numbers


# What is served


def _qcow2(folder: Path, *, base: bool = False, snapshot: bool = False, **options: str | int) -> Subject:
    if base:
        qemu_img_create(folder / "base", SIZE - (1 << 20), "raw")
        qemu_io(folder / "base", f"write -P 170 0 {SIZE // 2}", format="raw")
        options |= {"backing_file": "base", "backing_fmt": "raw"}
    image = qemu_img_create(folder / "image", SIZE, **options)
    qemu_io(image, "write -P 85 0 1M", f"write -z {SIZE // 4} 1M", f"write -c -P 51 {SIZE // 2} 64k")
    if snapshot:
        run("qemu-img", "snapshot", "-c", "before", image)
    return Subject(image, "qcow2", "before" if snapshot else "")


def _other(format: str, folder: Path, **options: str | int | bool) -> Subject:
    image = folder / "image"
    create(str(image), format, SIZE, options)
    return Subject(image, format)


MAKERS: dict[str, Callable[[Path], Subject]] = {
    "qcow2": _qcow2,
    "qcow2 small clusters": partial(_qcow2, cluster_size=512, refcount_bits=64),
    "qcow2 version 2": partial(_qcow2, compat="0.10", cluster_size=4096, base=True),
    "qcow2 overlay": partial(_qcow2, base=True, lazy_refcounts="on"),
    "qcow2 subclusters": partial(_qcow2, extended_l2="on", base=True),
    "qcow2 snapshot": partial(_qcow2, cluster_size=4096, snapshot=True),
    "vpc": partial(_other, "vpc", force_size=True),
    "vhdx": partial(_other, "vhdx", block_size=1 << 20),
    "vdi": partial(_other, "vdi"),
    "vmdk": partial(_other, "vmdk"),
    "vmdk zeroed grains": partial(_other, "vmdk", zeroed_grain=True),
}
KINDS = tuple(MAKERS)
