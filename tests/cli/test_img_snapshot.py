"""nbdimg snapshot beside qemu-img snapshot, on the same images."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.img import nbdimg
from tests.reference import needs, qemu_check, qemu_content, qemu_img_create, qemu_info, qemu_io, run

pytestmark = needs("qemu-img", "qemu-io")

MIB = 1 << 20


def test_the_list_is_qemus(tmp_path: Path) -> None:
    image = qemu_img_create(tmp_path / "a.qcow2", MIB)
    assert nbdimg("snapshot", "-l", image) == run("qemu-img", "snapshot", "-l", image)
    for maker in (run, nbdimg):
        command = ["qemu-img"] if maker is run else []
        maker(*command, "snapshot", "-c", f"by {maker.__name__} with quite a long name", image)
    assert nbdimg("snapshot", "-l", image) == run("qemu-img", "snapshot", "-l", image)
    assert nbdimg("snapshot", image, "--json") == nbdimg("snapshot", "--output=json", "-l", image)
    assert json.loads(nbdimg("snapshot", "--json", image)) == qemu_info(image)["snapshots"]


def test_what_a_machine_leaves_is_shown(tmp_path: Path) -> None:
    """The size of its state, and how long it had been running: written into the entry as QEMU's savevm does."""
    image = qemu_img_create(tmp_path / "a.qcow2", MIB)
    nbdimg("snapshot", "-c", "s", image)
    content = bytearray(image.read_bytes())
    entry = int.from_bytes(content[64:72], "big")
    content[entry + 24 : entry + 32] = (90061_000_000_000 + 234_000_000).to_bytes(8, "big")
    content[entry + 40 : entry + 48] = (5 << 20).to_bytes(8, "big")
    image.write_bytes(content)
    shown = nbdimg("snapshot", "-l", image)
    assert shown == run("qemu-img", "snapshot", "-l", image)
    assert "5 MiB" in shown and "25:01:01.234" in shown
    assert json.loads(nbdimg("snapshot", "--json", image)) == qemu_info(image)["snapshots"]


def test_apply_by_name_and_by_id(tmp_path: Path) -> None:
    image = qemu_img_create(tmp_path / "a.qcow2", 2 * MIB)
    for number in (1, 2):
        qemu_io(image, f"write -P {number} 0 1M")
        nbdimg("snapshot", "-c", f"s{number}", image)
    for wanted, number in (("s1", 1), ("2", 2)):
        nbdimg("snapshot", "-a", wanted, image)
        qemu_check(image)
        assert qemu_content(image, "qcow2") == bytes([number]) * MIB + bytes(MIB)


def test_an_overlay_whose_base_is_away_is_listed(tmp_path: Path) -> None:
    base = qemu_img_create(tmp_path / "base", MIB)
    image = qemu_img_create(tmp_path / "a.qcow2", None, backing_file="base", backing_fmt="qcow2")
    nbdimg("snapshot", "-c", "s", image)
    base.unlink()
    assert "s" in nbdimg("snapshot", "-l", image)
    assert "base" in nbdimg("snapshot", "-d", "s", image, status=1)


def test_mistakes_are_said_in_a_line(tmp_path: Path) -> None:
    image = qemu_img_create(tmp_path / "a.qcow2", MIB)
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(MIB))
    for arguments, said in (
        (("-d", "nope", image), "no snapshot 'nope'"),
        (("-a", "nope", image), "no snapshot 'nope'"),
        (("-l", raw), "raw images have no internal snapshots"),
        (("-c", "x", "-f", "raw", image), "raw images have no internal snapshots"),
        (("-l", tmp_path / "absent"), "no such file"),
        (("-l", "-d", "x", image), "not allowed with"),
    ):
        printed = nbdimg("snapshot", *arguments, status=1)
        assert said in printed and len(printed.splitlines()) == 1
