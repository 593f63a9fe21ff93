"""What an image may refer to: the gate between names inside images and files on the host."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import pytest

from nbdserve import opening
from nbdserve.block import HostFile
from nbdserve.errors import OpenError
from nbdserve.formats import FORMATS, probe
from nbdserve.opening import MAXIMUM_CHAIN, ReferencePolicy, known_format, open_image, select_range
from tests.formats.luks_images import qemu_create as qemu_create_encrypted
from tests.reference import needs, qemu_img_create, qemu_info, qemu_io, run
from tests.server import wire
from tests.server.wire import Wire
from tests.serving import Served, refusal

pytestmark = needs("qemu-img")

MIB = 1 << 20
SECRET = Random(7).randbytes(MIB)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The directory of the image; what is beside it is outside."""
    folder = tmp_path / "home"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for path in (folder / "base.raw", folder / "sub/base.raw", tmp_path / "outside/base.raw"):
        path.write_bytes(SECRET)
    return folder


def overlay(path: Path, backing: str, format: str | None = "raw") -> Path:
    """A qcow2 image that refers to `backing`, literally; nothing needs to be there."""
    qemu_img_create(path, MIB)
    rebase(path, backing, format)
    return path


def rebase(path: Path, backing: str, format: str | None) -> None:
    """Write a reference into an image's header, whatever qemu-img would think of it (qcow2 specification, "Header")."""
    content = bytearray(path.read_bytes())
    name = backing.encode()
    extensions = b"" if format is None else extension(0xE2792ACA, format.encode())
    start = 104 if int.from_bytes(content[4:8], "big") == 2 else int.from_bytes(content[100:104], "big")
    at = start + len(extensions) + 8
    content[start : at + len(name)] = extensions + bytes(8) + name
    content[8:20] = at.to_bytes(8, "big") + len(name).to_bytes(4, "big")
    path.write_bytes(content)


def extension(kind: int, data: bytes) -> bytes:
    padded = data.ljust((len(data) + 7) & ~7, b"\0")
    return kind.to_bytes(4, "big") + len(data).to_bytes(4, "big") + padded


def content_of(path: Path, **options: object) -> bytes:
    with open_image(path, read_only=True, **options) as device:  # type: ignore[arg-type]
        return bytes(device.read(0, device.size))


def refused(path: Path, reason: str, **options: object) -> None:
    with pytest.raises(OpenError, match=reason) as caught:
        content_of(path, **options)
    assert "\n" not in str(caught.value)


# Where references may lead


@pytest.mark.parametrize("name", ["base.raw", "./base.raw", "sub/base.raw", "sub/../base.raw"])
def test_inside_its_own_directory(home: Path, name: str) -> None:
    assert content_of(overlay(home / "image.qcow2", name)) == SECRET


def test_by_an_absolute_path_into_its_own_directory(home: Path) -> None:
    assert content_of(overlay(home / "image.qcow2", str(home / "sub/base.raw"))) == SECRET


