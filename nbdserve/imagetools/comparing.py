"""Whether two disks show the same content."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from nbdserve.block import BlockDevice, Data, Extent, Zero

_PIECE = 2 << 20  # bytes
_SECTOR = 512
_WORKERS = 4


def first_difference(
    one: BlockDevice,
    other: BlockDevice,
    progress: Callable[[int], None] = lambda done: None,
    *,
    limit: int | None = None,
) -> int | None:
    """Where the sector begins in which two disks first differ, in bytes; None when they are alike.

    A shorter disk counts as if zeros followed it.

    Args:
        progress: told how many bytes have been compared.
        limit: bytes; what lies behind is not looked at.

    Raises:
        OSError: one of them cannot be read.
    """
    pending: deque[tuple[int, Future[int | None]]] = deque()
    with ThreadPoolExecutor(_WORKERS) as pool:
        try:
            for offset, length in _to_compare(one, other, limit):
                pending.append((offset, pool.submit(_compare, one, other, offset, length)))
                if len(pending) > 2 * _WORKERS and (found := _oldest(pending, progress)) is not None:
                    return found
            while pending:
                if (found := _oldest(pending, progress)) is not None:
                    return found
        finally:
            pool.shutdown(cancel_futures=True)
    return None


def _oldest(pending: deque[tuple[int, Future[int | None]]], progress: Callable[[int], None]) -> int | None:
    offset, result = pending.popleft()
    progress(offset)
    return result.result()


def allocation_difference(one: BlockDevice, other: BlockDevice) -> int | None:
    """Where one disk has space set aside and the other has not, in bytes; None when they agree."""
    for offset, _, first, second in _together(one, other, None):
        if _is_hole(first) != _is_hole(second):
            return offset
    return None


def _is_hole(extent: Extent | None) -> bool:
    return extent is None or (isinstance(extent, Zero) and not extent.allocated)


def _together(
    one: BlockDevice, other: BlockDevice, limit: int | None
) -> Iterator[tuple[int, int, Extent | None, Extent | None]]:
    """Ranges (offset, bytes) with the extents of both; None behind the end of the shorter one."""
    offset, end = 0, max(one.size, other.size) if limit is None else limit
    while offset < end:
        extents = [
            device.map(offset, device.size - offset) if offset < device.size else None for device in (one, other)
        ]
        length = min(end - offset, *(extent.length for extent in extents if extent is not None))
        yield offset, length, extents[0], extents[1]
        offset += length


def _to_compare(one: BlockDevice, other: BlockDevice, limit: int | None) -> Iterator[tuple[int, int]]:
    """The ranges in which the disks may differ, in pieces that end at multiples of their size."""
    start = stop = 0
    for offset, length, first, second in _together(one, other, limit):
        if all(extent is None or isinstance(extent, Zero) for extent in (first, second)) or _is_same(first, second):
            continue
        if offset > stop:
            yield from _cut(start, stop)
            start = offset
        stop = offset + length
        if stop - start >= _PIECE:
            whole = stop // _PIECE * _PIECE
            yield from _cut(start, whole)
            start = max(start, whole)
    yield from _cut(start, stop)


def _is_same(first: Extent | None, second: Extent | None) -> bool:
    """Whether both lie at the same place of the same host file: two overlays on one base."""
    return (
        isinstance(first, Data)
        and isinstance(second, Data)
        and first.host_offset == second.host_offset
        and os.path.sameopenfile(first.file.fd, second.file.fd)
    )


def _cut(start: int, stop: int) -> Iterator[tuple[int, int]]:
    while start < stop:
        end = min(stop, (start // _PIECE + 1) * _PIECE)
        yield start, end - start
        start = end


def _compare(one: BlockDevice, other: BlockDevice, offset: int, length: int) -> int | None:
    first, second = (_content(device, offset, length) for device in (one, other))
    if first == second:
        return None
    low, high = 0, length  # the first difference lies in there
    while high - low > _SECTOR:
        middle = low + -(-(high - low) // 2 // _SECTOR) * _SECTOR
        if first[low:middle] != second[low:middle]:
            high = middle
        else:
            low = middle
    return (offset + low) // _SECTOR * _SECTOR


def _content(device: BlockDevice, offset: int, length: int) -> bytearray:
    """What a disk shows, and zeros behind its end."""
    inside = max(0, min(length, device.size - offset))
    content = device.read(offset, inside) if inside else bytearray()
    content.extend(bytes(length - inside))
    return content
