"""What pyfuse3 waits with: quick while there is something to do, and never at the cost of everything else for long."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import trio

pytestmark = pytest.mark.needs("module:pyfuse3")


@pytest.fixture
def readable() -> Iterator[int]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"x")
        yield ours.fileno()


def stand_in(monkeypatch: pytest.MonkeyPatch, idle: bool) -> object:
    """The module that pyfuse3 takes for trio."""
    import pyfuse3

    from fusemount.waiting import wait_briefly_first

    monkeypatch.setattr(pyfuse3, "trio", trio)
    wait_briefly_first(lambda: idle)
    return pyfuse3.trio


def turns(module: object, fd: int, requests: int) -> int:
    """How often another task has its turn while so many requests are found."""
    count = 0

    async def other() -> None:
        nonlocal count
        while True:
            count += 1
            await trio.lowlevel.checkpoint()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            for _ in range(requests):
                await module.lowlevel.wait_readable(fd)  # type: ignore[attr-defined]
            nursery.cancel_scope.cancel()

    trio.run(main)
    return count


def test_requests_in_a_row_are_found_without_the_event_loop(monkeypatch: pytest.MonkeyPatch, readable: int) -> None:
    few, many = (turns(stand_in(monkeypatch, True), readable, number) for number in (10, 1000))
    assert few < 5
    assert 10 < many < 100, "others have their turn now and then"


def test_what_is_under_way_has_its_turn_each_time(monkeypatch: pytest.MonkeyPatch, readable: int) -> None:
    assert turns(stand_in(monkeypatch, False), readable, 100) > 90


def test_a_request_that_comes_late_is_waited_for_in_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    module = stand_in(monkeypatch, True)
    ours, theirs = socket.socketpair()

    async def late() -> None:
        await trio.sleep(0.05)
        theirs.send(b"x")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(late)
                await module.lowlevel.wait_readable(ours.fileno())  # type: ignore[attr-defined]
                ours.recv(1)

    with ours, theirs:
        trio.run(main)


def test_one_task_reads_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    module = stand_in(monkeypatch, True)
    inside, order = 0, list[str]()

    async def reader(lock: object, name: str) -> None:
        nonlocal inside
        for _ in range(3):
            async with lock:  # type: ignore[attr-defined]
                inside += 1
                assert inside == 1
                await trio.lowlevel.checkpoint()
                order.append(name)
                inside -= 1
            await trio.lowlevel.checkpoint()

    async def main() -> None:
        lock = module.Lock()  # type: ignore[attr-defined]
        async with trio.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(reader, lock, name)

    trio.run(main)
    assert sorted(order) == list("aaabbbccc")


def test_all_else_is_trio(monkeypatch: pytest.MonkeyPatch) -> None:
    module = stand_in(monkeypatch, True)
    assert module.open_nursery is trio.open_nursery  # type: ignore[attr-defined]
    assert module.ClosedResourceError is trio.ClosedResourceError  # type: ignore[attr-defined]
    assert module.lowlevel.current_task is trio.lowlevel.current_task  # type: ignore[attr-defined]
