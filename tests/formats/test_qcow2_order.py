"""Crash a qcow2 image everywhere: no errors in its tables, nothing flushed is lost, nothing is invented."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nbdserve.errors import OpenError
from nbdserve.formats.qcow2.mapping import Mapping
from nbdserve.formats.qcow2.writable import WritableQcow2Image
from nbdserve.formats.qcow2.writeback import WriteBack, _Flush
from tests.formats.crashes import SECTOR
from tests.formats.qcow2_check import Check
from tests.formats.qcow2_crashes import Recorder, Witness, remains
from tests.formats.qcow2_images import open_qcow2
from tests.reference import needs, qemu_check, qemu_img_create, qemu_io, run

pytestmark = needs("qemu-img", "qemu-io")

SIZE = 96 << 10


def _small(directory: Path) -> Path:
    return qemu_img_create(directory / "a.qcow2", SIZE, cluster_size=512, refcount_bits=64)


def _larger(directory: Path) -> Path:
    return qemu_img_create(directory / "a.qcow2", SIZE, cluster_size=4096)


def _old(directory: Path) -> Path:
    return qemu_img_create(directory / "a.qcow2", SIZE, cluster_size=512, compat="0.10")


def _with_snapshot(directory: Path) -> Path:
    image = qemu_img_create(directory / "a.qcow2", SIZE, cluster_size=512)
    qemu_io(image, "write -P 5 0 80k")
    run("qemu-img", "snapshot", "-c", "before", str(image))
    qemu_io(image, "write -P 6 20k 5k", "write -z 2k 3k")
    return image


def _compressed(directory: Path) -> Path:
    (directory / "plain").write_bytes(b"\7" * SIZE)
    image = directory / "a.qcow2"
    run(
        *("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4096"),
        *(str(directory / "plain"), str(image)),
    )
    return image


def _over_a_base(directory: Path) -> Path:
    (directory / "base").write_bytes(b"\7" * (SIZE // 2))
    return qemu_img_create(directory / "a.qcow2", SIZE, cluster_size=2048, backing_file="base", backing_fmt="raw")


def _subclusters(directory: Path) -> Path:
    return qemu_img_create(directory / "a.qcow2", SIZE, cluster_size=16384, extended_l2="on")


def _subclusters_with_snapshot(directory: Path) -> Path:
    image = _subclusters(directory)
    qemu_io(image, "write -P 5 0 80k")
    run("qemu-img", "snapshot", "-c", "before", str(image))
    qemu_io(image, "write -P 6 20k 5k", "write -z 2k 3k")
    return image


def _work(witness: Witness, chosen: random.Random, steps: int) -> None:
    sectors = SIZE // SECTOR
    for number in range(1, steps):
        sector = chosen.randrange(sectors)
        count = min(chosen.choice((1, 2, 5, 20)), sectors - sector)
        match chosen.randrange(6):
            case 5 if number % 3 == 0:
                witness.pack(sector, number)
            case 0:
                witness.zero(range(sector, sector + count), unmap=True)
            case 1:
                witness.zero(range(sector, sector + count), unmap=False)
            case _:
                witness.write(range(sector, sector + count), number)
        if chosen.random() < 0.2:
            witness.flush()
    witness.flush()


def _snapshot_of(image: Path) -> bytearray | None:
    """What the first internal snapshot holds."""
    try:
        with open_qcow2(image, read_only=True, snapshot="before") as device:
            return device.read(0, device.size)
    except OpenError:
        return None


def _crash_everywhere(image: Path, seed: int, *, steps: int = 35, samples: int = 2, ask_qemu: int = 10) -> int:
    chosen = random.Random(seed)
    start, before = image.read_bytes(), _snapshot_of(image)
    with open_qcow2(image, file_type=Recorder) as device:
        log = device.file.log  # type: ignore[attr-defined]
        witness = Witness(device, log)
        _work(witness, chosen, steps)
    final = Check(image.read_bytes())
    final.run()
    assert final.leaks == 0
    crashed = image.with_name("crashed.qcow2")
    every = max(1, len(log) * (1 + samples) // ask_qemu)
    crashes = 0
    for moment, content in remains(start, log, chosen, samples):
        Check(content).run()
        crashed.write_bytes(content)
        with open_qcow2(crashed, read_only=True) as left:
            witness.check(left, moment)
        assert _snapshot_of(crashed) == before
        crashes += 1
        if crashes % every == 0:
            qemu_check(crashed, leaks_allowed=True)
            with open_qcow2(crashed) as again:  # whatever has leaked is no obstacle
                again.write(0, b"x" * again.size)
                assert again.read(0, again.size) == b"x" * again.size
            qemu_check(crashed, leaks_allowed=True)
    return crashes


MAKERS = [_small, _larger, _old, _with_snapshot, _compressed, _over_a_base, _subclusters, _subclusters_with_snapshot]


@pytest.mark.parametrize("make", MAKERS)
def test_no_crash_corrupts_loses_or_invents(tmp_path: Path, make) -> None:
    assert _crash_everywhere(make(tmp_path), 1) > 150


def _crash_until_noticed(directory: Path) -> None:
    for seed, make in enumerate(MAKERS):
        _crash_everywhere(make(directory), seed, ask_qemu=1)


def _phases(*names: str):
    def write(self: WriteBack, flush: _Flush) -> None:
        for name in names:
            self._write_and_sync(getattr(flush, name))

    return write


@pytest.mark.parametrize(
    "order",
    [
        ("mapping_links", "contents", "refcount_links"),
        ("contents", "mapping_links", "refcount_links"),
        ("refcount_links", "contents", "mapping_links"),
    ],
    ids=" ".join,
)
def test_another_order_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[str, ...]
) -> None:
    monkeypatch.setattr(WriteBack, "_write", _phases(*order))
    with pytest.raises((AssertionError, OSError)):
        _crash_until_noticed(tmp_path)


def test_phases_without_syncs_between_them_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: WriteBack, flush: _Flush) -> None:
        self._write_and_sync([*flush.contents, *flush.refcount_links, *flush.mapping_links])

    monkeypatch.setattr(WriteBack, "_write", write)
    with pytest.raises((AssertionError, OSError)):
        _crash_until_noticed(tmp_path)


def test_clusters_given_up_at_once_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WriteBack, "park", WriteBack._release)
    with pytest.raises((AssertionError, OSError)):
        _crash_until_noticed(tmp_path)


def test_overwriting_what_a_snapshot_shares_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = _with_snapshot(tmp_path)

    def move_table(self: Mapping, key: int, allocator: object, free: object) -> None:
        self.l1[key] |= 1 << 63

    monkeypatch.setattr(Mapping, "_move_table", move_table)
    with pytest.raises((AssertionError, OSError)):
        _crash_everywhere(image, 1)


def test_a_flush_with_nothing_to_write_is_one_sync(tmp_path: Path) -> None:
    with open_qcow2(_larger(tmp_path), file_type=Recorder) as device:
        assert isinstance(device, WritableQcow2Image)
        device.write(0, b"x" * 4096)
        device.flush()
        log = device.file.log  # type: ignore[attr-defined]
        log.clear()
        device.write(0, b"y" * 4096)
        device.flush()
        assert [entry is None for entry in log] == [False, True]
        assert log[0].data == b"y" * 4096
