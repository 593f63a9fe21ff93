"""A guest boots from its own boot sector: SeaBIOS, SYSLINUX, a kernel and a root file system, all from our server.

`scripts/boot-guest` starts both, as a user would. What the guest has written is there afterwards, and the image sound.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.interop import guest
from tests.reference import needs, qemu_check, run

MIB = 1 << 20
BOOT_START, ROOT_START = MIB, 49 * MIB
ROOT_MIB = 64
MASTER_BOOT_RECORD = Path("/usr/lib/syslinux/mbr/mbr.bin")
SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "boot_guest.py"

TABLE = f"""\
label: dos
start={BOOT_START // 512}, size={48 * 2048}, type=e, bootable
start={ROOT_START // 512}, size={ROOT_MIB * 2048}, type=83
"""

MENU = f"""\
SERIAL 0
DEFAULT linux
LABEL linux
KERNEL /vmlinuz
INITRD /initrd
APPEND {guest.KERNEL_OPTIONS} root=/dev/vda2 token=written-by-the-guest
"""


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw disk that boots by itself, made without root: a FAT with SYSLINUX and the kernel, and an ext4."""
    if reason := guest.what_is_missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    if not MASTER_BOOT_RECORD.exists():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("syslinux-common is not installed")
    kernel = guest.find_kernel()
    assert kernel is not None
    folder = tmp_path_factory.mktemp("boot")
    raw, root, menu, initrd = folder / "disk.raw", folder / "root.raw", folder / "syslinux.cfg", folder / "initrd"
    menu.write_text(MENU)
    guest.build_initrd(initrd, kernel)
    guest.build_root_disk(root, size_mib=ROOT_MIB)
    with raw.open("wb") as file:
        file.seek(ROOT_START)
        file.write(root.read_bytes())
        file.truncate(ROOT_START + (ROOT_MIB + 1) * MIB)
    run("sfdisk", "-q", raw, stdin=TABLE)
    with raw.open("r+b") as file:
        file.write(MASTER_BOOT_RECORD.read_bytes()[:440])
    boot = f"{raw}@@{BOOT_START}"
    run("mkfs.fat", "-F", "16", "-h", str(BOOT_START // 512), "--offset", str(BOOT_START // 512), raw, str(48 << 10))
    run("mcopy", "-i", boot, menu, "::syslinux.cfg")
    run("mcopy", "-i", boot, kernel.image, "::vmlinuz")
    run("mcopy", "-i", boot, initrd, "::initrd")
    run("syslinux", "--offset", str(BOOT_START), "--install", raw)
    return raw


# How images are made of it: a directory is given, and the image comes back.


def raw(disk: Path, folder: Path) -> Path:
    return Path(shutil.copy(disk, folder / "image.raw"))


def qcow2(disk: Path, folder: Path, *options: str) -> Path:
    run("qemu-img", "convert", *options, "-f", "raw", "-O", "qcow2", disk, folder / "image.qcow2")
    return folder / "image.qcow2"


def compressed_qcow2(disk: Path, folder: Path) -> Path:
    return qcow2(disk, folder, "-c")


def overlay_qcow2(disk: Path, folder: Path) -> Path:
    shutil.copy(disk, folder / "base.raw")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", folder / "image.qcow2")
    return folder / "image.qcow2"


def dynamic_vhd(disk: Path, folder: Path, kind: str = "dynamic") -> Path:
    options = f"subformat={kind},force_size=on"
    run("qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", options, disk, folder / "image.vpc")
    return folder / "image.vpc"


def fixed_vhd(disk: Path, folder: Path) -> Path:
    return dynamic_vhd(disk, folder, "fixed")


# Each format over each transport.
BOOTS = [
    ("tcp", overlay_qcow2),
    ("tcp", dynamic_vhd),
    ("tcp", raw),
    ("unix", qcow2),
    ("unix", fixed_vhd),
    ("unix", raw),
    ("tls", compressed_qcow2),
    ("tls", dynamic_vhd),
    ("tls", raw),
]


@pytest.mark.parametrize(
    ("transport", "make"), [pytest.param(*boot, id=f"{boot[0]}-{boot[1].__name__}") for boot in BOOTS]
)
@needs("qemu-system-x86_64", "qemu-img", "sfdisk", "mkfs.fat", "mcopy", "syslinux")
def test_a_guest_boots_from_its_own_boot_sector(
    transport: str, make: Callable[[Path, Path], Path], disk: Path, tmp_path: Path
) -> None:
    image = make(disk, tmp_path)
    format = image.suffix[1:]
    where = [] if transport == "unix" else [f"--{transport}"]
    machine = ["-machine", "accel=tcg", "-m", "256", "-nodefaults", "-no-reboot", "-display", "none"]
    command = [sys.executable, SCRIPT, *where, "--format", format, image, *machine, "-serial", "stdio"]
    # Not on stdin: QEMU would take the terminal's settings for its own.
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=guest.BOOT_SECONDS, check=False
    )
    console, recipe = result.stdout.decode(errors="replace"), result.stderr.decode()
    assert result.returncode == 0 and guest.GUEST_DONE in console, f"{recipe}\n{console[-3000:]}"
    assert "SYSLINUX" in console, "the boot loader said its name"
    assert ("tls-creds=tls0" in recipe, "server.type=unix" in recipe) == (transport == "tls", transport == "unix")
    if format == "qcow2":
        qemu_check(image)
    if make is overlay_qcow2:
        assert (tmp_path / "base.raw").read_bytes() == disk.read_bytes(), "nothing was written to the base"
    written = tmp_path / "written.raw"
    run("qemu-img", "convert", "-f", format, "-O", "raw", image, written)
    guest.check_file_system(written, ROOT_START)
    assert guest.read_file(written, ROOT_START, "/token") == b"written-by-the-guest\n"
    assert guest.read_file(written, ROOT_START, "/copy") == guest.busybox().read_bytes()


def test_the_recipe_is_printed(tmp_path: Path) -> None:
    image = tmp_path / "my disk.raw"
    image.write_bytes(bytes(MIB))
    command = [sys.executable, SCRIPT, "--dry-run", "--tls", image, "-nographic"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    certificates, serve, boot = result.stderr.splitlines()
    assert certificates == "nbdserve --make-certs pki"
    assert serve == f"nbdserve --port 10809 --tls-certs pki --tls-verify-peer -- '{image}' &"
    assert "-object tls-creds-x509,id=tls0,dir=pki,endpoint=client -drive driver=nbd,host=localhost,port=10809" in boot
    assert ",tls-creds=tls0," in boot and boot.endswith(" -nographic")
