"""The client's half of the protocol on real servers: qemu-nbd and nbdkit, each with one raw file."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdserve.errors import ProtocolError
from nbdserve.protocol.constants import AllocationState, Command, CommandFlags, ErrorCode, TransmissionFlags
from nbdserve.protocol.handshake import HandshakeState
from nbdserve.protocol.handshake_client import ClientHandshake
from nbdserve.protocol.messages import Listing
from nbdserve.protocol.outstanding import BlockStatusChunk, Done, Event
from nbdserve.protocol.transmission_client import ReplyReader
from tests.reference import needs

SIZE = 4 << 20
DATA_END = 1 << 20  # behind it the file is one hole

QEMU = pytest.param(("qemu-nbd", "-t", "-f", "raw", "-x", "disk", "-D", "a disk", "-k"), marks=needs("qemu-nbd"))
NBDKIT = pytest.param(("nbdkit", "-f", "-U"), marks=needs("nbdkit"))
SERVERS = pytest.mark.parametrize("server", [QEMU, NBDKIT], ids=["qemu-nbd", "nbdkit"])


class Session:
    """The smallest blocking client."""

    def __init__(self, path: Path, handshake: ClientHandshake) -> None:
        self.handshake = handshake
        self._cookies = itertools.count(1)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(20)
        self._socket.connect(str(path))
        try:
            self._shake_hands()
        except ProtocolError:
            self.close()
            raise
        if handshake.state is HandshakeState.TRANSMISSION:
            agreement = handshake.agreement
            self.reader = ReplyReader(agreement.structured, agreement.contexts)
        else:
            self.close()

    def _shake_hands(self) -> None:
        while self.handshake.state is HandshakeState.NEGOTIATING:
            self._socket.sendall(self.handshake.data_to_send())
            received = self._socket.recv(65536)
            if not received:
                self.handshake.connection_lost()
            self.handshake.receive(received)
        self._socket.sendall(self.handshake.data_to_send())

    def ask(
        self, command: Command, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b""
    ) -> list[Event]:
        self._socket.sendall(self.reader.request(command, next(self._cookies), offset, length, flags) + payload)
        events: list[Event] = []
        while self.reader.outstanding:
            size = self._socket.recv_into(self.reader.space())
            assert size, "the server hung up"
            self.reader.received(size)
            events.extend(self.reader.events())
        return events

    def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        *_, done = self.ask(Command.READ, offset, length, flags)
        assert isinstance(done, Done)
        assert done.error is None, done.text
        assert done.data is not None
        return bytes(done.data)

    def close(self) -> None:
        self._socket.close()


@contextmanager
def serving(command: tuple[str, ...], directory: Path) -> Iterator[tuple[Path, bytearray]]:
    """The server's socket, and what is on its disk."""
    content = bytearray(os.urandom(DATA_END)) + bytes(SIZE - DATA_END)
    image, path = directory / "disk.raw", directory / "socket"
    image.write_bytes(content[:DATA_END])
    os.truncate(image, SIZE)
    process = subprocess.Popen([*command, str(path), *(["file"] if command[0] == "nbdkit" else []), str(image)])
    try:
        for _ in range(200):
            if path.exists() and process.poll() is None:
                break
            time.sleep(0.02)
        yield path, content
    finally:
        process.terminate()
        process.wait(10)


@SERVERS
@pytest.mark.parametrize("structured", [True, False])
def test_reading_and_writing(server: tuple[str, ...], structured: bool, tmp_path: Path) -> None:
    with serving(server, tmp_path) as (path, content):
        session = Session(path, ClientHandshake("disk", structured=structured))
        agreement = session.handshake.agreement
        assert (agreement.export.size, agreement.structured) == (SIZE, structured)
        assert agreement.export.flags & TransmissionFlags.SEND_FLUSH
        assert session.read(0, SIZE) == content
        assert session.read(DATA_END - 700, 1400) == content[DATA_END - 700 : DATA_END + 700]
        if agreement.export.flags & TransmissionFlags.SEND_DF:
            assert session.read(DATA_END - 700, 1400, CommandFlags.DF) == content[DATA_END - 700 : DATA_END + 700]

        session.ask(Command.WRITE, 2 << 20, 300_000, CommandFlags.FUA, b"w" * 300_000)
        content[2 << 20 : (2 << 20) + 300_000] = b"w" * 300_000
        session.ask(Command.WRITE_ZEROES, 4096, 8192)
        content[4096 : 4096 + 8192] = bytes(8192)
        session.ask(Command.FLUSH)
        assert session.read(0, SIZE) == content
        assert (tmp_path / "disk.raw").read_bytes() == content

        *_, done = session.ask(Command.READ, SIZE, 512)
        assert isinstance(done, Done)
        assert done.error is ErrorCode.EINVAL
        assert session.read(0, 512) == content[:512], "the connection goes on behind an error"
        session.close()


@SERVERS
def test_block_status(server: tuple[str, ...], tmp_path: Path) -> None:
    with serving(server, tmp_path) as (path, _):
        session = Session(path, ClientHandshake("disk"))
        ((context, name),) = session.handshake.agreement.contexts.items()
        assert name == "base:allocation"
        status, _ = session.ask(Command.BLOCK_STATUS, 0, SIZE)
        assert isinstance(status, BlockStatusChunk)
        assert status.context == context
        assert status.extents == (
            (DATA_END, 0),
            (SIZE - DATA_END, AllocationState.HOLE | AllocationState.ZERO),
        )
        status, _ = session.ask(Command.BLOCK_STATUS, 0, 4096, CommandFlags.REQ_ONE)
        assert isinstance(status, BlockStatusChunk)
        assert status.extents == ((4096, 0),)
        session.close()


@SERVERS
def test_listing_asking_and_being_refused(server: tuple[str, ...], tmp_path: Path) -> None:
    with serving(server, tmp_path) as (path, _):
        listing = Session(path, ClientHandshake(list_only=True)).handshake.listed
        assert listing == ((Listing("disk", "a disk"),) if server[0] == "qemu-nbd" else (Listing(""),))
        asked = Session(path, ClientHandshake(listing[0].name, info_only=True)).handshake.agreement
        assert asked.export.size == SIZE
        with pytest.raises(ProtocolError, match="refuses STARTTLS"):
            Session(path, ClientHandshake(tls=True))
        if server[0] == "qemu-nbd":  # nbdkit's file plugin ignores the name
            with pytest.raises(ProtocolError, match='refuses export "nosuch": it has no such export; it says: '):
                Session(path, ClientHandshake("nosuch"))


@pytest.mark.parametrize(
    ("option", "words"), [("--oldstyle", "oldstyle"), ("--mask-handshake=0", "STARTTLS|fixed newstyle")]
)
@needs("nbdkit")
def test_old_servers(option: str, words: str, tmp_path: Path) -> None:
    with serving(("nbdkit", option, "-f", "-U"), tmp_path) as (path, content):
        with pytest.raises(ProtocolError, match=words):
            Session(path, ClientHandshake(tls=True))
        if option != "--oldstyle":
            session = Session(path, ClientHandshake("disk"))
            assert not session.handshake.agreement.structured
            assert session.read(0, SIZE) == content
            session.close()
