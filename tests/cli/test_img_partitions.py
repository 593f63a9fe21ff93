"""nbdimg partitions and identify beside sfdisk, blkid, file(1)'s subject matter and the commands that they print."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.cli.img import nbdimg
from tests.reference import needs, qemu_img_create, run

MIB = 1 << 20
GPT = """\
label: gpt
start=2048, size=8192, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, name="EFI part"
start=10240, size=32768, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4, name="root"
start=43008, size=2048, type=21686148-6449-6E6F-744E-656564454649
"""
MBR = """\
label: dos
start=2048, size=8192, type=c, bootable
start=10240, size=49152, type=5
start=12288, size=32768, type=83
start=47104, size=4096, type=82
"""


def make_disk(path: Path, table: str, root: int) -> Path:
    """A raw disk with a FAT on its first partition and an ext4, with one file, at the offset of its second."""
    with path.open("wb") as file:
        file.truncate(32 * MIB)
    run("sfdisk", "--quiet", path, stdin=table)
    fat, ext, tree = path.with_name("fat"), path.with_name("ext"), path.with_name("tree")
    with fat.open("wb") as file:
        file.truncate(4 * MIB)
    run("mkfs.vfat", "-n", "ESP", fat)
    run("mmd", "-i", fat, "::/EFI", "::/EFI/BOOT")
    tree.mkdir()
    (tree / "hello").write_text("hello\n")
    run("mcopy", "-i", fat, tree / "hello", "::/EFI/BOOT/BOOTX64.EFI")
    run("mkfs.ext4", "-q", "-L", "root fs", "-d", tree, ext, "16M")
    with path.open("r+b") as file:
        for offset, part in ((MIB, fat), (root, ext)):
            file.seek(offset)
            file.write(part.read_bytes())
    return path


@needs("sfdisk", "blkid", "mkfs.vfat", "mkfs.ext4", "mmd", "mcopy")
@pytest.mark.parametrize(("table", "root"), [(GPT, 10240 * 512), (MBR, 12288 * 512)], ids=["gpt", "mbr"])
def test_the_table_is_sfdisks(tmp_path: Path, table: str, root: int) -> None:
    disk = make_disk(tmp_path / "disk", table, root)
    found = json.loads(nbdimg("partitions", "--json", "-f", "raw", disk))
    theirs = json.loads(run("sfdisk", "--json", disk))["partitiontable"]
    assert found["partition-table"] == {"dos": "mbr", "gpt": "gpt"}[theirs["label"]]
    assert len(found["partitions"]) == len(theirs["partitions"])
    for ours, other in zip(found["partitions"], theirs["partitions"], strict=True):
        assert other["node"] == f"{disk}{ours['number']}"
        assert (ours["start"], ours["sectors"]) == (other["start"], other["size"])
        assert (ours["offset"], ours["size"]) == (other["start"] * 512, other["size"] * 512)
        assert ours["end"] == other["start"] + other["size"] - 1
        assert ours["label"] == other.get("name", "")
        assert ours["bootable"] == other.get("bootable", False)
        if theirs["label"] == "gpt":
            assert (ours["type"], ours["uuid"]) == (other["type"].lower(), other["uuid"].lower())
        else:
            assert int(ours["type"], 16) == int(other["type"], 16)
        probe = ["blkid", "-p", "-o", "export", "-O", str(ours["offset"]), "-S", str(ours["size"]), str(disk)]
        lines = subprocess.run(probe, capture_output=True, text=True).stdout.splitlines()
        said = dict(line.split("=", 1) for line in lines)
        expected = {"type": said.get("TYPE"), "label": said.get("LABEL", ""), "uuid": said.get("UUID", "")}
        expected["label"] = expected["label"].replace("\\ ", " ")
        assert ours["filesystem"] == (expected if said.get("TYPE") else None)
    shown = nbdimg("partitions", disk, "-f", "raw")
    assert f" {root} " in shown and '"root fs"' in shown


@needs("sfdisk", "mkfs.vfat", "mkfs.ext4", "mmd", "mcopy", "mount", "losetup")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount through a loop device")
def test_the_commands_work_as_they_are(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "a disk", GPT, 10240 * 512)
    part = json.loads(nbdimg("partitions", "--json", "-f", "raw", disk))["partitions"][1]
    place = tmp_path / "mnt"
    place.mkdir()
    mount = shlex.split(part["commands"]["mount"])
    assert mount[-2:] == [str(disk), "/mnt"]
    run(*mount[:-1], place)
    try:
        assert (place / "hello").read_text() == "hello\n"
    finally:
        run("umount", place)
    loop = run(*shlex.split(part["commands"]["losetup"])).strip()
    try:
        assert int(run("blockdev", "--getsize64", loop)) == part["size"]
        assert "root fs" in run("blkid", "-p", loop)
    finally:
        run("losetup", "-d", loop)
    from fusemount.cli import parser as fusemount_parser
    from nbdserve.cli.serve import parser as nbdserve_parser

    for name, parser in (("nbdserve", nbdserve_parser()), ("fusemount", fusemount_parser())):
        options = parser.parse_args(shlex.split(part["commands"][name])[1:])
        assert (options.partition, options.image) == ("2", str(disk))


@needs("sfdisk", "mkfs.vfat", "mkfs.ext4", "mmd", "mcopy", "qemu-img")
def test_identify_tells_it_all(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", GPT, 10240 * 512)
    run("qemu-img", "convert", "-O", "qcow2", "-f", "raw", disk, tmp_path / "base.qcow2")
    qemu_img_create(tmp_path / "top.qcow2", None, backing_file="base.qcow2", backing_fmt="qcow2")
    run("qemu-img", "snapshot", "-c", "s", tmp_path / "top.qcow2")
    shown = nbdimg("identify", tmp_path / "top.qcow2")
    for words in (
        "qcow2 version 3",
        "1 internal snapshots",
        "an overlay of base.qcow2",
        "GPT with 3 partitions",
        'EFI System "EFI part", vfat "ESP"',
        'Linux filesystem "root", ext4 "root fs"',
        "boot code: none",
        "EFI: p1:/EFI/BOOT/BOOTX64.EFI",
    ):
        assert words in shown, shown
    found = json.loads(nbdimg("identify", "--json", tmp_path / "top.qcow2"))
    assert [info["format"] for info in found["chain"]] == ["qcow2", "qcow2"]
    assert "nbdserve --partition 2" in found["disk"]["partitions"][1]["commands"]["nbdserve"]
    assert "mount" not in found["disk"]["partitions"][1]["commands"], "a qcow2 file shows no partition to a loop device"
    (tmp_path / "base.qcow2").unlink()
    assert "damaged:" in nbdimg("identify", tmp_path / "top.qcow2")


BOOT_CODE = {
    "/usr/lib/grub/i386-pc/boot.img": "GRUB",
    "/usr/lib/syslinux/mbr/mbr.bin": "syslinux",
    "/usr/lib/syslinux/mbr/gptmbr.bin": "syslinux (GPT)",
}


@needs("sfdisk")
@pytest.mark.parametrize("path", BOOT_CODE)
def test_boot_code(tmp_path: Path, path: str) -> None:
    if not Path(path).exists():
        pytest.skip(f"needs {path}")
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(8 * MIB)
    run("sfdisk", "--quiet", disk, stdin="label: dos\nstart=2048, type=83\n")
    with disk.open("r+b") as file:
        file.write(Path(path).read_bytes()[:440])
    assert f"boot code: {BOOT_CODE[path]}\n" in nbdimg("identify", disk)


def test_no_disks(tmp_path: Path) -> None:
    import gzip

    for name, content, said in (
        ("a.gz", gzip.compress(bytes(1000)), "gunzip"),
        ("a", b"\x7fELF" + bytes(1000), "ELF"),
        ("zeros", bytes(MIB), "no partition table; file system: -"),
        ("empty", b"", "0 B"),
    ):
        (tmp_path / name).write_bytes(content)
        assert said in nbdimg("identify", tmp_path / name)
