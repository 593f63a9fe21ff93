"""No crash loses what was flushed to a dynamic or differencing VHD, or shows anything wrong. See crashes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nbdserve.formats.vpc.bitmaps import SectorBitmaps
from nbdserve.formats.vpc.table import BlockTable
from tests.formats import vhd_images as vhd
from tests.formats.crashes import SECTOR, Recorder, Remains, Witness, remains_of

BLOCK_SIZE = 4096
BLOCKS = 12
SECTORS = BLOCKS * BLOCK_SIZE // SECTOR
PARENT = 9999  # the number in all sectors of the parent


def _crash_everywhere(directory: Path, seed: int, *, differencing: bool = False) -> int:
    chosen = random.Random(seed)
    image, crashed = directory / "a.vhd", directory / "crashed.vhd"
    if differencing:
        vhd.make_parent(directory / "parent.vhd", PARENT.to_bytes(4, "big") * (BLOCKS * BLOCK_SIZE // 4), BLOCK_SIZE)
        vhd.make_child(image, "parent.vhd", BLOCK_SIZE)
    else:
        image.write_bytes(vhd.dynamic(BLOCKS * BLOCK_SIZE, BLOCK_SIZE))
    start = Remains.of(image)
    with vhd.open_vhd(image, file_type=Recorder) as device:
        witness = Witness(device, device.file.log, [range(SECTORS)], before=PARENT if differencing else 0)
        witness.work(chosen, steps=30 if differencing else 50)
    crashes = 0
    for moment, remains in remains_of(start, witness.log, chosen):
        remains.write_to(crashed)
        with vhd.open_vhd(crashed, read_only=crashes % 16 > 0) as device:
            witness.check(device, moment)
            if not device.read_only:  # there may be rubbish behind the last block
                device.write(0, bytes(device.size - 1) + b"x")
                assert device.read(0, device.size) == bytes(device.size - 1) + b"x"
        crashes += 1
    return crashes


@pytest.mark.parametrize(("seed", "differencing"), [(0, False), (1, False), (2, False), (0, True)])
def test_no_crash_loses_or_invents_bytes(tmp_path: Path, seed: int, differencing: bool) -> None:
    assert _crash_everywhere(tmp_path, seed, differencing=differencing) > 100


def test_entries_before_data_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flush(table: BlockTable) -> None:
        entries, table._waiting = table._waiting, {}
        if entries:
            table._write(entries)
        table._file.sync()

    monkeypatch.setattr(BlockTable, "flush", flush)
    with pytest.raises((AssertionError, OSError)):
        _crash_everywhere(tmp_path, 0)


def test_entries_left_in_memory_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockTable, "flush", lambda table: table._file.sync())
    with pytest.raises(AssertionError):
        _crash_everywhere(tmp_path, 0)


def test_bits_left_in_memory_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SectorBitmaps, "take", lambda bitmaps: [])
    with pytest.raises(AssertionError):
        _crash_everywhere(tmp_path, 0, differencing=True)
