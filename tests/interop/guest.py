"""A Linux guest small enough to boot in a test: Debian's kernel, busybox, and a root disk that lies behind NBD.

The kernel starts /init in an initrd made here. That loads the disk's drivers, mounts the device that `root=` names and
changes over to /sbin/init *on the disk*, which does some work there, says `GUEST_DONE` on the console and powers off.
After the change everything the guest runs, reads and writes passes through the NBD server.

Neither root's rights, nor a mount, nor KVM is used: mke2fs fills the file system from a directory, debugfs reads it.
"""

from __future__ import annotations

import lzma
import os
import platform
import re
import shutil
import struct
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("qemu-system-x86_64", "busybox", "mke2fs", "e2fsck", "debugfs")
"""What this module calls. Debian keeps the last three in /usr/sbin, off an ordinary user's PATH: see `find_program`."""

GUEST_DONE = "guest: all is written, powering off"

BOOT_SECONDS = 240.0
"""A boot takes ten seconds or so on an idle machine; a guest that has not powered off by now is stuck."""

KERNEL_OPTIONS = "console=ttyS0 loglevel=4 panic=-1 cryptomgr.notests"
"""panic=-1 with QEMU's -no-reboot: a guest that panics ends at once. What it tests of itself costs a second."""

APPLETS = ("sh", "mount", "cp", "sync", "cmp", "rm", "fstrim", "poweroff", "cat", "sha256sum", "stat")
"""What the guest has of busybox once it runs from its disk."""

DISK_MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")
_DECOMPRESSORS = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}

