"""An image becomes a device. When attach() returns, its partitions are there; when it raises, nothing is left of it."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path

from nbdserve.errors import NbdserveError
from nbdserve.kernel import backends, module
from nbdserve.kernel.backends import Request, Tell
from nbdserve.kernel.detaching import detach, retire
from nbdserve.kernel.records import Record, Records
from nbdserve.kernel.system import Device, KernelError, Partition, System, find_program, run, wait_until

_BLKRRPART = 0x125F  # include/uapi/linux/fs.h: read the partition table again
_BUSY_RETRIES = 20
_NODE_SECONDS = 10.0


def attach(
    request: Request, backend: str | None, mountpoint: str | None, partition: int | None, system: System, tell: Tell
) -> Device:
    """Connect an image to a device, wait for its partitions, and mount one if there is a mount point.

    Args:
        backend: "native" or "qemu"; None chooses.
        partition: which one to mount; None: the only one, or the whole device if it has none.
        tell: told, in one line, of what the user should know.

    Raises:
        NbdserveError: something failed, in one line.
    """
    if mountpoint is not None and not Path(mountpoint).is_dir():
        raise KernelError(f"--mount {mountpoint}: there is no such directory; make it with 'mkdir -p {mountpoint}'")
    module.prepare(system)
    records = Records()
    if (backend or backends.choose_backend()) == "native":
        record = backends.connect_native(request, records, tell)
        _register(record, records, tell)
    else:
        record = backends.connect_qemu(request, system, records)
    try:
        device = with_partitions(record.device, system)
        if mountpoint is not None:
            run(mount_command(chosen(device, partition), mountpoint, device.read_only))
        elif partition is not None:
            chosen(device, partition)
    except BaseException:
        with suppress(NbdserveError):  # the first failure is what the user has to hear
            detach(record.device, system)
        raise
    return device


def _register(record: Record, records: Records, tell: Tell) -> None:
    with records.lock(record.device):
        older = records.get(record.device)
        if older is not None:  # of a device that somebody has disconnected behind our back
            try:
                retire(older, records)
            except NbdserveError as error:
                tell(str(error))
        records.put(record)


def with_partitions(name: str, system: System) -> Device:
    """A connected device whose partitions are all there, with their nodes.

    The kernel reads the table when the device is first opened, and answers BLKRRPART when it has read it again: neither
    is left to chance or to udev. What remains to wait for is that udev or devtmpfs makes the nodes.
    """
    _have_table_read(name, system)
    device = system.device(name)
    if device is None or not device.is_connected:
        raise KernelError(f"/dev/{name} was disconnected again at once; see the kernel's log (dmesg)")
    nodes: list[Device | Partition] = [device, *device.partitions]
    for node in nodes:
        if not wait_until(lambda node=node: _has_node(node.name, system), _NODE_SECONDS):  # type: ignore[misc]
            raise KernelError(f"{node.path} has not appeared; nothing makes device nodes here (udev, devtmpfs)")
    if find_program("udevadm") is not None and os.path.exists("/run/udev/control"):
        with suppress(NbdserveError):  # symlinks, and a last look by udev, during which mounting might fail as busy
            run(["udevadm", "settle", "--timeout=10"])
    return device


def _have_table_read(name: str, system: System) -> None:
    fd = os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for _ in range(_BUSY_RETRIES):
            device = system.device(name)
            if device is None or device.partitions:
                return
            try:
                fcntl.ioctl(fd, _BLKRRPART)
                return
            except OSError as error:
                if error.errno != errno.EBUSY:  # EINVAL: this kernel has no room for partitions on it
                    return
            wait_until(lambda: False, 0.05)
    finally:
        os.close(fd)


def _has_node(name: str, system: System) -> bool:
    try:
        number = os.stat(f"/dev/{name}").st_rdev
    except OSError:
        return False
    return f"{os.major(number)}:{os.minor(number)}" == system.number(name)


def chosen(device: Device, number: int | None) -> Device | Partition:
    """What to mount of a device.

    Raises:
        KernelError: there is no such partition, or more than one to choose from.
    """
    there = ", ".join(str(partition.number) for partition in device.partitions) or "none"
    if number is None and not device.partitions:
        return device
    if number is None and len(device.partitions) > 1:
        raise KernelError(f"{device.path} has several partitions: {there}; choose one with --partition")
    found = [partition for partition in device.partitions if number in (None, partition.number)]
    if not found:
        raise KernelError(f"{device.path} has no partition {number}; it has: {there}")
    return found[0]


def mount_command(what: Device | Partition, mountpoint: str, read_only: bool) -> list[str]:
    """What mounts a device or a partition."""
    return ["mount", *(["-o", "ro"] if read_only else []), what.path, mountpoint]


def reconnect(name: str, system: System, tell: Tell) -> None:
    """Start the server of a device again, and let requests that wait for it go on.

    Raises:
        NbdserveError: the device is not ours, or it failed.
    """
    module.check_rights()
    records = Records()
    with records.lock(name):
        record = records.get(name)
        device = system.device(name)
        if record is None or record.backend != "native" or device is None or not device.is_connected:
            raise KernelError(f"/dev/{name}: not a device that --backend native has attached; nothing to reconnect")
        records.put(backends.reconnect_native(record, tell))
