"""Damaged images: an error in one line, or as many bytes as were asked for; never a traceback or a hang."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from nbdserve.block import BlockDevice
from nbdserve.errors import NbdserveError, OpenError
from tests.formats.qcow2_images import open_qcow2, places
from tests.formats.usage import assert_one_line, mutate, use_damaged
from tests.reference import needs, qemu_content, qemu_img_create, qemu_io, run

pytestmark = needs("qemu-img", "qemu-io")

SIZE = 256 << 10


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Images that between them have every kind of entry, extension and table."""
    directory = tmp_path_factory.mktemp("sound")
    (directory / "base").write_bytes(b"b" * SIZE)
    made = []
    for number, options in enumerate(({"cluster_size": 512, "refcount_bits": 64}, {"cluster_size": 4096})):
        image = qemu_img_create(directory / f"{number}.qcow2", SIZE, backing_file="base", backing_fmt="raw", **options)
        qemu_io(image, "write -P 1 0 60k", "write -z 8k 8k", "write -c -P 2 64k 4k", "write -c -P 3 72k 4k")
        run("qemu-img", "snapshot", "-c", "before", str(image))
        qemu_io(image, "write -P 4 20k 8k")
        made.append(image.read_bytes())
    image = qemu_img_create(directory / "2.qcow2", SIZE, extended_l2="on", cluster_size=16384, lazy_refcounts="on")
    qemu_io(image, "write -P 1 0 60k", "write -z 8k 8k", "write -c -P 2 64k 16k")
    run("qemu-img", "bitmap", "--add", "-g", "4096", str(image), "changes")
    run("qemu-img", "snapshot", "-c", "before", str(image))
    qemu_io(image, "write -P 4 20k 8k")
    made.append(image.read_bytes())
    dirty = bytearray(made[-1])
    dirty[79] |= 1
    made.append(bytes(dirty))
    return made


def first_l2(content: bytes) -> int:
    """Where the image's first L2 table begins."""
    l1 = int.from_bytes(content[40:48], "big")
    return int.from_bytes(content[l1 : l1 + 8], "big") & ((1 << 56) - 512)


def _opened(path: Path, chosen: random.Random) -> BlockDevice:
    snapshot = chosen.choice((None, None, "before"))
    return open_qcow2(path, read_only=snapshot is not None or chosen.random() < 0.4, snapshot=snapshot)


@pytest.mark.parametrize("seed", range(4))
def test_mutations(tmp_path: Path, images: list[bytes], seed: int) -> None:
    chosen = random.Random(seed)
    path = tmp_path / "damaged.qcow2"
    (tmp_path / "base").write_bytes(b"b" * SIZE)
    failed = 0
    for _ in range(100):
        content = bytearray(chosen.choice(images))
        mutate(content, places(content), chosen)
        path.write_bytes(content)
        begun = time.monotonic()
        try:
            with _opened(path, chosen) as device:
                failed += use_damaged(device, chosen, lengths=(1, 512, 5000, 100_000)) > 0
        except OpenError as error:
            failed += 1
            assert_one_line(error, tmp_path)
        assert time.monotonic() - begun < 5
    assert 5 < failed < 95


@pytest.mark.parametrize("length", [0, 3, 71, 80, 103, 110, 511, 600])
def test_files_cut_short(tmp_path: Path, images: list[bytes], length: int) -> None:
    path = tmp_path / "a.qcow2"
    path.write_bytes(images[0][:length])
    with pytest.raises(OpenError, match=str(path)):
        open_qcow2(path, read_only=True)


