"""The process behind a mount: from the moment it is mounted to the one when the image is closed.

However the mount ends, the kernel first hands over what it still holds. Plain unmounting does that by itself. On
SIGTERM we unmount too; where files are still open, the mount is taken out of sight, the kernel is told to hand over
what was written, and then the processes that hold those files lose them.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable

import pyfuse3
import trio

from fusemount import mounting
from fusemount.operations import GuestOperations
from fusemount.owners import Owners
from fusemount.state import MountState
from fusemount.vfs import Tree
from fusemount.waiting import wait_briefly_first
from nbdserve.errors import NbdserveError

_SYNC_SECONDS = 15
_QUIET_SECONDS = 0.3

Log = Callable[[str], None]


def mount_and_serve(
    tree: Tree,
    owners: Owners,
    state: MountState,
    mountpoint: str,
    options: set[str],
    ready: Callable[[], None],
    log: Log,
) -> None:
    """Mount, call ready(), and return when it has been unmounted and the kernel wants no more of us.

    Raises:
        OpenError: it could not be mounted.
    """
    operations = GuestOperations(tree, owners, state.facts, log)
    wait_briefly_first(lambda: not operations.handed_on)
    mounting.explained(lambda: pyfuse3.init(operations, mountpoint, options))
    gc.freeze()  # modules live to the end; looking at them then would take longer than all else that unmounting takes
    gc.enable()
    try:
        trio.run(_serve, operations, mountpoint, ready, log)
    finally:
        tree.hasty = 0
        pyfuse3.close(unmount=True)
        operations.stop_workers()


async def _serve(operations: GuestOperations, mountpoint: str, ready: Callable[[], None], log: Log) -> None:
    operations.tree.hasty = threading.get_ident()
    async with trio.open_nursery() as nursery:
        await nursery.start(_end_on_signal, operations, mountpoint, log)
        nursery.start_soon(_sync_now_and_then, operations)
        if os.geteuid() == 0:
            nursery.start_soon(trio.to_thread.run_sync, mounting.widen_read_ahead, mountpoint)
        ready()
        await pyfuse3.main()
        nursery.cancel_scope.cancel()


async def _sync_now_and_then(operations: GuestOperations) -> None:
    """What was written without fsync is not to be lost for ever if we are killed."""
    while not operations.read_only:
        await trio.sleep(_SYNC_SECONDS)
        with trio.CancelScope(shield=True):
            await operations.sync_changes()


async def _end_on_signal(
    operations: GuestOperations, mountpoint: str, log: Log, task_status: trio.TaskStatus[None]
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        task_status.started()
        async for _ in signals:
            try:
                await trio.to_thread.run_sync(mounting.unmount, mountpoint)
            except (OSError, NbdserveError):
                await _tear_off(operations, mountpoint, log)


async def _tear_off(operations: GuestOperations, mountpoint: str, log: Log) -> None:
    """End a mount in which files are open; nothing that was written in them so far is lost."""
    log(f"{mountpoint}: files in it are still in use; whoever uses them gets an error from now on")

    def detach() -> None:
        fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY)
        try:
            mounting.unmount(mountpoint, lazy=True)
            mounting.sync_open(fd)
        finally:
            os.close(fd)

    try:
        await trio.to_thread.run_sync(detach)
    except (OSError, NbdserveError) as error:
        log(f"{mountpoint}: {error}")
    before = -1
    while before != operations.requests:
        before = operations.requests
        await trio.sleep(_QUIET_SECONDS)
    pyfuse3.terminate()
