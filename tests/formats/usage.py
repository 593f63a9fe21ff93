"""Ways to use a device hard, and the bytes that it must hold then: what the tests of all formats have in common."""

from __future__ import annotations

import errno
import random
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

from nbdserve.block import BlockDevice


def scribble(device: BlockDevice, chosen: random.Random, *, steps: int = 40) -> bytearray:
    """Change a device here and there; return what it must hold."""
    model = device.read(0, device.size)
    for step in range(steps):
        offset = chosen.randrange(device.size)
        length = min(chosen.choice((1, 512, 5000, 70_000, 700_000)), device.size - offset)
        data = chosen.randbytes(length) if step % 4 else bytes(length)
        if step % 8 == 0:
            device.zero(offset, length, unmap=step % 16 == 0)
        else:
            device.write(offset, data)
        model[offset : offset + length] = data
    assert device.read(0, device.size) == model
    return model


def scribble_in_threads(
    device: BlockDevice, threads: int, *, steps: int, flush_every: int, lengths: Sequence[int] = (1, 600, 9000)
) -> bytearray:
    """Write, zero, read and flush in several threads at once, each in its own share of the device; return what it must
    hold, if it was all zeros before."""
    share = device.size // threads
    model = bytearray(device.size)

    def work(number: int) -> None:
        chosen = random.Random(number)
        for step in range(steps):
            offset = number * share + chosen.randrange(share)
            length = min(chosen.choice(lengths), (number + 1) * share - offset)
            data = chosen.randbytes(length) if step % 5 else bytes(length)
            if step % 5:
                device.write(offset, data)
            else:
                device.zero(offset, length)
            model[offset : offset + length] = data
            assert device.read(offset, length) == data
            if step % flush_every == 7:
                device.flush()

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    return model


def use_damaged(device: BlockDevice, chosen: random.Random, *, allowed: Collection[int] = (errno.EIO,)) -> None:
    """Read here and there, and write if the device takes that; what is not done must fail with an allowed errno."""
    for _ in range(8 if device.size else 0):
        offset = chosen.randrange(device.size)
        length = min(chosen.choice((1, 5000)), device.size - offset)
        try:
            assert len(device.read(offset, length)) == length
            if not device.read_only:
                device.write(offset, b"x" * length)
        except OSError as error:
            if error.errno not in allowed:
                raise