@pytest.mark.parametrize(
    ("offset", "size", "value", "words"),
    [
        (4, 4, 4, "version 4"),
        (8, 8, 1 << 40, "backing file name"),
        (16, 4, 1024, "backing file name"),
        (16, 4, 20, "zero byte"),
        (20, 4, 8, "2\\^8 bytes"),
        (20, 4, 22, "2\\^22 bytes"),
        (24, 8, 1 << 62, "L1 table of"),
        (24, 8, (1 << 64) - 1, "L1 table of"),
        (36, 4, (4 << 20) + 1, "are the most"),
        (36, 4, 4 << 20, "reaches past the file"),
        (40, 8, 513, "does not begin at a cluster"),
        (40, 8, 0, "does not begin at a cluster"),
        (48, 8, 1 << 50, "reaches past the file"),
        (56, 4, 0, "no refcount table"),
        (56, 4, 1 << 20, "are the most"),
        (60, 4, 65537, "are the most"),
        (96, 4, 7, "2\\^7 bits"),
        (100, 4, 96, "96 bytes long"),
        (100, 4, 1 << 20, "not between"),
        (104, 1, 1, "contradicts"),
    ],
)
def test_every_field_of_the_header(
    tmp_path: Path, images: list[bytes], offset: int, size: int, value: int, words: str
) -> None:
    content = bytearray(images[0])
    content[offset : offset + size] = value.to_bytes(size, "big")
    path = tmp_path / "a.qcow2"
    path.write_bytes(content)
    with pytest.raises(OpenError, match=words):
        open_qcow2(path, read_only=True)


def test_reserved_bits_fail_that_read_only(tmp_path: Path, images: list[bytes]) -> None:
    content = bytearray(images[1])
    (tmp_path / "base").write_bytes(b"b" * SIZE)
    l2 = first_l2(images[1])
    content[l2 + 7] |= 0x20
    path = tmp_path / "a.qcow2"
    path.write_bytes(content)
    for read_only in (True, False):
        with open_qcow2(path, read_only=read_only) as device:
            with pytest.raises(OSError, match=r"reserved bits.*qemu-img check -r all"):
                device.read(100, 10)
            assert device.locate(100, 10) is None
            assert device.read(4096, 10) == b"\1" * 10
            if not read_only:
                with pytest.raises(OSError, match="reserved bits"):
                    device.write(0, bytes(4096))
                with pytest.raises(OSError, match="reserved bits"):
                    device.zero(0, 4096)


def test_damaged_compressed_data(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(bytes(range(256)) * 256)
    for method in ("zlib", "zstd"):
        image = tmp_path / f"{method}.qcow2"
        options = f"compression_type={method}"
        run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", options, str(tmp_path / "plain"), str(image))
        content = bytearray(image.read_bytes())
        start = _compressed_offset(content)
        content[start : start + 300] = b"\xff" * 300
        image.write_bytes(content)
        with (
            open_qcow2(image, read_only=True) as device,
            pytest.raises(OSError, match=r"cannot be decompressed|cut short"),
        ):
            device.read(0, 100)


def _compressed_offset(content: bytes) -> int:
    l2 = first_l2(content)
    return int.from_bytes(content[l2 : l2 + 8], "big") & ((1 << 54) - 1)


def patched(image: Path, offset: int, number: int) -> None:
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(number.to_bytes(8, "big"))


def number_at(image: Path, offset: int) -> int:
    return int.from_bytes(image.read_bytes()[offset : offset + 8], "big")


def test_a_damaged_entry_never_frees_a_table(tmp_path: Path) -> None:
    image = qemu_img_create(tmp_path / "image", 8 << 20, cluster_size=4096)
    qemu_io(image, "write -P 1 0 1M")
    l1 = number_at(image, 40)
    l2 = number_at(image, l1) & 0x00FFFFFFFFFFFE00
    patched(image, l2, l1)  # guest cluster 0 claims to lie on the L1 table, shared
    before = number_at(image, l1)
    with open_qcow2(image) as device:
        device.write(0, b"y" * 4096)
        device.discard(8192, 4096)
        device.flush()
        device.flush()
        for cluster in range(300, 400):
            device.write(cluster * 4096, b"y" * 4096)
    assert number_at(image, l1) == before
    assert qemu_content(image, "qcow2")[4096:8192] == b"\1" * 4096


def test_tables_that_overlap_are_not_written(tmp_path: Path) -> None:
    image = qemu_img_create(tmp_path / "image", 8 << 20, cluster_size=4096)
    qemu_io(image, "write -P 1 0 1M")
    l1 = number_at(image, 40)
    refcount_block = number_at(image, number_at(image, 48))
    for target in (refcount_block, l1, number_at(image, l1) & 0x00FFFFFFFFFFFE00):
        patched(image, l1 + 8, target | 1 << 63)
        before = image.read_bytes()
        with pytest.raises(NbdserveError, match="two tables claim"):
            open_qcow2(image)
        assert image.read_bytes() == before
