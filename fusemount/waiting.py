"""What pyfuse3 waits with for the kernel's next request.

By itself it lets the event loop wait, after a lock has been handed from task to task: two rounds of the loop for each
request, which cost more than most answers. But whoever asks something through FUSE mostly has the next question within
microseconds. So we look for it a little while before the loop is left to wait, unless anything else is under way; and
now and then the loop has its turn in any case.

pyfuse3 finds what it waits with in its attribute `trio`. Here it gets a stand-in, as it does from pyfuse3.asyncio.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Any

import pyfuse3
import trio

_MOST_AT_ONCE = 64  # requests, before everything else has its turn
_MILLISECONDS = 1


def wait_briefly_first(is_idle: Callable[[], bool]) -> None:
    """Let pyfuse3 look for requests before it waits for them in the event loop; to be called before it is mounted.

    Args:
        is_idle: says whether nothing is under way that the event loop would have to continue.
    """
    pyfuse3.trio = _Trio(is_idle)  # type: ignore[attr-defined]


class _Turn:
    """A lock for the task that reads the next request: free for whoever comes first, be it the one that has left it."""

    def __init__(self) -> None:
        self._taken = False
        self._waiting = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        while self._taken:
            await self._waiting.park()
        self._taken = True

    async def __aexit__(self, *_: object) -> None:
        self._taken = False
        if self._waiting:
            self._waiting.unpark()


class _LowLevel:
    def __init__(self, is_idle: Callable[[], bool]) -> None:
        self._is_idle = is_idle
        self._left = 0
        self._fd = -1
        self._poll = select.poll()

    async def wait_readable(self, fd: int) -> None:
        if self._left and self._is_idle():
            self._left -= 1
            if fd != self._fd:
                self._poll.register(fd, select.POLLIN)
                self._fd = fd
            if self._poll.poll(_MILLISECONDS):
                return
        await trio.lowlevel.wait_readable(fd)
        self._left = _MOST_AT_ONCE

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)


class _Trio:
    Lock = _Turn

    def __init__(self, is_idle: Callable[[], bool]) -> None:
        self.lowlevel = _LowLevel(is_idle)

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)
