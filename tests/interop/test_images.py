"""Images that qemu makes, through the server, judged by qemu-img and libnbd; and what is written comes back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from tests.reference import needs, qemu_check, qemu_content, qemu_img_create, qemu_io, qemu_map, run
from tests.serving import Served

MIB = 1 << 20

PATTERN = (
    "write -P 1 0 3M",
    "write -P 2 3145729 777",
    "write -z 1M 600k",
    "write -P 3 7M 64k",
    "write -z -u 2M 128k",
    "write -P 4 11111111 70001",
    "discard 8M 1M",
    "write -P 5 16776704 512",
)


@dataclass(frozen=True, slots=True)
class Image:
    """How to make an image in a directory, and how to open it."""

    name: str
    format: str
    make: Callable[[Path], Path]

    def __str__(self) -> str:
        return self.name


def plain(format: str, **options: str | int) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        image = qemu_img_create(folder / "image", "16M", format, **options)
        qemu_io(image, *PATTERN, format=format)
        return image

    return make


def compressed(**options: str | int) -> Callable[[Path], Path]:
    """Compressed clusters among ordinary ones, some written over."""

    def make(folder: Path) -> Path:
        source = plain("raw")(folder)
        image = folder / "compressed"
        chosen = ",".join(f"{name}={value}" for name, value in options.items())
        run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", chosen, source, image)
        qemu_io(image, "write -P 8 2M 100k", "write -P 9 5000001 3", "write -z 64k 256k")
        return image

    return make


def overlay(base_format: str, base_size: str, size: str, **options: str | int) -> Callable[[Path], Path]:
    """A qcow2 image over a base that may be shorter or longer."""

    def make(folder: Path) -> Path:
        base = qemu_img_create(folder / "base", base_size, base_format)
        qemu_io(base, "write -P 6 0 5M", "write -P 7 6M 100k", "write -z 2M 1M", format=base_format)
        image = folder / "image"
        qemu_img_create(image, size, backing_file="base", backing_fmt=base_format, **options)
        qemu_io(image, "write -P 1 100 70000", "write -z 4M 128k", "write -P 2 7800000 100k")
        return image

    return make


QCOW2 = [
    Image(f"qcow2 {compat} {cluster}", "qcow2", plain("qcow2", compat=compat, cluster_size=cluster))
    for compat in ("0.10", "1.1")
    for cluster in ("512", "4k", "64k", "2M")
]
COMPRESSED = [
    Image(f"compressed {kind} {cluster}", "qcow2", compressed(compression_type=kind, cluster_size=cluster))
    for kind in ("zlib", "zstd")
    for cluster in ("4k", "64k", "2M")
]
OVERLAYS = [
    Image("over raw", "qcow2", overlay("raw", "16M", "16M")),
    Image("over qcow2", "qcow2", overlay("qcow2", "16M", "16M", cluster_size="4k")),
    Image("over vpc", "qcow2", overlay("vpc", "16M", "16M")),
    Image("over a shorter one", "qcow2", overlay("qcow2", "7M", "16M")),
    Image("over a longer one", "qcow2", overlay("qcow2", "32M", "8M", compat="0.10")),
]
OTHERS = [
    Image("raw", "raw", plain("raw")),
    Image("vpc dynamic", "vpc", plain("vpc", subformat="dynamic")),
    Image("vpc fixed", "vpc", plain("vpc", subformat="fixed")),
]
IMAGES = [*QCOW2, *COMPRESSED, *OVERLAYS, *OTHERS]


@pytest.mark.parametrize("kind", IMAGES, ids=str)
@needs("qemu-img", "qemu-io", "nbdcopy", "nbdinfo")
def test_what_qemu_made_is_served_as_qemu_reads_it(kind: Image, tmp_path: Path) -> None:
    image = kind.make(tmp_path)
    before = image.read_bytes()
    expected = qemu_content(image, kind.format)
    with Served(image, "-f", kind.format, "-k", tmp_path / "socket") as server:
        run("nbdcopy", server.uri, tmp_path / "copy")
        mapped = json.loads(run("nbdinfo", "--map", "--json", server.uri))
        assert int(run("nbdinfo", "--size", server.uri)) == len(expected)
    assert (tmp_path / "copy").read_bytes() == expected
    assert image.read_bytes() == before, "nothing was asked to be written"
    ours = zeros((extent["offset"], extent["length"], bool(extent["type"] & 2)) for extent in mapped)
    theirs = zeros((extent["start"], extent["length"], extent["zero"]) for extent in qemu_map(image, kind.format))
    assert all(not any(expected[start:end]) for start, end in ours)
    if kind.format == "raw":
        assert ours == theirs
    else:  # we also see the holes that the host's file has within clusters
        assert [run for run in theirs if not any(start <= run[0] and run[1] <= end for start, end in ours)] == []


def zeros(extents: Iterable[tuple[int, int, bool]]) -> list[tuple[int, int]]:
    """(start, end) of the runs of zeros."""
    runs: list[tuple[int, int]] = []
    for start, length, is_zero in extents:
        if is_zero and runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], start + length)
        elif is_zero:
            runs.append((start, start + length))
    return runs


WRITABLE = [QCOW2[0], QCOW2[2], QCOW2[6], QCOW2[7], COMPRESSED[1], *OVERLAYS[:4], *OTHERS]


def assert_holds(image: Path, format: str, model: bytes, folder: Path) -> None:
    """The image is sound, and its content is the model's."""
    if format == "qcow2":
        qemu_check(image)
    (folder / "model").write_bytes(model)
    run("qemu-img", "compare", "-f", "raw", "-F", format, folder / "model", image)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("kind", WRITABLE, ids=str)
