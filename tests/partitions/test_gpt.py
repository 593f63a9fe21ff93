"""GUID partition tables against sfdisk, sgdisk and fdisk, and with parts of them damaged."""

from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path
from uuid import UUID

import pytest

from nbdserve.errors import FormatError, OpenError
from nbdserve.partitions import Partition, TableKind, find
from tests.partitions.test_mbr import MIB, SIZE, entry, partitioned, read, record, sfdisk_says
from tests.reference import needs, run

EFI_SYSTEM = UUID("C12A7328-F81F-11D2-BA4B-00A0C93EC93B")
LINUX = UUID("0FC63DAF-8483-4772-8E79-3D69D8477DE4")

SCRIPT = """label: gpt
size=8M,type=U,name=boot,attrs=LegacyBIOSBootable
3: size=4M,name="two words"
128: size=1M,name=last,uuid=AABBCCDD-0011-2233-4455-66778899AABB
"""


@needs("sfdisk")
def test_agrees_with_sfdisk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    table = read(partitioned(disk, SCRIPT))
    assert (table.kind, table.sector_size, table.remarks) == (TableKind.GPT, 512, ())
    assert list(table.partitions) == [
        Partition(
            int(part["node"].removeprefix(str(disk))),
            part["start"] * 512,
            part["size"] * 512,
            UUID(part["type"]),
            part["uuid"].lower(),
            part["name"],
            "LegacyBIOSBootable" in part.get("attrs", ""),
        )
        for part in sfdisk_says(disk)["partitions"]
    ]
    assert [part.label for part in table.partitions] == ["boot", "two words", "last"]
    assert table.partitions[2].uuid == "aabbccdd-0011-2233-4455-66778899aabb"


@needs("sgdisk")
def test_agrees_with_sgdisk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(SIZE))
    run("sgdisk", "-n", "2:2048:+8M", "-t", "2:ef00", "-c", "2:EFI system", "-n", "7:0:0", "-S", "56", disk)
    first, second = read(disk.read_bytes()).partitions
    assert (first.number, first.offset, first.size, first.type) == (2, MIB, 8 * MIB, EFI_SYSTEM)
    assert (first.label, second.number, second.offset, second.type) == ("EFI system", 7, 9 * MIB, LINUX)
    assert f"Partition unique GUID: {first.uuid.upper()}" in run("sgdisk", "-i", "2", disk)


@needs("fdisk")
def test_sectors_of_4096_bytes(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(SIZE))
    run("fdisk", "-b", "4096", "-w", "always", disk, stdin="g\nn\n1\n\n+8M\nn\n5\n\n+4M\nt\n1\n1\nw\n")
    content = bytearray(disk.read_bytes())
    table = read(content)
    assert (table.sector_size, table.remarks) == (4096, ())
    parts = [(part.number, part.offset, part.size, part.type) for part in table.partitions]
    assert parts == [(1, MIB, 8 * MIB, EFI_SYSTEM), (5, 9 * MIB, 4 * MIB, LINUX)]
    content[4096 + 60] ^= 1
    from_backup = read(content)
    assert from_backup.partitions == table.partitions
    assert "backup in sector 16383" in from_backup.remarks[0]


