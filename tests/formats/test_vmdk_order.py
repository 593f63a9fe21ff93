"""No crash makes a sparse VMDK show wrong bytes or lose what was flushed, and both sets of tables get equal again."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from nbdserve.block import BlockDevice
from nbdserve.formats import OpenOptions
from nbdserve.formats.vmdk import open_image as open_vmdk
from nbdserve.formats.vmdk.create import create_image
from nbdserve.formats.vmdk.header import read_header
from nbdserve.formats.vmdk.layout import Layout
from nbdserve.formats.vmdk.tables import GrainTables
from nbdserve.opening import open_image
from tests.formats.crashes import Recorder, crash_everywhere, sector_of
from tests.formats.vmdk_images import cid_of, without_tables
from tests.reference import needs, run

GRAIN = 4096
SIZE = 12 * GRAIN

pytestmark = needs("qemu-img")


def _open_recorded(image: Path) -> tuple[BlockDevice, Recorder]:
    file = Recorder.open(image, writable=True)
    assert isinstance(file, Recorder)

    def open_reference(name: str, format: str | None) -> BlockDevice:
        return open_image(image.parent / name, format=format, read_only=True)

    return open_vmdk(file, OpenOptions(False, open_reference)), file


def _reopen(image: Path, read_only: bool) -> BlockDevice:
    return open_image(image, format="vmdk", read_only=read_only)


def _judge(image: Path) -> None:
    run("qemu-img", "check", "-q", "-f", "vmdk", image)
    with closing(Recorder.open(image, writable=False)) as file:
        layout = read_header(file)
        assert isinstance(layout, Layout)
        assert layout.redundant is not None
        assert not layout.unclean
        for first, second in zip(layout.directory, layout.redundant, strict=True):
            assert file.read(first, layout.table_size) == file.read(second, layout.table_size)


def _crash(directory: Path, seed: int, *, over: bool = False, zeroed: bool = False, bare: bool = False) -> int:
    image = directory / "a.vmdk"
    parent = None
    if over:
        create_image(directory / "base.vmdk", SIZE, grain_size=GRAIN)
        with open_image(directory / "base.vmdk") as base:
            base.write(0, b"".join(sector_of(1000 + number) for number in range(SIZE // 512)))
        parent = (cid_of(directory / "base.vmdk"), "base.vmdk")
    create_image(image, SIZE, grain_size=GRAIN, zeroed_grains=zeroed, parent=parent)
    if bare:
        without_tables(image)
    return crash_everywhere(image, _open_recorded, _reopen, _judge, seed)


@pytest.mark.parametrize("seed", range(2))
def test_no_crash_loses_or_invents_bytes(tmp_path: Path, seed: int) -> None:
    assert _crash(tmp_path, seed) > 100


@pytest.mark.parametrize("zeroed", [False, True])
def test_no_crash_over_a_parent(tmp_path: Path, zeroed: bool) -> None:
    assert _crash(tmp_path, 7, over=True, zeroed=zeroed) > 100


def test_no_crash_while_tables_are_added(tmp_path: Path) -> None:
    assert _crash(tmp_path, 3, bare=True) > 100


def test_entries_before_data_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flush(tables: GrainTables) -> None:
        tables._writing, tables._waiting = tables._waiting, {}
        tables._write_entries()
        tables._file.sync()

    monkeypatch.setattr(GrainTables, "flush", flush)
    with pytest.raises((AssertionError, OSError)):
        _crash(tmp_path, 0, over=True)


def test_entries_left_in_memory_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GrainTables, "flush", lambda tables: tables._file.sync())
    with pytest.raises(AssertionError):
        _crash(tmp_path, 0)


def test_tables_that_differ_after_a_crash_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GrainTables, "_equalize", lambda tables: None)
    with pytest.raises(AssertionError):
        _crash(tmp_path, 1)
