"""nbdimg ls, cat, cp and tar, judged by the kernel's mounts, e2fsck, GNU tar, mtools and fsck.vfat."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cli.img import NBDIMG, nbdimg
from tests.fusemount.ext_images import assert_clean, mkfs, mounted, needs_kernel
from tests.reference import needs, run

MIB = 1 << 20


def fill(top: Path) -> None:
    """A tree with one of everything."""
    (top / "etc").mkdir(mode=0o750)
    (top / "etc" / "hosts").write_text("127.0.0.1 localhost\n")
    os.chown(top / "etc" / "hosts", 1000, 1001)
    (top / "etc" / "absolute").symlink_to("/etc/hosts")
    (top / "etc" / "outside").symlink_to("../../../../etc/passwd")
    (top / "run.sh").write_bytes(b"#!/bin/sh\n" * 50000)
    (top / "run.sh").chmod(0o4755)
    os.link(top / "run.sh", top / "etc" / "second name")
    with (top / "sparse").open("wb") as file:
        file.seek(3 * MIB)
        file.write(b"end")
    os.mkfifo(top / "fifo")
    os.setxattr(top / "run.sh", "user.note", b"\xff\0binary")
    (top / os.fsdecode(b"n\xc3\xa4me \xff\n")).write_text("odd")
    for number in range(300):
        (top / "etc" / f"file {number}").write_text(str(number))
    os.utime(top / "etc" / "hosts", ns=(1_600_000_000_123_456_789, 1_500_000_000_987_654_321))
    os.utime(top / "etc" / "absolute", ns=(0, 10**18), follow_symlinks=False)
    os.utime(top / "etc", ns=(10**18, 11 * 10**17))


def facts(top: Path, *, owners: bool = True) -> dict[str, Any]:
    """What a tree holds, as the host sees it."""
    found: dict[str, Any] = {}
    for folder, folders, files in os.walk(top):
        for name in folders + files:
            path = Path(folder, name)
            status = path.lstat()
            content: Any = None
            if stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                content = path.read_bytes(), os.listxattr(path), status.st_blocks < status.st_size // 512
            about = (status.st_mode, status.st_mtime_ns, content)
            links = 0 if stat.S_ISDIR(status.st_mode) else status.st_nlink
            found[str(path.relative_to(top))] = (*about, links, *((status.st_uid, status.st_gid) if owners else ()))
    found.pop("lost+found", None)
    return found


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An ext4 that the kernel has filled."""
    image = mkfs(tmp_path / "image", "48M")
    with mounted(image) as top:
        fill(Path(os.fsdecode(top)))
    return image


def kernel_facts(image: Path) -> dict[str, Any]:
    with mounted(image, "ro,noatime") as top:
        return facts(Path(os.fsdecode(top)))


@needs("mkfs.ext4", "mount", "tar")
@needs_kernel
def test_out_of_an_image(tmp_path: Path, image: Path) -> None:
    expected, before = kernel_facts(image), image.read_bytes()
    out = tmp_path / "out"
    out.mkdir()
    nbdimg("cp", "-r", "-f", "raw", f"{image}:/", out)
    got = facts(out)
    assert got.keys() == expected.keys()
    for name in expected:
        if name != "fifo":
            assert got[name] == expected[name], name
    assert (out / "run.sh").stat().st_ino == (out / "etc" / "second name").stat().st_ino
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    archive = tmp_path / "archive.tar"
    nbdimg("tar", "-f", "raw", "-o", archive, image)
    run("tar", "--xattrs", "-xpf", archive, "-C", unpacked)
    got = facts(unpacked)
    for name in expected:
        if name != "sparse":  # pax archives of ours hold no holes
            assert got[name] == expected[name], name
    assert image.read_bytes() == before, "nothing was written to the image"


@needs("mkfs.ext4", "mount")
@needs_kernel
def test_single_files(tmp_path: Path, image: Path) -> None:
    assert nbdimg("cat", image, "/etc/hosts", "etc/absolute", "-f", "raw") == "127.0.0.1 localhost\n" * 2
    assert "No such file" in nbdimg("cat", "-f", "raw", image, "/etc/outside", status=1)
    assert "Is a directory" in nbdimg("cat", "-f", "raw", image, "/etc", status=1)
    nbdimg("cp", "-f", "raw", f"{image}:/etc/hosts", f"{image}:/run.sh", tmp_path)
    assert (tmp_path / "hosts").read_text() == "127.0.0.1 localhost\n"
    assert stat.S_IMODE((tmp_path / "run.sh").stat().st_mode) == 0o4755
    nbdimg("cp", "-f", "raw", f"{image}:/etc/absolute", tmp_path / "other name")
    assert (tmp_path / "other name").read_text() == "127.0.0.1 localhost\n"
    assert "copy it with -r" in nbdimg("cp", "-f", "raw", f"{image}:/etc", tmp_path, status=1)
    piped = subprocess.run([*NBDIMG, "tar", image, "/etc", "-f", "raw"], capture_output=True, check=True).stdout
    assert b"127.0.0.1 localhost" in piped


@needs("mkfs.ext4", "mount")
@needs_kernel
def test_ls(image: Path) -> None:
    found = {each["name"]: each for each in json.loads(nbdimg("ls", "--json", "-R", "-f", "raw", image))}
    expected = kernel_facts(image)
    assert found.keys() - {"lost+found"} == {
        name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for name in expected
    }
    assert found["etc/hosts"] == found["etc/hosts"] | {"type": "file", "mode": "0644", "uid": 1000, "gid": 1001}
    assert found["etc/outside"]["target"] == "../../../../etc/passwd"
    assert found["sparse"]["size"] == 3 * MIB + 3 and found["sparse"]["allocated"] < MIB
    long = nbdimg("ls", "-l", image, "/etc", "-f", "raw").splitlines()
    assert any(line.startswith("-rw-r--r--") and line.endswith("2017-07-14 02:40:00 hosts") for line in long)
    assert any(line.endswith("absolute -> /etc/hosts") for line in long)
    assert nbdimg("ls", image, "/etc/hosts", "-f", "raw") == "hosts\n"


