"""Chains of images made by QEMU, and processes that are killed while they change them."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.reference import qemu_content, qemu_img_create, qemu_io

KIB, MIB = 1 << 10, 1 << 20


def make_chain(folder: Path, *sizes: int, base: str = "qcow2", seed: int = 1, **options: str | int) -> list[Path]:
    """base, sn1, sn2, ...: each with other bytes and zeros in places of its own; QEMU wrote them all."""
    chosen = random.Random(seed)
    paths: list[Path] = []
    for number, size in enumerate(sizes):
        path = folder / (f"sn{number}" if number else "base")
        format = "qcow2" if number else base
        if number:
            below = "qcow2" if number > 1 else base
            qemu_img_create(path, size, backing_file=paths[-1].name, backing_fmt=below, **options)
        else:
            qemu_img_create(path, size, base)
        commands = []
        for _ in range(6):
            length = chosen.randrange(1, 40) * 8 * KIB
            offset = chosen.randrange(0, (size - length) // 512) * 512
            what = "write -z" if chosen.random() < 0.25 else f"write -P {chosen.randrange(1, 255)}"
            commands.append(f"{what} {offset} {length}")
        qemu_io(path, *commands, format=format)
        paths.append(path)
    return paths


def contents(paths: list[Path], base: str = "qcow2") -> list[bytes]:
    """What QEMU reads of each."""
    return [bytes(qemu_content(path, "qcow2" if number else base)) for number, path in enumerate(paths)]


def killed_at_random(work: Callable[[], object], check: Callable[[], None], times: int, seed: int = 1) -> int:
    """Do the work in processes that are killed on the way, with a check after each; then let it come to its end.

    Returns how many were killed before they were through.
    """
    chosen, killed, longest = random.Random(seed), 0, 0.3
    for _ in range(times):
        child = _start(work)
        began = time.monotonic()
        time.sleep(chosen.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            killed += 1
        else:
            longest = (time.monotonic() - began) * 0.8
        check()
    _, status = os.waitpid(_start(work), 0)
    assert status == 0
    check()
    return killed


def _start(work: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)
