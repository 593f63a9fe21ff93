"""Images made by QEMU's tools, read by us: the bytes, the holes and the snapshots must be what QEMU sees."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nbdserve.block import Zero
from nbdserve.errors import FormatError, OpenError, Unsupported
from nbdserve.opening import open_image
from tests.conformance import check_mapping
from tests.formats.qcow2_images import open_qcow2
from tests.reference import needs, qemu_content, qemu_img_create, qemu_io, qemu_map, run

pytestmark = needs("qemu-img", "qemu-io")

KiB, MiB = 1 << 10, 1 << 20

LAYOUTS = [
    {"cluster_size": 512, "compat": "1.1"},
    {"cluster_size": 4096, "compat": "0.10"},
    {"cluster_size": 4096, "compat": "1.1", "refcount_bits": 1},
    {"cluster_size": 65536, "compat": "0.10"},
    {"cluster_size": 65536, "compat": "1.1"},
    {"cluster_size": 65536, "compat": "1.1", "refcount_bits": 64},
    {"cluster_size": 65536, "compat": "1.1", "lazy_refcounts": "on"},
    {"cluster_size": 2 * MiB, "compat": "1.1"},
    {"cluster_size": 65536, "compat": "1.1", "preallocation": "metadata"},
]


def _named(layout: dict[str, str | int]) -> str:
    return "-".join(str(value) for value in layout.values())


def _scribble(image: Path, size: int, *commands: str, seed: int = 1) -> None:
    """Data, zeros and discarded parts here and there, at every alignment."""
    chosen = random.Random(seed)
    script = list(commands)
    for number in range(1, 25):
        offset = chosen.randrange(size // 512) * 512
        length = min(chosen.choice((512, 4096, 65536, 200 * KiB)), size - offset)
        verb = chosen.choice((f"write -P {number}", f"write -P {number}", "write -z", "write -zu", "discard"))
        script.append(f"{verb} {offset} {length}")
    qemu_io(image, *script)


def _check_like_qemu(image: Path, snapshot: str | None = None) -> None:
    options = ["-l", f"snapshot.name={snapshot}"] if snapshot else []
    expected = qemu_content(image, "qcow2", *options)
    with open_qcow2(image, read_only=True, snapshot=snapshot) as device:
        if snapshot:  # qemu-img shows it with the size that the disk has now
            expected = expected[: device.size]
        assert device.size == len(expected)
        assert device.read(0, device.size) == expected
        chosen = random.Random(2)
        for _ in range(100):
            offset = chosen.randrange(device.size)
            length = min(chosen.choice((1, 100, 4096, 70000, 5 * MiB)), device.size - offset)
            assert device.read(offset, length) == expected[offset : offset + length]
            check_mapping(device, expected, offset, length)


def _check_map_like_qemu(image: Path) -> None:
    theirs = qemu_map(image, "qcow2")
    with open_qcow2(image, read_only=True) as device:
        for extent in theirs:
            for ours in device.extents(extent["start"], extent["length"]):
                # Where clusters are holes in the host file, both may say zeros.
                assert isinstance(ours, Zero) or not extent["zero"], (extent, ours)
        assert sum(extent["length"] for extent in theirs) == device.size


@pytest.mark.parametrize("layout", LAYOUTS, ids=_named)
def test_every_layout(tmp_path: Path, layout: dict[str, str | int]) -> None:
    image = qemu_img_create(tmp_path / "a.qcow2", 5 * MiB + 512, **layout)
    _scribble(image, 5 * MiB + 512)
    _check_like_qemu(image)
    _check_map_like_qemu(image)


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 * MiB])
@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_compressed(tmp_path: Path, cluster_size: int, method: str) -> None:
    plain = qemu_img_create(tmp_path / "plain.qcow2", 5 * MiB)
    _scribble(plain, 5 * MiB)
    noise = random.Random(3).randbytes(300 * KiB)
    (tmp_path / "noise").write_bytes(noise)
    qemu_io(plain, f"write -s {tmp_path}/noise 1M 300k")
    image = tmp_path / "compressed.qcow2"
    options = f"cluster_size={cluster_size},compression_type={method}"
    run("qemu-img", "convert", "-c", "-f", "qcow2", "-O", "qcow2", "-o", options, str(plain), str(image))
    _check_like_qemu(image)
    _check_map_like_qemu(image)


@pytest.mark.parametrize("base_size", [1 * MiB + 512, 9 * MiB])
@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_backing_files(tmp_path: Path, base_size: int, base_format: str, compat: str) -> None:
    base = qemu_img_create(tmp_path / "base", base_size, base_format)
    qemu_io(base, f"write -P 77 0 {base_size}", "write -z 64k 100k", format=base_format)
    middle = qemu_img_create(
        tmp_path / "middle", 5 * MiB, backing_file="base", backing_fmt=base_format, cluster_size=4096
    )
    _scribble(middle, 5 * MiB, seed=4)
    image = qemu_img_create(
        tmp_path / "a.qcow2", 6 * MiB, backing_file="middle", backing_fmt="qcow2", compat=compat, cluster_size=65536
    )
    _scribble(image, 6 * MiB, seed=5)
    _check_like_qemu(image)
    _check_map_like_qemu(image)
    with open_qcow2(image, read_only=True) as device:
        depths = {extent.depth for extent in device.extents(0, device.size)}
        assert max(depths) == max(extent["depth"] for extent in qemu_map(image, "qcow2"))


def test_internal_snapshots(tmp_path: Path) -> None:
    image = qemu_img_create(tmp_path / "a.qcow2", 3 * MiB, cluster_size=4096)
    _scribble(image, 3 * MiB, seed=6)
    run("qemu-img", "snapshot", "-c", "first", str(image))
    _scribble(image, 3 * MiB, seed=7)
    run("qemu-img", "snapshot", "-c", "second", str(image))
    run("qemu-img", "resize", "-q", str(image), "4M")
    _scribble(image, 4 * MiB, seed=8)
    _check_like_qemu(image)
    _check_like_qemu(image, "first")
    _check_like_qemu(image, "second")
    with open_qcow2(image, read_only=True, snapshot="2") as by_id:
        assert by_id.read_only and by_id.size == 3 * MiB
    with pytest.raises(OpenError, match=r"no snapshot 'third'.*first \(ID 1\), second"):
        open_qcow2(image, read_only=True, snapshot="third")


def test_small_reads_decompress_a_cluster_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(bytes(range(256)) * 1024)
    image = tmp_path / "a.qcow2"
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", str(plain), str(image))
    with open_qcow2(image, read_only=True) as device:
        times = []
        inflate = device._compressed._inflate  # type: ignore[attr-defined]
        monkeypatch.setattr(device._compressed, "_inflate", lambda *args: times.append(1) or inflate(*args))  # type: ignore[attr-defined]
        for offset in range(0, device.size, 4096):
            assert device.read(offset, 4096) == plain.read_bytes()[offset : offset + 4096]
        assert len(times) == 4


def test_an_image_without_bytes(tmp_path: Path) -> None:
    image = qemu_img_create(tmp_path / "a.qcow2", 0)
    for read_only in (True, False):
        with open_qcow2(image, read_only=read_only) as device:
            assert device.size == 0
            device.flush()


def _set(image: Path, offset: int, value: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(value)


def test_features_are_refused_by_name(tmp_path: Path) -> None:
    luks = qemu_img_create(tmp_path / "old", MiB)
    _set(luks, 32, (2).to_bytes(4, "big"))
    with pytest.raises(FormatError, match="where the LUKS header lies"):
        open_qcow2(luks, read_only=True)
    named = qemu_img_create(tmp_path / "named", MiB)
    start = named.read_bytes()
    _set(named, start.index(b"dirty bit") - 2, b"\0\x3f" + b"time travel".ljust(46, b"\0"))
    _set(named, 72, (1 << 63).to_bytes(8, "big"))
    with pytest.raises(Unsupported, match="'time travel'"):
        open_qcow2(named, read_only=True)
    _set(named, 72, (1 << 62).to_bytes(8, "big"))
    with pytest.raises(Unsupported, match="unknown feature 62"):
        open_qcow2(named, read_only=True)


def test_corrupt_images_may_be_read_but_not_written(tmp_path: Path) -> None:
    image = qemu_img_create(tmp_path / "a.qcow2", MiB)
    _set(image, 72, (2).to_bytes(8, "big"))
    said: list[str] = []
    with open_image(image, read_only=True, warn=said.append) as device:
        assert device.read(0, MiB) == bytes(MiB)
    assert len(said) == 1 and "marked as corrupt" in said[0]
    with pytest.raises(FormatError, match=r"corrupt.*qemu-img check -r all"):
        open_qcow2(image)


def test_a_file_cut_short_says_so_for_that_read_only(tmp_path: Path) -> None:
    image = qemu_img_create(tmp_path / "a.qcow2", 4 * MiB)
    qemu_io(image, "write -P 1 0 1M", "write -P 2 1M 1M")
    with image.open("r+b") as file:
        file.truncate(image.stat().st_size - MiB + 100)
    with open_qcow2(image, read_only=True) as device:
        assert device.read(0, MiB) == b"\1" * MiB
        with pytest.raises(OSError, match="past the end"):
            device.read(MiB + 512 * KiB, 4096)
        assert device.read(3 * MiB, 4096) == bytes(4096)
