"""Descriptors of VMDK disks: all kinds of extents, and what is refused in one line."""

from __future__ import annotations

import random
import struct
from contextlib import closing
from pathlib import Path

import pytest

from nbdserve.block import HostFile, Zero
from nbdserve.errors import FormatError, OpenError, ReadOnly, Unsupported
from nbdserve.formats import probe
from nbdserve.formats.vmdk.create import create_image
from nbdserve.opening import ReferencePolicy, open_image
from tests.formats import vmdk_images as vmdk
from tests.formats.vmdk_images import content_of, refused
from tests.reference import needs, qemu_content

MIB = 1 << 20


def described(directory: Path, *extents: str, create_type: str = "custom") -> Path:
    image = directory / "a.vmdk"
    image.write_text(vmdk.descriptor(list(extents), create_type))
    return image


def test_all_kinds_of_extents_in_one_disk(tmp_path: Path) -> None:
    (tmp_path / "flat").write_bytes(bytes(512) + b"f" * 2048)
    (tmp_path / "read-only").write_bytes(b"r" * 1024)
    create_image(tmp_path / "sparse.vmdk", 64 * 1024)
    image = described(
        tmp_path,
        'RW 4 FLAT "flat" 1',
        "RW 8 ZERO",
        'RDONLY 2 FLAT "read-only" 0',
        'RW 128 SPARSE "sparse.vmdk"',
        'NOACCESS 1 FLAT "missing" 0',
        "",
    )
    with open_image(image) as device:
        assert device.size == 143 * 512 + 0
        assert device.read(0, 2050) == b"f" * 2048 + b"\0\0"
        assert device.map(2048, 9999) == Zero(4096, allocated=False)
        device.write(2040, b"x" * 8 + bytes(4096))
        assert device.locate_writable(0, 512) is not None
        assert device.locate_writable(6144, 512) is None
        for offset, data in ((2048, b"x"), (6144, b"x")):
            with pytest.raises(ReadOnly):
                device.write(offset, data)
        device.write(7168, b"in the sparse one")
        with pytest.raises(OSError, match="NOACCESS"):
            device.read(142 * 512, 1)
        assert device.read(6144, 1030) == b"r" * 1024 + b"in the"
    assert (tmp_path / "flat").read_bytes() == bytes(512) + b"f" * 2040 + b"x" * 8
    assert (tmp_path / "read-only").read_bytes() == b"r" * 1024


@needs("qemu-img")
@pytest.mark.parametrize("lines", ["\n", "\r\n"])
def test_vmfs_and_foreign_line_ends(tmp_path: Path, lines: str) -> None:
    (tmp_path / "a-flat.vmdk").write_bytes(random.Random(1).randbytes(64 * 1024))
    image = tmp_path / "a.vmdk"
    text = vmdk.descriptor(['RW 128 VMFS "a-flat.vmdk"'], "vmfs")
    image.write_text(text.replace("\n", lines))
    with closing(HostFile.open(image, writable=False)) as file:
        assert probe(file) == "vmdk"
    assert content_of(image) == (tmp_path / "a-flat.vmdk").read_bytes()
    assert qemu_content(image, "vmdk") == content_of(image)
    with open_image(image) as device:
        device.write(0, b"x")
    assert image.read_bytes().count(b"\r") == (image.read_bytes().count(b"\n") if lines == "\r\n" else 0)


def test_names_in_windows_western_encoding(tmp_path: Path) -> None:
    (tmp_path / "Gerät.vmdk").write_bytes(b"x" * 512)
    text = vmdk.descriptor(['RW 1 FLAT "Gerät.vmdk" 0'], "custom", 'encoding="windows-1252"')
    (tmp_path / "a.vmdk").write_bytes(text.encode("cp1252"))
    assert content_of(tmp_path / "a.vmdk") == b"x" * 512