def header(own: int, other: int, entries_sector: int, entries: bytes, size: int = 128, length: int = 92) -> bytes:
    """A header for these entries, one sector long."""

    def packed(crc: int) -> bytes:
        fields = (b"EFI PART", 0x10000, length, crc, 0, own, other, 34, 100, bytes(16))
        places = (entries_sector, len(entries) // size, size, zlib.crc32(entries))
        return struct.pack("<8sIIII4Q16sQIII", *fields, *places).ljust(length, b"\0")

    return packed(zlib.crc32(packed(0))).ljust(512, b"\0")


def gpt_entry(first: int, last: int, name: str = "", size: int = 128, kind: UUID = LINUX) -> bytes:
    """One entry; its UUID is made of its place."""
    fields = (kind.bytes_le, UUID(int=first).bytes_le, first, last, 0, name.encode("utf-16-le"))
    return struct.pack("<16s16sQQQ72s", *fields).ljust(size, b"\0")


def disk_with(entries: bytes, *, size: int = 128, first_sector: bytes = record(entry(0xEE, 1, 199))) -> bytearray:
    """A disk of 200 sectors with both copies of a table."""
    disk = bytearray(200 * 512)
    disk[:512] = first_sector
    disk[512:1024] = header(1, 199, 2, entries, size)
    disk[1024 : 1024 + len(entries)] = entries
    disk[199 * 512 :] = header(199, 1, 167, entries, size)
    disk[167 * 512 : 167 * 512 + len(entries)] = entries
    return disk


GOOD = gpt_entry(40, 49, "a") + bytes(128) + gpt_entry(50, 250, "far") + gpt_entry(60, 59, "empty") + bytes(512)


@pytest.mark.parametrize("place", [512, 512 + 8, 512 + 16, 512 + 24, 512 + 72, 512 + 88, 1024, 1024 + 500])
def test_the_backup_serves_when_the_primary_is_damaged(place: int) -> None:
    disk = disk_with(GOOD)
    whole = read(disk)
    assert whole.remarks == ()
    disk[place] ^= 0x10
    rescued = read(disk)
    assert rescued.partitions == whole.partitions
    assert len(rescued.remarks) == 1


def test_the_backup_is_found_where_the_primary_says() -> None:
    disk = disk_with(GOOD)
    disk[1024] ^= 1  # the entries, so that the header still counts
    grown = disk + bytes(64 * 512)
    assert read(grown).partitions[0].label == "a"
    assert read(disk_with(GOOD) + bytes(64 * 512)).remarks == ()


def test_the_primary_goes_before_an_older_backup_of_other_sectors() -> None:
    disk = disk_with(gpt_entry(40, 49, "old"))
    disk[512:1024] = bytes(512)
    new = gpt_entry(10, 11, "new")
    disk[4096:8192] = header(1, 24, 2, new).ljust(4096, b"\0")
    disk[8192 : 8192 + 128] = new
    assert [(part.label, part.offset) for part in read(disk).partitions] == [("new", 40960)]


def test_both_copies_damaged() -> None:
    disk = disk_with(GOOD)
    disk[512] ^= 1
    disk[199 * 512] ^= 1
    with pytest.raises(FormatError, match="both damaged"):
        read(disk)


def test_a_hybrid_record_counts_only_without_gpt() -> None:
    disk = disk_with(GOOD, first_sector=record(entry(0xEE, 1, 39), entry(0x83, 40, 10)))
    assert read(disk).kind is TableKind.GPT
    disk[512] ^= 1
    disk[199 * 512] ^= 1
    assert [part.number for part in read(disk).partitions] == [1, 2]


def test_a_gpt_left_by_earlier_use_does_not_count() -> None:
    assert read(disk_with(GOOD, first_sector=record(entry(0x83, 1, 100)))).kind is TableKind.MBR
    assert read(disk_with(GOOD, first_sector=bytes(512))).kind is TableKind.NONE


@pytest.mark.parametrize("size", [256, 1024])
def test_larger_entries(size: int) -> None:
    table = read(disk_with(gpt_entry(40, 49, "a", size) + gpt_entry(50, 59, "b" * 36, size), size=size))
    assert [part.label for part in table.partitions] == ["a", "b" * 36]


def test_names_are_utf16() -> None:
    table = read(disk_with(gpt_entry(40, 49, "größer 💾\0rest") + gpt_entry(50, 59)[:56] + b"\x00\xd8" + bytes(70)))
    assert [part.label for part in table.partitions] == ["größer 💾", "\ufffd"]
    assert find(table, "größer 💾").number == 1


@pytest.mark.parametrize(
    "bad",
    [
        header(1, 199, 2, bytes(384), size=384),
        header(1, 199, 2, bytes(64), size=64),
        header(1, 199, 2, GOOD, length=90),
        header(1, 199, 2, GOOD, length=600)[:512],
        header(2, 199, 2, GOOD),
        header(1, 199, 199, GOOD),
        header(1, 199, 1 << 63, GOOD),
        header(1, 199, 2, bytes(2 << 20)),
    ],
)
def test_headers_that_do_not_count(bad: bytes) -> None:
    disk = disk_with(GOOD)
    disk[512:1024] = bad
    table = read(disk)
    assert table.remarks
    assert table.partitions[0].label == "a"


def test_find() -> None:
    table = read(disk_with(GOOD + gpt_entry(70, 71, "twin") + gpt_entry(72, 73, "twin") + gpt_entry(74, 75, "1")))
    assert [part.number for part in table.partitions] == [1, 3, 4, 9, 10, 11]
    assert find(table, "a") is find(table, 1) is find(table, "1") is table.partitions[0]
    assert find(table, str(UUID(int=70)).upper()).number == 9
    with pytest.raises(OpenError, match="by number: 9, 10"):
        find(table, "twin")
    with pytest.raises(OpenError, match="it has: 1, 3, 4"):
        find(table, "")
    for outside in (3, 4):
        with pytest.raises(FormatError, match="truncated"):
            find(table, outside)


def test_mutations_are_read_or_refused() -> None:
    chosen = random.Random(5)
    good = disk_with(GOOD)
    found = 0
    for _ in range(400):
        mutant = bytearray(good)
        for _ in range(chosen.randint(1, 6)):
            place = chosen.choice((446, 512, 1024, 167 * 512, 199 * 512)) + chosen.randrange(128)
            mutant[place] = chosen.choice((chosen.randrange(256), 0, 0xFF))
        if chosen.random() < 0.5:  # let some of it pass the checksums
            entries = bytes(mutant[1024 : 1024 + len(GOOD)])
            mutant[512 + 88 : 512 + 92] = struct.pack("<I", zlib.crc32(entries))
            mutant[512 + 16 : 512 + 20] = bytes(4)
            mutant[512 + 16 : 512 + 20] = struct.pack("<I", zlib.crc32(mutant[512 : 512 + 92]))
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
    assert found > 100
