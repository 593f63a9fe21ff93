"""Random changes to a disk, made by qemu-io or by us, and the bytes that must be there afterwards.

Both get the same operations. Those of a batch come in an order in which the content is certain: discarded bytes, which
may read as before or as zeros, are discarded last and looked up afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from nbdserve.block import BlockDevice
from nbdserve.opening import open_image
from tests.reference import qemu_content, qemu_io

COMMANDS = {
    "write": "write -P {fill} {offset} {length}",
    "compressed": "write -c -P {fill} {offset} {length}",
    "zero": "write -z {offset} {length}",
    "zero, unmap": "write -z -u {offset} {length}",
    "discard": "discard {offset} {length}",
    "flush": "flush",
}


class Writer(Enum):
    """Who changes an image."""

    QEMU = "qemu"
    US = "us"


@dataclass(frozen=True, slots=True)
class Operation:
    """One change: `fill` is the byte that is written, and `kind` a key of COMMANDS."""

    kind: str
    offset: int
    length: int
    fill: int

    @property
    def command(self) -> str:
        """What to tell qemu-io."""
        return COMMANDS[self.kind].format(fill=self.fill, offset=self.offset, length=self.length)

    @property
    def data(self) -> bytes:
        return bytes([self.fill if self.kind in ("write", "compressed") else 0]) * self.length

    def apply_to(self, device: BlockDevice) -> None:
        """Make the change through one of our devices."""
        match self.kind:
            case "write":
                device.write(self.offset, self.data)
            case "compressed":
                device.write_compressed(self.offset, self.data)  # type: ignore[attr-defined]
            case "zero" | "zero, unmap":
                device.zero(self.offset, self.length, unmap=self.kind == "zero, unmap")
            case "discard":
                device.discard(self.offset, self.length)
            case "flush":
                device.flush()


def batch(
    chosen: random.Random, size: int, writer: Writer, *, cluster: int, compressed: bool = False, steps: int = 25
) -> list[Operation]:
    """Random operations on a disk, for somebody to do.

    Args:
        cluster: half of the operations begin and end where its multiples lie; bytes.
        compressed: some write whole clusters of that size compressed.
    """
    kinds = ["write"] * 5 + ["zero", "zero, unmap", "flush"] + ["compressed"] * (2 if compressed else 0)
    operations = []
    for step in range(steps if size else 0):
        kind = "discard" if step > steps * 5 // 6 else chosen.choice(kinds)
        offset = chosen.randrange(size)
        length = chosen.choice((1, 511, 512, 4096, 70_000, cluster, 3 * cluster, 5 * cluster // 2))
        if kind == "compressed":
            offset, length = offset - offset % cluster, cluster
        elif chosen.random() < 0.5:
            unit = chosen.choice((512, cluster))
            offset, length = offset - offset % unit, -(-length // unit) * unit
        operations.append(Operation(kind, offset, min(length, size - offset), chosen.randrange(1, 256)))
    return _for_qemu(operations) if writer is Writer.QEMU else operations


def _for_qemu(operations: list[Operation]) -> list[Operation]:
    """Compressed writes first, each to a cluster of its own.

    QEMU 7.2 appends compressed data to a host cluster even when that was freed and allocated again since the last
    compressed write of the same process (qcow2_alloc_bytes), and so corrupts what lies there.
    """
    packed = {each.offset: each for each in operations if each.kind == "compressed"}
    return [*packed.values(), *(each for each in operations if each.kind != "compressed")]


def change(
    image: Path,
    format: str,
    writer: Writer,
    operations: Iterable[Operation],
    model: bytearray,
    read: Callable[[Path, str], bytearray] = qemu_content,
) -> None:
    """Change an image, and the model with it; afterwards `read`, for one QEMU, reads what the model says."""
    operations = list(operations)
    if writer is Writer.QEMU:
        # Compressed writes are refused where something is.
        gaps = [replace(each, kind="discard") for each in operations if each.kind == "compressed"]
        printed = qemu_io(image, *(each.command for each in [*gaps, *operations]), format=format)
        assert "failed" not in printed, printed
    else:
        with open_image(image, format=format) as device:
            for each in operations:
                each.apply_to(device)
    for each in operations:
        if each.kind not in ("flush", "discard"):
            model[each.offset : each.offset + each.length] = each.data
    content = read(image, format)
    for each in operations:
        if each.kind == "discard":
            _settle(model, content, each.offset, each.offset + each.length)
    assert_equal(content, model, f"written by {writer.value}: others read")


def _settle(model: bytearray, content: bytearray, start: int, end: int) -> None:
    """Let the model have what a discarded range reads as now, which must be what was there or zeros."""
    now, before = content[start:end], model[start:end]
    if now != before and any(now):
        assert all(new in (0, old) for new, old in zip(now, before, strict=True)), f"discarded {start} to {end}"
    model[start:end] = now


def assert_equal(content: bytes | bytearray, model: bytes | bytearray, what: str) -> None:
    """Compare two disks, and say where they first differ."""
    if content != model:
        assert len(content) == len(model), f"{what} {len(content)} bytes, not {len(model)}"
        first = next(at for at, (one, other) in enumerate(zip(content, model, strict=True)) if one != other)
        raise AssertionError(f"{what} {content[first : first + 16]!r} at {first}, not {model[first : first + 16]!r}")