@needs("qemu-img")
def test_a_header_that_only_leads_to_a_descriptor(tmp_path: Path) -> None:
    (tmp_path / "flat").write_bytes(b"x" * 512)
    text = vmdk.descriptor(['RW 1 FLAT "flat" 0'], "monolithicFlat").encode()
    header = bytearray(512)
    struct.pack_into("<4sIIQQQQ", header, 0, b"KDMV", 1, 1, 0, 128, 1, 20)
    header[vmdk.LINE_ENDS : vmdk.LINE_ENDS + 4] = b"\n \r\n"
    (tmp_path / "a.vmdk").write_bytes(bytes(header) + text.ljust(20 * 512, b"\0"))
    assert content_of(tmp_path / "a.vmdk") == b"x" * 512
    assert qemu_content(tmp_path / "a.vmdk", "vmdk") == b"x" * 512


@pytest.mark.parametrize(
    ("extents", "words"),
    [
        ((), "no extents"),
        (('RW 2 FLAT "flat" 0',), "truncated"),
        (('RW 1 FLAT "flat" 1',), "truncated"),
        (('RW 1 FLAT "missing" 0',), "no such file"),
        (("RW 1 FLAT",), "has no file"),
        (('RW 1 FLAT "a.vmdk" 0',), "comes back"),
        (('RW 1 SPARSE "flat"',), "not a sparse VMDK"),
        (('RW 1 SESPARSE "flat"',), "not an seSparse"),
        (('RW 9 SPARSE "sparse.vmdk"',), "descriptor .* says 4608"),
        (('RW 128 SPARSE "sparse.vmdk"',) * 2, "two extents"),
        (('RW 1 VMFSRAW "flat"',), "type VMFSRAW"),
        (("RW 0 ZERO",), "empty extent"),
        (("RW 99999999999999 ZERO",), "more than"),
        (("RW 1 ZERO",) * 5000, "more than"),
        (('RW 1 FLAT "../flat" 0',), "outside its own directory"),
        (('RW 1 FLAT "/etc/passwd" 0',), "outside its own directory"),
        (('RW 1 FLAT "json:{}" 0',), "not a plain path"),
        (('RW 1 FLAT "." 0',), "directory"),
    ],
)
def test_descriptors_refused_in_one_line(tmp_path: Path, extents: tuple[str, ...], words: str) -> None:
    (tmp_path / "flat").write_bytes(bytes(512))
    (tmp_path.parent / "flat").write_bytes(bytes(512))
    create_image(tmp_path / "sparse.vmdk", 64 * 1024)
    refused(described(tmp_path, *extents), words)


def test_an_extent_elsewhere_if_allowed(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "flat").write_bytes(b"x" * 512)
    image = described(tmp_path / "home", f'RW 1 FLAT "{tmp_path}/flat" 0')
    refused(image, "outside its own directory")
    assert content_of(image, policy=ReferencePolicy(allowed=(tmp_path,))) == b"x" * 512


@pytest.mark.parametrize(
    ("old", "new", "error", "words"),
    [
        ("createType", "x", FormatError, "no createType"),
        ("CID=12345678", "", FormatError, "no CID"),
        ("CID=12345678", "CID=xyz", FormatError, "no CID"),
        ('"custom"', '"fullDevice"', Unsupported, "physical disks"),
        ("parentCID=ffffffff", "parentCID=nonsense", FormatError, "not a number"),
        ("parentCID=ffffffff", "parentCID=1234", FormatError, "both"),
        ("parentCID=ffffffff", 'parentFileNameHint="b.vmdk"', FormatError, "both"),
        ("parentCID=ffffffff", 'parentCID=1\nparentFileNameHint="b.vmdk"', OpenError, "no such file"),
        ("parentCID=ffffffff", 'parentCID=1\nparentFileNameHint="a.vmdk"', FormatError, "comes back"),
        ("parentCID=ffffffff", 'parentCID=1\nparentFileNameHint="C:\\b.vmdk"', OpenError, "not a plain path"),
    ],
)
def test_settings_refused_in_one_line(tmp_path: Path, old: str, new: str, error: type[OpenError], words: str) -> None:
    image = described(tmp_path, "RW 1 ZERO")
    text = image.read_text()
    assert old in text
    image.write_text(text.replace(old, new, 1))
    with pytest.raises(error, match=words) as caught:
        content_of(image)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_endless_lines_take_no_time(tmp_path: Path) -> None:
    for filler in (" ", "\t=", ' "', " RW", " x=", "# "):
        image = described(tmp_path, "RW 1 ZERO" + filler * (900_000 // len(filler)))
        assert content_of(image) == bytes(512)
