"""Pins: who may still be looking at host space that has been freed.

The rule this file keeps: *extents outlive lookups.* Between the lookup that said "the bytes lie at host offset X" and
the moment those bytes have been read, written or sent, X must not be given to another guest range. So everyone who
acts on an extent does it while holding a pin, and space freed at some moment may be reused only when every pin that was
taken before that moment has been dropped.

A pin is a number, so that taking one costs next to nothing on the path of every request.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Pins:
    """Counts pins by epoch; a new epoch begins whenever something is freed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._epoch = 0
        self._held: dict[int, int] = {}

    def take(self) -> int:
        """Take a pin; hand the number back to drop()."""
        with self._lock:
            epoch = self._epoch
            self._held[epoch] = self._held.get(epoch, 0) + 1
            return epoch

    def drop(self, pin: int) -> None:
        """Give a pin back."""
        with self._lock:
            left = self._held[pin] - 1
            if left:
                self._held[pin] = left
            else:
                del self._held[pin]

    @contextmanager
    def held(self) -> Iterator[None]:
        """A pin for the length of a with-block."""
        pin = self.take()
        try:
            yield
        finally:
            self.drop(pin)

    def mark(self) -> int:
        """Note that something has been freed now; ask is_past() with the number before it is reused."""
        with self._lock:
            mark = self._epoch
            self._epoch += 1
            return mark

    def is_past(self, mark: int) -> bool:
        """Whether every pin taken before mark() returned this number has been dropped."""
        with self._lock:
            return not self._held or min(self._held) > mark
