"""NTFS volumes that must not be written to: why, in one line, and agreed on by ntfs-3g."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fusemount.filesystems import ntfs
from fusemount.filesystems.ntfs import library
from fusemount.filesystems.ntfs.records import Type
from fusemount.filesystems.ntfs.volume import LOG, VOLUME, Volume
from nbdserve.block import MemoryDevice
from nbdserve.errors import FormatError, OpenError
from tests.fusemount.ntfs_images import make_ntfs, mounted, run
from tests.fusemount.trees import device_of, tree_of

pytestmark = pytest.mark.needs("mkfs.ntfs", "ntfs-3g", "ntfs-3g.probe")

UNCLEAN, HIBERNATED = 15, 14
"""What ntfs-3g.probe answers."""


def place_of_log(image: Path) -> int:
    """Where $LogFile begins."""
    with device_of(image) as device:
        volume = Volume(device)
        stream = volume.system(LOG).stream(Type.DATA)
        place, _ = next(stream._runs.find(0, 1))
        return place * volume.geometry.cluster


def write_log(image: Path, *, version: int, clients: int, flags: int) -> None:
    """Put a restart page at the start of the log, as Windows does; the rest of the log stays empty."""
    page = bytearray(4096)
    struct.pack_into("<4sHHQIIHhh", page, 0, b"RSTR", 0x1E, 9, 0, 4096, 4096, 0x30, 1 if version == 1 else 0, version)
    area = struct.pack("<QHHHHIHHqIHH", 1000, 1, 0xFFFF, clients, flags, 67 - 22, 0xE0, 0x40, 2 << 20, 0, 0x30, 0x40)
    client = struct.pack("<QQHHHH4xI", 0, 0, 0xFFFF, 0xFFFF, 0, 0, 8) + "NTFS".encode("utf-16-le")
    page[0x30 : 0x30 + len(area)] = area
    page[0x70 : 0x70 + len(client)] = client
    for index in range(9):
        page[0x1E + 2 * index : 0x20 + 2 * index] = b"\x07\x00" if index == 0 else b"\x00\x00"
        if index:
            page[512 * index - 2 : 512 * index] = b"\x07\x00"
    with image.open("r+b") as file:
        file.seek(place_of_log(image))
        file.write(page)
        file.write(page)


def unclean_log(image: Path) -> None:
    write_log(image, version=1, clients=0, flags=0)


def cached_by_windows(image: Path) -> None:
    write_log(image, version=2, clients=0, flags=0)


def hibernated(image: Path) -> None:
    with mounted(image, image.parent / "mnt") as root:
        (root / "hiberfil.sys").write_bytes(b"HIBR" + bytes(8192))


def set_dirty(image: Path) -> None:
    with device_of(image, writable=True) as device:
        volume = Volume(device)
        geometry = volume.geometry
        value = volume.system(VOLUME).values(Type.VOLUME_INFORMATION)[0]
        for table in (geometry.mft, geometry.mirror):
            record = table * geometry.cluster + VOLUME * geometry.record
            offset = device.read(record, geometry.record).index(value)
            device.write(record + offset + 10, b"\x01\x00")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    image = make_ntfs(tmp_path / "image", 16 << 20)
    with mounted(image, tmp_path / "mnt") as root:
        (root / "file").write_text("still to be read")
    return image


@pytest.mark.parametrize(
    ("spoil", "words", "probe"),
    [
        (unclean_log, "log holds changes", UNCLEAN),
        (cached_by_windows, "shut it down fully", HIBERNATED),
        (hibernated, "hibernated", HIBERNATED),
        (set_dirty, "chkdsk", 0),
    ],
)
def test_what_is_in_use_is_only_read(image: Path, spoil: Callable[[Path], None], words: str, probe: int) -> None:
    spoil(image)
    assert subprocess.run(["ntfs-3g.probe", "--readwrite", image], capture_output=True).returncode == probe
    before = image.read_bytes()
    with device_of(image, writable=True) as device:
        condition = ntfs.examine(device)
        assert condition.readable and not condition.writable and condition.dirty
        assert words in condition.remark and "\n" not in condition.remark
        with pytest.raises(OpenError, match=words):
            ntfs.open_filesystem(device, writable=True)
        assert b"file" in tree_of(ntfs.open_filesystem(device, writable=False))
    assert image.read_bytes() == before


@pytest.mark.parametrize(("clients", "flags"), [(0xFFFF, 0), (0, 2)])
def test_a_closed_log_does_no_harm(image: Path, clients: int, flags: int) -> None:
    write_log(image, version=1, clients=clients, flags=flags)
    run("ntfs-3g.probe", "--readwrite", image)
    with device_of(image, writable=True) as device:
        assert ntfs.examine(device).writable
        ntfs.open_filesystem(device, writable=True).close()


def test_an_interrupted_session_leaves_the_volume_marked(image: Path) -> None:
    copy = image.with_name("copy")
    with device_of(image, writable=True) as device:
        filesystem = ntfs.open_filesystem(device, writable=True)
        filesystem.create(filesystem.root, b"new", 0o644, 0, 0)
        filesystem.sync()
        copy.write_bytes(image.read_bytes())
        filesystem.close()
        assert not ntfs.examine(device).dirty
    with device_of(copy, writable=True) as device:
        assert ntfs.examine(device).dirty
        assert b"new" in tree_of(ntfs.open_filesystem(device, writable=False))
    run("ntfsfix", "--clear-dirty", copy)
    with device_of(copy, writable=True) as device:
        assert ntfs.examine(device).writable


def test_without_the_library_reading_works(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise OSError("cannot load library")

    monkeypatch.setattr(library, "_load", load)
    with device_of(image, writable=True) as device:
        condition = ntfs.examine(device)
        assert condition.readable and not condition.writable and not condition.dirty
        assert "libntfs-3g89" in condition.remark
        with pytest.raises(OpenError, match="libntfs-3g89"):
            ntfs.open_filesystem(device, writable=True)
        assert b"file" in tree_of(ntfs.open_filesystem(device, writable=False))


def test_an_image_that_is_open_read_only(image: Path) -> None:
    with device_of(image) as device:
        assert "read-only" in ntfs.examine(device).remark
        with pytest.raises(OpenError, match="read-only"):
            ntfs.open_filesystem(device, writable=True)


def damage_boot(content: bytearray) -> None:
    content[3:11] = b"MSDOS5.0"


def damage_cluster_size(content: bytearray) -> None:
    content[13] = 3


def damage_mft(content: bytearray) -> None:
    place = int.from_bytes(content[0x30:0x38], "little") * 4096
    content[place : place + 4] = b"BAAD"


def cut(content: bytearray) -> None:
    del content[len(content) // 2 :]


@pytest.mark.parametrize("damage", [damage_boot, damage_cluster_size, damage_mft, cut])
def test_what_cannot_be_read_is_refused_in_one_line(image: Path, damage: Callable[[bytearray], None]) -> None:
    content = bytearray(image.read_bytes())
    damage(content)
    device = MemoryDevice(content)
    condition = ntfs.examine(device)
    assert not condition.readable and not condition.writable and "\n" not in condition.remark
    for writable in (False, True):
        with pytest.raises(FormatError) as caught:
            ntfs.open_filesystem(device, writable=writable)
        assert str(caught.value) == condition.remark
