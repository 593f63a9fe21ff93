"""A guest boots from its own boot sector: SeaBIOS, SYSLINUX, a kernel and a root file system, all from our server.

`scripts/boot-guest` starts both, as a user would. What the guest has written is there afterwards, and the image sound.
"""

from __future__ import annotations

import os
import subprocess
import sys
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

MENU = """\
SERIAL 0
DEFAULT linux
LABEL linux
KERNEL /vmlinuz
INITRD /initrd
APPEND console=ttyS0 loglevel=4 panic=-1 root=/dev/vda2 token=written-by-the-guest
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


# Each format and each transport once.
@pytest.mark.parametrize(
    ("format", "options"), [("qcow2", ("--tcp",)), ("vpc", ()), ("raw", ("--tls",))], ids=["tcp", "unix", "tls"]
)
@needs("qemu-system-x86_64", "qemu-img", "sfdisk", "mkfs.fat", "mcopy", "syslinux")
def test_a_guest_boots_from_its_own_boot_sector(
    format: str, options: tuple[str, ...], disk: Path, tmp_path: Path
) -> None:
    image = tmp_path / f"image.{format}"
    exactly = ["-o", "force_size=on"] if format == "vpc" else []
    run("qemu-img", "convert", "-f", "raw", "-O", format, *exactly, disk, image)
    machine = ["-machine", "accel=tcg", "-m", "256", "-nodefaults", "-no-reboot", "-display", "none"]
    command = [sys.executable, SCRIPT, *options, "--format", format, image, *machine, "-serial", "stdio"]
    # Not on stdin: QEMU would take the terminal's settings for its own.
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=guest.BOOT_SECONDS, check=False
    )
    console = result.stdout.decode(errors="replace")
    assert result.returncode == 0 and guest.GUEST_DONE in console, f"{result.stderr.decode()}\n{console[-3000:]}"
    assert "SYSLINUX" in console, "the boot loader said its name"
    if format == "qcow2":
        qemu_check(image)
    written = tmp_path / "written.raw"
    run("qemu-img", "convert", "-f", format, "-O", "raw", image, written)
    root = tmp_path / "root.raw"
    root.write_bytes(written.read_bytes()[ROOT_START : ROOT_START + ROOT_MIB * MIB])
    guest.check_file_system(root)
    assert guest.read_file(root, "/token") == b"written-by-the-guest\n"
    assert guest.read_file(root, "/copy") == guest.busybox().read_bytes()


def test_the_recipe_is_printed(tmp_path: Path) -> None:
    image = tmp_path / "my disk.raw"
    image.write_bytes(bytes(MIB))
    command = [sys.executable, SCRIPT, "--dry-run", "--tls", image, "-nographic"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    certificates, serve, boot = result.stderr.splitlines()
    assert certificates.startswith("nbdserve --make-certs /")
    assert serve.startswith("nbdserve --port 0 --tls-certs /") and serve.endswith("-- '" + str(image) + "' &")
    assert "-object tls-creds-x509,id=tls0,dir=/" in boot and "tls-creds=tls0" in boot and boot.endswith("-nographic")
