"""The conformance suite of BlockDevice: every implementation calls check_block_device() with a way to make one.

A random sequence of operations runs on the device and on a bytearray; what the device says must agree with the
bytearray at every step, by every way of asking: read(), map(), locate().
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdserve.block import BlockDevice, Computed, Data, Zero


@dataclass(frozen=True)
class Operation:
    """One step; `start` and `length` are fractions of the device in 1/4096, so that one strategy fits every size."""

    kind: str
    start: int
    length: int
    fill: int

    def range_in(self, device: BlockDevice) -> tuple[int, int]:
        """The step's guest offset and length, at least one byte."""
        offset = min(self.start * device.size // 4096, device.size - 1)
        length = max(1, self.length * device.size // 4096)
        return offset, min(length, device.size - offset)


KINDS = ("write", "write", "write_nowait", "zero", "zero_keep", "discard", "read", "flush", "reopen")
OPERATIONS = st.lists(
    st.builds(
        Operation,
        kind=st.sampled_from(KINDS),
        start=st.integers(0, 4096),
        length=st.one_of(st.integers(0, 40), st.integers(0, 1500)),
        fill=st.integers(1, 255),
    ),
    min_size=1,
    max_size=25,
)


def check_block_device(
    make: Callable[[], BlockDevice],
    reopen: Callable[[BlockDevice], BlockDevice] | None = None,
    judge: Callable[[bytearray], None] | None = None,
    *,
    examples: int = 25,
) -> None:
    """Run the suite.

    Args:
        make: a new writable device, with any content.
        reopen: closes the device and opens the same image again; None where that has no meaning.
        judge: called after the device was closed, with the bytes it must hold: the place to ask a reference tool.
        examples: how many sequences to try.
    """

    @settings(
        max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
    )
    @given(OPERATIONS)
    def run(operations: list[Operation]) -> None:
        device = make()
        try:
            model = device.read(0, device.size)
            for operation in operations:
                if operation.kind == "reopen" and reopen is not None:
                    device = reopen(device)
                    assert device.size == len(model)
                _step(device, model, operation)
                check_mapping(device, model, *operation.range_in(device))
            assert device.read(0, device.size) == model
        finally:
            device.close()
        if judge is not None:
            judge(model)

    run()


def _step(device: BlockDevice, model: bytearray, operation: Operation) -> None:
    offset, length = operation.range_in(device)
    end = offset + length
    data = bytes((operation.fill + i * 7) & 0xFF for i in range(min(length, 251))) * (length // 251 + 1)
    data = data[:length]
    match operation.kind:
        case "write":
            device.write(offset, data)
            model[offset:end] = data
        case "write_nowait":
            if device.write_nowait(offset, data):
                model[offset:end] = data
        case "zero" | "zero_keep":
            device.zero(offset, length, unmap=operation.kind == "zero")
            model[offset:end] = bytes(length)
        case "discard":
            device.discard(offset, length)
            after = device.read(offset, length)
            assert all(now in (0, before) for now, before in zip(after, model[offset:end], strict=True))
            model[offset:end] = after
        case "flush":
            device.flush()
    assert device.read(offset, length) == model[offset:end]


def check_mapping(device: BlockDevice, model: bytearray, offset: int, length: int) -> None:
    """map() and locate() agree with the content of the range."""
    position, end = offset, offset + length
    for extent in device.extents(offset, length):
        assert 1 <= extent.length <= end - position
        expected = model[position : position + extent.length]
        match extent:
            case Data():
                assert extent.file.read(extent.host_offset, extent.length) == expected
            case Zero():
                assert not any(expected)
            case Computed():
                buffer = bytearray(extent.length)
                device.read_computed(position, buffer)
                assert buffer == expected
        position += extent.length
    assert position == end
    piece = min(length, 4096)
    for place in (device.locate(offset, piece), device.locate_writable(offset, piece)):
        if place is not None:
            assert place[0].read(place[1], piece) == model[offset : offset + piece]