def test_relative_to_the_image_rather_than_to_us(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = overlay(home / "image.qcow2", "base.raw")
    monkeypatch.chdir(home.parent)
    assert content_of(Path("home/image.qcow2")) == SECRET
    monkeypatch.chdir(home)
    assert content_of(Path(image.name)) == SECRET


@pytest.mark.parametrize(
    "name", ["../outside/base.raw", "sub/../../outside/base.raw", "{}/outside/base.raw", "/etc/passwd"]
)
def test_outside_its_directory(home: Path, name: str) -> None:
    image = overlay(home / "image.qcow2", name.format(home.parent))
    refused(image, r"outside its own directory; allow that with --allow-path .* or --trust-references")
    refused(image, "outside its own directory", policy=ReferencePolicy(allowed=(home / "sub",)))


def test_allowed_directories(home: Path) -> None:
    image = overlay(home / "image.qcow2", "../outside/base.raw")
    assert content_of(image, policy=ReferencePolicy(allowed=(home.parent / "outside",))) == SECRET
    assert content_of(image, policy=ReferencePolicy(allowed=(home.parent,))) == SECRET
    assert content_of(image, policy=ReferencePolicy(trust_all=True)) == SECRET


def test_a_neighbour_with_a_longer_name_is_outside(home: Path) -> None:
    neighbour = home.parent / "home2"
    neighbour.mkdir()
    (neighbour / "base.raw").write_bytes(SECRET)
    refused(overlay(home / "image.qcow2", "../home2/base.raw"), "outside its own directory")


@pytest.mark.parametrize("how", ["file", "directory", "chain of links"])
def test_a_symlink_that_leaves(home: Path, how: str) -> None:
    outside = home.parent / "outside"
    match how:
        case "file":
            (home / "link").symlink_to(outside / "base.raw")
            name = "link"
        case "directory":
            (home / "link").symlink_to(outside)
            name = "link/base.raw"
        case _:
            (home / "sub/second").symlink_to("../../outside/base.raw")
            (home / "link").symlink_to("sub/second")
            name = "link"
    image = overlay(home / "image.qcow2", name)
    refused(image, "outside its own directory")
    assert content_of(image, policy=ReferencePolicy(allowed=(outside,))) == SECRET


def test_a_symlink_that_stays(home: Path) -> None:
    (home / "link").symlink_to("sub/base.raw")
    assert content_of(overlay(home / "image.qcow2", "link")) == SECRET


def test_an_image_that_is_itself_reached_through_a_symlink(home: Path, tmp_path: Path) -> None:
    """Its directory is that of the name the user gave, as qemu has it: what lies there may be referred to."""
    image = overlay(home / "image.qcow2", "base.raw")
    (tmp_path / "directory").symlink_to(home)
    assert content_of(tmp_path / "directory/image.qcow2") == SECRET
    (tmp_path / "outside/image.qcow2").symlink_to(image)
    assert content_of(tmp_path / "outside/image.qcow2") == SECRET, "outside/base.raw"


def test_a_symlink_outside_that_leads_back_in(home: Path) -> None:
    """What it leads to would refer to further files from where the link lies."""
    outside = home.parent / "outside"
    overlay(home / "middle.qcow2", "base.raw")
    (outside / "back.qcow2").symlink_to("../home/middle.qcow2")
    image = overlay(home / "image.qcow2", "../outside/back.qcow2", "qcow2")
    refused(image, f"outside its own directory; allow that with --allow-path {outside} or")
    assert content_of(image, policy=ReferencePolicy(allowed=(outside,))) == SECRET


# Files that are exchanged while we look


def test_what_was_checked_is_what_is_opened(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A symlink that is turned elsewhere once it has been looked up changes nothing."""
    inside, outside = home / "inside.raw", home.parent / "outside/base.raw"
    inside.write_bytes(bytes(MIB))
    link = home / "link"
    link.symlink_to(inside)
    image = overlay(home / "image.qcow2", "link")
    real_path = opening._real_path

    def exchanged_right_after(fd: int) -> str:
        real = real_path(fd)
        if real == str(inside):
            link.unlink()
            link.symlink_to(outside)
        return real

    monkeypatch.setattr(opening, "_real_path", exchanged_right_after)
    assert content_of(image) == bytes(MIB)
    assert link.resolve() == outside, "it was exchanged"
    refused(image, "outside its own directory")


def test_the_directory_is_that_in_which_the_image_was_found(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = overlay(home / "image.qcow2", "base.raw")

    def exchange(*_: object) -> bool:
        if not home.is_symlink():
            home.rename(home.with_name("moved"))
            home.symlink_to("outside")
        return True

    monkeypatch.setattr(opening.locking, "lock", exchange)  # the image is open by then, and nothing of it was read
    refused(image, "outside its own directory")
    assert home.is_symlink()


# Anything but a path


@pytest.mark.parametrize(
    "name",
    [
        'json:{"driver":"file","filename":"/etc/passwd"}',
        'json:{"driver":"raw","file":{"driver":"nbd","host":"localhost"}}',
        "nbd://localhost/x",
        "nbd:unix:/tmp/socket",
        "file:base.raw",
        "file:/etc/passwd",
        "https://example.com/base.raw",
        "fat:rw:/tmp",
        "blkdebug::base.raw",
    ],
)
def test_anything_but_a_plain_path(home: Path, name: str) -> None:
    refused(overlay(home / "image.qcow2", name), "is not a plain path; such references are not followed")


def test_a_plain_path_with_a_colon(home: Path) -> None:
    (home / "disk:1.raw").write_bytes(SECRET)
    assert content_of(overlay(home / "image.qcow2", "disk:1.raw")) == SECRET


def test_a_backing_file_that_is_gone(home: Path) -> None:
    refused(overlay(home / "image.qcow2", "gone.raw"), "gone.raw: no such file")


@pytest.mark.parametrize("name", ["sub", "fifo"])
def test_a_backing_file_that_is_no_file(home: Path, name: str) -> None:
    os.mkfifo(home / "fifo")
    refused(overlay(home / "image.qcow2", name), name)


def test_a_reference_that_names_no_known_format(home: Path) -> None:
    refused(overlay(home / "image.qcow2", "base.raw", "nonsense"), "nonsense")
    refused(overlay(home / "image.qcow2", "base.raw", "qed"), "qed")


# Chains


def test_a_chain_that_comes_back(home: Path) -> None:
    refused(overlay(home / "self.qcow2", "self.qcow2", "qcow2"), "comes back to this file")
    overlay(home / "a.qcow2", "b.qcow2", "qcow2")
    overlay(home / "b.qcow2", "c.qcow2", "qcow2")
    overlay(home / "c.qcow2", "a.qcow2", "qcow2")
    refused(home / "a.qcow2", "comes back to this file")
    (home / "link.qcow2").symlink_to("d.qcow2")
    refused(overlay(home / "d.qcow2", "link.qcow2", "qcow2"), "comes back to this file")


def test_a_chain_without_end(home: Path) -> None:
    overlay(home / "0.qcow2", "base.raw", "raw")
    pattern = (home / "0.qcow2").read_bytes()
    for number in range(1, MAXIMUM_CHAIN + 1):
        path = home / f"{number}.qcow2"
        path.write_bytes(pattern)
        rebase(path, f"{number - 1}.qcow2", "qcow2")
    assert content_of(home / f"{MAXIMUM_CHAIN - 2}.qcow2") == SECRET
    refused(home / f"{MAXIMUM_CHAIN}.qcow2", f"longer than {MAXIMUM_CHAIN}")


def test_each_image_refers_from_its_own_directory(home: Path) -> None:
    overlay(home / "sub/middle.qcow2", "base.raw")
    assert content_of(overlay(home / "image.qcow2", "sub/middle.qcow2", "qcow2")) == SECRET
    overlay(home / "sub/up.qcow2", "../base.raw")
    refused(overlay(home / "image.qcow2", "sub/up.qcow2", "qcow2"), r"sub/up.qcow2: refers to .* outside its own")


# Formats that were guessed


def test_a_guessed_backing_file_may_be_read(home: Path) -> None:
    assert content_of(overlay(home / "image.qcow2", "base.raw", None)) == SECRET


def test_a_guessed_backing_file_may_not_refer_to_others(home: Path) -> None:
    """CVE-2008-1945 and its kin: a guest that writes a header into its raw disk must not get a host file."""
    overlay(home / "middle", "base.raw")
    image = overlay(home / "image.qcow2", "middle", None)
    refused(
        image, r"middle: refers to 'base.raw', but its own format was only guessed; record it with 'qemu-img rebase -u"
    )
    assert content_of(image, policy=ReferencePolicy(trust_all=True)) == SECRET
    rebase(image, "middle", "qcow2")
    assert content_of(image) == SECRET


def test_a_format_that_was_given_is_not_probed_again(home: Path) -> None:
    """A backing file recorded as raw stays raw, whatever its guest has written into its first sector."""
    middle = overlay(home / "middle", "base.raw")
    image = overlay(home / "image.qcow2", "middle", "raw")
    assert content_of(image)[: middle.stat().st_size] == middle.read_bytes()[:MIB]


def test_a_guessed_qcow2_given_by_the_user_may_refer(home: Path) -> None:
    assert content_of(overlay(home / "image", "base.raw")) == SECRET
    assert content_of(home / "image", format="qcow2") == SECRET


@needs("losetup")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a loop device")
def test_a_guessed_block_device_may_not_refer(home: Path) -> None:
    """It may be a guest's raw disk, and /dev is full of files that it could name."""
    image = overlay(home / "image.qcow2", "null")
    os.truncate(image, MIB)  # a device has whole sectors only
    device = Path(run("losetup", "-f", "--show", image).strip())
    try:
        refused(device, f"{device}: refers to 'null', but its own format was only guessed; give it with --format")
        refused(device, "null: this is neither a file nor a block device", format="qcow2")
    finally:
        run("losetup", "-d", device)


# A raw image whose format was guessed


HEADERS = {
    "qcow2": b"QFI\xfb\0\0\0\3",
    "vmdk": b"KDMV\1\0\0\0",
    "a VMDK descriptor": b"# any comment\nversion=1\n",
    "vhdx": b"vhdxfile",
    "luks": b"LUKS\xba\xbe\0\1",
    "vpc": b"conectix",
}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain.img"
    path.write_bytes(SECRET)
    return path


def test_a_guess_warns_and_a_format_does_not(plain: Path) -> None:
    warnings: list[str] = []
    open_image(plain, warn=warnings.append).close()
    assert len(warnings) == 1
    assert str(plain) in warnings[0]
    assert "--format raw" in warnings[0]
    for options in ({"format": "raw"}, {"read_only": True}):
        open_image(plain, warn=pytest.fail, **options).close()  # type: ignore[arg-type]


@pytest.mark.parametrize("format", HEADERS)
def test_its_first_sector_cannot_become_another_header(plain: Path, tmp_path: Path, format: str) -> None:
    header = HEADERS[format]
    with Served(plain, "-k", tmp_path / "socket") as server, Wire(server.connect()) as client:
        client.greet()
        client.go()
        assert client.write(0, header.ljust(512, b"\0")) == wire.EPERM
        assert client.write(0, header.ljust(MIB, b"\0")) == wire.EPERM
        assert client.read(0, 512) == SECRET[:512]
        assert client.write(0, header[:3]) == 0
        assert client.write(3, header[3:]) == wire.EPERM, "in pieces neither"
        assert client.write(0, b"harmless".ljust(512)) == 0
        assert client.write(4096, header) == 0, "elsewhere it is just data"
        assert client.read(4096, len(header)) == header
    assert [line for line in server.stderr if "first sector is protected" in line]


@needs("qemu-img")
def test_its_last_sector_cannot_become_a_footer(plain: Path, tmp_path: Path) -> None:
    """A fixed VHD is raw data with a footer behind it."""
    footer = qemu_img_create(tmp_path / "fixed.vhd", MIB, "vpc", subformat="fixed").read_bytes()[-512:]
    with Served(plain, "-k", tmp_path / "socket") as server, Wire(server.connect()) as client:
        client.greet()
        client.go()
        assert client.write(MIB - 512, footer) == wire.EPERM
        assert client.write(MIB - 4096, bytes(3584) + footer) == wire.EPERM
        assert client.read(MIB - 512, 512) == SECRET[-512:]


def test_with_a_format_given_it_may(plain: Path, tmp_path: Path) -> None:
    with Served(plain, "--format", "raw", "-k", tmp_path / "socket") as server, Wire(server.connect()) as client:
        client.greet()
        assert client.go().write(0, HEADERS["qcow2"]) == 0
    assert plain.read_bytes()[:8] == HEADERS["qcow2"]


# Through the command


def test_the_options_of_the_command(home: Path, tmp_path: Path) -> None:
    image = overlay(home / "image.qcow2", "../outside/base.raw")
    assert f"allow that with --allow-path {tmp_path / 'outside'} or --trust-references" in refusal(image)
    for options in (("--allow-path", "/nowhere", "--allow-path", tmp_path / "outside"), ("--trust-references",)):
        with Served(image, *options, "-k", tmp_path / "socket") as server, Wire(server.connect()) as client:
            client.greet()
            assert client.go().read(0, MIB) == SECRET


@needs("qemu-io")
def test_backing_files_are_never_written(home: Path, tmp_path: Path) -> None:
    image = overlay(home / "image.qcow2", "base.raw")
    (home / "base.raw").chmod(0o444)
    with Served(image, "-k", tmp_path / "socket") as server:
        qemu_io(server.uri, "write -P 1 1000 50000", "write -z 500k 100k", "discard 0 64k", "flush", format="raw")
    assert (home / "base.raw").read_bytes() == SECRET


# Names of formats, and ranges


@pytest.mark.parametrize(("name", "known"), [("raw", "raw"), ("qcow2", "qcow2"), ("vhd", "vpc"), ("img", "raw")])
def test_names_of_formats(name: str, known: str) -> None:
    assert known_format(name) == known


def test_ranges(plain: Path) -> None:
    with open_image(plain, format="raw", read_only=True) as device:
        assert select_range(device, 0, None) is device
        assert select_range(device, 0, MIB) is device
        assert select_range(device, 100, None).read(0, 10) == SECRET[100:110]
        assert select_range(device, MIB, None).size == 0


@pytest.mark.parametrize(("offset", "size"), [(MIB + 1, None), (0, MIB + 1), (MIB, 1), (1 << 70, None)])
def test_ranges_past_the_end(plain: Path, offset: int, size: int | None) -> None:
    with open_image(plain, format="raw", read_only=True) as device, pytest.raises(OpenError, match="past the end"):
        select_range(device, offset, size)


def test_probing_agrees_with_qemu(tmp_path: Path) -> None:
    for format in FORMATS:
        make = qemu_create_encrypted if format == "luks" else qemu_img_create
        image = make(tmp_path / f"image.{format}", 4 << 20, format)
        assert qemu_info(image)["format"] == format
        file = HostFile.open(image, writable=False)
        assert probe(file) == format
        file.close()
