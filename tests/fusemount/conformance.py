"""The conformance suite of FileSystem: every adapter calls check_filesystem() with a way to make an image.

Two parts. Some checks (contract_*) go through the contract in fusemount/filesystems/base.py point by point; then random
sequences of operations run on the file system and on a model (see machine and model). After each, a judge that knows
the real thing (e2fsck -fn, fsck.vfat -n, ...) looks at what is on the device.
"""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from fusemount.filesystems.base import FileSystem
from nbdserve.block import BlockDevice
from tests.fusemount import contract_content, contract_modes, contract_names
from tests.fusemount.machine import FileSystemMachine
from tests.fusemount.model import DAY_NS, Traits
from tests.fusemount.subject import Subject

__all__ = ["DAY_NS", "Traits", "check_filesystem"]

CHECKS = (*contract_names.CHECKS, *contract_content.CHECKS, *contract_modes.CHECKS)


def check_filesystem(
    make: Callable[[], BlockDevice],
    open_filesystem: Callable[..., FileSystem],
    judge: Callable[[BlockDevice], None],
    *,
    traits: Traits,
    examples: int = 15,
    steps: int = 40,
) -> None:
    """Run the suite.

    Args:
        make: a new writable device with an empty file system on it, with 8 MiB of free space at least.
        open_filesystem: the adapter's function: (device, *, writable) -> FileSystem.
        judge: asserts that the file system on a device is clean, after it was closed.
        traits: what this kind of file system has not.
        examples, steps: how many random sequences to try, and how long each may be; 0 examples leave that part out.
    """
    subject = Subject(make, open_filesystem, judge, traits)
    for check in CHECKS:
        check(subject)
    if examples:
        run_state_machine_as_test(
            lambda: FileSystemMachine(subject),
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                derandomize=True,
                database=None,
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
