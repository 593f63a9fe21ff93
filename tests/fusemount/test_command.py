"""The command fusemount on images of every kind, as an ordinary user, judged by the tools that know the contents."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fusemount.disks import MIB, checksum, ext, give, make_disk, make_ext4, tool, tree, two
from tests.fusemount.mounted import (
    COMMAND,
    FAILS,
    NOBODY,
    REPOSITORY,
    environment,
    fusemount,
    is_mounted,
    mounted,
    needs_fuse,
    prefix,
    refusal,
    run,
    tear_down,
    wait_for_end,
)
from tests.reference import needs, qemu_check, qemu_img_create

pytestmark = needs_fuse


# Looking


@ext
def test_the_files_of_an_image(folder: Path, mnt: Path) -> None:
    source = tree(folder)
    image = make_ext4(folder / "disk.raw", source=source)
    before = checksum(image)
    with mounted(image, mnt, nobody=True):
        said = run(
            ["diff", "-r", "--no-dereference", "-x", "lost+found", source / "etc/deep", mnt / "etc/deep"], nobody=True
        )
        assert (said.returncode, said.stdout) == (0, "")
        assert run(["readlink", mnt / "etc/link"], nobody=True).stdout == "../etc/hostname\n"
        assert run(["cat", mnt / "etc/link"], nobody=True).stdout == "guest\n"
        assert "Read-only" in run(["touch", mnt / "etc/new"], nobody=True).stderr
    assert checksum(image) == before


@ext
def test_raw_links(folder: Path, mnt: Path) -> None:
    image = make_ext4(folder / "disk.raw", source=tree(folder))
    with mounted(image, mnt, "--raw-links", nobody=True):
        assert run(["readlink", mnt / "etc/link"], nobody=True).stdout == "/etc/hostname\n"


@two
@pytest.mark.parametrize(
    "script",
    [
        "label: gpt\nstart=1MiB, size=32MiB, name=one\nstart=40MiB, size=48MiB\nstart=100MiB, size=1MiB\n",
        "label: dos\nstart=1MiB, size=32MiB\nstart=39MiB, size=60MiB, type=5\nstart=40MiB, size=48MiB\n",
    ],
    ids=["gpt", "mbr with a logical partition"],
)
def test_every_partition_is_a_folder(folder: Path, mnt: Path, script: str) -> None:
    first = make_ext4(folder / "first", source=tree(folder))
    second = make_fat(folder / "second")
    image = make_disk(folder / "disk.raw", script, {1: first, 40: second})
    gpt = "gpt" in script
    fat = "p2" if gpt else "p5"
    with mounted(image, mnt, nobody=True):
        assert run(["ls", mnt], nobody=True).stdout.split() == (["p1", "p2", "p3"] if gpt else ["p1", "p5"])
        assert run(["cat", mnt / "p1/etc/link"], nobody=True).stdout == "guest\n"
        assert run(["cat", mnt / fat / "Long name.txt"], nobody=True).stdout == "fat\n"
        if gpt:
            assert run(["stat", "-c", "%s %a", mnt / "p3"], nobody=True).stdout == f"{MIB} 400\n"
    for selector in [fat, "FATLABEL"] if gpt else [fat[1:]]:
        with mounted(image, mnt, "--partition", selector, nobody=True):
            assert run(["cat", mnt / "Long name.txt"], nobody=True).stdout == "fat\n"


def make_fat(path: Path) -> Path:
    path.touch()
    os.truncate(path, 48 * MIB)
    tool("mkfs.vfat", "-F", "16", "-n", "FATLABEL", path)
    text = path.with_suffix(".txt")
    text.write_text("fat\n")
    tool("mcopy", "-i", path, text, "::Long name.txt")
    return path


@ext
@needs("qemu-img")
@pytest.mark.parametrize(("format", "options"), [("qcow2", {}), ("vpc", {"subformat": "dynamic"})])
def test_image_formats(folder: Path, mnt: Path, format: str, options: dict[str, str]) -> None:
    raw = make_ext4(folder / "disk.raw", source=tree(folder))
    image = folder / f"disk.{format}"
    more = [f"-o{name}={value}" for name, value in options.items()]
    tool("qemu-img", "convert", "-f", "raw", "-O", format, *more, raw, image)
    give(image)
    with mounted(image, mnt, "--rw", "--as-root-of-guest", nobody=True):
        assert (
            run(["sh", "-c", f"cat {mnt}/etc/link; echo more >> {mnt}/etc/hostname"], nobody=True).stdout == "guest\n"
        )
    tool("qemu-img", "convert", "-f", format, "-O", "raw", image, folder / "after.raw")
    tool("e2fsck", "-fn", folder / "after.raw")
    assert tool("debugfs", "-R", "cat /etc/hostname", folder / "after.raw") == "guest\nmore\n"


# Writing


@ext
def test_writing_as_the_guests_root(folder: Path, mnt: Path) -> None:
    image = make_ext4(folder / "disk.raw", source=tree(folder))
    with mounted(image, mnt, "--rw", "--as-root-of-guest", "--format=raw", nobody=True):
        script = f"""
            cd {mnt}
            mkdir root; echo text > root/new; cp -r etc/deep root/copy; mv etc/deep moved; rm -r empty
            dd if=/dev/zero of=root/big bs=1M count=4 conv=fsync status=none
            exec 3<> root/open; echo unlinked >&3; rm root/open; cat /proc/self/fd/3
        """
        result = run(["sh", "-ec", script], nobody=True)
        assert (result.returncode, result.stdout) == (0, "unlinked\n"), result.stderr
    tool("e2fsck", "-fn", image)
    stat = tool("debugfs", "-R", "stat /root/new", image)
    assert "User:     0   Group:     0" in stat
    with mounted(image, mnt, nobody=True):
        assert run(["cmp", folder / "tree/etc/deep/deeper/data", mnt / "root/copy/deeper/data"]).returncode in (0, 2)
        assert run(["cat", mnt / "root/new"], nobody=True).stdout == "text\n"
        assert run(["sh", "-c", f"md5sum < {mnt}/root/copy/deeper/data"], nobody=True).stdout == tool(
            "sh", "-c", f"md5sum < {folder}/tree/etc/deep/deeper/data"
        )


@ext
def test_an_ordinary_user_is_not_the_guests_root(folder: Path, mnt: Path) -> None:
    image = make_ext4(folder / "disk.raw", 32 * MIB, tree(folder), "-E", "root_owner=0:0")
    with mounted(image, mnt, "--rw", "--format=raw", nobody=True):
        assert "Permission denied" in run(["touch", mnt / "etc/new"], nobody=True).stderr
    with mounted(
        image, mnt, "--rw", "--format=raw", "--map-uid", f"0:{NOBODY}:1", "--map-gid", f"0:{NOBODY}:1", nobody=True
    ):
        assert run(["touch", mnt / "etc/new"], nobody=True).stderr == ""
    assert "User:     0   Group:     0" in tool("debugfs", "-R", "stat /etc/new", image)


@needs("mkfs.vfat", "mcopy", "fsck.vfat")
def test_a_file_of_several_spellings_is_gone_under_all_of_them(folder: Path, mnt: Path) -> None:
    image = make_fat(folder / "disk.raw")
    give(image)
    with mounted(image, mnt, "--rw", "--format=raw", nobody=True):
        script = f"cd {mnt}; cat 'LONG NAME.TXT' 'long name.txt'; rm 'Long name.txt'; fails cat 'LONG NAME.TXT'; ls"
        result = run(["sh", "-ec", FAILS + script], nobody=True)
        assert (result.returncode, result.stdout, result.stderr) == (0, "fat\nfat\n", "")
    tool("fsck.vfat", "-n", image)


@ext
@needs("qemu-img")
def test_an_overlay_leaves_the_image_alone(folder: Path, mnt: Path) -> None:
    image = make_ext4(folder / "disk.raw", source=tree(folder))
    before = checksum(image)
    image.chmod(0o444)
    overlay = folder / "changes.qcow2"
    for number in (1, 2):
        with mounted(image, mnt, "--overlay", overlay, "--as-root-of-guest", nobody=True):
            run(["sh", "-c", f"echo {number} >> {mnt}/etc/hostname"], nobody=True)
    assert checksum(image) == before
    qemu_check(overlay)
    tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", overlay, folder / "after.raw")
    tool("e2fsck", "-fn", folder / "after.raw")
    assert tool("debugfs", "-R", "cat /etc/hostname", folder / "after.raw") == "guest\n1\n2\n"
    other = make_ext4(folder / "other.raw")
    assert f"is an overlay of disk.raw, not of {other}" in refusal("--overlay", overlay, other, mnt, nobody=True)
    assert "an image of its own" in refusal("--overlay", blank(folder / "own.qcow2"), other, mnt, nobody=True)


def blank(path: Path) -> Path:
    qemu_img_create(path, "1M")
    give(path)
    return path


@ext
def test_a_discarded_overlay_leaves_nothing(folder: Path, mnt: Path) -> None:
    image = make_ext4(folder / "disk.raw", source=tree(folder))
    before, files = checksum(image), sorted(os.listdir(folder))
    with mounted(image, mnt, "--overlay", "discard", "--as-root-of-guest", nobody=True):
        run(["sh", "-c", f"echo new > {mnt}/etc/hostname"], nobody=True)
        assert run(["cat", mnt / "etc/hostname"], nobody=True).stdout == "new\n"
    assert checksum(image) == before
    assert sorted(os.listdir(folder)) == files


@ext
@needs("qemu-img")
def test_an_internal_snapshot(folder: Path, mnt: Path) -> None:
    raw = make_ext4(folder / "disk.raw", source=tree(folder))
    image = folder / "disk.qcow2"
    tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image)
    tool("qemu-img", "snapshot", "-c", "before", image)
    give(image)
    with mounted(image, mnt, "--rw", "--as-root-of-guest", nobody=True):
        run(["sh", "-c", f"echo changed > {mnt}/etc/hostname"], nobody=True)
    with mounted(image, mnt, "--snapshot", "before", nobody=True):
        assert run(["cat", mnt / "etc/hostname"], nobody=True).stdout == "guest\n"
    with mounted(image, mnt, nobody=True):
        assert run(["cat", mnt / "etc/hostname"], nobody=True).stdout == "changed\n"


# Partitions as files


@needs("mkfs.ext4", "e2fsck", "sfdisk", "dd", "mkfs.vfat", "fsck.vfat")
def test_tools_work_on_partitions_as_files(folder: Path, mnt: Path) -> None:
    image = make_disk(folder / "disk.raw", "label: gpt\nsize=24MiB\nsize=24MiB\nsize=24MiB\n", {})
    with mounted(image, mnt, "--raw", "--rw", "--format=raw", nobody=True):
        script = f"""
            cd {mnt}
            mkfs.ext4 -q p1; e2fsck -fn p1
            mkfs.vfat p2 > /dev/null; fsck.vfat -n p2 > /dev/null
            dd if=/dev/zero bs=1M count=24 status=none | tr '\\0' x | dd of=p3 bs=1M status=none iflag=fullblock
            test "$(stat -c %s p3)" = {24 * MIB}
            printf 12345 | dd of=p3 bs=1 status=none
            test "$(stat -c %s p3)" = {24 * MIB}
            printf abc | dd of=p3 bs=1 seek=10 conv=notrunc status=none
            truncate -s {24 * MIB} p3
            test "$(head -c 16 p3)" = 12345xxxxxabcxxx
            fails rm p3
            sfdisk -J disk > /dev/null
        """
        result = run(["sh", "-exc", FAILS + script], nobody=True)
        assert result.returncode == 0, result.stdout + result.stderr
    part = folder / "part"
    for number, check in ((1, ["e2fsck", "-fn"]), (2, ["fsck.vfat", "-n"])):
        tool("dd", f"if={image}", f"of={part}", "bs=1M", f"skip={1 + 24 * (number - 1)}", "count=24", "status=none")
        tool(*check, part)
    content = image.read_bytes()[49 * MIB : 73 * MIB]
    assert content == b"12345xxxxxabc" + b"x" * (24 * MIB - 13)
    with mounted(image, mnt, nobody=True):
        assert run(["ls", mnt / "p1"], nobody=True).stdout == "lost+found\n"


@needs("dd")
def test_writing_past_the_end_is_told(folder: Path, mnt: Path) -> None:
    image = folder / "disk.raw"
    image.write_bytes(bytes(MIB))
    give(image)
    assert fusemount("--raw", "--rw", "--format=raw", image, mnt, nobody=True).returncode == 0
    try:
        script = f"fails dd if=/dev/zero of={mnt}/disk bs=1M seek=1 count=1 conv=notrunc; stat -c %s {mnt}/disk"
        assert run(["sh", "-ec", FAILS + script], nobody=True).stdout == f"{MIB}\n"
        ended = fusemount("--unmount", mnt, nobody=True)
        # Whether the kernel takes dd, or nobody, to have been told of the failure depends on when it wrote.
        assert ended.returncode == 0 or "could be stored: No space left" in ended.stderr
        assert not is_mounted(mnt)
    finally:
        tear_down(mnt)
    assert image.stat().st_size == MIB


# Listing


@two
def test_list(folder: Path) -> None:
    first = make_ext4(folder / "first", 32 * MIB, None, "-L", "root fs")
    script = "label: gpt\nstart=1MiB, size=32MiB, name=one\nstart=40MiB, size=48MiB\nstart=100MiB, size=1MiB\n"
    image = make_disk(folder / "disk.raw", script, {1: first, 40: make_fat(folder / "second")})
    before = checksum(image)
    listed = fusemount("--list", image, nobody=True)
    assert listed.returncode == 0
    rows = [line.split() for line in listed.stdout.splitlines()]
    assert rows[1][:8] == ["p1", str(MIB), "32M", "ext4", "rw", "clean", "root", "fs"]
    assert rows[2][:7] == ["p2", str(40 * MIB), "48M", "vfat", "rw", "clean", "FATLABEL"]
    assert rows[3][:5] == ["p3", str(100 * MIB), "1M", "-", "-"]
    described = json.loads(fusemount("--list", "--json", image, nobody=True).stdout)
    judged = json.loads(tool("sfdisk", "-J", image))["partitiontable"]["partitions"]
    for volume, part in zip(described["volumes"], judged, strict=True):
        assert (volume["offset"], volume["size"]) == (part["start"] * 512, part["size"] * 512)
        assert volume["partition_uuid"] == part["uuid"].lower()
        assert volume["partition_type"] == part["type"].lower()
    assert described["volumes"][0]["label"] == "root fs"
    assert described["partition_table"] == "gpt"
    assert checksum(image) == before


# A guest as it sees itself


@two
def test_inspect(folder: Path, mnt: Path) -> None:
    source = tree(folder)
    (source / "boot").mkdir()
    (source / "srv").mkdir()
    (source / "srv/data").symlink_to("/boot")
    identifier = "01234567-89ab-cdef-0123-456789abcdef"
    (source / "etc/fstab").write_text(
        "# <device> <dir> <type>\nproc /proc proc defaults 0 0\n/dev/sda2 / ext4 defaults 0 1\n"
        f"UUID={identifier} /srv/mo\\\\040re ext4 defaults 0 2\nLABEL=FATLABEL /boot vfat defaults 0 2\n"
        "UUID=deadbeef-0000-0000-0000-000000000000 /lost ext4 defaults 0 2\n/dev/vda9 none swap sw 0 0\n".replace(
            "\\\\", "\\"
        )
    )
    (source / "srv/mo re").mkdir()
    root = make_ext4(folder / "root", source=source)
    home = make_ext4(
        folder / "home", 24 * MIB, tree(folder / "x" if (folder / "x").mkdir() is None else folder), "-U", identifier
    )
    script = "label: gpt\nstart=1MiB, size=48MiB\nstart=50MiB, size=32MiB\nstart=90MiB, size=24MiB\n"
    image = make_disk(folder / "disk.raw", script, {1: make_fat(folder / "fat"), 50: root, 90: home})
    said: list[str] = []
    with mounted(image, mnt, "-i", nobody=True, said=said):
        result = run(
            [
                "sh",
                "-c",
                f"cd {mnt}; cat 'boot/Long name.txt' etc/hostname 'srv/mo re/etc/hostname' 'srv/data/Long name.txt'",
            ],
            nobody=True,
        )
        assert result.stdout == "fat\nguest\nguest\nfat\n"
    assert len(said) == 1
    assert "/lost, is not on this disk" in said[0]
    with mounted(image, mnt, "-i", "--rw", "--as-root-of-guest", "--format=raw", nobody=True, said=said):
        result = run(
            ["sh", "-c", f"cd {mnt}; echo new > boot/new; echo new > etc/new; rmdir boot; mv etc/new boot/"],
            nobody=True,
        )
        assert "busy" in result.stderr
    with mounted(image, mnt, nobody=True):
        assert run(["sh", "-c", f"cat {mnt}/p1/new {mnt}/p2/etc/hostname"], nobody=True).stdout == "new\nguest\n"


@ext
def test_an_image_without_a_guest(folder: Path, mnt: Path) -> None:
    image = make_ext4(folder / "disk.raw")
    assert "no guest's root file system found (there is: disk ext4)" in refusal("-i", image, mnt, nobody=True)


# The end


@ext
@pytest.mark.parametrize("how", ["fusermount3", "SIGTERM"])
def test_other_ways_to_unmount_write_everything(folder: Path, mnt: Path, how: str) -> None:
    image = make_ext4(folder / "disk.raw", source=tree(folder))
    try:
        assert fusemount("--rw", "--as-root-of-guest", "--format=raw", image, mnt, nobody=True).returncode == 0
        process = int(
            run(["getfattr", "--only-values", "-n", "user.fusemount.process", mnt], nobody=True).stdout.split()[0]
        )
        run(["sh", "-c", f"head -c 3000000 /dev/zero | tr '\\0' y > {mnt}/etc/big"], nobody=True)
        if how == "SIGTERM":
            os.kill(process, signal.SIGTERM)
        else:
            assert run(["fusermount3", "-u", mnt], nobody=True).returncode == 0
        wait_for_end(process)
        assert not is_mounted(mnt)
    finally:
        tear_down(mnt)
    tool("e2fsck", "-fn", image)
    assert tool("debugfs", "-R", "cat /etc/big", image) == "y" * 3000000


@ext
def test_unmounting_tells_of_open_files(folder: Path, mnt: Path) -> None:
    image = make_ext4(folder / "disk.raw", source=tree(folder))
    with mounted(image, mnt, nobody=True):
        source = f"file = open('{mnt}/etc/hostname'); print('open', flush=True); input()"
        command = [*prefix(True), sys.executable, "-c", source]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "open\n"
            assert "busy" in refusal("--unmount", mnt, nobody=True)
            holder.communicate("\n", timeout=20)


@ext
def test_unmounting_tells_of_a_process_that_was_killed(folder: Path, mnt: Path) -> None:
    image = make_ext4(folder / "disk.raw", source=tree(folder))
    try:
        assert fusemount(image, mnt, nobody=True).returncode == 0
        process = int(
            run(["getfattr", "--only-values", "-n", "user.fusemount.process", mnt], nobody=True).stdout.split()[0]
        )
        os.kill(process, signal.SIGKILL)
        wait_for_end(process)
        assert "its process has died" in refusal("--unmount", mnt, nobody=True)
        assert "whose process has died" in refusal(image, mnt, nobody=True)
    finally:
        tear_down(mnt)


@ext
def test_in_the_foreground(folder: Path, mnt: Path) -> None:
    image = make_ext4(folder / "disk.raw", source=tree(folder))
    process = subprocess.Popen(
        [*prefix(True), *COMMAND, "--foreground", image, mnt], stderr=subprocess.PIPE, text=True, env=environment()
    )
    try:
        deadline = time.monotonic() + 30
        while not any(str(mnt) in line for line in Path("/proc/mounts").read_text().splitlines()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert run(["cat", mnt / "etc/hostname"], nobody=True).stdout == "guest\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[1] == ""
        assert process.returncode == 0
    finally:
        tear_down(mnt)
        process.kill()
        process.communicate()


@ext
@needs("unshare")
@pytest.mark.skipif(os.geteuid() != 0, reason="mount(8) is for root")
def test_fstab(folder: Path, mnt: Path) -> None:
    image = make_ext4(folder / "disk.raw", source=tree(folder))
    programs = folder / "bin"
    programs.mkdir()
    program = programs / "fusemount"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={REPOSITORY} exec {sys.executable} -m fusemount "$@"\n')
    program.chmod(0o755)
    table = folder / "fstab"
    table.write_text(f"{image} {mnt} fuse.fusemount ro,noauto,nofail,raw_links 0 0\n")
    # mount(8) looks for the program in a path of its own; so it is put there, in a name space that only we see.
    script = f"""
        mount --bind {programs} /usr/local/bin
        try() {{
            "$@"
            test "$(cat {mnt}/etc/hostname)" = guest
            grep " {mnt} " /proc/mounts
            readlink {mnt}/etc/link
            fusemount --unmount {mnt}
        }}
        try mount -T {table} {mnt}
        try mount -t fuse.fusemount -o rw,format=raw {image} {mnt}
        try mount -t fuse -o ro,allow_other fusemount#{image} {mnt}
    """
    result = run(["unshare", "-m", "sh", "-ec", script])
    assert (result.returncode, result.stderr) == (0, "")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[0] for line in lines[1::2]] == ["/etc/hostname", "../etc/hostname", "../etc/hostname"]
    for fields, wanted in zip(lines[::2], ("ro", "rw", "ro"), strict=True):
        options = set(fields[3].split(","))
        assert fields[2] == "fuse.fusemount"
        assert {"nosuid", "nodev", wanted} <= options
    assert "allow_other" in lines[4][3]
    assert "allow_other" not in lines[2][3]
    tool("e2fsck", "-fn", image)


@ext
def test_an_image_that_somebody_writes_to(folder: Path, mnt: Path) -> None:
    """Refused, with the way to look at it all the same."""
    image = make_ext4(folder / "disk.raw", source=tree(folder))
    other = folder / "other"
    other.mkdir()
    give(other)
    with mounted(image, mnt, "--rw", "--format=raw", nobody=True):
        said = refusal(image, other, nobody=True)
        assert "is writing to it; stop that first" in said and said.endswith("--read-only --force-share")
        assert "is writing to it" in refusal("--list", image, nobody=True)
        look = ("--read-only", "--force-share")
        assert "ext4" in fusemount("--list", *look, image, nobody=True).stdout
        with mounted(image, other, *look, nobody=True):
            assert run(["cat", other / "etc/hostname"], nobody=True).stdout == "guest\n"
