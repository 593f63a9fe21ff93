"""Ways to use a device hard, and the bytes that it must hold then: what the tests of all formats have in common."""

from __future__ import annotations

import errno
import random
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nbdserve.block import BlockDevice


def patch(path: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


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


def use_damaged(
    device: BlockDevice,
    chosen: random.Random,
    *,
    allowed: Collection[int] = (errno.EIO,),
    lengths: Sequence[int] = (1, 512, 5000),
) -> int:
    """Use a device in all ways that it takes; what is not done must fail with an allowed errno. Returns how often."""
    failures = 0
    for _ in range(8 if device.size else 0):
        offset = chosen.randrange(chosen.choice((device.size, min(device.size, 1 << 20))))
        length = min(chosen.choice(lengths), device.size - offset)
        try:
            _use(device, offset, length, chosen)
        except OSError as error:
            failures += 1
            if error.errno not in allowed:
                raise
    return failures


def _use(device: BlockDevice, offset: int, length: int, chosen: random.Random) -> None:
    device.locate(offset, length)
    device.map_nowait(offset, length)
    assert sum(extent.length for extent in device.extents(offset, length)) == length
    assert len(device.read(offset, length)) == length
    if device.read_only:
        return
    data = chosen.randbytes(length)
    match chosen.randrange(5):
        case 0:
            device.write(offset, data)
        case 1:
            if not device.write_nowait(offset, data):
                return
        case 2:
            device.zero(offset, length, unmap=chosen.random() < 0.5)
            data = bytes(length)
        case 3:
            device.discard(offset, length)
            return
        case _:
            device.flush()
            return
    if offset // 512 == (offset + length - 1) // 512:  # of more, a damaged mapping may say that two parts share a place
        assert device.read(offset, length) == data


def assert_one_line(error: Exception, where: Path) -> None:
    """What is wrong with an image is said in one line that names the image, or what lies in this directory."""
    assert "\n" not in str(error)
    assert str(where) in str(error)


INTERESTING = (0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF, 1 << 63)


def mutate(content: bytearray, places: Sequence[tuple[int, int]], chosen: random.Random) -> None:
    """Damage a file in some of these places (offset, length), as bits rot and as an attacker would; or cut it short."""
    for _ in range(chosen.choice((1, 1, 1, 2, 4, 12))):
        start, length = chosen.choice(places)
        width = chosen.choice((1, 2, 4, 4, 8, 8))
        order = chosen.choice(("little", "big"))
        position = start + chosen.randrange(length)
        if chosen.random() < 0.7:
            position -= position % width
        old = int.from_bytes(content[position : position + width], order)
        match chosen.randrange(5):
            case 0:
                new = chosen.choice(INTERESTING)
            case 1:
                new = chosen.getrandbits(8 * width)
            case 2:
                new = old ^ 1 << chosen.randrange(8 * width)
            case 3:
                new = old + chosen.choice((-1, 1, 1 << chosen.randrange(8 * width)))
            case _:  # what another place says
                other, length = chosen.choice(places)
                other += chosen.randrange(length) & -width
                new = int.from_bytes(content[other : other + width], order)
        if position + width <= len(content):
            content[position : position + width] = (new % (1 << 8 * width)).to_bytes(width, order)
    if chosen.random() < 0.1:
        del content[chosen.randrange(len(content)) :]
