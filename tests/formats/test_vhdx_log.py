"""Logs that a crash has left: read-only they are replayed in memory, for writing on the disk, as QEMU does."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from nbdserve.block import HostFile
from nbdserve.errors import FormatError, Unsupported
from nbdserve.formats.vhdx import MIB
from nbdserve.formats.vhdx.create import create_image
from nbdserve.formats.vhdx.log import Replay, ReplayedFile, Update
from tests.formats import vhdx_images as vhdx
from tests.reference import needs, qemu_content, qemu_img_create, run

GUID = uuid.UUID("01234567-89ab-cdef-0123-456789abcdef")
DYNAMIC_BLOCK = 5 * MIB


def dirty_image(path: Path, *, start: int = 0, number: int = 7) -> bytearray:
    """An image whose log, from `start` on, holds two entries that link blocks to the table; return its content."""
    path.unlink(missing_ok=True)
    create_image(path, 8 * MIB, block_size=MIB)
    with vhdx.open_vhdx(path) as device:
        device.write(0, b"first" * 100_000)
        device.write(2 * MIB, b"second" * 100_000)
        content = device.read(0, device.size)
        size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(vhdx.TABLE)
        table = file.read(4096)
    stale = table[:8] + bytes(4088)  # the log's first entry links the first block only
    first = vhdx.log_entry(GUID, number, start, [(vhdx.TABLE, stale), (vhdx.TABLE + 8192, 4096)], size)
    place = (start + len(first)) % MIB
    second = vhdx.log_entry(GUID, number + 1, start, [(vhdx.TABLE + 8192, 8192), (vhdx.TABLE, table)], size)
    for at, entry in ((start, first), (place, second)):
        head = entry[: MIB - at]
        vhdx.patch(path, vhdx.LOG + at, head)
        vhdx.patch(path, vhdx.LOG, entry[len(head) :]) if len(head) < len(entry) else None
    vhdx.patch(path, vhdx.TABLE, b"\xee" * 64)  # what the crash has left of a write
    vhdx.set_log_guid(path, GUID)
    return content


@needs("qemu-img")
@pytest.mark.parametrize("start", [0, 4096 * 17, MIB - 4096, MIB - 8192])
def test_replay(tmp_path: Path, start: int) -> None:
    image, theirs = tmp_path / "a.vhdx", tmp_path / "b.vhdx"
    content = dirty_image(image, start=start)
    before = image.read_bytes()
    with vhdx.open_vhdx(image, read_only=True) as device:
        assert device.read(0, device.size) == content
    assert image.read_bytes() == before
    if start < MIB - 8192:  # QEMU loses its way where an entry wraps around
        theirs.write_bytes(before)
        run("qemu-img", "check", "-r", "all", "-f", "vhdx", theirs)
        assert qemu_content(theirs, "vhdx") == content
    with vhdx.open_vhdx(image) as device:
        assert device.read(0, device.size) == content
    after = image.read_bytes()
    assert after[vhdx.TABLE : vhdx.TABLE + 64] != before[vhdx.TABLE : vhdx.TABLE + 64]
    assert "No errors" in run("qemu-img", "check", "-f", "vhdx", image)
    assert qemu_content(image, "vhdx") == content
    with vhdx.open_vhdx(image, read_only=True) as device:
        assert device.read(0, device.size) == content


def test_replayed_guest_bytes_are_computed(tmp_path: Path) -> None:
    """Nothing forbids the log to hold guest data."""
    image = tmp_path / "a.vhdx"
    create_image(image, 4 * MIB, block_size=2 * MIB)
    with vhdx.open_vhdx(image) as device:
        device.write(0, b"a" * 2 * MIB)
        model = device.read(0, 4 * MIB)
    sectors = [
        (vhdx.BLOCKS + 8192, b"n" * 4096),
        (vhdx.BLOCKS + 65536, 16384),
        (vhdx.BLOCKS + 65536 + 4096, b"m" * 4096),
    ]
    vhdx.patch(image, vhdx.LOG, vhdx.log_entry(GUID, 1, 0, sectors, image.stat().st_size))
    vhdx.set_log_guid(image, GUID)
    model[8192:12288] = b"n" * 4096
    model[65536 : 65536 + 16384] = bytes(4096) + b"m" * 4096 + bytes(8192)
    with vhdx.open_vhdx(image, read_only=True) as device:
        assert device.read(0, device.size) == model
        assert device.read(10_000, 100_000) == model[10_000:110_000]
        assert device.locate(0, 512) is None
    vhdx.open_vhdx(image).close()
    assert qemu_content(image, "vhdx") == model


def test_overlay_against_a_model(tmp_path: Path) -> None:
    chosen = random.Random(1)
    path = tmp_path / "file"
    for _ in range(30):
        model = bytearray(chosen.randbytes(40_000))
        path.write_bytes(model)
        updates = []
        for _ in range(chosen.randrange(1, 20)):
            start = chosen.randrange(39_000)
            end = start + chosen.randrange(0, 1000)
            data = chosen.choice((None, chosen.randbytes(end - start)))
            updates.append(Update(start, end, data))
            model[start:end] = bytes(end - start) if data is None else data
        file = HostFile.open(path, writable=False)
        view = ReplayedFile(file, Replay(tuple(updates), len(model)))
        assert view.read(0, len(model)) == model
        for _ in range(50):
            start = chosen.randrange(len(model))
            length = min(chosen.randrange(1, 3000), len(model) - start)
            assert view.read(start, length) == model[start : start + length]
            is_changed, end = view.next_update(start, start + length)
            assert start < end <= start + length
            if not is_changed:
                assert file.read(start, end - start) == model[start:end]
        file.close()


def test_what_is_not_valid_is_not_replayed(tmp_path: Path) -> None:
    """A damaged byte anywhere in the newest entry leaves a log that says nothing, or the older entry alone."""
    image = tmp_path / "a.vhdx"
    content = dirty_image(image)
    first = 12288  # length of the first entry: descriptors, one data sector
    good = image.read_bytes()
    length = int.from_bytes(good[vhdx.LOG + 8 : vhdx.LOG + 12], "little")
    assert length in (8192, first)
    for at in (length, length + 4, length + 16, length + 32, length + 70, length + 4096, length + 8191):
        damaged = bytearray(good)
        damaged[vhdx.LOG + at] ^= 1
        damaged[vhdx.TABLE : vhdx.TABLE + 64] = bytes(64)
        image.write_bytes(damaged)
        with vhdx.open_vhdx(image, read_only=True) as device:
            assert device.read(0, MIB) == content[:MIB]  # as the older entry has it
            assert not any(device.read(2 * MIB, MIB))


@pytest.mark.parametrize(
    ("sectors", "flushed_end", "words"),
    [
        ([(64 << 10, bytes(4096))], 0, "no metadata"),
        ([(vhdx.LOG + 4096, bytes(4096))], 0, "no metadata"),
        ([(1 << 40, bytes(4096))], 0, "no metadata"),
        ([(1 << 62, 1 << 63)], 0, "no metadata"),
        ([(vhdx.TABLE, bytes(4096))], 1 << 40, "truncated"),
    ],
)
def test_absurd_logs_are_refused(tmp_path: Path, sectors: list[vhdx.Sector], flushed_end: int, words: str) -> None:
    image = tmp_path / "a.vhdx"
    create_image(image, MIB)
    vhdx.patch(image, vhdx.LOG, vhdx.log_entry(GUID, 1, 0, sectors, flushed_end))
    vhdx.set_log_guid(image, GUID)
    before = image.read_bytes()
    for read_only in (True, False):
        with pytest.raises(FormatError, match=words):
            vhdx.open_vhdx(image, read_only=read_only)
    assert image.read_bytes()[MIB:] == before[MIB:]


def test_absurd_ends_are_refused(tmp_path: Path) -> None:
    image = tmp_path / "a.vhdx"
    create_image(image, MIB)
    entry = vhdx.log_entry(GUID, 1, 0, [(vhdx.TABLE, bytes(4096))], 0, last_end=1 << 63)
    vhdx.patch(image, vhdx.LOG, entry)
    vhdx.set_log_guid(image, GUID)
    with pytest.raises(FormatError, match="more than a VHDX"):
        vhdx.open_vhdx(image)


def test_a_huge_log_is_refused_only_when_it_must_be_replayed(tmp_path: Path) -> None:
    image = tmp_path / "a.vhdx"
    create_image(image, MIB, log_size=200 * MIB)
    vhdx.open_vhdx(image).close()
    vhdx.set_log_guid(image, GUID)
    with pytest.raises(Unsupported, match="log of"):
        vhdx.open_vhdx(image, read_only=True)


@needs("qemu-img", "qemu-io")
def test_qemu_killed_while_it_writes(tmp_path: Path) -> None:
    """Whatever QEMU leaves behind is shown here as QEMU shows it after its own replay."""
    image, theirs = tmp_path / "a.vhdx", tmp_path / "b.vhdx"
    chosen = random.Random(3)
    dirty = 0
    for _ in range(6):
        image.unlink(missing_ok=True)
        qemu_img_create(image, "40M", "vhdx", block_size="1M")
        commands = [part for block in range(40) for part in ("-c", f"write -P {block + 1} {block}M 1M")]
        process = subprocess.Popen(["qemu-io", "-f", "vhdx", *commands, image], stdout=subprocess.PIPE)
        assert process.stdout is not None
        for _ in range(chosen.randrange(2, 20)):
            process.stdout.readline()
        time.sleep(chosen.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        with image.open("rb") as file:
            file.seek(vhdx.HEADERS[0] + 48)
            dirty += any(file.read(16))
        before = image.read_bytes()
        shutil.copyfile(image, theirs)
        run("qemu-img", "check", "-r", "all", "-f", "vhdx", theirs)
        content = qemu_content(theirs, "vhdx")
        with vhdx.open_vhdx(image, read_only=True) as device:
            assert device.read(0, device.size) == content
        assert image.read_bytes() == before
        with vhdx.open_vhdx(image) as device:
            assert device.read(0, device.size) == content
        assert "No errors" in run("qemu-img", "check", "-f", "vhdx", image)
        assert qemu_content(image, "vhdx") == content
