"""nbdimg convert: what we write qemu-img reads, and what it writes we read; and nothing is ever half there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli.img import NBDIMG, nbdimg
from tests.imagetools.content import MIB, mixed
from tests.reference import needs, qemu_check, qemu_content, qemu_img_create, qemu_info, qemu_io, run

FORMATS = [
    ("qcow2", ()),
    ("qcow2", ("-c",)),
    ("qcow2", ("-c", "-o", "compression_type=zstd,cluster_size=256k")),
    ("qcow2", ("-o", "cluster_size=512,compat=0.10")),
    ("qcow2", ("-o", "extended_l2=on,cluster_size=2M")),
    ("qcow2", ("-S", "0")),
    ("raw", ()),
    ("vpc", ("-o", "force_size=on")),
    ("vpc", ("-o", "subformat=fixed,force_size=on")),
    ("vhdx", ()),
    ("vdi", ()),
    ("vmdk", ()),
    ("vmdk", ("-o", "subformat=twoGbMaxExtentFlat")),
    ("vmdk", ("-o", "subformat=streamOptimized")),
]


@needs("qemu-img")
@pytest.mark.parametrize(("format", "options"), FORMATS, ids=str)
def test_there_and_back(tmp_path: Path, format: str, options: tuple[str, ...]) -> None:
    content = mixed(tmp_path / "source.raw")
    ours, theirs, back = (tmp_path / name for name in ("ours", "theirs", "back"))
    nbdimg("convert", "-f", "raw", "-O", format, *options, tmp_path / "source.raw", ours)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    shown = qemu_content(ours, format)
    assert shown[: len(content)] == content
    assert not any(shown[len(content) :])
    if format == "qcow2":
        qemu_check(ours)
    arguments = [*options] if options != ("-c", "-o", "compression_type=zstd,cluster_size=256k") else ["-c"]
    run("qemu-img", "convert", "-f", "raw", "-O", format, *arguments, str(tmp_path / "source.raw"), str(theirs))
    nbdimg("convert", "-f", format, "-O", "raw", theirs, back)
    read = back.read_bytes()
    assert read[: len(content)] == content
    assert not any(read[len(content) :])
    if not options:
        assert sum(os.stat(path).st_blocks for path in (ours, back)) < 2 * 11 * MIB // 512, "zeros were written"


@needs("qemu-img", "qemu-io")
def test_a_snapshot_and_a_partition(tmp_path: Path) -> None:
    source = qemu_img_create(tmp_path / "disk.qcow2", "4M")
    qemu_io(source, "write -P 1 0 1M")
    run("qemu-img", "snapshot", "-c", "first", source)
    qemu_io(source, "write -P 2 0 1M")
    nbdimg("convert", "-l", "first", source, tmp_path / "first.raw")
    assert (tmp_path / "first.raw").read_bytes() == b"\1" * MIB + bytes(3 * MIB)

    disk = tmp_path / "parted.raw"
    disk.write_bytes(bytes(8 * MIB))
    run("sfdisk", "-q", str(disk), stdin="2048,2048,L\n4096,8192,L\n")
    (tmp_path / "part.raw").write_bytes(b"\5" * MIB)
    nbdimg("convert", "-f", "raw", "--target-partition", "1", "-O", "raw", tmp_path / "part.raw", disk)
    assert disk.read_bytes()[MIB : 2 * MIB] == b"\5" * MIB
    nbdimg("convert", "-f", "raw", "-P", "1", "-O", "qcow2", disk, tmp_path / "part.qcow2")
    assert qemu_content(tmp_path / "part.qcow2", "qcow2") == b"\5" * MIB
    assert "no partition" in nbdimg("convert", "-f", "raw", "-P", "3", disk, tmp_path / "none.raw", status=1).lower()
    assert not (tmp_path / "none.raw").exists()


@needs("qemu-img", "qemu-io")
def test_only_the_top_image_goes_onto_another_base(tmp_path: Path) -> None:
    base = qemu_img_create(tmp_path / "base.qcow2", "4M")
    qemu_io(base, "write -P 1 0 3M")
    top = qemu_img_create(tmp_path / "top.qcow2", None, backing_file=base.name, backing_fmt="qcow2")
    qemu_io(top, "write -P 2 1M 64k", "write -z 2M 64k")
    copy = tmp_path / "copy.qcow2"
    nbdimg("convert", "-O", "qcow2", "-B", base.name, "-F", "qcow2", top, copy)
    assert qemu_content(copy, "qcow2") == qemu_content(top, "qcow2")
    assert qemu_info(copy)["backing-filename"] == base.name
    assert copy.stat().st_blocks * 512 < MIB
    qemu_check(copy)


@needs("qemu-nbd", "qemu-img")
def test_from_and_to_a_server(tmp_path: Path) -> None:
    content = mixed(tmp_path / "source.raw")
    target = tmp_path / "target.raw"
    target.write_bytes(b"\xff" * len(content))
    for name, arguments in (("source", ["-r"]), ("target", [])):
        socket = tmp_path / f"{name}.sock"
        server = subprocess.Popen(["qemu-nbd", *arguments, "-f", "raw", "-k", socket, tmp_path / f"{name}.raw"])
        try:
            for _ in range(200):
                if socket.exists():
                    break
                time.sleep(0.02)
            uri = f"nbd+unix:///?socket={socket}"
            if name == "source":
                nbdimg("convert", "-O", "qcow2", uri, tmp_path / "copy.qcow2")
                assert qemu_content(tmp_path / "copy.qcow2", "qcow2") == content
            else:
                nbdimg("convert", "-f", "raw", "-O", "raw", tmp_path / "source.raw", uri)
        finally:
            server.terminate()
            server.wait(10)
    assert target.read_bytes() == content


@needs("qemu-img")
def test_a_killed_copy_leaves_what_was_there(tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    with open(source, "wb") as file:
        file.write(os.urandom(MIB) * 48)
    target = qemu_img_create(tmp_path / "target.qcow2", "1M")
    before = target.read_bytes()
    for number, delay in ((signal.SIGINT, 0.45), (signal.SIGKILL, 0.6)):
        process = subprocess.Popen([*NBDIMG, "convert", "-c", "-f", "raw", str(source), str(target)], stderr=-1)
        deadline = time.monotonic() + 10
        while not list(tmp_path.glob(".*.partial")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(delay / 4)
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
        assert process.returncode != 0
        assert b"Traceback" not in errors
        assert target.read_bytes() == before
        assert bool(list(tmp_path.glob(".*"))) == (number == signal.SIGKILL)
    nbdimg("convert", "-f", "raw", source, target)
    assert qemu_content(target, "qcow2") == source.read_bytes()


@needs("qemu-img")
def test_unreadable_parts_are_zeros_and_listed(tmp_path: Path) -> None:
    source = qemu_img_create(tmp_path / "disk.qcow2", "1M")
    qemu_io(source, "write -P 1 0 1M")
    with open(source, "r+b") as file:  # the L2 entry of the third cluster leads nowhere
        table = int(json.loads(run("qemu-img", "map", "--output=json", source))[0]["offset"]) - 65536
        file.seek(table + 16)
        file.write((1 << 63 | 1 << 40).to_bytes(8, "big"))
    target, listed = tmp_path / "copy.raw", tmp_path / "bad.map"
    assert "damaged" in nbdimg("convert", source, target, status=1)
    assert not target.exists()
    for kept in (source, Path(__file__)):  # no other file is lost to the list
        before = kept.read_bytes()
        assert "is no map" in nbdimg("convert", "--skip-errors", kept, source, target, status=1)
        assert kept.read_bytes() == before
    assert "give the target" in nbdimg("convert", "--skip-errors", target, source, target, status=1)
    nbdimg("convert", "--skip-errors", listed, source, target)
    expected = bytearray(b"\1" * MIB)
    expected[131072:196608] = bytes(65536)
    assert target.read_bytes() == expected
    assert "0x00020000  0x00010000  -" in listed.read_text()
    stream = tmp_path / "copy.vmdk"
    nbdimg("convert", "--skip-errors", listed, "-o", "subformat=streamOptimized", source, stream)
    assert qemu_content(stream, "vmdk") == expected
    assert "0x00020000  0x00010000  -" in listed.read_text()


@needs("qemu-img")
@pytest.mark.parametrize("cache", ["unsafe", "writeback", "none"])
def test_a_new_copy_waits_for_the_storage_only_if_that_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    """A copy that replaces another image always does: otherwise a crash could take both."""
    synced: list[str] = []
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    content = mixed(tmp_path / "source.raw")
    target = tmp_path / "target.qcow2"
    nbdimg("convert", "-t", cache, "-f", "raw", tmp_path / "source.raw", target)
    assert bool(synced) == (cache != "unsafe")
    synced.clear()
    nbdimg("convert", "-t", cache, "-f", "raw", tmp_path / "source.raw", target)
    assert any(path.endswith("/target.qcow2") for path in synced)
    assert synced[-1] == str(tmp_path)
    assert qemu_content(target, "qcow2") == content


def test_refusals(tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(bytes(4096))
    for arguments, words in (
        (["-c", "-O", "vdi", source, tmp_path / "x"], "cannot be compressed"),
        (["-S", "3", source, tmp_path / "x"], "power of two"),
        (["-f", "raw", source, source], "is the source as well"),
        ([tmp_path / "none", tmp_path / "x"], "no such file"),
        (["-f", "raw", "-n", source, tmp_path / "x"], "no such file"),
        ([source], "give the source and the target"),
    ):
        message = nbdimg("convert", *arguments, status=1)
        assert words in message
        assert len(message.splitlines()) == 1
    assert os.listdir(tmp_path) == ["source.raw"]


@needs("mkfs.btrfs", "mount", "qemu-img")
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_blocks_are_shared_where_the_file_system_can(tmp_path: Path, format: str) -> None:
    disk, folder = tmp_path / "btrfs", tmp_path / "mnt"
    folder.mkdir()
    with open(disk, "wb") as file:
        file.truncate(256 * MIB)
    run("mkfs.btrfs", "-q", disk)
    run("mount", "-o", "loop", disk, folder)
    try:
        source, target = folder / "source.raw", folder / "target"
        content = os.urandom(40 * MIB) + bytes(3 * MIB) + os.urandom(5 * MIB + 512)
        source.write_bytes(content)
        run("sync", "-f", folder)
        before = os.statvfs(folder).f_bfree
        nbdimg("convert", "-f", "raw", "-O", format, source, target)
        run("sync", "-f", folder)
        taken = (before - os.statvfs(folder).f_bfree) * os.statvfs(folder).f_frsize
        assert taken < 8 * MIB, "blocks were copied"
        assert run("qemu-img", "compare", "-f", "raw", "-F", format, source, target)
        if format == "qcow2":
            qemu_check(target)
            nbdimg("convert", "-O", "raw", target, folder / "back.raw")
            assert (folder / "back.raw").read_bytes() == content
    finally:
        run("umount", folder)