@needs("mkfs.ext4", "mount")
@needs_kernel
def test_links_of_the_target_are_not_followed(tmp_path: Path, image: Path) -> None:
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    out.mkdir()
    (outside / "run.sh").write_text("mine")
    (out / "etc").symlink_to(outside)
    (out / "run.sh").symlink_to(outside / "run.sh")
    printed = subprocess.run([*NBDIMG, "cp", "-r", f"{image}:/", out, "-f", "raw"], capture_output=True, text=True)
    assert printed.returncode == 1
    assert "etc: " in printed.stderr and "run.sh: " in printed.stderr and "Traceback" not in printed.stderr
    assert (outside / "run.sh").read_text() == "mine"
    assert os.listdir(outside) == ["run.sh"]
    assert (out / "sparse").stat().st_size == 3 * MIB + 3, "all else was copied"


@needs("mkfs.ext4", "mount", "e2fsck")
@needs_kernel
def test_into_an_image(tmp_path: Path) -> None:
    source, image = tmp_path / "source", mkfs(tmp_path / "image", "48M")
    source.mkdir()
    fill(source)
    nbdimg("cp", "-r", "-f", "raw", source, f"{image}:/")
    assert_clean(image)
    expected, got = facts(tmp_path / "source"), kernel_facts(image)
    for name, about in expected.items():
        assert got[f"source/{name}"] == about, name
    (source / "run.sh").write_text("shorter")
    nbdimg("cp", "-f", "raw", "--owner", "7:8", source / "run.sh", f"{image}:/source/etc/hosts")
    nbdimg("cp", "-f", "raw", source / "run.sh", f"{image}:/source/etc")
    assert_clean(image)
    got = kernel_facts(image)
    assert got["source/etc/hosts"][2][0] == b"shorter" and got["source/etc/hosts"][-2:] == (7, 8)
    assert got["source/etc/run.sh"][2][0] == b"shorter"
    assert "is no directory" in nbdimg("cp", source / "run.sh", f"{image}:/absent/", "-f", "raw", status=1)


@needs("sfdisk", "mkfs.vfat", "mkfs.ext4", "mtype", "fsck.vfat", "qemu-img", "e2fsck")
def test_partitions_of_a_qcow2(tmp_path: Path) -> None:
    from tests.cli.test_img_partitions import GPT, make_disk

    disk = make_disk(tmp_path / "disk", GPT, 10240 * 512)
    image = tmp_path / "image.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, image)
    assert nbdimg("ls", image).split() == ["p1", "p2", "p3"]
    (tmp_path / "Ünï.txt").write_text("a long name\n" * 1000)
    for place in ("/p1/", "/p2"):
        nbdimg("cp", tmp_path / "Ünï.txt", f"{image}:{place}")
    assert nbdimg("cat", image, "/p2/hello", "/p2/Ünï.txt") == "hello\n" + "a long name\n" * 1000
    assert nbdimg("ls", image, "--partition", "ESP").split() == ["EFI", "Ünï.txt"]
    assert "several partitions" in nbdimg("cat", image, "/p1/a", "/p2/a", status=1)
    run("qemu-img", "convert", "-O", "raw", image, disk)
    content = disk.read_bytes()
    (tmp_path / "fat").write_bytes(content[MIB : MIB + 8192 * 512])
    (tmp_path / "ext").write_bytes(content[10240 * 512 : 43008 * 512])
    run("fsck.vfat", "-n", tmp_path / "fat")
    assert run("mtype", "-i", tmp_path / "fat", "::/Ünï.txt") == "a long name\n" * 1000
    assert_clean(tmp_path / "ext")


def test_no_file_system_says_so_in_a_line(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"garbage" * 1000)
    for arguments in (
        ("ls", garbage),
        ("cat", garbage, "/a"),
        ("cp", f"{garbage}:/a", tmp_path),
        ("cp", garbage, f"{garbage}:/"),
        ("tar", "-o", tmp_path / "t", garbage),
    ):
        printed = nbdimg(arguments[0], "-f", "raw", *arguments[1:], status=1)
        assert printed == f"nbdimg: {garbage}: disk: no known file system\n"
    assert "IMAGE:/PATH" in nbdimg("cp", garbage, tmp_path, status=1)
    assert not (tmp_path / "t").exists()


@needs("mkfs.ext4", "mount", "debugfs")
@needs_kernel
def test_what_is_damaged_is_left_out(tmp_path: Path, image: Path) -> None:
    """A file whose block map is garbage; nothing half of it stays, and all else is copied."""
    run("debugfs", "-w", "-R", "set_inode_field /run.sh block[0] 0x12345678", image)
    out = tmp_path / "out"
    out.mkdir()
    printed = subprocess.run([*NBDIMG, "cp", "-r", f"{image}:/", out, "-f", "raw"], capture_output=True, text=True)
    assert printed.returncode == 1
    lines = printed.stderr.splitlines()
    assert sorted(line.split(": ")[1] for line in lines) == ["etc/second name", "run.sh"]
    assert all(line.endswith("; left out") for line in lines)
    assert not (out / "run.sh").exists() and not (out / "etc" / "second name").exists()
    assert (out / "etc" / "hosts").read_text() == "127.0.0.1 localhost\n"
