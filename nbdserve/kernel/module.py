"""The nbd module, loaded so that partitions appear.

Without max_part the module gives its devices no room for partitions on many kernels; what it was loaded with stands in
/sys/module/nbd/parameters (modinfo shows only that there is such a parameter).
"""

from __future__ import annotations

import os
from pathlib import Path

from nbdserve.kernel.system import KernelError, Module, System, Unavailable, find_program, run, wait_until

MAXIMUM_PARTITIONS = 16
DEVICES = 16

_NODE_SECONDS = 10.0

Command = list[str]


def load_command() -> Command:
    """What loads the module."""
    return ["modprobe", "nbd", f"max_part={MAXIMUM_PARTITIONS}", f"nbds_max={DEVICES}"]


def preparation(system: System) -> list[Command]:
    """The commands after which the module is loaded, with room for partitions; none if it is.

    Raises:
        KernelError: it would have to be loaded anew, and is in use.
    """
    module = system.module()
    if module is None:
        return [load_command()]
    if module.max_part > 0:
        return []
    _check_idle(system, module)
    return [["modprobe", "-r", "nbd"], load_command()]


def _check_idle(system: System, module: Module) -> None:
    used = [device.path for device in system.devices() if device.is_connected]
    if used:
        raise KernelError(
            f"the module nbd was loaded with max_part={module.max_part}, so that no partitions can appear, and cannot "
            f"be loaded anew while {used[0]} is in use; detach that first"
        )


def prepare(system: System) -> None:
    """Have the module loaded.

    Raises:
        Unavailable: that is not possible here; says what is missing.
        KernelError: it is in use in a way that is of no use to us.
    """
    check_rights()
    commands = preparation(system)
    if commands and find_program("modprobe") is None:
        raise Unavailable("the kernel module nbd is not loaded, and there is no modprobe to load it (package kmod)")
    for command in commands:
        try:
            run(command)
        except KernelError as error:
            where = " (in a container the host has to load it)" if in_container() else ""
            raise Unavailable(f"the kernel module nbd cannot be loaded{where}: {error}") from None
    # udev, or the kernel itself on devtmpfs, makes the nodes; a container has neither.
    if not wait_until(lambda: Path("/dev/nbd0").is_block_device(), _NODE_SECONDS if commands else 0.0):
        raise Unavailable("the kernel module nbd is loaded, but /dev/nbd0 is not here (is this a container?)")


def check_rights() -> None:
    """Only root may connect devices.

    Raises:
        Unavailable: we are not root.
    """
    if os.geteuid() != 0:
        raise Unavailable("only root may use the kernel's NBD devices (try sudo)")


def in_container() -> bool:
    """Whether this looks like a container: podman and docker leave a file, systemd-nspawn and lxc a variable."""
    marks = ("/run/.containerenv", "/.dockerenv", "/run/systemd/container")
    return any(map(os.path.exists, marks)) or "container" in os.environ
