"""nbdimg info, measured against qemu-img info on the same images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.img import nbdimg
from tests.reference import needs, qemu_img_create, qemu_io, run


def images(folder: Path) -> list[tuple[str, Path]]:
    """One image of every kind, with something in each."""
    made = [(format, qemu_img_create(folder / f"plain.{format}", "10M", format)) for format in ("raw", "vpc", "vdi")]
    made += [
        ("vhdx", qemu_img_create(folder / "plain.vhdx", "10M", "vhdx")),
        ("vmdk", qemu_img_create(folder / "sparse.vmdk", "10M", "vmdk")),
        ("vmdk", qemu_img_create(folder / "flat.vmdk", "10M", "vmdk", subformat="monolithicFlat")),
        ("vmdk", qemu_img_create(folder / "split.vmdk", "10M", "vmdk", subformat="twoGbMaxExtentSparse")),
        ("vpc", qemu_img_create(folder / "fixed.vpc", "10M", "vpc", subformat="fixed")),
        ("qcow2", qemu_img_create(folder / "old.qcow2", "10M", compat="0.10", cluster_size="4k")),
        ("qcow2", qemu_img_create(folder / "external.qcow2", "10M", data_file=folder / "data", data_file_raw="on")),
        ("qcow2", qemu_img_create(folder / "new.qcow2", "10M", compression_type="zstd", lazy_refcounts="on")),
    ]
    for format, path in made:
        qemu_io(path, "write 1M 1M", format=format)
    run("qemu-img", "convert", "-O", "vmdk", "-o", "subformat=streamOptimized", made[0][1], folder / "stream.vmdk")
    base = folder / "new.qcow2"
    run("qemu-img", "snapshot", "-c", "first", base)
    run("qemu-img", "snapshot", "-c", "second one", base)
    run("qemu-img", "bitmap", "--add", base, "changes")
    overlay = qemu_img_create(folder / "overlay.qcow2", None, backing_file="new.qcow2", backing_fmt="qcow2")
    return [*made, ("vmdk", folder / "stream.vmdk"), ("qcow2", overlay)]


@needs("qemu-img", "qemu-io")
def test_json_and_text_are_qemus(tmp_path: Path) -> None:
    for format, path in images(tmp_path):
        for arguments in ([], ["--backing-chain"]):
            common = ["info", "-f", format, *arguments]
            theirs = json.loads(run("qemu-img", *common, "--output=json", path))
            assert json.loads(nbdimg(*common, "--output=json", path)) == theirs
            assert json.loads(nbdimg(*common, "--json", path)) == theirs
        text = run("qemu-img", "info", "-f", format, path)
        assert sorted(nbdimg("info", "-f", format, path).splitlines()) == sorted(text.splitlines())


@needs("qemu-img")
def test_the_first_image_is_told_of_although_its_base_is_missing(tmp_path: Path) -> None:
    base = qemu_img_create(tmp_path / "base.raw", "1M", "raw")
    overlay = qemu_img_create(tmp_path / "over.qcow2", None, backing_file=base, backing_fmt="raw")
    base.unlink()
    assert json.loads(nbdimg("info", "--json", overlay))["backing-filename"] == str(base)
    assert "no such file" in nbdimg("info", "--backing-chain", overlay, status=1)


def test_the_chain_ends_where_the_policy_does(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "secret.raw").write_bytes(bytes(4096))
    overlay = tmp_path / "a" / "over.qcow2"
    nbdimg("create", "-b", "../secret.raw", "-F", "raw", overlay)
    assert "--allow-path" in nbdimg("info", "--backing-chain", overlay, status=1)
    nbdimg("info", "--backing-chain", "--allow-path", tmp_path, overlay)


@pytest.mark.parametrize("format", ["qcow2", "vpc", "vhdx", "vdi", "vmdk"])
def test_what_is_no_image_of_that_format_is_refused_in_one_line(tmp_path: Path, format: str) -> None:
    (tmp_path / "zeros").write_bytes(bytes(1 << 20))
    said = nbdimg("info", "-f", format, tmp_path / "zeros", status=1)
    assert len(said.splitlines()) == 1
    assert str(tmp_path / "zeros") in said
