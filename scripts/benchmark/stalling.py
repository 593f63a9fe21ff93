"""A client that asks for much and takes nothing."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from benchmark.servers import Place

_GO = 7
_REQUESTS = 64
_LENGTH = 1 << 20


@contextmanager
def stalled_client(place: Place) -> Iterator[None]:
    """Negotiate plainly, send reads for 64 MiB, and read none of the replies until the end."""
    with socket.socket(socket.AF_INET if place.port else socket.AF_UNIX) as connection:
        connection.connect(("127.0.0.1", place.port) if place.port else os.fspath(place.socket))
        _receive(connection, 18)
        connection.sendall(struct.pack(">I", 3) + struct.pack(">QIIIH", 0x49484156454F5054, _GO, 6, 0, 0))
        while True:  # the replies to GO, up to the acknowledgement
            _, _, reply, length = struct.unpack(">QIII", _receive(connection, 20))
            _receive(connection, length)
            if reply == 1:
                break
        for cookie in range(_REQUESTS):
            connection.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, cookie, cookie * _LENGTH, _LENGTH))
        yield


def _receive(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            raise ConnectionError("the server hung up during the handshake")
        data += piece
    return data
