"""The kernel's NBD devices through generic netlink: include/uapi/linux/nbd-netlink.h, genetlink.h and netlink.h.

The sockets that are handed over are looked up in this very process while it sends, so everything here is synchronous.
All numbers are in the machine's byte order, and every attribute starts at a multiple of four bytes.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct

from nbdserve.kernel.system import KernelError, Unavailable

_MESSAGE = Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_GENERIC = Struct("=BBH")  # genlmsghdr: command, version, reserved
_ATTRIBUTE = Struct("=HH")  # nlattr: length, type
_U32, _U64, _ERROR = Struct("=I"), Struct("=Q"), Struct("=i")

_NETLINK_GENERIC = 16
_ERROR_MESSAGE, _CONTROL_FAMILY = 2, 16  # NLMSG_ERROR, GENL_ID_CTRL
_REQUEST, _WANT_ACK = 1, 4  # NLM_F_REQUEST, NLM_F_ACK
_NESTED = 1 << 15  # NLA_F_NESTED
_TYPE_MASK = (1 << 14) - 1
_GET_FAMILY, _FAMILY_ID, _FAMILY_NAME = 3, 1, 2  # CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_ID, CTRL_ATTR_FAMILY_NAME
_RECEIVE_BYTES = 1 << 16


class _Command(IntEnum):
    """NBD_CMD_*"""

    CONNECT = 1
    DISCONNECT = 2
    RECONFIGURE = 3


class _Attribute(IntEnum):
    """NBD_ATTR_*"""

    INDEX = 1
    SIZE_BYTES = 2
    BLOCK_SIZE_BYTES = 3
    TIMEOUT = 4
    SERVER_FLAGS = 5
    SOCKETS = 7
    DEAD_CONN_TIMEOUT = 8
    BACKEND_IDENTIFIER = 10


_ITEM, _SOCKET_FD = 1, 1  # NBD_SOCK_ITEM, NBD_SOCK_FD

_Attributes = dict[int, bytes]


@dataclass(frozen=True, slots=True)
class Connection:
    """What the kernel has to know of a server.

    Attributes:
        size: of the export, bytes.
        flags: of the export, as the server announced them.
        request_seconds: after which an unanswered request counts its connection as dead.
        dead_seconds: for which requests wait for a new connection when all are dead; then they fail.
        identifier: what the device's `backend` says in sysfs; a later reconfigure() has to give the same.
    """

    size: int
    flags: int
    request_seconds: int
    dead_seconds: int
    identifier: str


class NbdNetlink:
    """A netlink socket that knows the family "nbd"; a context manager."""

    def __init__(self) -> None:
        """Find the family.

        Raises:
            Unavailable: the kernel does not offer it here.
        """
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_GENERIC)
        except OSError as error:
            raise Unavailable(f"netlink cannot be used here: {error.strerror}") from None
        self._sequence = 0
        try:
            self._socket.bind((0, 0))
            answer = self._ask(_CONTROL_FAMILY, _GET_FAMILY, _attribute(_FAMILY_NAME, b"nbd\0"))
        except OSError as error:
            self._socket.close()
            if error.errno == errno.ENOENT:
                raise Unavailable(
                    "the kernel's NBD is out of reach here (not loaded, or a container's network)"
                ) from None
            raise
        self._family = int.from_bytes(answer[_FAMILY_ID], sys.byteorder)

    def __enter__(self) -> NbdNetlink:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def connect(self, sockets: Sequence[socket.socket], connection: Connection, index: int | None) -> int:
        """Make a device of connections on which the handshake is over; they belong to the kernel from then on.

        Args:
            index: of the device, or None: the kernel takes a free one, or makes one.

        Returns:
            The index of the device.

        Raises:
            KernelError: the device is in use, or the kernel refuses.
        """
        attributes = [
            *([_attribute(_Attribute.INDEX, _U32.pack(index))] if index is not None else []),
            _attribute(_Attribute.SIZE_BYTES, _U64.pack(connection.size)),
            _attribute(_Attribute.BLOCK_SIZE_BYTES, _U64.pack(512)),  # a larger one would cut the end of the disk off
            _attribute(_Attribute.SERVER_FLAGS, _U64.pack(connection.flags)),
            *_server(sockets, connection),
        ]
        try:
            answer = self._ask(self._family, _Command.CONNECT, b"".join(attributes))
        except OSError as error:
            where = "a device" if index is None else f"/dev/nbd{index}"
            raise KernelError(f"the kernel does not connect {where}: {error.strerror}") from None
        return int(_U32.unpack(answer[_Attribute.INDEX])[0])

    def reconfigure(self, index: int, sockets: Sequence[socket.socket], connection: Connection) -> None:
        """Replace a device's dead connections by new ones; requests that wait for that go on.

        Raises:
            KernelError: it is not connected, or no connection of it is dead.
        """
        attributes = [_attribute(_Attribute.INDEX, _U32.pack(index)), *_server(sockets, connection)]
        try:
            self._ask(self._family, _Command.RECONFIGURE, b"".join(attributes))
        except OSError as error:
            raise KernelError(f"the kernel does not reconnect /dev/nbd{index}: {error.strerror}") from None

    def disconnect(self, index: int) -> None:
        """Say goodbye to the server; requests under way fail.

        Raises:
            KernelError: it is not connected.
        """
        try:
            self._ask(self._family, _Command.DISCONNECT, _attribute(_Attribute.INDEX, _U32.pack(index)))
        except OSError as error:
            raise KernelError(f"the kernel does not disconnect /dev/nbd{index}: {error.strerror}") from None

    def _ask(self, family: int, command: int, attributes: bytes) -> _Attributes:
        """Send a request; the attributes of its answer, if it has any. Raises OSError with the kernel's errno."""
        self._sequence += 1
        body = _GENERIC.pack(command, 1, 0) + attributes
        header = _MESSAGE.pack(_MESSAGE.size + len(body), family, _REQUEST | _WANT_ACK, self._sequence, 0)
        self._socket.send(header + body)
        answer: _Attributes = {}
        while True:
            data = self._socket.recv(_RECEIVE_BYTES)
            while data:
                length, kind, _, _, _ = _MESSAGE.unpack_from(data)
                body = data[_MESSAGE.size : length]
                data = data[_aligned(length) :]
                if kind != _ERROR_MESSAGE:
                    answer = _parsed(body[_GENERIC.size :])
                elif code := -_ERROR.unpack_from(body)[0]:
                    raise OSError(code, os.strerror(code))
                else:
                    return answer


def _server(sockets: Sequence[socket.socket], connection: Connection) -> list[bytes]:
    items = [_attribute(_ITEM | _NESTED, _attribute(_SOCKET_FD, _U32.pack(each.fileno()))) for each in sockets]
    return [
        _attribute(_Attribute.TIMEOUT, _U64.pack(connection.request_seconds)),
        _attribute(_Attribute.DEAD_CONN_TIMEOUT, _U64.pack(connection.dead_seconds)),
        _attribute(_Attribute.BACKEND_IDENTIFIER, connection.identifier.encode() + b"\0"),
        _attribute(_Attribute.SOCKETS | _NESTED, b"".join(items)),
    ]


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def _attribute(kind: int, content: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(content)
    return _ATTRIBUTE.pack(length, kind) + content + bytes(_aligned(length) - length)


def _attributes(data: bytes) -> list[tuple[int, bytes]]:
    found = []
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        found.append((kind & _TYPE_MASK, data[_ATTRIBUTE.size : length]))
        data = data[_aligned(max(length, _ATTRIBUTE.size)) :]
    return found


def _parsed(data: bytes) -> _Attributes:
    return dict(_attributes(data))
