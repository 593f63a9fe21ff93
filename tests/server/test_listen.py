"""Listening sockets: what is replaced, what never is, and how an address is written down."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdserve.server import listen
from nbdserve.server.listen import ListenError, listen_tcp, listen_unix, nbd_uri


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    listen_unix(str(path)).close()
    assert path.is_socket()
    with listen_unix(str(path)), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


@pytest.mark.parametrize("busy", [False, True])
def test_a_live_socket_never_is(tmp_path: Path, busy: bool) -> None:
    """Not even one whose server is too busy to accept."""
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as client:
        other.bind(str(path))
        other.listen(0)
        if busy:
            client.connect(str(path))
        before = path.stat()
        with pytest.raises(ListenError, match="another server is listening there"):
            listen_unix(str(path))
        assert path.stat().st_ino == before.st_ino


def test_a_file_never_is(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(ListenError, match="is no socket"):
        listen_unix(str(path))
    assert path.read_text() == "data"


def test_a_dangling_symlink_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "link"
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ListenError, match="Address already in use"):
        listen_unix(str(path))
    assert path.is_symlink()


@pytest.mark.parametrize(("path", "reason"), [("/nonexistent/socket", "No such file"), ("x" * 200, "too long")])
def test_impossible_paths(path: str, reason: str) -> None:
    with pytest.raises(ListenError, match=rf"^--socket {path}: .*{reason}"):
        listen_unix(path)


def test_a_taken_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ListenError, match=f"port {port} on 127.0.0.1 is in use; choose another"):
            listen_tcp("127.0.0.1", port)


def test_a_free_port_is_the_same_in_both_families() -> None:
    sockets = listen_tcp("localhost", 0)
    try:
        assert len({sock.getsockname()[1] for sock in sockets}) == 1
        for sock in sockets:
            assert sock.getsockname()[0] in ("127.0.0.1", "::1")
    finally:
        for sock in sockets:
            sock.close()


def test_addresses_of_others_are_refused() -> None:
    with pytest.raises(ListenError, match=r"192\.0\.2\.1"):
        listen_tcp("192.0.2.1", 0)
    with pytest.raises(ListenError, match=r"--bind no\.such\.host\.invalid"):
        listen_tcp("no.such.host.invalid", 0)


# URIs (doc/uri.md of the NetworkBlockDevice project)


@pytest.mark.parametrize(
    ("path", "export", "expected"),
    [
        ("s", "", "nbd+unix:///?socket={}/s"),
        ("s", "disk", "nbd+unix:///disk?socket={}/s"),
        ("a b?c&d=e#f%", "", "nbd+unix:///?socket={}/a%20b%3Fc%26d%3De%23f%25"),
        ("s", "a b/c?d#e%ä", "nbd+unix:///a%20b%2Fc%3Fd%23e%25%C3%A4?socket={}/s"),
        (os.fsdecode(b"\xff"), "", "nbd+unix:///?socket={}/%FF"),
        ("s", "/", "nbd+unix:///%2F?socket={}/s"),
    ],
)
def test_uris_of_unix_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, export: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with listen_unix(path) as sock:
        assert nbd_uri(sock, export, tls=False) == expected.format(tmp_path)
        assert nbd_uri(sock, export, tls=True) == expected.format(tmp_path).replace("nbd+", "nbds+")


def test_uris_of_ports() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        assert nbd_uri(sock, "", tls=False) == f"nbd://localhost:{port}"
        assert nbd_uri(sock, "a b", tls=True) == f"nbds://localhost:{port}/a%20b"


class Named:
    """A socket that only has a name."""

    def __init__(self, family: socket.AddressFamily, *name: object) -> None:
        self.family = family
        self.getsockname = lambda: name


def test_the_default_port_is_left_out() -> None:
    assert nbd_uri(Named(socket.AF_INET, "127.0.0.1", 10809), "", tls=False) == "nbd://localhost"  # type: ignore[arg-type]
    six = Named(socket.AF_INET6, "2001:db8::1", 10809, 0, 0)
    assert nbd_uri(six, "x", tls=False) == "nbd://[2001:db8::1]/x"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("address", "beyond"),
    [("127.0.0.1", False), ("127.9.9.9", False), ("0.0.0.0", True), ("10.0.0.1", True)],
)
def test_who_can_reach_an_ipv4_address(address: str, beyond: bool) -> None:
    assert listen.is_beyond_loopback(Named(socket.AF_INET, address, 1)) is beyond  # type: ignore[arg-type]


@pytest.mark.parametrize(("address", "beyond"), [("::1", False), ("::", True), ("fe80::1%eth0", True)])
def test_who_can_reach_an_ipv6_address(address: str, beyond: bool) -> None:
    assert listen.is_beyond_loopback(Named(socket.AF_INET6, address, 1, 0, 0)) is beyond  # type: ignore[arg-type]


# Sockets handed over (sd_listen_fds(3))


@contextmanager
def descriptors_from(first: int, monkeypatch: pytest.MonkeyPatch, count: str, pid: int | None = None) -> Iterator[None]:
    monkeypatch.setattr(listen, "_FIRST_ACTIVATED", first)
    monkeypatch.setenv("LISTEN_PID", str(os.getpid() if pid is None else pid))
    monkeypatch.setenv("LISTEN_FDS", count)
    monkeypatch.setenv("LISTEN_FDNAMES", "unknown")
    yield


def test_sockets_are_taken_over_and_the_variables_go(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as parent, descriptors_from(parent.fileno(), monkeypatch, "1"):
        (taken,) = listen.activated_sockets()
        assert taken.fileno() == parent.fileno()
        assert not taken.get_inheritable()
        assert not [name for name in os.environ if name.startswith("LISTEN_")]
        taken.detach()


def test_variables_meant_for_another_process_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with descriptors_from(3, monkeypatch, "1", pid=1):
        assert listen.activated_sockets() == []
        assert os.environ["LISTEN_FDS"] == "1"


def test_what_is_no_listening_socket_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    with descriptors_from(read_end, monkeypatch, "1"), pytest.raises(ListenError, match=os.strerror(errno.ENOTSOCK)):
        listen.activated_sockets()
    os.close(read_end)
    os.close(write_end)


def test_a_connected_socket_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Connected(socket.socket):
        """Does not close the descriptor that the test owns."""

        def __del__(self) -> None:
            self.detach()

    one, other = socket.socketpair()
    with one, other, descriptors_from(one.fileno(), monkeypatch, "1"):
        monkeypatch.setattr(socket, "socket", Connected)
        with pytest.raises(ListenError, match="is no listening stream socket"):
            listen.activated_sockets()
