"""HostFile.sync(): what failed once is never said to be safe, and those who wait share one call."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserve.block import HostFile
from nbdserve.formats.raw import RawImage


@pytest.fixture
def file(tmp_path: Path) -> Iterator[HostFile]:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    opened = HostFile.open(path, writable=True)
    yield opened
    opened.close()


class Storage:
    """Stands for the kernel: counts calls, holds them back while `gate` is cleared, fails while told to."""

    def __init__(self) -> None:
        self.calls = 0
        self.fails_with: int | None = None
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()

    def fdatasync(self, _: int) -> None:
        self.calls += 1
        self.entered.release()
        assert self.gate.wait(10)
        if self.fails_with is not None:
            raise OSError(self.fails_with, os.strerror(self.fails_with))


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Storage:
    made = Storage()
    monkeypatch.setattr(os, "fdatasync", made.fdatasync)
    return made


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_failure_stays(file: HostFile, storage: Storage, code: int) -> None:
    file.sync()
    storage.fails_with = code
    with pytest.raises(OSError, match=os.strerror(code)) as first:
        file.sync()
    assert first.value.errno == code
    storage.fails_with = None  # the kernel reports it once, and then says that all is well
    for _ in range(3):
        file.write(0, b"more")
        with pytest.raises(OSError, match="an earlier flush failed") as later:
            file.sync()
        assert (later.value.errno, later.value.filename) == (errno.EIO, file.name)
    assert storage.calls == 2


def test_an_image_whose_flush_has_failed_says_so_to_the_end_and_is_closed(file: HostFile, storage: Storage) -> None:
    storage.fails_with = errno.EIO
    image = RawImage(file, read_only=False)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        image.flush()
    with pytest.raises(OSError, match="an earlier flush failed"):
        image.close()
    assert file.fd < 0


def test_whoever_waits_for_a_call_that_fails_fails_too(file: HostFile, storage: Storage) -> None:
    """Its bytes may be those that were lost: only one of the two would hear of it from the kernel."""
    failures = sync_together(file, storage, 4, errno.EIO)
    assert failures == 4
    assert storage.calls == 1


def test_those_who_wait_share_the_next_call(file: HostFile, storage: Storage) -> None:
    assert sync_together(file, storage, 8, None) == 0
    assert storage.calls == 2, "the first one began before the others came and says nothing about their bytes"


def sync_together(file: HostFile, storage: Storage, count: int, code: int | None) -> int:
    """Let so many threads call sync(), all but the first while that one is in the kernel; return how many fail."""
    failed: list[OSError] = []

    def sync() -> None:
        try:
            file.sync()
        except OSError as error:
            failed.append(error)

    storage.gate.clear()
    threads = [threading.Thread(target=sync) for _ in range(count)]
    threads[0].start()
    assert storage.entered.acquire(timeout=10)
    for thread in threads[1:]:
        thread.start()
    threading.Event().wait(0.1)  # until they stand before the lock
    storage.fails_with = code
    storage.gate.set()
    for thread in threads:
        thread.join(10)
    return len(failed)
