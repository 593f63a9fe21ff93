"""The kernel's own vfat driver, in a guest, reads what we wrote, and we read what it wrote."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest

from fusemount.filesystems.base import Changes, FileSystem
from tests.fusemount.fat_images import FAT12, FAT16, MIB, Shape, check_clean
from tests.fusemount.model import pattern
from tests.fusemount.test_fat import NAMES, mount, tree
from tests.interop import guest
from tests.reference import needs

pytestmark = needs("mkfs.fat", "fsck.vfat", "qemu-system-x86_64")

SHAPES = (FAT12, FAT16, Shape(32, 512, 1, 40 * MIB))
MODULES = ("virtio_pci", "virtio_blk", "nls_cp437", "nls_ascii", "nls_utf8", "fat", "vfat")
LONG_AGO = 981_173_106  # 2001-02-03 04:05:06

# On each disk: a list of all that is there; then changes; then a list of all that is there now.
INIT = f"""\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
for module in /modules/*.ko; do insmod $module; done
list() {{
    find . -type f ! -name '*.list' -exec md5sum {{}} +
    find . -mindepth 1 -type d
    find . -mindepth 1 -exec stat -c '%Y  %n' {{}} +
}}
for disk in vda vdb vdc; do
    mount -t vfat -o utf8=1,tz=UTC /dev/$disk /root || continue
    cd /root
    list > /before.list
    mkdir "made by the kernel"
    cd "made by the kernel"
    cp /bin/busybox "a copy of busybox"
    cp /init lower.ext
    cp /init MiXeD.Ext
    cp /init "\U0001f600 \u540d\u524d.txt"
    dd if=/bin/busybox of="a copy of busybox" bs=1000 seek=7 count=50 conv=notrunc
    truncate -s 12345 lower.ext
    for i in $(seq 99); do echo $i > "one of many files, number $i"; done
    rm *'r '?[147]
    mv "one of many files, number 2" ..
    cd ..
    mv "sub directory/many" "moved by the kernel"
    rm -r "sub directory"
    touch -d "2001-02-03 04:05:06" MiXeD.Ext README.TXT
    list > /after.list
    cp /*.list .
    cd /
    umount /root
done
dmesg | grep FAT
echo "{guest.GUEST_DONE}"
poweroff -f
"""


def fill(fs: FileSystem) -> None:
    sub = fs.make_directory(fs.root, b"sub directory", 0o755, 0, 0)
    many = fs.make_directory(sub, b"many", 0o755, 0, 0)
    for i, name in enumerate((*NAMES, "\U0001f600.txt", "mixedCase.TXT")):
        for place in (fs.root, sub, many):
            inode = fs.create(place, name.encode(), stat.S_IFREG | 0o644, 0, 0)
            fs.write(inode, 0, pattern(i, i * 2500))
            fs.change(inode, Changes(mtime_ns=(1_500_000_000 + 2 * i) * 10**9))
    for i in range(0, 150, 2):
        fs.create(many, b"a rather long name, number %d" % i, stat.S_IFREG | 0o644, 0, 0)
    for i in range(0, 150, 3):
        if i % 2 == 0:
            fs.rename(many, b"a rather long name, number %d" % i, sub, b"moved %d" % i)


def listing(fs: FileSystem) -> set[str]:
    """What the guest's list() says."""
    lines = set()
    for path, content in tree(fs, fs.root):
        if path.endswith(".list"):
            continue
        inode = fs.root
        for name in path[1:].split("/"):
            inode = fs.lookup(inode, name.encode())
        lines.add(f".{path}" if content is None else f"{hashlib.md5(content).hexdigest()}  .{path}")
        lines.add(f"{fs.attributes(inode).mtime_ns // 10**9}  .{path}")
    return lines


def test_the_kernel_agrees(tmp_path: Path) -> None:
    if reason := guest.what_is_missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    kernel = guest.find_kernel()
    assert kernel is not None
    guest.build_initrd(tmp_path / "initrd", kernel, init=INIT, modules=MODULES)
    images, expected = [shape.make(tmp_path) for shape in SHAPES], []
    for image in images:
        fs = mount(image, writable=True)
        fill(fs)
        expected.append(listing(fs))
        fs.close()
    disks = [part for image in images for part in ("-drive", f"file={image},format=raw,if=virtio")]
    # It does more than boot.
    console = guest.run_guest(kernel, tmp_path / "initrd", disks, seconds=240)
    assert "FAT-fs" not in console

    for image, before in zip(images, expected, strict=True):
        check_clean(image)
        fs = mount(image)
        told = {name: set(read(fs, name).decode().splitlines()) for name in (b"before.list", b"after.list")}
        assert told[b"before.list"] - {line for line in told[b"before.list"] if line.endswith(".list")} == before
        assert {line for line in told[b"after.list"] if not line.endswith(".list")} == listing(fs)
        assert f"{LONG_AGO}  ./README.TXT" in told[b"after.list"]
        # What the kernel left, we go on with.
        fs = mount(image, writable=True)
        made = fs.lookup(fs.root, b"made by the kernel")
        for entry in list(fs.entries(made)):
            fs.rename(made, entry.name, fs.root, b"back " + entry.name)
        fs.remove_directory(fs.root, b"made by the kernel")
        fs.close()
        check_clean(image)


def read(fs: FileSystem, name: bytes) -> bytes:
    inode = fs.lookup(fs.root, name)
    return bytes(fs.read(inode, 0, fs.attributes(inode).size))
