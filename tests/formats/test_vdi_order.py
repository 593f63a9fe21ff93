"""No crash makes a VDI show wrong bytes, lose what was flushed, or hand out one block twice."""

from __future__ import annotations

import struct
from contextlib import closing
from pathlib import Path

import pytest

from nbdserve.block import BlockDevice
from nbdserve.formats import OpenOptions
from nbdserve.formats.vdi import open_image as open_vdi
from nbdserve.formats.vdi.block_map import BlockMap
from nbdserve.formats.vdi.create import create_image
from nbdserve.formats.vdi.header import read_header
from nbdserve.opening import open_image
from tests.formats.crashes import Recorder, crash_everywhere, sector_of

BLOCK_SIZE = 4096
SIZE = 12 * BLOCK_SIZE


def _open_recorded(image: Path) -> tuple[BlockDevice, Recorder]:
    file = Recorder.open(image, writable=True)
    assert isinstance(file, Recorder)

    def open_reference(name: str, format: str | None) -> BlockDevice:
        return open_image(image.parent / name, format=format, read_only=True)

    def open_file(name: str, *, writable: bool) -> Recorder:
        part = Recorder.open(image.parent / name, writable=writable)
        assert isinstance(part, Recorder)
        return part

    return open_vdi(file, OpenOptions(False, open_reference, open_file=open_file)), file


def _reopen(image: Path, read_only: bool) -> BlockDevice:
    return open_image(image, format="vdi", read_only=read_only)


def _judge(image: Path) -> None:
    """The header's count covers every entry, and no block is used twice."""
    with closing(Recorder.open(image, writable=False)) as file:
        header = read_header(file)
        entries = struct.unpack(f"<{header.blocks}I", file.read(header.map_offset, 4 * header.blocks))
    used = [entry for entry in entries if entry < 0xFFFFFFFE]
    assert used
    assert len(used) == len(set(used)) == header.blocks_allocated == max(used) + 1


def _crash(directory: Path, seed: int, *, differencing: bool = False) -> int:
    image = directory / "a.vdi"
    header = None
    if differencing:
        create_image(directory / "base.vdi", SIZE, block_size=BLOCK_SIZE)
        with open_image(directory / "base.vdi") as base:
            base.write(0, b"".join(sector_of(1000 + number) for number in range(SIZE // 512)))
        with closing(Recorder.open(directory / "base.vdi", writable=False)) as file:
            header = read_header(file)
    create_image(image, SIZE, block_size=BLOCK_SIZE, parent=header)
    return crash_everywhere(image, _open_recorded, _reopen, _judge, seed)


@pytest.mark.parametrize("seed", range(2))
def test_no_crash_loses_or_invents_bytes(tmp_path: Path, seed: int) -> None:
    assert _crash(tmp_path, seed) > 100


def test_no_crash_over_a_parent(tmp_path: Path) -> None:
    assert _crash(tmp_path, 7, differencing=True) > 100


def test_entries_before_data_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flush(blocks: BlockMap) -> None:
        entries, blocks._waiting = blocks._waiting, {}
        if entries:
            blocks._write(entries)
        blocks._file.sync()

    monkeypatch.setattr(BlockMap, "flush", flush)
    with pytest.raises((AssertionError, OSError)):
        _crash(tmp_path, 0)


def test_entries_left_in_memory_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockMap, "flush", lambda blocks: blocks._file.sync())
    with pytest.raises(AssertionError):
        _crash(tmp_path, 0)
