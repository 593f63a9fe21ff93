"""Listening sockets: TCP, unix, or handed over by whoever started us (systemd, libnbd)."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path
from urllib.parse import quote

from nbdserve.errors import NbdserveError

DEFAULT_PORT = 10809
_BACKLOG = 128
_FIRST_ACTIVATED = 3  # sd_listen_fds(3)


class ListenError(NbdserveError):
    """An address cannot be listened on."""


def listen_tcp(host: str, port: int) -> list[socket.socket]:
    """Listen on every address the host name stands for; port 0 picks a free one, the same for all.

    Raises:
        ListenError: the name is unknown, the port taken or not allowed.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ListenError(f"--bind {host}: {error.strerror}; give an address of this machine") from None
    anyone = port == 0
    sockets: list[socket.socket] = []
    for family, _, _, _, address in dict.fromkeys(found):
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            sock.bind((address[0], port, *address[2:]))
            sock.listen(_BACKLOG)
        except OSError as error:
            sock.close()
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) and len(found) > 1:
                continue  # "localhost" may name an ::1 that this machine does not have
            if sockets and anyone:
                continue  # the free port of one family is taken in the other
            for other in sockets:
                other.close()
            raise ListenError(_why_not_bound(str(address[0]), port, error)) from None
        port = sock.getsockname()[1]
        sockets.append(sock)
    if not sockets:
        raise ListenError(f"--bind {host}: this machine has no such address")
    return sockets


def _why_not_bound(address: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {address} is in use; choose another with --port, or 0 for any free one"
    if error.errno == errno.EACCES:
        return f"port {port}: only root may use ports below 1024; choose another with --port"
    return f"port {port} on {address}: {error.strerror}"


def listen_unix(path: str) -> socket.socket:
    """Listen on a unix socket. A socket left behind by a dead server is replaced; one that answers never is.

    Raises:
        ListenError: something else has that name, another server answers there, or the directory refuses.
    """
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
    except OSError as error:
        sock.close()
        reason = "the path is too long for a socket" if "too long" in str(error) else error.strerror
        raise ListenError(f"--socket {path}: {reason}") from None
    sock.listen(_BACKLOG)
    return sock


def _remove_stale(path: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"--socket {path}: a file of that name exists and is no socket; choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            if error.errno != errno.EAGAIN:  # EAGAIN: alive, with a full backlog
                raise ListenError(f"--socket {path}: {error.strerror}") from None
    raise ListenError(f"--socket {path}: another server is listening there; stop it or choose another path")


def activated_sockets() -> list[socket.socket]:
    """The sockets that our parent has opened for us (sd_listen_fds(3): LISTEN_PID, LISTEN_FDS), or none.

    The variables are removed, so that no child of ours takes them for its own.
    """
    pid, count = os.environ.get("LISTEN_PID"), os.environ.get("LISTEN_FDS")
    if pid != str(os.getpid()) or count is None or not count.isdigit():
        return []
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    sockets = []
    for fd in range(_FIRST_ACTIVATED, _FIRST_ACTIVATED + int(count)):
        try:
            os.set_inheritable(fd, False)
            sock = socket.socket(fileno=fd)
            listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise ListenError(f"descriptor {fd}, handed over by LISTEN_FDS: {error.strerror}") from None
        if not listening or sock.type != socket.SOCK_STREAM:
            raise ListenError(f"descriptor {fd}, handed over by LISTEN_FDS, is no listening stream socket")
        sockets.append(sock)
    return sockets


def nbd_uri(sock: socket.socket, export: str, *, tls: bool) -> str:
    """How a client names this server (NetworkBlockDevice/nbd, doc/uri.md)."""
    scheme = "nbds" if tls else "nbd"
    name = quote(export, safe="")
    address = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"{scheme}+unix:///{name}?socket={quote(os.fsencode(Path(address).absolute()), safe='/')}"
    host, port = address[:2]
    host = "localhost" if host in ("127.0.0.1", "::1") else f"[{host}]" if ":" in host else host
    where = host if port == DEFAULT_PORT else f"{host}:{port}"
    return f"{scheme}://{where}/{name}" if name else f"{scheme}://{where}"


def is_beyond_loopback(sock: socket.socket) -> bool:
    """Whether other machines can reach this socket."""
    if sock.family == socket.AF_UNIX:
        return False
    import ipaddress

    return not ipaddress.ip_address(sock.getsockname()[0].split("%")[0]).is_loopback
