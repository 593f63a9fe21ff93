"""nbdimg create, judged by qemu-img: what we make it reads, and finds no fault with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cli.img import nbdimg
from tests.reference import needs, qemu_check, qemu_content, qemu_img_create, qemu_info, qemu_io, run

MIB = 1 << 20

CASES = [
    ("raw", ""),
    ("raw", "preallocation=full"),
    ("qcow2", ""),
    ("qcow2", "cluster_size=4k,compat=0.10"),
    ("qcow2", "cluster_size=2M,lazy_refcounts=on,refcount_bits=1"),
    ("qcow2", "extended_l2=on,compression_type=zstd"),
    ("qcow2", "preallocation=metadata"),
    ("vpc", "force_size=on"),
    ("vpc", "subformat=fixed"),
    ("vhdx", "block_size=1M,log_size=2M"),
    ("vhdx", "subformat=fixed"),
    ("vdi", ""),
    ("vdi", "static=on"),
    ("vmdk", "adapter_type=lsilogic"),
    ("vmdk", "subformat=monolithicFlat"),
    ("vmdk", "subformat=twoGbMaxExtentSparse,compat6=on"),
]


@needs("qemu-img", "qemu-io")
@pytest.mark.parametrize(("format", "options"), CASES, ids=lambda value: value or "plain")
def test_qemu_sees_the_image_it_would_have_made(tmp_path: Path, format: str, options: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ours, theirs = tmp_path / "a" / "disk.img", tmp_path / "b" / "disk.img"
    arguments = ["-f", format, *(["-o", options] if options else [])]
    nbdimg("create", *arguments, ours, "10M")
    run("qemu-img", "create", "-q", *arguments, theirs, "10M")
    assert not [name for name in os.listdir(ours.parent) if name.startswith(".")]
    assert sorted(os.listdir(ours.parent)) == sorted(os.listdir(theirs.parent))
    infos = [qemu_info(path, format) for path in (ours, theirs)]
    for info in infos:
        info.pop("actual-size")
        info["filename"] = ""
        for extent in info.get("format-specific", {}).get("data", {}).get("extents", ()):
            extent["filename"] = os.path.basename(extent["filename"])
        info.get("format-specific", {}).get("data", {}).pop("cid", None)
    assert infos[0] == infos[1]
    qemu_io(ours, "write -P 7 1M 64k", format=format)
    if format == "qcow2":
        qemu_check(ours)
    assert qemu_content(ours, format)[MIB : MIB + 65536] == b"\7" * 65536


@needs("qemu-img")
def test_an_overlay_finds_its_base_from_its_own_directory(tmp_path: Path) -> None:
    base = qemu_img_create(tmp_path / "base.vmdk", "3M", "vmdk")
    (tmp_path / "over").mkdir()
    overlay = tmp_path / "over" / "overlay.qcow2"
    text = nbdimg("create", "-b", "../base.vmdk", "-F", "vmdk", overlay)
    assert f"chain: {tmp_path}/over/../base.vmdk <- {overlay}" in text
    info = qemu_info(overlay)
    assert info["backing-filename"] == "../base.vmdk"
    assert info["backing-filename-format"] == "vmdk"
    assert info["virtual-size"] == 3 * MIB
    message = nbdimg("create", "-b", os.path.relpath(base), "-F", "vmdk", overlay, status=1)
    assert "say -b ../base.vmdk" in message
    assert "needs --allow-path" not in message
    assert qemu_info(overlay) == info, "a failure leaves the former image"


@needs("qemu-img")
@pytest.mark.parametrize("format", ["vpc", "vhdx", "vdi", "vmdk"])
def test_differencing_disks(tmp_path: Path, format: str) -> None:
    base = qemu_img_create(tmp_path / f"base.{format}", "8M", format)
    overlay = tmp_path / f"over.{format}"
    nbdimg("create", "-f", format, "-b", base.name, "-F", format, overlay)
    shown = nbdimg("info", "--backing-chain", "-f", format, overlay)
    assert f"backing file: {base.name}" in shown
    assert [line for line in shown.splitlines() if line.startswith("file format:")] == [f"file format: {format}"] * 2
    if format == "vmdk":
        assert qemu_info(overlay)["backing-filename"] == base.name


def test_vmdks_on_one_that_has_its_data_in_another_file(tmp_path: Path) -> None:
    """What stands below a VMDK is one, whether or not that is recorded, and so may refer to its own extents."""
    nbdimg("create", "-f", "vmdk", "-o", "subformat=monolithicFlat", tmp_path / "base.vmdk", "1M")
    nbdimg("create", "-b", "base.vmdk", "-F", "vmdk", tmp_path / "middle.vmdk")
    nbdimg("create", "-b", "middle.vmdk", "-F", "vmdk", tmp_path / "top.vmdk")
    assert "base-flat.vmdk" in nbdimg("info", "--backing-chain", tmp_path / "middle.vmdk")


@needs("qemu-img")
def test_refusals_are_one_line_and_make_nothing(tmp_path: Path) -> None:
    new = tmp_path / "new.qcow2"
    base = qemu_img_create(tmp_path / "base.qcow2", "1M")
    for arguments, words in (
        ([new], "Give a size"),
        (["-o", "nonsense=1", new, "1M"], "it has backing_file, backing_fmt, cluster_size"),
        (["-o", "cluster_size=3k", new, "1M"], "power of two"),
        (["-o", "compat=7", new, "1M"], "compat is 0.10|1.1|v2|v3"),
        (["-o", "lazy_refcounts=perhaps", new, "1M"], "on|off"),
        (["-f", "qed", new, "1M"], "choose one of"),
        (["-b", "missing", "-F", "raw", new], "does not exist"),
        (["-b", base.name, new], "say -F qcow2"),
        (["-b", new.name, "-F", "qcow2", new], "cannot stand on itself"),
        ([new, "1X"], "is no size"),
    ):
        message = nbdimg("create", *arguments, status=1)
        assert words in message
        assert len(message.splitlines()) == 1
        assert os.listdir(tmp_path) == [base.name]


@needs("qemu-img")
def test_an_existing_image_is_replaced_unless_it_is_in_use(tmp_path: Path) -> None:
    from nbdserve.opening import open_image

    path = qemu_img_create(tmp_path / "disk.qcow2", "1M")
    path.chmod(0o640)
    with open_image(path):
        assert "disk.qcow2" in nbdimg("create", path, "2M", status=1)
    nbdimg("create", path, "2M")
    assert qemu_info(path)["virtual-size"] == 2 * MIB
    assert path.stat().st_mode & 0o777 == 0o640


def test_help_lists_options(tmp_path: Path) -> None:
    assert "cluster_size=size" in nbdimg("create", "-f", "qcow2", "-o", "help")
