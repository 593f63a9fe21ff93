"""nbdimg amend, beside qemu-img amend."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.img import nbdimg
from tests.reference import needs, qemu_check, qemu_content, qemu_img_create, qemu_info, qemu_io, run


@needs("qemu-img", "qemu-io")
def test_an_old_image_becomes_a_new_one(tmp_path: Path) -> None:
    base = qemu_img_create(tmp_path / "base.raw", "4M", "raw")
    path = qemu_img_create(tmp_path / "disk.qcow2", None, compat="0.10", backing_file=base.name, backing_fmt="raw")
    qemu_io(path, "write -P 1 1M 1M")
    before = qemu_content(path, "qcow2")
    nbdimg("amend", "-o", "compat=1.1,lazy_refcounts=on", path)
    info = qemu_info(path)
    assert info["format-specific"]["data"]["compat"] == "1.1"
    assert info["format-specific"]["data"]["lazy-refcounts"]
    assert (info["backing-filename"], info["backing-filename-format"]) == (base.name, "raw")
    assert qemu_content(path, "qcow2") == before
    qemu_check(path)
    qemu_io(path, "write -z 1M 64k")
    nbdimg("amend", "-o", "lazy_refcounts=off,backing_file=./base.raw", path)
    nbdimg("bitmap", "--add", path, "bits")
    info = qemu_info(path)
    assert info["backing-filename"] == "./base.raw"
    assert not info["format-specific"]["data"]["lazy-refcounts"]
    nbdimg("amend", "-o", "backing_file=", path)
    assert "backing-filename" not in qemu_info(path)
    qemu_check(path)


@needs("qemu-img", "qemu-io")
@pytest.mark.parametrize(
    ("made", "amended"),
    [
        ("compat=1.1", "compat=0.10"),
        ("compat=1.1,lazy_refcounts=on", "compat=0.10"),
        ("compat=0.10", "compat=1.1"),
        ("compat=1.1", "lazy_refcounts=on"),
        ("lazy_refcounts=on", "lazy_refcounts=off"),
        ("compat=1.1", "refcount_bits=1"),
        ("cluster_size=512", "refcount_bits=64"),
        ("refcount_bits=64", "refcount_bits=16,size=6M"),
        ("refcount_bits=8", "compat=0.10,refcount_bits=16"),
        ("data_file=outside.bin,data_file_raw=on", "data_file_raw=off"),
        ("cluster_size=4k", "size=9M"),
    ],
)
def test_options_change_as_qemus_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str, amended: str) -> None:
    monkeypatch.chdir(tmp_path)  # where qemu-img makes data files
    path = qemu_img_create(tmp_path / "disk.qcow2", "4M", **dict(part.split("=") for part in made.split(",")))
    qemu_io(path, "write -P 1 1M 1M", "write -P 2 3M 70k")
    if "compat=0.10" not in made:
        qemu_io(path, "write -z 1M 64k", "write -z -u 3M 64k", "write -z 2M 128k")
    before = qemu_content(path, "qcow2")
    theirs = tmp_path / "theirs" / path.name
    shutil.copytree(tmp_path, theirs.parent)
    run("qemu-img", "amend", "-f", "qcow2", "-o", amended, theirs)
    nbdimg("amend", "-o", amended, path)
    said = [qemu_info(each) for each in (path, theirs)]
    for each in said:
        for volatile in ("filename", "actual-size", "children"):
            each.pop(volatile, None)
    assert said[0] == said[1]
    content = qemu_content(path, "qcow2")
    assert content[: len(before)] == before
    assert not any(content[len(before) :])
    qemu_check(path, leaks_allowed=False)
    qemu_io(path, "write -P 3 0 4M", "read -P 3 0 4M")
    qemu_check(path)


@needs("qemu-img", "qemu-io")
@pytest.mark.parametrize("size", ["4M", "2M"])
def test_zeros_over_a_backing_file_outlive_a_downgrade(tmp_path: Path, size: str) -> None:
    base = qemu_img_create(tmp_path / "base.qcow2", size)
    qemu_io(base, f"write -P 1 0 {size}")
    path = qemu_img_create(tmp_path / "top.qcow2", "4M", backing_file=base.name, backing_fmt="qcow2")
    qemu_io(path, "write -z 0 1M", "write -P 2 1M 1M", "write -z 1M 64k", "write -z 3M 1M")
    before = qemu_content(path, "qcow2")
    nbdimg("amend", "-o", "compat=0.10", path)
    assert qemu_info(path)["format-specific"]["data"]["compat"] == "0.10"
    assert qemu_content(path, "qcow2") == before
    qemu_check(path)


@needs("qemu-img", "qemu-io")
def test_a_data_file_that_has_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = qemu_img_create(tmp_path / "disk.qcow2", "4M", data_file="old.bin")
    qemu_io(path, "write -P 1 1M 1M")
    before = qemu_content(path, "qcow2")
    (tmp_path / "old.bin").rename(tmp_path / "new.bin")
    nbdimg("amend", "-o", "data_file=new.bin", path)
    assert qemu_content(path, "qcow2") == before
    qemu_check(path)


@needs("qemu-img", "qemu-io")
def test_what_cannot_change_says_so_and_stays(tmp_path: Path) -> None:
    path = qemu_img_create(tmp_path / "disk.qcow2", "4M")
    qemu_io(path, "write -P 1 0 1M", "write -z 0 64k")
    run("qemu-img", "snapshot", "-c", "first", path)
    zstd = qemu_img_create(tmp_path / "zstd.qcow2", "4M", compression_type="zstd")
    old = qemu_img_create(tmp_path / "old.qcow2", "4M", compat="0.10")
    raw = qemu_img_create(tmp_path / "disk.raw", "4M", "raw")
    for image, option, words in (
        (path, "cluster_size=4k", "cannot be changed"),
        (path, "compat=0.10", "zeros in snapshots"),
        (path, "refcount_bits=1", "more references"),
        (path, "refcount_bits=7", "not 7"),
        (path, "size=1M", "--shrink"),
        (path, "data_file=x", "no external data file"),
        (path, "data_file_raw=on", "no external data file"),
        (path, "backing_fmt=raw", "no backing file"),
        (zstd, "compat=0.10", "zstd"),
        (old, "lazy_refcounts=on", "version 3"),
        (old, "refcount_bits=8", "version 2"),
        (raw, "size=8M", "only qcow2"),
    ):
        before = image.read_bytes()
        message = nbdimg("amend", "-f", image.suffix[1:], "-o", option, image, status=1)
        assert words in message
        assert len(message.splitlines()) == 1
        assert image.read_bytes() == before, option
