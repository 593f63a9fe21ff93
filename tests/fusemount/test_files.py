"""Devices as files, without a kernel; see test_command.py for real tools on them."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from fusemount.filesystems.base import Changes
from fusemount.filesystems.files import DeviceFiles
from nbdserve.block import HostFile, MemoryDevice
from nbdserve.formats.raw import RawImage


def test_files_and_directories() -> None:
    fs = DeviceFiles({"disk": MemoryDevice(bytearray(b"x" * 700))}, ["p1"])
    entries = list(fs.entries(fs.root))
    assert [(entry.name, entry.type) for entry in entries] == [(b"disk", stat.S_IFREG), (b"p1", stat.S_IFDIR)]
    assert [entry.inode for entry in entries] == [fs.lookup(fs.root, b"disk"), fs.directory("p1")]
    assert list(fs.entries(fs.root, entries[0].position)) == entries[1:]
    disk = fs.attributes(entries[0].inode)
    assert (disk.size, disk.blocks, stat.S_IMODE(disk.mode)) == (700, 2, 0o600)
    assert fs.attributes(fs.root).links == 3
    with pytest.raises(FileNotFoundError):
        fs.lookup(fs.root, b"p2")
    with pytest.raises(IsADirectoryError):
        fs.read(fs.directory("p1"), 0, 1)


def test_reading_and_writing_stay_inside() -> None:
    content = bytearray(b"0123456789")
    fs = DeviceFiles({"disk": MemoryDevice(content)})
    disk = fs.lookup(fs.root, b"disk")
    assert bytes(fs.read(disk, 8, 100)) == b"89"
    assert bytes(fs.read(disk, 100, 1)) == b""
    fs.write(disk, 8, b"ab")
    with pytest.raises(OSError, match="No space") as caught:
        fs.write(disk, 9, b"ab")
    assert caught.value.errno == errno.ENOSPC
    assert fs.lookup(fs.root, b"disk") != disk, "or the kernel would go on to show a longer file"
    assert content == b"01234567ab"


def test_a_file_that_is_cut_keeps_its_size_under_a_new_number() -> None:
    fs = DeviceFiles({"a": MemoryDevice(bytearray(10)), "b": MemoryDevice(bytearray(10))})
    a, b = fs.lookup(fs.root, b"a"), fs.lookup(fs.root, b"b")
    fs.truncate(a, 10)
    assert fs.lookup(fs.root, b"a") == a
    fs.truncate(a, 0)
    new = fs.lookup(fs.root, b"a")
    assert new not in (a, b)
    assert fs.attributes(new).size == fs.attributes(a).size == 10
    fs.write(a, 0, b"old")
    assert bytes(fs.read(new, 0, 3)) == b"old"
    assert fs.lookup(fs.root, b"b") == b
    with pytest.raises(OSError, match="No space"):
        fs.truncate(a, 11)


def test_what_is_read_only_stays_so() -> None:
    content = bytearray(10)
    fs = DeviceFiles({"a": MemoryDevice(content, read_only=True)})
    assert fs.read_only
    a = fs.lookup(fs.root, b"a")
    for call in (lambda: fs.write(a, 0, b"x"), lambda: fs.truncate(a, 0)):
        with pytest.raises(OSError, match="Read-only"):
            call()
    assert stat.S_IMODE(fs.attributes(a).mode) == 0o400
    assert content == bytes(10)


def test_times_are_kept() -> None:
    fs = DeviceFiles({"a": MemoryDevice(bytearray(10))})
    a = fs.lookup(fs.root, b"a")
    fs.change(a, Changes(mode=0o777, mtime_ns=5))
    assert (fs.attributes(a).mtime_ns, stat.S_IMODE(fs.attributes(a).mode)) == (5, 0o600)


def test_without_waiting_what_the_host_has_in_memory_is_read(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"data" * 2048)
    os.truncate(path, 1 << 20)
    with RawImage(HostFile.open(path, writable=False), read_only=True) as image:
        fs = DeviceFiles({"a": image})
        a = fs.lookup(fs.root, b"a")
        fs.nowait = True
        try:
            assert bytes(fs.read(a, 8188, 8)) == b"data\0\0\0\0"
        except BlockingIOError:  # the host may drop its cache at any time
            fs.nowait = False
            assert bytes(fs.read(a, 8188, 8)) == b"data\0\0\0\0"


def test_without_waiting_what_must_be_computed_is_left() -> None:
    fs = DeviceFiles({"a": MemoryDevice(bytearray(10))})
    fs.nowait = True
    with pytest.raises(BlockingIOError):
        fs.read(fs.lookup(fs.root, b"a"), 0, 5)