# Runs in the initrd. /proc/cmdline is read because the kernel keeps root= to itself. The disk is there as soon as the
# driver is loaded, but its partitions are read behind insmod's back.
BOOT_DISK = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
for module in /modules/*.ko; do insmod $module; done
for word in $(cat /proc/cmdline); do
    case $word in root=*) root=${word#root=} ;; esac
done
for attempt in 1 2 3 4 5 6 7 8 9 10; do
    [ -b $root ] && break
    sleep 1
done
mount -t ext4 $root /root && umount /proc && mount --move /dev /root/dev && exec switch_root /root /sbin/init
echo "guest: cannot start from $root"
poweroff -f
"""

# Runs from the disk. `token` is on the kernel's command line: what the kernel does not know it puts into init's
# environment. The copy is compared after the page cache is dropped, so that it is read back from the server. Mounting
# read-only empties the journal: afterwards the files can be read from the image without a replay.
_DISK_INIT = f"""\
#!/bin/sh
PATH=/bin
set -e
mount -t proc proc /proc
cp /bin/busybox /copy
sync
echo 3 > /proc/sys/vm/drop_caches
cmp /bin/busybox /copy
rm -f /litter
sync
fstrim /
echo "$token" > /token
mount -o remount,ro /
echo "{GUEST_DONE}"
poweroff -f
"""


@dataclass(frozen=True, slots=True)
class Kernel:
    """An installed kernel: its image and the modules that belong to it."""

    image: Path
    modules: Path


def find_program(name: str) -> str | None:
    """The path of a program, looked for in the administrator's directories too."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]))


def find_kernel() -> Kernel | None:
    """The newest kernel in /boot that this user may read and whose modules are installed."""
    kernels = [
        Kernel(image, modules)
        for image in Path("/boot").glob("vmlinuz-*")
        if os.access(image, os.R_OK)
        and (modules := Path("/lib/modules") / image.name.removeprefix("vmlinuz-")).is_dir()
    ]
    return max(kernels, key=lambda kernel: _version(kernel.modules.name), default=None)


def what_is_missing() -> str | None:
    """Why no guest can run here, in words for pytest.skip; None if one can."""
    if platform.machine() != "x86_64":
        return "the guest is an x86-64 one, with this machine's own kernel"
    for program in PROGRAMS:
        if find_program(program) is None:
            return f"{program} is not installed"
    if not _is_static(busybox()):
        return "busybox is linked dynamically: the guest has no libraries (Debian: install busybox-static)"
    if find_kernel() is None:
        return "no kernel in /boot is readable and has its modules in /lib/modules"
    return None


def build_initrd(path: Path, kernel: Kernel, *, init: str = BOOT_DISK, modules: Sequence[str] = DISK_MODULES) -> None:
    """Write an initrd for `kernel`: busybox, its /init, and modules in loading order, with all that they need."""
    files: list[tuple[str, bytes | None]] = [(name, None) for name in ("bin", "dev", "modules", "proc", "root")]
    files += [("init", init.encode()), ("bin/busybox", busybox().read_bytes())]
    for number, module in enumerate(_in_loading_order(kernel, modules)):
        name = module.name.partition(".")[0]
        files.append((f"modules/{number:02}-{name}.ko", _read_module(module)))
    path.write_bytes(b"".join(_cpio_entries(files)))


def build_root_disk(path: Path, *, size_mib: int = 64, init: str = _DISK_INIT) -> None:
    """Write a raw image of a bare ext4 file system whose /sbin/init is described at the top of this file, or another.

    Args:
        init: a script for the shell; it has `APPLETS` in /bin, and has to end as the usual one does.
    """
    tree = path.with_suffix(".tree")
    for directory in ("bin", "dev", "proc", "sbin", "root/tmp"):
        (tree / directory).mkdir(parents=True)
    shutil.copy(busybox(), tree / "bin/busybox")
    for applet in APPLETS:
        (tree / "bin" / applet).symlink_to("busybox")
    (tree / "litter").write_bytes(b"to be discarded\n" * (4 << 16))
    program = tree / "sbin/init"
    program.write_text(init)
    program.chmod(0o755)
    _run("mke2fs", "-q", "-t", "ext4", "-E", "root_owner=0:0", "-d", str(tree), str(path), f"{size_mib}M")
    shutil.rmtree(tree)


def run_guest(
    kernel: Kernel,
    initrd: Path,
    devices: Sequence[str],
    *,
    options: str = "",
    seconds: float = BOOT_SECONDS,
    memory: int = 256,
) -> str:
    """Boot with an /init that ends by itself, and return what the guest wrote on its console.

    Args:
        devices: QEMU's arguments for the disk and what else there is (-drive, -device, -object, -virtfs ...).
        options: more words for the kernel's command line, such as BOOT_DISK's root=.
        memory: MiB.

    Error handling:
        AssertionError with the end of the console if the guest did not reach `GUEST_DONE` in `seconds`.
    """
    unpacked = initrd.with_name("vmlinux")
    image = unpacked if _unpack(kernel, unpacked) else kernel.image
    command = ["qemu-system-x86_64", "-accel", "tcg", "-m", str(memory), "-nodefaults", "-no-reboot"]
    command += ["-display", "none", "-serial", "stdio", *devices]
    command += ["-kernel", str(image), "-initrd", str(initrd), "-append", f"{KERNEL_OPTIONS} {options}"]
    try:
        process = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        console, ending = expired.stdout or b"", f"was still running after {seconds:.0f} s"
    else:
        console, ending = process.stdout, f"ended with status {process.returncode}"
    text = console.decode(errors="replace").replace("\r\n", "\n")
    assert GUEST_DONE in text and ending == "ended with status 0", f"QEMU {ending}; its console:\n{text[-3000:]}"
    return text


def _unpack(kernel: Kernel, path: Path) -> bool:
    """Write the ELF file that is in a kernel's image; whether that could be done.

    QEMU starts it as it is (PVH). The image would decompress itself first, which takes longer under emulation than all
    the rest of a boot. Its header is told by Documentation/arch/x86/boot.rst.
    """
    image = kernel.image.read_bytes()
    start = (image[0x1F1] + 1) * 512  # behind the real-mode part: setup_sects and the boot sector
    offset, length = struct.unpack_from("<II", image, 0x248)  # payload_offset, payload_length
    payload = image[start + offset : start + offset + length]
    if not payload.startswith(b"\xfd7zXZ"):
        return False
    path.write_bytes(lzma.LZMADecompressor().decompress(payload))  # the size that stands behind it is left
    return True


def read_file(disk: Path, offset: int, name: str) -> bytes:
    """A file's contents, out of an ext4 file system that starts at an offset of a raw image."""
    return _run("debugfs", "-R", f"cat {name}", f"{disk}?offset={offset}")


def check_file_system(disk: Path, offset: int) -> None:
    """Let e2fsck judge an ext4 file system that starts at an offset of a raw image, without changing it."""
    _run("e2fsck", "-f", "-n", f"{disk}?offset={offset}")


def _run(program: str, *arguments: str) -> bytes:
    command = [find_program(program) or program, *arguments]
    process = subprocess.run(command, capture_output=True, check=False, timeout=60)
    assert process.returncode == 0, f"{program} {' '.join(arguments)}: {process.stdout!r} {process.stderr!r}"
    return process.stdout


def busybox() -> Path:
    """The program of that name on this machine."""
    path = find_program("busybox")
    assert path, "busybox is not installed"
    return Path(path)


def _is_static(program: Path) -> bool:
    # A dynamic program names the loader by its whole path in PT_INTERP; a static glibc has only the bare name in it.
    return b"/ld-linux" not in program.read_bytes() and b"/ld-musl" not in program.read_bytes()


def _version(release: str) -> list[tuple[int, str]]:
    """A sort key that puts 6.1.0-10 after 6.1.0-9."""
    return [(int(number or 0), text) for number, text in re.findall(r"(\d+)|(\D+)", release)]


def _in_loading_order(kernel: Kernel, modules: Sequence[str]) -> list[Path]:
    """The files of modules and all they depend on, each after those it needs; built-in ones have no file."""
    dependencies: dict[str, list[str]] = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        module, _, needed = line.partition(":")
        dependencies[module] = needed.split()
    by_name = {Path(module).name.partition(".")[0].replace("-", "_"): module for module in dependencies}

    order: dict[str, None] = {}
    for name in modules:
        if wanted := by_name.get(name):
            # modules.dep(5) lists what a module needs with the first to load last.
            order.update(dict.fromkeys([*reversed(dependencies[wanted]), wanted]))
    return [kernel.modules / file for file in order]


def _read_module(path: Path) -> bytes:
    """The module as busybox's insmod wants it, without the compression a distribution may have chosen."""
    if path.suffix in _DECOMPRESSORS:
        return _run(_DECOMPRESSORS[path.suffix], "-dc", str(path))
    return path.read_bytes()


def _cpio_entries(files: Iterable[tuple[str, bytes | None]]) -> Iterable[bytes]:
    """An archive in cpio's "newc" format, as Documentation/driver-api/early-userspace/buffer-format.rst has it.

    Args:
        files: a name and contents each, None for a directory; everything is executable and belongs to root.
    """
    for inode, (name, contents) in enumerate([*files, ("TRAILER!!!", b"")], start=1):
        mode, links = (0o040755, 2) if contents is None else (0o100755, 1)
        data = contents or b""
        encoded = name.encode() + b"\0"
        fields = (inode, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        header = b"070701" + b"".join(b"%08x" % field for field in fields)
        yield header + encoded + bytes(-(len(header) + len(encoded)) % 4)
        yield data + bytes(-len(data) % 4)
