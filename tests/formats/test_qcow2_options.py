"""Every option of qcow2 that changes how an image is written: created by us and by QEMU, judged by QEMU."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from nbdserve.block import BlockDevice
from nbdserve.errors import OpenError
from nbdserve.formats.qcow2.create import CreateOptions, create_image
from nbdserve.formats.qcow2.header import CompressionType
from nbdserve.formats.qcow2.writable import WritableQcow2Image
from tests.conformance import check_block_device
from tests.formats.qcow2_images import open_qcow2
from tests.reference import needs, qemu_check, qemu_content, qemu_img_create, qemu_info, qemu_io, run

pytestmark = needs("qemu-img", "qemu-io")

KIB, MIB = 1 << 10, 1 << 20
SIZE = MIB + 512


def _plain(directory: Path, **options: str | int) -> Path:
    return qemu_img_create(directory / "a.qcow2", SIZE, **options)


def _overlay(directory: Path, **options: str | int) -> Path:
    base = qemu_img_create(directory / "base", 600 * KIB, "raw")
    qemu_io(base, "write -P 77 0 500k", format="raw")
    return qemu_img_create(directory / "a.qcow2", SIZE, backing_file="base", backing_fmt="raw", **options)


def _with_snapshot(directory: Path, **options: str | int) -> Path:
    image = _plain(directory, **options)
    qemu_io(image, "write -P 5 0 300k", "write -z 100k 20k", "write -P 6 500k 1k", "write -c -P 9 640k 64k")
    run("qemu-img", "snapshot", "-c", "before", str(image))
    qemu_io(image, "write -P 7 100k 50k")
    return image


CASES = {
    "subclusters": (_plain, {"extended_l2": "on", "cluster_size": 16384}),
    "subclusters of 2 KiB": (_plain, {"extended_l2": "on", "cluster_size": 65536}),
    "subclusters over a base": (_overlay, {"extended_l2": "on", "cluster_size": 65536}),
    "subclusters with a snapshot": (_with_snapshot, {"extended_l2": "on", "cluster_size": 65536}),
    "data file": (_plain, {"data_file": "data", "cluster_size": 4096}),
    "data file over a base": (_overlay, {"data_file": "data", "cluster_size": 65536}),
    "raw data file": (_plain, {"data_file": "data", "data_file_raw": "on", "cluster_size": 65536}),
    "data file with subclusters": (_plain, {"data_file": "data", "extended_l2": "on", "cluster_size": 16384}),
    "raw with subclusters": (
        _plain,
        {"data_file": "data", "data_file_raw": "on", "extended_l2": "on", "cluster_size": 16384},
    ),
    "lazy refcounts": (_plain, {"lazy_refcounts": "on"}),
}


@pytest.mark.parametrize("case", CASES)
def test_conformance(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    maker, options = CASES[case]
    monkeypatch.chdir(tmp_path)
    original = maker(tmp_path, **options)
    pristine, data = original.read_bytes(), tmp_path / "data"
    external = data.read_bytes() if data.exists() else None
    before = qemu_content(original, "qcow2", "-l", "before") if "snapshot" in case else b""
    image = tmp_path / "work.qcow2"

    def make() -> BlockDevice:
        image.write_bytes(pristine)
        if external is not None:
            data.write_bytes(external)
        return open_qcow2(image)

    def reopen(device: BlockDevice) -> BlockDevice:
        device.close()
        return open_qcow2(image)

    def judge(model: bytearray) -> None:
        qemu_check(image)
        assert qemu_content(image, "qcow2") == model
        if "raw" in case:
            assert data.read_bytes() == model
        if before:
            assert qemu_content(image, "qcow2", "-l", "before") == before

    check_block_device(make, reopen, judge, examples=8)


CREATED = {
    "v2": CreateOptions(version=2, cluster_size=4096),
    "v3": CreateOptions(),
    "small": CreateOptions(cluster_size=512, refcount_bits=64),
    "one bit": CreateOptions(refcount_bits=1),
    "lazy": CreateOptions(lazy_refcounts=True),
    "zstd": CreateOptions(compression=CompressionType.ZSTD),
    "subclusters": CreateOptions(extended_l2=True, cluster_size=16384),
    "data": CreateOptions(data_file="data"),
    "raw data": CreateOptions(data_file="data", data_file_raw=True),
    "metadata": CreateOptions(preallocation="metadata"),
    "metadata, small": CreateOptions(preallocation="metadata", cluster_size=512, refcount_bits=64),
    "metadata, subclusters": CreateOptions(preallocation="metadata", extended_l2=True),
    "falloc": CreateOptions(preallocation="falloc"),
    "full": CreateOptions(preallocation="full", cluster_size=2 * MIB),
    "full data": CreateOptions(preallocation="full", data_file="data"),
}


@pytest.mark.parametrize("case", CREATED)
def test_created(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # QEMU looks for data files there
    image, options = tmp_path / "a.qcow2", CREATED[case]
    size = 5 * MIB + 512
    create_image(image, size, options)
    qemu_check(image)
    info = qemu_info(image)
    data = info["format-specific"]["data"]
    assert (info["virtual-size"], info["cluster-size"]) == (size, options.cluster_size)
    assert data["compat"] == ("0.10" if options.version == 2 else "1.1")
    assert data["refcount-bits"] == options.refcount_bits
    if options.version == 3:
        assert data["lazy-refcounts"] == options.lazy_refcounts
        assert data["compression-type"] == options.compression.name.lower()
        assert data["extended-l2"] == options.extended_l2
        assert data.get("data-file") == options.data_file
        assert data.get("data-file-raw", False) == options.data_file_raw
    if options.preallocation in ("falloc", "full"):
        holder = tmp_path / "data" if options.data_file else image
        assert holder.stat().st_blocks * 512 >= size
    qemu_io(image, "write -P 1 1M 70k", f"write -P 2 {size - 512} 512")
    model = bytearray(size)
    model[MIB : MIB + 70 * KIB] = b"\1" * 70 * KIB
    model[-512:] = b"\2" * 512
    with open_qcow2(image) as device:
        assert device.read(0, size) == model
        device.write(3 * MIB - 5, b"hello")
        model[3 * MIB - 5 : 3 * MIB] = b"hello"
    qemu_check(image)
    assert qemu_content(image, "qcow2") == model
    if options.data_file_raw:
        assert (tmp_path / "data").read_bytes() == model


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (CreateOptions(cluster_size=1000), "power of two"),
        (CreateOptions(extended_l2=True, cluster_size=4096), "16384"),
        (CreateOptions(refcount_bits=3), "power of two"),
        (CreateOptions(version=2, extended_l2=True), "need version 3"),
        (CreateOptions(data_file_raw=True), "name one"),
        (CreateOptions(backing="b", preallocation="full"), "exclude each other"),
        (CreateOptions(cluster_size=512, backing="x" * 500), "do not fit"),
    ],
)
def test_options_that_contradict(tmp_path: Path, options: CreateOptions, said: str) -> None:
    with pytest.raises(OpenError, match=said):
        create_image(tmp_path / "a", MIB, options)
    with pytest.raises(OpenError, match="take larger ones"):
        create_image(tmp_path / "a", 1 << 50, CreateOptions(cluster_size=512))
    assert not (tmp_path / "a").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    create_image(tmp_path / "a", MIB)
    with pytest.raises(FileExistsError):
        create_image(tmp_path / "a", MIB, CreateOptions(data_file="data"))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("compression", list(CompressionType))
@pytest.mark.parametrize(("cluster_size", "bits"), [(512, 16), (4096, 1), (65536, 16), (2 * MIB, 2)])
def test_compressed_clusters_are_written(
    tmp_path: Path, compression: CompressionType, cluster_size: int, bits: int
) -> None:
    image = tmp_path / "a.qcow2"
    size = (3 * MIB if cluster_size > 512 else 600 * KIB) + 512
    create_image(image, size, CreateOptions(cluster_size=cluster_size, compression=compression, refcount_bits=bits))
    chosen = random.Random(1)
    model = bytearray(b"".join(bytes([chosen.randrange(256)]) * 4096 for _ in range(size // 4096 + 1))[:size])
    model[200 * KIB : 500 * KIB] = chosen.randbytes(300 * KIB)
    with open_qcow2(image) as device:
        assert isinstance(device, WritableQcow2Image)
        step = max(cluster_size, 256 * KIB)
        for offset in range(0, size, step):
            device.write_compressed(offset, model[offset : offset + step])
        assert device.read(0, size) == model
    qemu_check(image)
    assert qemu_content(image, "qcow2") == model
    if cluster_size == 65536:
        assert image.stat().st_size < size // 2
    with open_qcow2(image) as device:  # what was compressed may be overwritten, compressed again, given up
        assert isinstance(device, WritableQcow2Image)
        for number in range(60):
            offset = chosen.randrange(size // cluster_size) * cluster_size
            data = bytes([number + 1]) * cluster_size
            if number % 3 == 0:
                device.write_compressed(offset, data)
            elif number % 3 == 1:
                data = data[:300]
                device.write(offset, data)
            else:
                device.discard(offset, cluster_size)
                data = bytes(cluster_size)
            model[offset : offset + len(data)] = data
            if number % 10 == 0:
                device.flush()
        assert device.read(0, size) == model
    qemu_check(image)
    assert qemu_content(image, "qcow2") == model


def test_a_huge_disk_of_small_clusters_opens_at_once(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    size = 64 << 40
    create_image(image, size, CreateOptions(cluster_size=16384))
    chosen = random.Random(3)
    places = [chosen.randrange(size >> 12) << 12 for _ in range(1200)]
    with open_qcow2(image) as device:
        assert isinstance(device, WritableQcow2Image)
        for number, place in enumerate(places):
            device.write(place, number.to_bytes(8, "big"))
        tables = device.mapping.tables
        assert len(tables.recent) + len(tables._older) <= tables.capacity
        assert len(tables.pinned) <= tables.capacity // 4 + 1
        for number, place in enumerate(places):
            assert device.read(place, 8) == number.to_bytes(8, "big")
    with open_qcow2(image, read_only=True) as device:
        for number, place in enumerate(places):
            assert device.read(place, 8) == number.to_bytes(8, "big")
    shutil.rmtree(tmp_path)
