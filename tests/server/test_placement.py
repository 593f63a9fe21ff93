"""Where the serving thread runs beside a client of the same host."""

from __future__ import annotations

import ctypes
import os
import socket
from pathlib import Path

import pytest

from nbdserve.server.placement import client_locator, keep_apart


def here() -> int:
    return int(ctypes.CDLL(None).sched_getcpu())


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_it_moves_away_and_may_come_back() -> None:
    allowed = os.sched_getaffinity(0)
    left = []

    def client() -> int:
        left.append(here())
        return left[-1]

    # The system may move us by itself just then, so one of some tries has to be seen to leave.
    moved = [keep_apart(client) or here() != left[-1] for _ in range(20)]
    assert any(moved)
    assert os.sched_getaffinity(0) == allowed


def test_a_client_that_is_gone_moves_nobody() -> None:
    def client() -> int:
        raise FileNotFoundError

    allowed = os.sched_getaffinity(0)
    keep_apart(client)
    assert os.sched_getaffinity(0) == allowed


def test_clients_of_this_host_are_found(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        locate = client_locator(ours)
        assert locate is not None and locate() in range(os.cpu_count() or 1)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
        listener.accept()[0] as server,
    ):
        client.send(b"x")
        assert server.recv(1) == b"x"
        locate = client_locator(server)
        assert locate is not None and locate() in range(os.cpu_count() or 1)


def test_others_are_not() -> None:
    class Distant:
        family = socket.AF_INET

        def getsockname(self) -> tuple[str, int]:
            return "192.0.2.1", 10809

        def getpeername(self) -> tuple[str, int]:
            return "192.0.2.7", 40000

    assert client_locator(Distant()) is None  # type: ignore[arg-type]