@needs("qemu-img", "qemu-io")
def test_what_qemu_io_writes_comes_back(kind: Image, seed: int, tmp_path: Path) -> None:
    image = kind.make(tmp_path)
    base = (tmp_path / "base").read_bytes() if (tmp_path / "base").exists() else b""
    model, chance = qemu_content(image, kind.format), Random(seed)
    commands = []
    for _ in range(60):
        length = chance.choice((1, 512, 4096, 65536, 200_000, 3 * MIB))
        offset = chance.randrange(len(model) - length)
        match chance.choice(("write", "write", "fua", "zero", "unmap", "flush", "discard")):
            case "flush":
                commands.append("flush")
                continue
            case "zero":
                commands.append(f"write -z {offset} {length}")
                fill = 0
            case "unmap":
                commands.append(f"write -z -u {offset} {length}")
                fill = 0
            case "discard":  # says nothing of what is there afterwards
                commands.append(f"discard {offset} {length}")
                fill = chance.randrange(1, 256)
                commands.append(f"write -P {fill} {offset} {length}")
            case how:
                fill = chance.randrange(1, 256)
                commands.append(f"write {'-f ' if how == 'fua' else ''}-P {fill} {offset} {length}")
        model[offset : offset + length] = bytes([fill]) * length
        commands.append(f"read -P {fill} {offset} {length}")
    with Served(image, "-f", kind.format, "-k", tmp_path / "socket") as server:
        printed = qemu_io(server.uri, *commands, format="raw")
        assert "failed" not in printed
    assert_holds(image, kind.format, model, tmp_path)
    assert not base or (tmp_path / "base").read_bytes() == base


# Runs in nbdsh, where h is the connection. TRIM says only that the bytes may be zeros afterwards: what is read back
# must be that or what was there before, and stays from then on.
NBDSH = """
import json, pathlib, random
folder = pathlib.Path({folder!r})
size, chance = h.get_size(), random.Random({seed})
model = bytearray(h.pread(size, 0))
for number in range(150):
    length = min(chance.choice((1, 511, 4096, 65536, 300_000, 2 << 20)), size)
    offset = chance.randrange(size - length + 1)
    if chance.random() < 0.5:
        offset &= ~4095
    end = offset + length
    kind = chance.choice(("write", "write", "fua", "zero", "no hole", "fast zero", "trim", "flush", "cache", "status"))
    if kind in ("write", "fua"):
        model[offset:end] = chance.randbytes(length)
        h.pwrite(bytes(model[offset:end]), offset, nbd.CMD_FLAG_FUA if kind == "fua" else 0)
    elif kind in ("zero", "no hole", "fast zero"):
        flags = dict(zip(("zero", "no hole", "fast zero"), (0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO)))[kind]
        h.zero(length, offset, flags)
        model[offset:end] = bytes(length)
    elif kind == "trim":
        h.trim(length, offset)
        after = h.pread(length, offset)
        assert all(new in (0, old) for new, old in zip(after, model[offset:end])), (offset, length)
        model[offset:end] = after
    elif kind == "flush":
        h.flush()
    elif kind == "cache":
        h.cache(length, offset)
    else:
        def check(context, position, entries, error):
            for run, flags in zip(entries[::2], entries[1::2]):
                assert not flags & 2 or not any(model[position:position + run]), (position, run)
                position += run
        h.block_status(length, offset, check)
    if offset < size:
        start = max(0, offset - 5000)
        stop = min(size, end + 5000)
        assert h.pread(stop - start, start) == model[start:stop]
(folder / "seen").write_bytes(model)
h.shutdown()
"""


@pytest.mark.parametrize("kind", WRITABLE, ids=str)
@needs("qemu-img", "qemu-io", "nbdsh")
def test_what_libnbd_writes_comes_back(kind: Image, tmp_path: Path) -> None:
    image = kind.make(tmp_path)
    base = (tmp_path / "base").read_bytes() if (tmp_path / "base").exists() else b""
    script = NBDSH.format(folder=str(tmp_path), seed=7)
    with Served(image, "-f", kind.format, "-k", tmp_path / "socket") as server:
        # nbdsh runs whatever python3 comes first; that of a virtual environment does not know libnbd.
        path = f"PATH=/usr/bin:{os.environ['PATH']}"
        run("env", path, "nbdsh", "--base-allocation", "-u", server.uri, "-c", script)
    assert_holds(image, kind.format, (tmp_path / "seen").read_bytes(), tmp_path)
    assert not base or (tmp_path / "base").read_bytes() == base


@pytest.mark.parametrize("kind", [QCOW2[2], OVERLAYS[1], OTHERS[1], OTHERS[0]], ids=str)
@needs("qemu-img", "qemu-io", "nbdcopy")
def test_many_connections_write_one_image(kind: Image, tmp_path: Path) -> None:
    """nbdcopy with four connections, each with many requests in flight."""
    image = kind.make(tmp_path)
    model = bytearray(Random(3).randbytes(len(qemu_content(image, kind.format))))
    model[3 * MIB : 5 * MIB] = bytes(2 * MIB)
    (tmp_path / "source").write_bytes(model)
    with Served(image, "-f", kind.format, "-k", tmp_path / "socket") as server:
        run(
            "nbdcopy",
            "--connections=4",
            "--requests=32",
            "--request-size=65536",
            "--flush",
            tmp_path / "source",
            server.uri,
        )
    assert_holds(image, kind.format, model, tmp_path)
