"""Extents -> what goes on the wire. Pure: no socket, no trio.

The one place that decides what a mapping means to a client: which bytes of a read are a hole chunk, and which status
flags of base:allocation an extent has (specification, section "Metadata contexts").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from nbdserve.block import BlockDevice, Extent, Zero
from nbdserve.protocol import replies
from nbdserve.protocol.constants import AllocationState

# Below this a hole costs the client more as a chunk of its own than as bytes.
_SMALLEST_HOLE = 4096


def allocation(extent: Extent) -> AllocationState:
    """The flags of base:allocation."""
    if not isinstance(extent, Zero):
        return AllocationState(0)
    return AllocationState.ZERO if extent.allocated else AllocationState.ZERO | AllocationState.HOLE


def status_extents(extents: Iterable[Extent], limit: int) -> list[tuple[int, int]]:
    """(length, flags) of the first `limit` runs of equal status. At least one extent has to be given."""
    runs: list[tuple[int, int]] = []
    for extent in extents:
        flags = int(allocation(extent))
        if runs and runs[-1][1] == flags:
            runs[-1] = (runs[-1][0] + extent.length, flags)
        elif len(runs) == limit:
            break
        else:
            runs.append((extent.length, flags))
    return runs


def read_runs(extents: Iterable[Extent]) -> Iterator[tuple[int, bool]]:
    """(length, is_hole) of the runs that a sparse read reply is made of; small holes count as data."""
    data = 0
    for extent in extents:
        if isinstance(extent, Zero) and extent.length >= _SMALLEST_HOLE:
            if data:
                yield data, False
                data = 0
            yield extent.length, True
        else:
            data += extent.length
    if data:
        yield data, False


def sparse_read(device: BlockDevice, cookie: int, offset: int, length: int) -> Iterator[bytes | bytearray]:
    """The chunks of a structured read reply, with holes as hole chunks; reads the device."""
    end = offset + length
    for run, is_hole in read_runs(list(device.extents(offset, length))):
        last = offset + run == end
        if is_hole:
            chunk = bytearray(replies.HOLE_CHUNK.size)
            replies.put_hole_chunk(chunk, 0, cookie, offset, run, last)
        else:
            chunk = bytearray(replies.DATA_CHUNK.size + run)
            body = replies.put_data_chunk(chunk, 0, cookie, offset, run, last)
            device.read_into(offset, memoryview(chunk)[body:])
        yield chunk
        offset += run
