"""No crash loses what was flushed to a VHDX, or shows anything wrong. See crashes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nbdserve.formats.vhdx import MIB
from nbdserve.formats.vhdx.create import create_image
from nbdserve.formats.vhdx.image import VhdxImage
from nbdserve.formats.vhdx.space import HostSpace
from nbdserve.formats.vpc.bitmaps import SectorBitmaps
from tests.formats import vhdx_images as vhdx
from tests.formats.crashes import SECTOR, Recorder, Remains, Witness, remains_of
from tests.reference import needs, qemu_content, run

BLOCKS = 3
IN_BLOCK = MIB // SECTOR
PARENT = 9999  # the number in all sectors of the parent that are looked at
AREAS = [  # the ends of the blocks
    range(8),
    range(IN_BLOCK - 8, IN_BLOCK + 8),
    range(2 * IN_BLOCK - 8, 2 * IN_BLOCK + 8),
    range(3 * IN_BLOCK - 8, 3 * IN_BLOCK),
]


def _make(directory: Path, *, differencing: bool) -> Path:
    image = directory / "a.vhdx"
    if not differencing:
        create_image(image, BLOCKS * MIB, block_size=MIB)
        return image
    create_image(directory / "parent.vhdx", BLOCKS * MIB)
    with vhdx.open_vhdx(directory / "parent.vhdx") as device:
        for area in AREAS:
            device.write(area.start * SECTOR, PARENT.to_bytes(4, "big") * (len(area) * SECTOR // 4))
    vhdx.make_child(image, "parent.vhdx")
    return image


def _crash_everywhere(
    directory: Path, seed: int, *, differencing: bool = False, asking_qemu: bool = False, steps: int = 36
) -> int:
    chosen = random.Random(seed)
    image, crashed = _make(directory, differencing=differencing), directory / "crashed.vhdx"
    start = Remains.of(image)
    with vhdx.open_vhdx(image, file_type=Recorder) as device:
        witness = Witness(device, device.file.log, AREAS, before=PARENT if differencing else 0)
        blocks = [range(number * IN_BLOCK, (number + 1) * IN_BLOCK) for number in range(BLOCKS)]
        witness.work(chosen, steps=steps, blocks=blocks)
    crashes = 0
    for moment, remains in remains_of(start, witness.log, chosen, samples=2):
        remains.write_to(crashed)
        with vhdx.open_vhdx(crashed, read_only=crashes % 32 > 0) as left:
            witness.check(left, moment)
            if asking_qemu and crashes % 60 == 1:
                assert "No errors" in run("qemu-img", "check", "-f", "vhdx", crashed)
                assert qemu_content(crashed, "vhdx") == left.read(0, left.size)
            if not left.read_only:  # there may be blocks that nobody refers to
                left.write(MIB - 5, b"x" * (MIB + 10))
                assert left.read(MIB - 5, MIB + 10) == b"x" * (MIB + 10)
        crashes += 1
    return crashes


@needs("qemu-img")
@pytest.mark.parametrize("seed", range(2))
def test_no_crash_loses_or_invents_bytes(tmp_path: Path, seed: int) -> None:
    assert _crash_everywhere(tmp_path, seed, asking_qemu=True) > 100


@pytest.mark.parametrize("seed", range(1))
def test_no_crash_of_a_differencing_disk_loses_or_invents_bytes(tmp_path: Path, seed: int) -> None:
    assert _crash_everywhere(tmp_path, seed, differencing=True) > 100


@pytest.mark.parametrize("differencing", [False, True])
def test_entries_before_data_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, differencing: bool
) -> None:
    def write_back(image: VhdxImage, bits: list[tuple[int, bytes]], bitmap_blocks: dict, payload: dict) -> None:
        for place, content in bits:
            image.file.write(place, content)
        image._table.write(bitmap_blocks | payload)
        image.file.sync()

    monkeypatch.setattr(VhdxImage, "_write_back", write_back)
    with pytest.raises((AssertionError, OSError)):
        _crash_everywhere(tmp_path, 0, differencing=differencing)


def test_bits_left_in_memory_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SectorBitmaps, "take", lambda bitmaps: [])
    with pytest.raises((AssertionError, OSError)):
        _crash_everywhere(tmp_path, 0, differencing=True)


def test_blocks_used_again_too_soon_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zero_blocks = VhdxImage._zero_blocks

    def release_at_once(image: VhdxImage, block: int, end: int) -> int:
        length = zero_blocks(image, block, end)
        image._parked = image._release(image._parked)
        return length

    monkeypatch.setattr(VhdxImage, "_zero_blocks", release_at_once)
    monkeypatch.setattr(HostSpace, "_clear", lambda space, start, length: None)
    with pytest.raises((AssertionError, OSError)):
        _crash_everywhere(tmp_path, 3)  # a seed that comes to the point
