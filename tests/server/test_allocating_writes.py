"""Writes that have to allocate, many at a time: few threads do them, and those that waited are tried again."""

from __future__ import annotations

from pathlib import Path
from random import Random

from tests.reference import needs, qemu_check, qemu_content, qemu_img_create
from tests.server import wire
from tests.server.wire import Wire
from tests.serving import Served

KIB = 1 << 10
MIB = 1 << 20


@needs("qemu-img")
def test_a_burst_of_writes_to_a_fresh_overlay(tmp_path: Path) -> None:
    chosen = Random(11)
    content = bytearray(chosen.randbytes(8 * MIB))
    (tmp_path / "base.raw").write_bytes(content)
    image = qemu_img_create(tmp_path / "overlay.qcow2", None, backing_file="base.raw", backing_fmt="raw")
    # Some in whole clusters, some across two, some within one; no two of them meet, for their order is open.
    places = [
        (number * 32 * KIB + chosen.randrange(8 * KIB), chosen.choice((512, 4096, 20 * KIB))) for number in range(256)
    ]
    chosen.shuffle(places)
    with Served(image, "-f", "qcow2") as server, Wire(server.connect()) as client:
        client.greet()
        client.go()
        requests = []
        for offset, length in places:
            data = chosen.randbytes(length)
            content[offset : offset + length] = data
            requests.append(client.request(wire.WRITE, offset, length, payload=data))
        client.send(b"".join(request for _, request in requests))
        replies = [client.reply() for _ in requests]
        assert {reply.cookie for reply in replies} == {cookie for cookie, _ in requests}
        assert not any(reply.error for reply in replies)
        assert client.read(0, 8 * MIB) == content
        client.send(client.request(wire.DISC)[1])
    qemu_check(image)
    assert qemu_content(image, "qcow2") == content
