"""Devices that make a file system's life hard, to stand between it and its image in tests."""

from __future__ import annotations

from nbdserve.block import BlockDevice, Window
from nbdserve.block.file import ReadBuffer, WriteBuffer


class Reluctant(Window):
    """While `nowait` is set, each range is refused (BlockingIOError) the first time that it is asked for.

    So does a device whose bytes are not in the page cache: the caller hands the same call to a thread that may wait.
    """

    def __init__(self, whole: BlockDevice) -> None:
        super().__init__(whole, 0, whole.size)
        self.nowait = False
        self.refusals = 0
        self._seen: set[tuple[int, int]] = set()

    def read_into(self, offset: int, buffer: WriteBuffer) -> None:
        asked = (offset, len(buffer))
        if self.nowait and asked not in self._seen:
            self._seen.add(asked)
            self.refusals += 1
            raise BlockingIOError
        super().read_into(offset, buffer)


class Recorder(Window):
    """Keeps a log of what was written: (offset, bytes), and None for every flush."""

    def __init__(self, whole: BlockDevice) -> None:
        super().__init__(whole, 0, whole.size)
        self.log: list[tuple[int, bytes] | None] = []

    def write(self, offset: int, data: ReadBuffer) -> None:
        self.log.append((offset, bytes(data)))
        super().write(offset, data)

    def write_nowait(self, offset: int, data: ReadBuffer) -> bool:
        return False

    def locate_writable(self, offset: int, length: int) -> None:
        return None

    def zero(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self.write(offset, bytes(length))

    def discard(self, offset: int, length: int) -> None:
        self.write(offset, bytes(length))

    def flush(self) -> None:
        super().flush()
        self.log.append(None)
