"""The devices of block/ and raw images against the conformance suite, and what is special about each."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbdserve.block import BlockDevice, Data, HostFile, MemoryDevice, Window, Zero
from nbdserve.block.pins import Pins
from nbdserve.errors import OpenError, ReadOnly
from nbdserve.formats import probe_sectors
from nbdserve.formats.raw import RawImage
from tests.conformance import check_block_device

SIZE = 1 << 20


def raw_image(path: Path, **options: bool) -> RawImage:
    path.touch()
    os.truncate(path, SIZE)
    return RawImage(HostFile.open(path, writable=True), read_only=False)


def test_memory_conforms() -> None:
    check_block_device(lambda: MemoryDevice(bytearray(os.urandom(70_001))))


def test_window_conforms() -> None:
    check_block_device(lambda: Window(MemoryDevice(bytearray(os.urandom(90_000))), 4096 + 17, 70_001))


def test_window_leaves_the_rest_alone() -> None:
    whole = MemoryDevice(bytearray(b"\xaa" * 3000))
    window = Window(whole, 1000, 1000)
    window.write(0, b"\xbb" * 1000)
    assert whole.content == b"\xaa" * 1000 + b"\xbb" * 1000 + b"\xaa" * 1000


def test_raw_conforms(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"

    def reopen(device: BlockDevice) -> BlockDevice:
        device.close()
        return RawImage(HostFile.open(path, writable=True), read_only=False)

    def judge(expected: bytearray) -> None:
        assert path.read_bytes() == expected

    check_block_device(lambda: raw_image(path), reopen, judge)


def test_raw_maps_holes(tmp_path: Path) -> None:
    with raw_image(tmp_path / "disk.raw") as device:
        device.write(512 << 10, b"x" * 4096)
        kinds = [(type(extent), extent.length) for extent in device.extents(0, SIZE)]
        assert kinds == [(Zero, 512 << 10), (Data, 4096), (Zero, (512 << 10) - 4096)]
        device.discard(512 << 10, 4096)
        assert device.map(0, SIZE) == Zero(SIZE, allocated=False)


def test_guessed_raw_never_becomes_another_format(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(SIZE))
    device = RawImage(HostFile.open(path, writable=True), read_only=False, looks_like=probe_sectors)
    with device:
        assert device.locate_writable(0, 4096) is None
        with pytest.raises(PermissionError):
            device.write(0, b"QFI\xfb\x00\x00\x00\x03" + bytes(504))
        device.write(0, b"QFI")
        with pytest.raises(PermissionError):  # in two steps, neither of them whole
            device.write(3, b"\xfb\x00\x00\x00\x03")
        device.write(0, b"\xeb\x3c\x90" + bytes(509))
    assert path.read_bytes()[:3] == b"\xeb\x3c\x90"


def test_read_only_refuses(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    with RawImage(HostFile.open(path, writable=False), read_only=True) as device:
        for attempt in (lambda: device.write(0, b"x"), lambda: device.zero(0, 1), lambda: device.discard(0, 1)):
            with pytest.raises(ReadOnly):
                attempt()
        assert device.locate_writable(0, 1) is None
        assert not device.write_nowait(0, b"x")


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo"])
def test_what_is_no_image_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "thing"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    with pytest.raises(OpenError) as caught:
        HostFile.open(path, writable=False)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_reads_past_the_end_are_zeros(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"abc")
    file = HostFile.open(path, writable=False)
    assert file.read(1, 4) == b"bc\0\0"
    file.close()


def test_pieces_are_written_in_a_row(tmp_path: Path) -> None:
    path = tmp_path / "pieces"
    path.touch()
    file = HostFile.open(path, writable=True)
    file.write_all(3, [b"", b"ab", memoryview(b"cde"), b""])
    assert path.read_bytes() == b"\0\0\0abcde"
    file.close()


def test_pins_hold_back_what_was_freed_while_they_were_held() -> None:
    pins = Pins()
    early = pins.take()
    mark = pins.mark()
    late = pins.take()
    assert not pins.is_past(mark)
    pins.drop(early)
    assert pins.is_past(mark)
    pins.drop(late)
