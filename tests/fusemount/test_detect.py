"""What lies on a device, judged by blkid on what the real tools have made; and garbage."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path
from random import Random
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusemount.filesystems.detect import Signature, detect
from nbdserve.block import HostFile, MemoryDevice
from nbdserve.formats.raw import RawImage
from tests.reference import needs, run

MIB = 1 << 20


def found_in(path: Path) -> Signature | None:
    with RawImage(HostFile.open(path, writable=False), read_only=True) as device:
        return detect(device)


def blkid(path: Path) -> Signature | None:
    """What blkid says of a file."""
    result = subprocess.run(["blkid", "-p", "-o", "export", path], capture_output=True, text=True, timeout=60)
    if result.returncode == 2:
        return None
    assert result.returncode == 0, result.stderr
    values = dict(line.split("=", 1) for line in result.stdout.splitlines())
    label = values.get("LABEL", "").replace("\\ ", " ")
    return Signature(values["TYPE"], label, values.get("UUID", ""))


def make(path: Path, size: int, *command: str) -> Path:
    path.write_bytes(b"")
    with path.open("r+b") as file:
        file.truncate(size)
    run(*(str(path) if part == "@" else part for part in command))
    return path


RECIPES = {
    "ext2": (4, "mkfs.ext2 -q -L label @"),
    "ext3": (16, "mkfs.ext3 -q -L label @"),
    "ext4": (16, "mkfs.ext4 -q -L label @"),
    "ext4 without a journal": (16, "mkfs.ext4 -q -O ^has_journal @"),
    "ext4 64bit": (16, "mkfs.ext4 -q -b 1024 -O 64bit,metadata_csum @"),
    "external journal": (16, "mke2fs -q -F -O journal_dev @"),
    "fat12": (2, "mkfs.vfat -F 12 -n LABEL @"),
    "fat16": (16, "mkfs.vfat -F 16 -n LABEL @"),
    "fat32": (64, "mkfs.vfat -F 32 -n LABEL @"),
    "fat without a label": (64, "mkfs.vfat -F 32 @"),
    "fat with large sectors": (64, "mkfs.vfat -S 4096 -n LABEL @"),
    "ntfs": (8, "mkntfs -q -F -f -L label @"),
    "ntfs small clusters": (8, "mkntfs -q -F -f -c 512 -L label @"),
    "exfat": (8, "mkfs.exfat -L label @"),
    "xfs": (320, "mkfs.xfs -q -L label @"),
    "btrfs": (128, "mkfs.btrfs -q -L label @"),
    "swap": (1, "mkswap -L label @"),
    "swap with large pages": (1, "mkswap -p 65536 -L label @"),
    "luks1": (8, "cryptsetup luksFormat -q --type luks1 --pbkdf-force-iterations 1000 --key-file /etc/passwd @"),
    "luks2": (
        32,
        "cryptsetup luksFormat -q --label label --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file /etc/passwd @",
    ),
    "udf": (8, "mkudffs -l label @"),
    "f2fs": (64, "mkfs.f2fs -q -l label @"),
    "reiserfs": (64, "mkreiserfs -q -f -f -l label @"),
    "jfs": (32, "mkfs.jfs -q -L label @"),
    "nilfs2": (256, "mkfs.nilfs2 -q -L label @"),
}

WITHOUT_UUID = {"udf"}  # blkid computes one


@needs("blkid")
@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(RECIPES[name][1].split()[0])) for name in RECIPES])
def test_as_blkid(tmp_path: Path, name: str) -> None:
    size, recipe = RECIPES[name]
    image = make(tmp_path / "image", size * MIB, *recipe.split())
    expected, found = blkid(image), found_in(image)
    assert expected is not None
    assert found is not None
    if name in WITHOUT_UUID:
        expected = Signature(expected.kind, expected.label)
    assert found == expected


@needs("blkid", "mksquashfs", "genisoimage")
@pytest.mark.parametrize(
    "recipe", ["mksquashfs SOURCE @ -quiet -no-progress", "genisoimage -quiet -R -J -V Label -o @ SOURCE"]
)
def test_read_only_kinds_as_blkid(tmp_path: Path, recipe: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_text("text")
    image = tmp_path / "image"
    run(*recipe.replace("@", str(image)).replace("SOURCE", str(source)).split())
    found = found_in(image)
    assert found == blkid(image)
    assert found is not None
    assert found.kind in ("squashfs", "iso9660")


def test_a_dvd_is_read_by_its_easier_side(tmp_path: Path) -> None:
    content = bytearray(64 * 2048)
    for number, name in ((16, b"\x01CD001\x01"), (17, b"\xffCD001\x01"), (18, b"\0BEA01\x01"), (19, b"\0NSR02\x01")):
        content[number * 2048 : number * 2048 + len(name)] = name
    assert detect(MemoryDevice(content)) == Signature("iso9660")
    content[16 * 2048 : 18 * 2048] = content[18 * 2048 : 20 * 2048]
    assert detect(MemoryDevice(content)) == Signature("udf")


@needs("blkid", "pvcreate", "losetup")
def test_a_physical_volume_as_blkid(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root has loop devices")
    image = make(tmp_path / "image", 8 * MIB, "true")
    loop = run("losetup", "-f", "--show", str(image)).strip()
    try:
        run("pvcreate", "-q", "--devices", loop, loop)
    finally:
        run("losetup", "-d", loop)
    found = found_in(image)
    assert found == blkid(image)
    assert found is not None
    assert found.kind == "LVM2_member"


# What no tool that is at hand makes, written by hand and judged by blkid

ID = UUID("12345678-9abc-def0-1234-56789abcdef0").bytes


def write_raid(content: bytearray, at: int) -> None:
    """md(4), version 1 superblock, with the checksum that blkid looks at (mdadm's super1.c is the reference)."""
    block = bytearray(256)
    struct.pack_into("<IIII", block, 0, 0xA92B4EFC, 1, 0, 0)
    block[16:32] = ID
    block[32:44] = b"host:stripes"
    struct.pack_into("<Q", block, 144, at // 512)
    total = sum(struct.unpack("<64I", block))
    struct.pack_into("<I", block, 216, ((total & 0xFFFFFFFF) + (total >> 32)) & 0xFFFFFFFF)
    content[at : at + 256] = block


@needs("blkid")
@pytest.mark.parametrize("at", [0, 4096, 8 * MIB - 8192])
def test_a_raid_member_as_blkid(tmp_path: Path, at: int) -> None:
    content = bytearray(8 * MIB)
    write_raid(content, at)
    image = tmp_path / "image"
    image.write_bytes(content)
    assert found_in(image) == blkid(image) == Signature("linux_raid_member", "host:stripes", str(UUID(bytes=ID)))


@needs("blkid")
def test_an_old_raid_member_as_blkid(tmp_path: Path) -> None:
    content = bytearray(8 * MIB)
    at = 8 * MIB - 65536
    struct.pack_into("<6I", content, at, 0xA92B4EFC, 0, 90, 0, 0, 0x11111111)
    struct.pack_into("<3I", content, at + 52, 0x22222222, 0x33333333, 0x44444444)
    image = tmp_path / "image"
    image.write_bytes(content)
    judged, found = blkid(image), found_in(image)
    assert judged is not None
    assert found is not None
    assert (found.kind, found.uuid) == (judged.kind, judged.uuid)


@needs("blkid")
@pytest.mark.parametrize(
    ("offset", "raw", "kind"),
    [
        (3, b"-FVE-FS-", "BitLocker"),
        (32, b"NXSB" + bytes(36) + ID, "apfs"),
    ],
)
def test_signatures_alone(tmp_path: Path, offset: int, raw: bytes, kind: str) -> None:
    content = bytearray(MIB)
    content[offset : offset + len(raw)] = raw
    found = detect(MemoryDevice(content))
    assert found is not None
    assert found.kind == kind


# Garbage


@pytest.mark.parametrize("size", [0, 1, 511, 512, 4096, 70000, MIB])
def test_nothing_is_seen_in_zeros_and_in_noise(size: int) -> None:
    assert detect(MemoryDevice(bytearray(size))) is None
    assert detect(MemoryDevice(bytearray(Random(7).randbytes(size)))) is None


MAGICS = [
    (1080, b"\x53\xef"),
    (3, b"NTFS    "),
    (3, b"EXFAT   "),
    (510, b"\x55\xaa"),
    (32769, b"CD001"),
    (32769, b"BEA01"),
    (34817, b"NSR02"),
    (0, b"LUKS\xba\xbe"),
    (512, b"LABELONE"),
    (4096, struct.pack("<II", 0xA92B4EFC, 1)),
    (0, b"XFSB"),
    (1024, b"\x10\x20\xf5\xf2"),
    (65600, b"_BHRfS_M"),
    (4086, b"SWAPSPACE2"),
]


@given(st.randoms(use_true_random=False), st.sampled_from(MAGICS), st.sampled_from([0x600, 0x9000, 0x12000, MIB]))
def test_damage_behind_a_magic_number_is_no_error(random: Random, magic: tuple[int, bytes], size: int) -> None:
    content = bytearray(random.randbytes(0x600) * (size // 0x600 + 1))[:size]
    at, raw = magic
    if at + len(raw) <= size:
        content[at : at + len(raw)] = raw
    found = detect(MemoryDevice(content))
    assert found is None or (found.kind and "\0" not in found.label)


@needs("mkfs.vfat", "mkfs.exfat", "mkntfs")
@pytest.mark.parametrize("name", ["fat12", "fat32", "ntfs", "exfat"])
def test_damaged_boot_sectors_are_no_error(tmp_path: Path, name: str) -> None:
    size, recipe = RECIPES[name]
    image = make(tmp_path / "image", size * MIB, *recipe.split()).read_bytes()
    random = Random(name)
    for _ in range(150):
        content = bytearray(image[: 2 * MIB])
        for _ in range(random.randrange(1, 5)):
            content[random.randrange(512)] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
        detect(MemoryDevice(content))
