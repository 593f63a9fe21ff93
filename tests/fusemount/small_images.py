"""One small image of each kind of file system, with something of everything, so that most damage hits what counts.

They are made by the usual tools; ext, NTFS and exFAT are filled through mounts, for which those tools want root.
"""

from __future__ import annotations

import os
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from fusemount.filesystems.fat import open_filesystem as open_fat
from nbdserve.block import MemoryDevice
from tests.fusemount import ext_images, ntfs_images
from tests.fusemount.fat_images import FAT12, FAT16, MIB, Shape
from tests.fusemount.model import pattern
from tests.reference import run


class Original(NamedTuple):
    """How an image is made; what detect() calls it, and whether it can be written."""

    kind: str
    make: Callable[[Path], Path]
    writable: bool = True


def make_ext(path: Path, *options: str) -> Path:
    """4 MiB, filled by the kernel."""
    image = ext_images.mkfs(path, "4M", "-b", "1024", "-N", "512", *options)
    with ext_images.mounted(image) as top:
        ext_images.fill_small(top)
    return image


def make_fat(path: Path, shape: Shape) -> Path:
    """Filled by the driver that is tested, and judged by fsck.vfat elsewhere."""
    device = MemoryDevice(bytearray(shape.make(path.parent).read_bytes()))
    fs = open_fat(device, writable=True)
    for i in range(3):
        sub = fs.make_directory(fs.root, b"directory %d" % i, 0o755, 0, 0)
        fs.make_directory(sub, b"below", 0o755, 0, 0)
        for j in range(12):
            file = fs.create(sub, b"a file with a long name %d" % j, stat.S_IFREG | 0o644, 0, 0)
            fs.write(file, 0, pattern(i, j * 3000))
    fs.close()
    path.write_bytes(device.content)
    return path


def make_ntfs(path: Path) -> Path:
    """With resident and compressed files, streams, links, and files in many pieces."""
    ntfs_images.make_ntfs(path, 3 << 20, "-c", "512")
    with ntfs_images.mounted(path, path.with_suffix(".mnt"), "-o", "compression") as root:
        (root / "compressed").mkdir()
        os.setxattr(root / "compressed", "system.ntfs_attrib_be", struct.pack(">I", 0x800))
        (root / "compressed/numbers").write_text("\n".join(map(str, range(2000))))
        (root / "many").mkdir()
        for number in range(30):
            (root / "many" / f"file number {number}").write_text(str(number))
        (root / "plain").write_bytes(os.urandom(9000))
        os.link(root / "plain", root / "many/hard link")
        os.symlink("many/hard link", root / "symlink")
        os.setxattr(root / "plain", "user.stream", b"s" * 2000)
        write_in_turns(root, 150, 1024)
    return path


def make_exfat(path: Path) -> Path:
    """With a directory of several clusters, and files in many pieces."""
    new_exfat(path, 4 << 20, "-c", "512")
    with exfat_mounted(path, path.with_suffix(".mnt")) as root:
        (root / "a/b/c").mkdir(parents=True)
        for number in range(60):
            (root / "a" / f"file number {number}").write_text(str(number))
        write_in_turns(root, 50, 512)
    return path


def new_exfat(path: Path, size: int, *options: str) -> Path:
    """An empty volume."""
    path.touch()
    os.truncate(path, size)
    run("mkfs.exfat", *options, path)
    return path


@contextmanager
def exfat_mounted(image: Path, mountpoint: Path, *options: str) -> Iterator[Path]:
    """The volume as exfat-fuse shows it, which root can only give a block device."""
    mountpoint.mkdir(exist_ok=True)
    device = run("losetup", "--find", "--show", image).strip()
    try:
        run("mount.exfat-fuse", *options, device, mountpoint)
        try:
            yield mountpoint
        finally:
            run("umount", mountpoint)
    finally:
        run("losetup", "--detach", device)


def write_in_turns(root: Path, count: int, step: int) -> None:
    """Two files that grow by turns, so that neither lies in one piece."""
    with (root / "one").open("wb", buffering=0) as one, (root / "two").open("wb", buffering=0) as two:
        for number in range(count):
            os.pwrite(one.fileno(), b"1" * 512, number * step)
            os.pwrite(two.fileno(), b"2" * 512, number * step)


def make_iso(path: Path, *command: str) -> Path:
    """Deep directories, a long symbolic link, a fifo."""
    source = path.with_suffix(".source")
    (source / "a/b/c/d/e/f/g/h/i").mkdir(parents=True)
    for number in range(40):
        (source / f"file number {number}").write_text(str(number))
    os.symlink("/".join(letter * 9 for letter in "abcdefghijklmnopqrstuvwxyz"), source / "link")
    os.mkfifo(source / "fifo")
    subprocess.run([*command, path, source], check=True, capture_output=True)
    return path


def make_squashfs(path: Path, *options: str) -> Path:
    """Fragments, a file of several blocks, an attribute, links."""
    source = path.with_suffix(".source")
    (source / "a/b/c").mkdir(parents=True)
    for number in range(60):
        (source / f"file number {number}").write_text(str(number) * 50)
    (source / "large").write_bytes(b"".join(b"%d" % number for number in range(4000)))
    os.setxattr(source / "large", "user.name", b"value" * 20)
    os.symlink("file number 3", source / "link")
    os.mkfifo(source / "fifo")
    run("mksquashfs", source, path, "-quiet", "-no-progress", "-processors", "1", "-b", "4K", *options)
    return path


EXT: dict[str, tuple[str, ...]] = {
    "ext2": ("-t", "ext2"),
    "ext4-extents": ("-O", "^metadata_csum,^64bit,^has_journal"),
    "ext4-inline": ("-O", "^metadata_csum,inline_data,ea_inode", "-J", "size=1"),
    "ext4": ("-J", "size=1"),
}

ORIGINALS: dict[str, Original] = {
    **{name: Original(name[:4], lambda path, mix=mix: make_ext(path, *mix)) for name, mix in EXT.items()},
    "fat12": Original("vfat", lambda path: make_fat(path, FAT12)),
    "fat16": Original("vfat", lambda path: make_fat(path, FAT16)),
    "fat32": Original("vfat", lambda path: make_fat(path, Shape(32, 512, 1, 3 * MIB))),
    "ntfs": Original("ntfs", make_ntfs),
    "exfat": Original("exfat", make_exfat, writable=False),
    "iso9660": Original("iso9660", lambda path: make_iso(path, "genisoimage", "-quiet", "-R", "-o"), writable=False),
    "iso9660-joliet": Original(
        "iso9660", lambda path: make_iso(path, "xorriso", "-as", "mkisofs", "-quiet", "-R", "-J", "-o"), writable=False
    ),
    "squashfs": Original("squashfs", make_squashfs, writable=False),
    "squashfs-plain": Original(
        "squashfs", lambda path: make_squashfs(path, "-noI", "-noD", "-noF", "-noX", "-noId"), writable=False
    ),
}
"""By name."""
