"""Images that QEMU left dirty (lazy refcounts), and persistent bitmaps."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest

from nbdserve.block import HostFile
from nbdserve.errors import FormatError, OpenError
from nbdserve.formats.qcow2.bitmaps import Flags, read_bitmaps
from nbdserve.formats.qcow2.header import Header, Incompatible
from nbdserve.formats.qcow2.resizing import resize
from nbdserve.formats.qcow2.writable import WritableQcow2Image
from nbdserve.imagetools.checking import check
from tests.formats.qcow2_crashes import Recorder, remains
from tests.formats.qcow2_images import open_qcow2
from tests.reference import needs, qemu_check, qemu_content, qemu_img_create, qemu_io, run

pytestmark = needs("qemu-img", "qemu-io")

KIB, MIB = 1 << 10, 1 << 20


def _header(image: Path) -> Header:
    with HostFile.open(image, writable=False) as file:
        return Header.read(file)


def _killed(image: Path, *commands: str) -> None:
    """Let qemu-io write and be killed before it can bring refcounts to the disk."""
    arguments = [part for command in (*commands, "flush", "sigraise 9") for part in ("-c", command)]
    assert subprocess.run(["qemu-io", "-f", "qcow2", *arguments, image], capture_output=True).returncode < 0


@pytest.mark.parametrize(
    "options",
    [
        {"cluster_size": 512, "refcount_bits": 64},
        {"cluster_size": 4096, "refcount_bits": 1},
        {"cluster_size": 65536},
        {"cluster_size": 65536, "extended_l2": "on"},
    ],
)
def test_a_dirty_image_is_repaired_before_it_is_written(tmp_path: Path, options: dict[str, str | int]) -> None:
    image = qemu_img_create(tmp_path / "a.qcow2", 4 * MIB, lazy_refcounts="on", **options)
    if options.get("refcount_bits") != 1:
        qemu_io(image, "write -P 1 0 300k", "write -c -P 5 3M 64k")
        run("qemu-img", "snapshot", "-c", "one", image)
    _killed(image, "write -P 2 100k 1M", "write -P 3 2M 300k")
    assert _header(image).incompatible & Incompatible.DIRTY
    assert subprocess.run(["qemu-img", "check", image], capture_output=True).returncode == 2
    model = bytearray(4 * MIB)
    with open_qcow2(image, read_only=True) as device:
        model = device.read(0, device.size)
    assert _header(image).incompatible & Incompatible.DIRTY
    pristine = image.read_bytes()
    with open_qcow2(image, file_type=Recorder) as device:
        assert not _header(image).incompatible & Incompatible.DIRTY
        log = list(device.file.log)  # type: ignore[attr-defined]
        device.write(50, b"after")
        model[50:55] = b"after"
    qemu_check(image)
    assert qemu_content(image, "qcow2") == model
    if options["cluster_size"] != 65536:
        return
    for _, content in remains(pristine, log, random.Random(1), 2):  # a crash while it is repaired
        image.write_bytes(content)
        with open_qcow2(image) as device:
            device.write(50, b"after")
        qemu_check(image)
        assert qemu_content(image, "qcow2") == model


def test_more_damage_than_refcounts_is_left_to_others(tmp_path: Path) -> None:
    image = qemu_img_create(tmp_path / "a.qcow2", 4 * MIB, lazy_refcounts="on")
    _killed(image, "write -P 2 0 1M")
    content = bytearray(image.read_bytes())
    l1 = _header(image).l1_offset
    l2 = int.from_bytes(content[l1 : l1 + 8], "big") & (1 << 56) - 512
    content[l2 : l2 + 8] = (1 << 63 | 1 << 50).to_bytes(8, "big")
    image.write_bytes(content)
    with pytest.raises(FormatError, match=r"lies outside the file; repair it with 'qemu-img check -r all'"):
        open_qcow2(image)
    assert image.read_bytes() == content


def _bitmaps(image: Path) -> dict[str, tuple[list[str], int]]:
    """What QEMU says: the flags and granularity of each bitmap."""
    info = json.loads(run("qemu-img", "info", "--output=json", image))
    listed = info["format-specific"]["data"].get("bitmaps", [])
    return {each["name"]: (each["flags"], each["granularity"]) for each in listed}


def _set_bits(image: Path, name: str) -> list[int]:
    with HostFile.open(image, writable=False) as file:
        header = Header.read(file)
        bitmap = next(each for each in read_bitmaps(file, header) if each.name == name)
        size = header.geometry.cluster_size
        content = b"".join(
            bytes(file.read(entry, size)) if entry > 1 else bytes([255 * entry]) * size for entry in bitmap.table
        )
    return [bit for bit in range(len(content) * 8) if content[bit // 8] >> bit % 8 & 1]


@pytest.mark.parametrize("cluster_size", [4096, 65536])
def test_bitmaps_are_kept_right(tmp_path: Path, cluster_size: int) -> None:
    image = qemu_img_create(tmp_path / "a.qcow2", 64 * MIB, cluster_size=cluster_size)
    run("qemu-img", "bitmap", "--add", "-g", "4096", image, "on")
    run("qemu-img", "bitmap", "--add", "-g", "65536", image, "coarse")
    run("qemu-img", "bitmap", "--add", "--disable", image, "off")
    qemu_io(image, "write 1M 4k")
    assert _set_bits(image, "on") == [256]
    before = _bitmaps(image)
    with open_qcow2(image) as device:
        assert set(_bitmaps(image)["on"][0]) == {"in-use", "auto"}
        device.write(100, b"x")
        assert device.locate_writable(0, 1) is None
        assert not device.write_nowait(0, b"x")
        device.write(4095, b"xx")
        device.zero(40 * MIB, 3 * 65536)
        device.discard(60 * MIB, 65536)
        device.flush()
    assert _bitmaps(image) == before
    qemu_check(image)
    zeroed = [*range(40 * 256, 40 * 256 + 48), *range(60 * 256, 60 * 256 + 16)]
    assert _set_bits(image, "on") == [0, 1, 256, *zeroed]
    assert _set_bits(image, "coarse") == [0, 16, 640, 641, 642, 960]
    assert _set_bits(image, "off") == []
    qemu_io(image, "write 2M 4k")  # QEMU goes on with them
    assert 512 in _set_bits(image, "on")
    with open_qcow2(image) as device:
        assert isinstance(device, WritableQcow2Image)
        with pytest.raises(OpenError, match="persistent bitmaps"):
            resize(device, MIB)
    qemu_check(image)


def test_bitmaps_after_a_crash_say_that_they_are_wrong(tmp_path: Path) -> None:
    image = qemu_img_create(tmp_path / "a.qcow2", 16 * MIB)
    run("qemu-img", "bitmap", "--add", image, "on")
    start = image.read_bytes()
    with open_qcow2(image, file_type=Recorder) as device:
        log = device.file.log  # type: ignore[attr-defined]
        device.write(0, b"x" * 4096)
        device.flush()
        device.write(8 * MIB, b"y" * 65536)
    crashed = tmp_path / "crashed"
    for _, content in remains(start, log, random.Random(1), 2):
        crashed.write_bytes(content)
        qemu_check(crashed, leaks_allowed=True)
        with HostFile.open(crashed, writable=False) as file:
            bitmap = read_bitmaps(file, Header.read(file))[0]
        if not bitmap.flags & Flags.IN_USE:
            shown = qemu_content(crashed, "qcow2")
            expected = [at // 65536 for at in (0, 8 * MIB) if any(shown[at : at + 4096])]
            assert set(expected) <= set(_set_bits(crashed, "on"))


def test_bitmaps_that_are_not_understood_are_given_up(tmp_path: Path) -> None:
    image = qemu_img_create(tmp_path / "a.qcow2", 16 * MIB)
    run("qemu-img", "bitmap", "--add", image, "on")
    content = bytearray(image.read_bytes())
    place = content.index(bytes.fromhex("23852875")) + 8 + 16
    directory = int.from_bytes(content[place : place + 8], "big")
    content[directory + 17] = 60  # the granularity
    image.write_bytes(content)
    with open_qcow2(image) as device:
        device.write(0, b"x")
    assert image.read_bytes()[88:96] == bytes(8)
    qemu_check(image, leaks_allowed=True)
    assert qemu_content(image, "qcow2")[:1] == b"x"


@pytest.mark.parametrize(
    ("extended", "table", "word", "value"),
    [
        (False, "l1", 1, 1 << 56),
        (False, "l1", 1, 1 << 63),
        (False, "l2", 0, 1 << 63 | 0x50002),
        (False, "l2", 60, 0x80),
        (True, "l2", 61, 1),
        (True, "l2", 1, 1 << 32 | 1),
        (True, "l2", 1, (1 << 64) - 1),
    ],
)
def test_impossible_entries_are_found_as_qemu_finds_them(
    tmp_path: Path, extended: bool, table: str, word: int, value: int
) -> None:
    image = qemu_img_create(tmp_path / "a.qcow2", 1 << 30, extended_l2="on" if extended else "off")
    qemu_io(image, "write -P 1 0 64k")
    content = bytearray(image.read_bytes())
    l1 = _header(image).l1_offset
    l2 = int.from_bytes(content[l1 : l1 + 8], "big") & (1 << 56) - 512
    at = {"l1": l1, "l2": l2}[table] + 8 * word
    content[at : at + 8] = value.to_bytes(8, "big")
    image.write_bytes(content)
    assert subprocess.run(["qemu-img", "check", image], capture_output=True).returncode == 2
    report = check(str(image), format="qcow2")
    assert report is not None
    assert report.corruptions
