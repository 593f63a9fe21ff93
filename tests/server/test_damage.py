"""Damage that is found only while an image is served: an error for the request that meets it, and for nobody else."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.reference import needs, qemu_check, qemu_content, qemu_img_create, qemu_io
from tests.server import wire
from tests.server.wire import Wire
from tests.serving import Served

pytestmark = needs("qemu-img", "qemu-io")

MIB = 1 << 20
CLUSTER = 65536


def connect(server: Served) -> Wire:
    client = Wire(server.connect())
    client.greet()
    return client.go()


def damaged_qcow2(path: Path, entry: int) -> Path:
    """An image whose first cluster has a wrong entry in the L2 table; the second one is sound (all ones)."""
    qemu_img_create(path, 16 * MIB, "qcow2", compat="1.1")
    qemu_io(path, "write -P 1 0 1M")
    content = bytearray(path.read_bytes())
    l1_table = int.from_bytes(content[40:48], "big")
    l2_table = int.from_bytes(content[l1_table : l1_table + 8], "big") & 0x00FF_FFFF_FFFF_FE00
    content[l2_table : l2_table + 8] = entry.to_bytes(8, "big")
    path.write_bytes(content)
    return path


ENTRIES = {
    "offset not aligned": 1 << 63 | 5 * CLUSTER + 512,
    "offset far outside": 1 << 63 | 1 << 50,
    "reserved bits": 1 << 63 | 5 * CLUSTER | 0x7E,
    "in the header": 1 << 63,
    "compressed, in the tables": 1 << 62 | 3 * CLUSTER,
    "compressed, far outside": 1 << 62 | 1 << 45,
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_wrong_entry_in_an_l2_table(tmp_path: Path, entry: str) -> None:
    image = damaged_qcow2(tmp_path / "image", ENTRIES[entry])
    with Served(image, "-k", tmp_path / "socket") as server, connect(server) as client, connect(server) as other:
        for command, length in (
            (wire.READ, 512),
            (wire.READ, CLUSTER),
            (wire.READ, MIB),
            (wire.BLOCK_STATUS, MIB),
            (wire.CACHE, CLUSTER),
        ):
            assert client.ask(command, 0, length).error in (0, wire.EIO)
            assert client.read(CLUSTER, 4096) == b"\1" * 4096
        if entry.startswith(("compressed", "offset not")):
            assert client.ask(wire.READ, 0, 512).error == wire.EIO
        for command, length in ((wire.WRITE_ZEROES, 4096), (wire.TRIM, 4096), (wire.FLUSH, 0)):
            assert client.ask(command, 0, length).error in (0, wire.EIO)
        assert client.write(100, b"x" * 1000) in (0, wire.EIO)
        assert client.write(0, b"x" * 4096) in (0, wire.EIO)
        assert client.read(CLUSTER, 4096) == b"\1" * 4096
        assert other.read(CLUSTER, MIB - CLUSTER) == b"\1" * (MIB - CLUSTER)


def test_a_disk_that_fails_is_reported_and_answered(tmp_path: Path) -> None:
    """The image's file is cut short under the server: what is gone reads as zeros, and the server lives."""
    image = qemu_img_create(tmp_path / "image", 16 * MIB, "qcow2")
    qemu_io(image, "write -P 1 0 4M")
    with Served(image, "-k", tmp_path / "socket") as server, connect(server) as client:
        assert client.read(0, 4 * MIB) == b"\1" * (4 * MIB)
        with image.open("r+b") as file:
            file.truncate(2 * MIB)
        for length in (512, CLUSTER, 2 * MIB, 4 * MIB):
            reply = client.ask(wire.READ, 0, length)
            assert reply.error in (0, wire.EIO)
        assert client.read(0, 4096) == b"\1" * 4096


@needs("prlimit")
def test_a_full_disk_is_answered_with_enospc(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: what does not fit fails, what was there stays."""
    image = qemu_img_create(tmp_path / "image", 16 * MIB, "qcow2")
    qemu_io(image, "write -P 1 0 1M")
    with Served(image, "-k", tmp_path / "socket") as server, connect(server) as client:
        subprocess.run(["prlimit", f"--pid={server.process.pid}", f"--fsize={4 * MIB}:"], check=True)
        errors = {client.write(offset, b"\2" * CLUSTER) for offset in range(MIB, 8 * MIB, CLUSTER)}
        assert errors == {0, wire.ENOSPC}
        assert client.read(0, MIB) == b"\1" * MIB
        assert client.read(MIB, CLUSTER) == b"\2" * CLUSTER
        subprocess.run(["prlimit", f"--pid={server.process.pid}", "--fsize=unlimited:"], check=True)
        assert client.write(12 * MIB, b"\3" * CLUSTER) == 0
        assert client.ask(wire.FLUSH).error == 0
    qemu_check(image, leaks_allowed=True)
    content = qemu_content(image, "qcow2")
    assert content[:MIB] == b"\1" * MIB
    assert content[MIB : MIB + CLUSTER] == b"\2" * CLUSTER
    assert content[12 * MIB : 12 * MIB + CLUSTER] == b"\3" * CLUSTER
    for offset in range(MIB, 8 * MIB, CLUSTER):
        assert content[offset : offset + CLUSTER] in (b"\2" * CLUSTER, bytes(CLUSTER))
