"""A file is copied into a guest's disk by an ordinary user, and the guest, once booted, has it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from tests.fusemount.disks import MIB, give, make_disk, tool
from tests.fusemount.mounted import mounted, needs_fuse, open_folder, run
from tests.interop import guest
from tests.reference import needs, qemu_check

pytestmark = [needs_fuse, needs("qemu-img", "qemu-system-x86_64", "sfdisk")]

INIT = f"""\
#!/bin/sh
PATH=/bin
mount -t proc proc /proc
cat /root/tmp/note
sha256sum /root/tmp/data
stat -c 'owner %u:%g mode %a' /root/tmp/data
echo "$token" > /root/tmp/answer
mount -o remount,ro /
echo "{guest.GUEST_DONE}"
poweroff -f
"""


def test_a_file_copied_into_a_guest_is_there_when_it_boots(tmp_path: Path) -> None:
    """And what the guest answers is seen in the next mount."""
    if reason := guest.what_is_missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    kernel = guest.find_kernel()
    assert kernel is not None
    initrd, root, disk = tmp_path / "initrd", tmp_path / "root.raw", tmp_path / "disk.raw"
    guest.build_initrd(initrd, kernel)
    guest.build_root_disk(root, init=INIT)
    make_disk(disk, "label: dos\nstart=1MiB, type=83\n", {1: root}, 72 * MIB)
    with open_folder() as folder:
        image, mnt = folder / "guest.qcow2", folder / "mnt"
        tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, image)
        mnt.mkdir()
        data = folder / "data"
        data.write_bytes(os.urandom(3 * MIB + 17))
        (folder / "note").write_text("a note for the guest\n")
        give(image, mnt)

        with mounted(image, mnt, "--rw", "--partition=1", "--as-root-of-guest", nobody=True):
            copied = run(["cp", folder / "note", data, mnt / "root/tmp"], nobody=True)
            assert copied.returncode == 0, copied.stderr
        check(image, tmp_path / "before")

        drive = f"file={image},format=qcow2,if=virtio"
        console = guest.run_guest(kernel, initrd, ["-drive", drive], options="root=/dev/vda1 token=answered")
        assert "a note for the guest\n" in console
        assert f"{hashlib.sha256(data.read_bytes()).hexdigest()}  /root/tmp/data\n" in console
        assert "owner 0:0 mode 644\n" in console

        check(image, tmp_path / "after")
        with mounted(image, mnt, "--partition=1", nobody=True):
            assert run(["cat", mnt / "root/tmp/answer"], nobody=True).stdout == "answered\n"


def check(image: Path, work: Path) -> None:
    """The image is sound, and so is the file system on its first partition."""
    qemu_check(image)
    whole = work.with_suffix(".raw")
    tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, whole)
    guest.check_file_system(whole, 1 << 20)
