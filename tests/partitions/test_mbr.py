"""Master boot records against sfdisk, and against those that are none."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from nbdserve.block import MemoryDevice
from nbdserve.errors import FormatError, OpenError
from nbdserve.partitions import PartitionTable, TableKind, find, read_partitions
from nbdserve.partitions.mbr import MAX_LOGICAL
from tests.reference import needs, run

MIB = 1 << 20
SIZE = 64 * MIB


def partitioned(path: Path, script: str, size: int = SIZE) -> bytearray:
    """A disk on which sfdisk has followed the script."""
    with path.open("wb") as file:
        file.truncate(size)
    run("sfdisk", "-q", path, stdin=script)
    return bytearray(path.read_bytes())


def sfdisk_says(path: Path) -> dict[str, Any]:
    """sfdisk --json."""
    table: dict[str, Any] = json.loads(run("sfdisk", "--json", path))["partitiontable"]
    return table


def read(content: bytearray | bytes) -> PartitionTable:
    """The table on a disk with this content."""
    return read_partitions(MemoryDevice(bytearray(content)))


def entry(kind: int, start: int, count: int, flag: int = 0) -> bytes:
    """One entry of a record."""
    return struct.pack("<B3sB3sII", flag, bytes(3), kind, bytes(3), start, count)


def record(*entries: bytes) -> bytes:
    """A boot record with these entries."""
    return bytes(440) + b"\x44\x33\x22\x11\0\0" + b"".join(entries).ljust(64, b"\0") + b"\x55\xaa"


EXTENDED = """label: dos
size=8M,type=83,bootable
size=4M,type=c
size=40M,type=5
size=4M,type=83
size=4M,type=82
size=6M
size=1M,type=7
"""

SCRIPTS = {
    "primary": "label: dos\nsize=8M,type=83,bootable\nsize=4M,type=c\n",
    "gap": "label: dos\n2: size=8M\n4: size=1M,type=7\n",
    "extended": EXTENDED,
    "extended first": "label: dos\nsize=40M,type=f\n4: size=8M\n5: size=3M\n6: size=2M\n",
    "empty extended": "label: dos\nsize=40M,type=85\n",
}


@needs("sfdisk")
@pytest.mark.parametrize("name", SCRIPTS)
def test_agrees_with_sfdisk(tmp_path: Path, name: str) -> None:
    disk = tmp_path / "disk"
    table = read(partitioned(disk, SCRIPTS[name]))
    theirs = sfdisk_says(disk)
    signature = int(theirs["id"], 16)
    assert table.kind is TableKind.MBR
    assert table.remarks == ()
    ours = [
        (part.number, part.offset // 512, part.size // 512, part.type, part.bootable, part.uuid)
        for part in table.partitions
    ]
    assert ours == [
        (
            number := int(part["node"].removeprefix(str(disk))),
            part["start"],
            part["size"],
            int(part["type"], 16),
            part.get("bootable", False),
            f"{signature:08x}-{number:02x}",
        )
        for part in theirs["partitions"]
    ]


@needs("sfdisk")
def test_logical_partitions_keep_linux_numbers_when_one_is_deleted(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    partitioned(disk, EXTENDED)
    run("sfdisk", "-q", "--delete", disk, "5")
    table = read(disk.read_bytes())
    assert [(part.number, part.offset // 512) for part in table.partitions if part.number >= 5] == [
        (int(part["node"].removeprefix(str(disk))), part["start"])
        for part in sfdisk_says(disk)["partitions"]
        if int(part["node"].removeprefix(str(disk))) >= 5
    ]


@needs("mkfs.vfat")
@pytest.mark.parametrize("options", [("-F", "12"), ("-F", "16"), ("-F", "32")])
def test_a_fat_file_system_is_no_table(tmp_path: Path, options: tuple[str, ...]) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(SIZE)
    run("mkfs.vfat", *options, disk)
    assert read(disk.read_bytes()) == PartitionTable(TableKind.NONE, 512, SIZE, ())


@needs("mkfs.ntfs")
def test_an_ntfs_file_system_is_no_table(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(8 * MIB)
    run("mkfs.ntfs", "-q", "-F", "-f", disk)
    assert read(disk.read_bytes()).kind is TableKind.NONE


def boot_sector(*entries: bytes) -> bytes:
    """A FAT boot sector with something where a table would be."""
    return b"\xeb\x3c\x90MSDOS5.0".ljust(54, b"\0") + b"FAT16   " + record(*entries)[62:]


@pytest.mark.parametrize(
    ("entries", "is_table"),
    [
        ((entry(0x65, 0x20656C69, 0x2E6E6961),), False),  # text that happens to follow a byte 0x00
        ((entry(0x0C, 0, 100),), False),
        ((entry(0x0C, 1, 100), entry(0x83, 50, 100)), False),
        ((entry(0x0C, 63, 100, 0x80), entry(0x83, 163, 100)), True),  # a boot manager that imitates a boot sector
    ],
)
def test_a_boot_sector_needs_a_plausible_table(entries: tuple[bytes, ...], is_table: bool) -> None:
    assert (read(boot_sector(*entries).ljust(MIB, b"\0")).kind is TableKind.MBR) == is_table


@pytest.mark.parametrize(
    "sector",
    [
        b"",
        bytes(511),
        bytes(512),
        record(),
        record(entry(0x83, 1, 1, flag=0x65)),
        record(entry(0x83, 1, 1))[:-2] + b"\xaa\x55",
        record(entry(0x83, 1, 0), entry(0, 1, 1)),
    ],
)
def test_no_table(sector: bytes) -> None:
    table = read(sector)
    assert table == PartitionTable(TableKind.NONE, 512, len(sector), ())
    with pytest.raises(OpenError, match="no partition table"):
        find(table, 1)


def test_find() -> None:
    disk = record(entry(0x83, 1, 10), entry(5, 20, 30), entry(0x83, 60, 41)).ljust(100 * 512, b"\0")
    table = read(disk)
    assert find(table, 1) is find(table, "1") is find(table, "11223344-01") is table.partitions[0]
    with pytest.raises(OpenError, match="extended partition"):
        find(table, 2)
    with pytest.raises(FormatError, match="truncated"):
        find(table, 3)
    for selector in (4, 0, -1, "", "01", "\u0661", "x" * 100, "2\n"):
        with pytest.raises(OpenError, match="it has: 1, 3"):
            find(table, selector)


@pytest.mark.parametrize("link", [0, 10, 20])
def test_a_loop_of_logical_partitions_ends(link: int) -> None:
    disk = bytearray(100 * 512)
    disk[:512] = record(entry(5, 10, 90))
    for place, following in ((10, 10), (20, 20), (30, link)):
        disk[place * 512 : place * 512 + 512] = record(entry(0x83, 1, 5), entry(5, following, 10))
    table = read(disk)
    assert [(part.number, part.offset // 512) for part in table.partitions] == [(1, 10), (5, 11), (6, 21), (7, 31)]
    assert "comes back" in table.remarks[0]
    assert find(table, 6).offset == 21 * 512


@pytest.mark.parametrize("link", [15, 95, 0xFFFFFFFF])
def test_a_broken_chain_keeps_what_came_before(link: int) -> None:
    disk = bytearray(100 * 512)
    disk[:512] = record(entry(5, 10, 90))
    disk[10 * 512 : 11 * 512] = record(entry(0x83, 1, 5), entry(5, link, 10))
    table = read(disk)
    assert [part.number for part in table.partitions] == [1, 5]
    assert "breaks off" in table.remarks[0]


def test_a_long_chain_is_cut() -> None:
    disk = bytearray(record(entry(5, 1, 400)))
    for place in range(1, 400):
        disk += record(entry(0x83, 0, 1), entry(5, place, 1))
    table = read(disk)
    assert len(table.partitions) == 1 + MAX_LOGICAL
    assert "more than" in table.remarks[0]


def test_mutations_are_read_or_refused() -> None:
    chosen = random.Random(11)
    good = bytearray(100 * 512)
    good[:512] = record(entry(0x83, 1, 5, 0x80), entry(5, 10, 80), entry(0x0C, 90, 5))
    for place in (10, 20, 30):
        good[place * 512 : place * 512 + 512] = record(entry(0x83, 1, 5), entry(5, place, 10))
    found = 0
    for _ in range(400):
        mutant = bytearray(good)
        for _ in range(chosen.randint(1, 5)):
            place = chosen.choice((0, 10, 20, 30)) * 512 + chosen.randrange(446, 512)
            mutant[place] = chosen.choice((chosen.randrange(256), 0, 5, 0xEE, 0xFF))
        del mutant[chosen.choice((20_000, len(mutant))) :]
        try:
            table = read(mutant)
        except FormatError:
            continue
        for part in table.partitions:
            try:
                window = find(table, part.number)
            except OpenError:
                continue
            found += 1
            assert 0 <= window.offset < window.offset + window.size <= len(mutant)
    assert found > 400
