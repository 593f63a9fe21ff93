"""RemoteDevice against servers that others wrote, and against our own."""

from __future__ import annotations

import errno
import os
import random
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdserve.block import Computed, Zero
from nbdserve.client import connect
from nbdserve.errors import OpenError, ReadOnly
from nbdserve.opening import open_image
from tests.conformance import check_block_device
from tests.interop.certificates import make_certificates
from tests.serving import Served

SIZE = 1 << 20


@contextmanager
def running(*command: str | Path, socket_path: Path) -> Iterator[str]:
    """A server in the foreground, once its socket is there."""
    with subprocess.Popen([os.fspath(word) for word in command]) as process:
        try:
            deadline = time.monotonic() + 20
            while not socket_path.exists():
                assert process.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server does not listen"
                time.sleep(0.02)
            yield f"nbd+unix:///?socket={socket_path}"
        finally:
            process.terminate()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


def check_remote(uri: str) -> None:
    check_block_device(lambda: connect(uri), lambda device: (device.close(), connect(uri))[1], examples=8)


@pytest.mark.needs("qemu-nbd")
def test_conformance_with_qemu_nbd(image: Path, tmp_path: Path) -> None:
    sock = tmp_path / "s"
    with running("qemu-nbd", "-f", "raw", "-t", "-e", "4", "-k", sock, image, socket_path=sock) as uri:
        check_remote(uri)


@pytest.mark.needs("nbdkit")
@pytest.mark.parametrize("options", [[], ["--no-sr"], ["--filter=blocksize-policy", "blocksize-minimum=4096"]])
def test_conformance_with_nbdkit(image: Path, tmp_path: Path, options: list[str]) -> None:
    """Without structured replies there is no allocation; with a minimum block size, smaller writes read first."""
    sock = tmp_path / "s"
    policy = ["blocksize-error-policy=error"] if options and options[0].startswith("--filter") else []
    flags = [option for option in options if option.startswith("--")]
    values = [option for option in options if not option.startswith("--")]
    command = ["nbdkit", "-f", "-U", sock, *flags, "file", image, *values, *policy]
    with running(*command, socket_path=sock) as uri:
        check_remote(uri)


def test_conformance_with_nbdserve(image: Path) -> None:
    with Served(image, "--format", "raw", "-t") as server:
        check_remote(server.uri)


@pytest.mark.needs("qemu-img", "qemu-io")
def test_holes_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "64M"], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 7 16M 1M", path], check=True, stdout=subprocess.DEVNULL)
    with Served(path, "-r") as server, connect(server.uri) as device:
        extents = list(device.extents(0, device.size))
        assert extents == [Zero(16 << 20, False), Computed(1 << 20), Zero(47 << 20, False)]
        assert device.read((16 << 20) - 2, 4) == b"\0\0\7\7"
        assert device.read_only
        with pytest.raises(ReadOnly):
            device.write(0, b"x")


def test_many_threads_share_a_connection(image: Path) -> None:
    content = image.read_bytes()
    wrong: list[int] = []
    with Served(image, "--format", "raw", "-r") as server, connect(server.uri) as device:

        def read_about(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(150):
                offset = chance.randrange(SIZE)
                length = chance.randrange(1, min(100_000, SIZE - offset) + 1)
                if device.read(offset, length) != content[offset : offset + length]:
                    wrong.append(offset)

        threads = [threading.Thread(target=read_about, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert not wrong


def test_an_error_of_the_server_is_an_oserror(image: Path) -> None:
    with Served(image, "--format", "raw") as server, connect(server.uri) as device:
        device.size += 4096  # only the server knows better now
        with pytest.raises(OSError, match="past the end") as caught:
            device.write(SIZE, b"x")
        assert caught.value.errno == errno.ENOSPC
        device.size = SIZE
        device.write(0, b"still works")
        assert device.read(0, 11) == b"still works"


def test_a_server_that_dies_fails_every_call(image: Path) -> None:
    with Served(image, "--format", "raw", "-r") as server:
        device = connect(server.uri)
        assert device.read(0, 1)
    for _ in range(2):
        with pytest.raises(OSError, match="connection is lost"):
            device.read(0, 1)
    device.close()


def test_tls(image: Path, tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path / "pki")
    with Served(image, "--format", "raw", "-r", "--tls-certs", certificates.good, "--tls", "require") as server:
        plain = server.uri.replace("nbds:", "nbd:")
        secure = plain.replace("nbd:", "nbds:")
        with connect(f"{secure}?tls-certificates={certificates.good}") as device:
            assert device.read(0, SIZE) == image.read_bytes()
        with pytest.raises(OpenError, match="requires TLS"):
            connect(plain)
        with pytest.raises(OpenError, match="not trusted"):
            connect(secure)
        with pytest.raises(OpenError, match=r"mismatch|not valid"):
            connect(f"{secure}?tls-certificates={certificates.good}&tls-hostname=elsewhere.example")


def test_nobody_is_there(tmp_path: Path) -> None:
    with pytest.raises(OpenError, match="is the server running"):
        connect(f"nbd+unix:///?socket={tmp_path}/none")


def test_a_server_that_is_none(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.fspath(tmp_path / "s"))
    listener.listen()

    def answer() -> None:
        connection, _ = listener.accept()
        connection.sendall(b"220 mail.example.org ESMTP\r\n")
        connection.recv(100)
        connection.close()

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(OpenError, match="no NBD server"):
        connect(f"nbd+unix:///?socket={tmp_path}/s")
    thread.join(10)
    listener.close()


def test_an_export_that_is_not_there(image: Path) -> None:
    with Served(image, "--format", "raw") as server, pytest.raises(OpenError, match="no such export"):
        connect(f"{server.uri}/other")


def test_open_image_takes_uris(image: Path, tmp_path: Path) -> None:
    with Served(image, "--format", "raw", "-r") as server:
        with pytest.raises(OpenError, match="offers it read-only"):
            open_image(server.uri)
        with pytest.raises(OpenError, match="raw disk"):
            open_image(server.uri, format="qcow2", read_only=True)
        with open_image(server.uri, read_only=True) as device:
            assert device.read(0, SIZE) == image.read_bytes()
        with Served(server.uri, "-r") as proxy, connect(proxy.uri) as device:
            assert device.read(0, SIZE) == image.read_bytes()
