"""nbdattach in a kernel of its own: Debian's, in a guest that sees this machine's tree and cannot change it."""

from __future__ import annotations

import compileall
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.interop import guest
from tests.reference import needs, run

ROOT = Path(__file__).parent.parent.parent
MIB = 1 << 20

MODULES = ("virtio_pci", "9pnet_virtio", "9p")
SECONDS = 300.0

# The host's tree is the root; what has to be written lies in memory. The kernel starts modprobe in the tree as well,
# because the first process changes over to it.
INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
for module in /modules/*.ko; do insmod $module; done
mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=512000 host /root || poweroff -f
mount -t proc proc /root/proc
mount -t sysfs sys /root/sys
mount -t tmpfs run /root/run && mkdir /root/run/lock
mount --move /dev /root/dev
export PATH=/usr/sbin:/usr/bin:/sbin:/bin PYTHONPATH={root} PYTHONDONTWRITEBYTECODE=1
cd /root
exec switch_root /root {command}
"""

TABLE = "label: dos\nstart=1MiB, size=8MiB, type=83\nstart=9MiB, size=8MiB, type=83\n"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with two file systems, as raw, as qcow2, and as one with a snapshot, in which a file still exists."""
    folder = tmp_path_factory.mktemp("images")
    raw = folder / "disk.raw"
    with raw.open("wb") as file:
        file.truncate(20 * MIB)
    run("sfdisk", "-q", raw, stdin=TABLE)
    for number, name in ((1, "file"), (2, "second")):
        tree = folder / name
        tree.mkdir()
        (tree / name).write_text("the second partition\n")
        options = f"offset={number * 8 * MIB - 7 * MIB}"
        run("mke2fs", "-q", "-F", "-t", "ext4", "-E", options, "-d", tree, raw, "8M")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, folder / "disk.qcow2")
    later = folder / "later.raw"
    shutil.copy(raw, later)
    run("debugfs", "-w", "-R", "rm file", f"{later}?offset={MIB}")
    snapshot = folder / "snapshot.qcow2"
    shutil.copy(folder / "disk.qcow2", snapshot)
    run("qemu-img", "snapshot", "-c", "earlier", snapshot)
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", later, snapshot)
    return folder


@needs("qemu-system-x86_64", "qemu-nbd", "sfdisk", "mke2fs", "debugfs", "modprobe")
@pytest.mark.parametrize("part", ["native", "both"])
def test_the_kernel_attaches_and_detaches(part: str, images: Path, tmp_path: Path) -> None:
    if reason := guest.what_is_missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    kernel = guest.find_kernel()
    assert kernel is not None
    compileall.compile_dir(ROOT / "nbdserve", quiet=2)  # the guest cannot, and would compile at every start
    command = [sys.executable, __file__.replace("test_inside", "inside"), part, str(guest.busybox()), str(images)]
    init = INIT.format(root=ROOT, command=" ".join([*command, f"'{guest.GUEST_DONE}'"]))
    guest.build_initrd(tmp_path / "initrd", kernel, init=init, modules=MODULES)
    tree = ["-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"]
    print(guest.run_guest(kernel, tmp_path / "initrd", tree, seconds=SECONDS, memory=768))
