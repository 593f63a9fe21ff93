"""The end of a device, in the order that loses nothing: unmount, flush, disconnect, wait, end the server.

Where the server is dead there is nothing to flush to: then the device is disconnected first, so that nothing waits for
it, and unmounted afterwards. What had not been written is lost, and that is told.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from nbdserve.errors import NbdserveError
from nbdserve.kernel import backends, module
from nbdserve.kernel.records import Record, Records
from nbdserve.kernel.system import Device, KernelError, Mount, System, run, wait_until

_FREE_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Attached:
    """One connected device, for people.

    Attributes:
        record: what we know of it; None: somebody else has attached it.
        is_stale: its server is dead.
    """

    device: Device
    record: Record | None
    mounts: tuple[Mount, ...]
    is_stale: bool


def attached(system: System) -> list[Attached]:
    """All devices that are connected; forgets what is recorded of others, and ends their servers."""
    records = Records()
    found = []
    for device in system.devices():
        if device.is_connected:
            found.append(_described(device, records.get(device.name), system))
        elif os.geteuid() == 0 and records.get(device.name) is not None:
            _clean(device.name, system, records)
    return found


def _described(device: Device, record: Record | None, system: System) -> Attached:
    is_stale = record is not None and not record.server.is_alive
    return Attached(device, record, tuple(system.mounts(device)), is_stale)


def _clean(name: str, system: System, records: Records) -> None:
    with records.lock(name):
        device, record = system.device(name), records.get(name)
        if record is not None and (device is None or not device.is_connected):
            retire(record, records)


def retire(record: Record, records: Records) -> None:
    """Forget a device that is no longer connected, and end its server; under its lock."""
    try:
        backends.stop_server(record)
    finally:
        records.remove(record)


def detach(name: str, system: System) -> list[str]:
    """Free a device.

    Returns:
        What the user should know, a line each: something was lost, because the server had died before.

    Raises:
        NbdserveError: it could not be freed, or the server could not write everything; in one line.
    """
    module.check_rights()
    records = Records()
    with records.lock(name):
        device, record = system.device(name), records.get(name)
        if device is None or not device.is_connected:
            if record is not None:
                retire(record, records)
                return []
            raise KernelError(f"/dev/{name} is not connected; 'nbdattach --list' shows what is")
        if users := system.other_users(device):
            raise KernelError(f"{device.path} is in use by {', '.join(users)}; deactivate that first")
        state = _described(device, record, system)
        if state.is_stale:
            _abandon(state, system)
        else:
            _finish(state, system)
        if not wait_until(lambda: _is_free(name, system), _FREE_SECONDS):
            raise KernelError(
                f"{device.path} is disconnected, but something still has it open (see fuser {device.path})"
            )
        if record is not None:
            retire(record, records)
        if state.is_stale and not device.read_only:
            return [f"{device.path}: its server had died; what was not written by then is lost"]
        return []


def _finish(state: Attached, system: System) -> None:
    _unmount(state)
    _flush(state.device)
    backends.disconnect(state.record, state.device.index)


def _abandon(state: Attached, system: System) -> None:
    backends.disconnect(state.record, state.device.index)
    _unmount(state)


def _unmount(state: Attached) -> None:
    for mount in reversed(state.mounts):
        run(["umount", mount.target])


def _flush(device: Device) -> None:
    try:
        fd = os.open(device.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise KernelError(f"{device.path}: what was written to it cannot be flushed: {error.strerror}") from None


def _is_free(name: str, system: System) -> bool:
    device = system.device(name)
    return device is None or not device.is_connected


def detach_all(system: System) -> tuple[list[str], list[NbdserveError]]:
    """Free every device that we have attached; what the user should know, and what failed."""
    told: list[str] = []
    failures: list[NbdserveError] = []
    for state in attached(system):
        if state.record is not None:
            try:
                told += detach(state.device.name, system)
            except NbdserveError as error:
                failures.append(error)
    return told, failures
