"""Bad input: one line that says what, where and what to do; status 1 (2 for the command line); nothing touched."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.interop.certificates import Certificates, make_certificates
from tests.reference import needs, qemu_img_create, qemu_io, run
from tests.serving import COMMAND, refusal, run_nbdserve

MIB = 1 << 20


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(Random(1).randbytes(MIB))
    return path


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def refusal_of(image: Path, *options: str) -> str:
    """refusal() that names the image and leaves it as it was, in content and in time."""
    before, modified = image.read_bytes(), image.stat().st_mtime_ns
    said = refusal(image, *options)
    assert image.read_bytes() == before
    assert image.stat().st_mtime_ns == modified
    assert str(image) in said
    return said


# Files that are no images


def test_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.qcow2"
    assert refusal(path) == f"{path}: no such file; check the path"
    assert not path.exists()


def test_a_directory(tmp_path: Path) -> None:
    assert "this is a directory" in refusal(tmp_path)
    assert "this is a directory" in refusal(tmp_path, "-r")


def test_a_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for options in ((), ("-r",)):
        assert "neither a file nor a block device" in refusal(tmp_path / "fifo", *options)


def test_a_character_device() -> None:
    assert "neither a file nor a block device" in refusal("/dev/null")


def test_a_name_that_is_too_long() -> None:
    assert "File name too long" in refusal("x" * 300)


def test_a_path_through_a_file(raw: Path) -> None:
    assert "Not a directory" in refusal(raw / "disk.qcow2")


@pytest.fixture
def as_nobody() -> Callable[[Path], str]:
    """Runs nbdserve without root's rights, which know no unreadable file, and returns its refusal."""

    def refused(image: Path, *options: str) -> str:
        command = [*COMMAND, str(image), *options]
        if os.geteuid() == 0:
            command = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", *command]
            able = subprocess.run([*command[:6], *COMMAND, "--version"], capture_output=True, text=True)
            if able.returncode:
                pytest.skip(f"nobody cannot run nbdserve here: {able.stderr}")
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
        assert result.returncode == 1
        assert len(result.stderr.splitlines()) == 1
        return result.stderr

    return refused


@needs("setpriv")
def test_an_unreadable_file(as_nobody: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = Path("/tmp") if os.geteuid() == 0 else tmp_path_factory.mktemp("unreadable")
    path = folder / f"nbdserve-unreadable-{os.getpid()}"
    path.touch(mode=0o000)
    try:
        assert f"{path}: no permission to write; open it read-only (-r)" in as_nobody(path)
        assert f"{path}: no permission to read" in as_nobody(path, "-r")
        path.chmod(0o444)
        assert f"{path}: no permission to write" in as_nobody(path)
    finally:
        path.unlink()


# Damaged images


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param((4, b"\0\0\0\x09"), id="version 9"),
        pytest.param((8, b"\xff" * 8), id="backing name far outside"),
        pytest.param((16, b"\xff" * 4), id="backing name of 4 GiB"),
        pytest.param((20, b"\0\0\0\x3f"), id="clusters of 2^63 bytes"),
        pytest.param((20, b"\0\0\0\0"), id="clusters of one byte"),
        pytest.param((24, b"\xff" * 8), id="2^64-1 bytes"),
        pytest.param((32, b"\0\0\0\7"), id="unknown encryption"),
        pytest.param((36, b"\xff" * 4), id="L1 table of 32 GiB"),
        pytest.param((40, b"\xff" * 8), id="L1 table far outside"),
        pytest.param((40, b"\0\0\0\0\0\0\0\1"), id="L1 table not aligned"),
        pytest.param((48, b"\xff" * 8), id="refcount table far outside"),
        pytest.param((72, b"\x80" + bytes(7)), id="incompatible feature"),
        pytest.param((96, b"\0\0\0\x40"), id="refcounts of 2^64 bits"),
        pytest.param((100, b"\0\0\0\1"), id="header of one byte"),
    ],
)
@needs("qemu-img")
def test_a_corrupt_qcow2_header(tmp_path: Path, damage: tuple[int, bytes]) -> None:
    image = qemu_img_create(tmp_path / "disk.qcow2", "16M")
    with image.open("r+b") as file:
        file.seek(damage[0])
        file.write(damage[1])
    # Given outright: with an unknown version it would be probed as raw.
    refusal_of(image, "-f", "qcow2")


@needs("qemu-img", "qemu-io")
@pytest.mark.parametrize("length", [0, 3, 71, 103, 512, 65536 + 100, 200_000])
@pytest.mark.parametrize("format", ["qcow2", "vpc"])
def test_a_truncated_image(tmp_path: Path, format: str, length: int) -> None:
    """The tables are cut off; what lies in front of the cut is left as it is."""
    image = qemu_img_create(tmp_path / "disk", "16M", format)
    qemu_io(image, "write -P 1 0 1M", format=format)
    if format == "vpc" and length >= 65536:
        length = 1024 + 16
    os.truncate(image, length)
    result = run_nbdserve_briefly(image, format)
    if result is not None:
        assert len(result.splitlines()) == 1
        assert result.startswith(f"nbdserve: {image}: ")


def run_nbdserve_briefly(image: Path, format: str) -> str | None:
    """What nbdserve says when it refuses an image; None when it serves it (a cut may hit nothing but data)."""
    before = image.read_bytes()
    command = [*COMMAND, os.fspath(image), "-f", format, "-p", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        serves = bool(server.stdout.readline())  # the URI, once it listens
        if serves:
            server.terminate()
        said = server.communicate(timeout=20)[1]
    if serves:
        assert len(before) >= 196_608, "served although a table is missing"
        return None
    assert server.returncode == 1
    assert image.read_bytes() == before
    return said


@needs("qemu-img")
@pytest.mark.parametrize("format", ["qed", "qcow", "parallels"])
def test_a_format_that_is_recognised_but_not_supported(tmp_path: Path, format: str) -> None:
    image = tmp_path / "disk"
    run("qemu-img", "create", "-q", "-f", format, image, "16M")
    said = refusal_of(image)
    assert format in said
    assert "convert it to qcow2" in said


@pytest.mark.parametrize("format", ["qcow2", "vpc"])
def test_an_image_of_another_format_than_was_said(raw: Path, format: str) -> None:
    refusal_of(raw, "-f", format)


def test_a_format_nobody_knows(raw: Path) -> None:
    assert "choose one of raw, qcow2, vpc" in refusal(raw, "--format", "nonsense")


# What does not exist in it


def test_a_partition_where_there_are_none(raw: Path) -> None:
    assert "no partition table" in refusal_of(raw, "-f", "raw", "-P", "1")


@needs("sfdisk")
@pytest.mark.parametrize("selector", ["0", "7", "-1", "x", "1.0", "99999999999999999999", ""])
def test_a_partition_that_does_not_exist(tmp_path: Path, selector: str) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(8 * MIB))
    run("sfdisk", "-q", disk, stdin="label: gpt\nstart=2048, size=4096\n")
    refusal_of(disk, "-f", "raw", f"--partition={selector}")


@needs("qemu-img")
def test_a_snapshot_that_does_not_exist(tmp_path: Path, raw: Path) -> None:
    image = qemu_img_create(tmp_path / "disk.qcow2", "16M")
    assert "none" in refusal_of(image, "--snapshot", "none")
    run("qemu-img", "snapshot", "-c", "good", image)
    assert "good" in refusal_of(image, "--snapshot", "bad")
    assert "no internal snapshots" in refusal_of(raw, "--snapshot", "x")


@pytest.mark.parametrize("options", [("-o", "1025k"), ("--size", "1025k"), ("-o", "1M", "--size", "1"), ("-o", "9P")])
def test_a_range_past_the_end(raw: Path, options: tuple[str, ...]) -> None:
    assert "which has 1048576 bytes" in refusal(raw, *options)


# Certificates


@pytest.mark.parametrize("name", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "binary", "directory"])
def test_a_bad_certificate_directory(
    raw: Path, tmp_path: Path, certificates: Certificates, name: str, damage: str
) -> None:
    pki = tmp_path / "pki"
    shutil.copytree(certificates.good, pki)
    (pki / name).unlink()
    match damage:
        case "empty":
            (pki / name).touch()
        case "garbage":
            (pki / name).write_text("-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")
        case "binary":
            (pki / name).write_bytes(bytes(range(256)))
        case "directory":
            (pki / name).mkdir()
    said = refusal(raw, "-f", "raw", "--tls-certs", pki)
    assert name in said
    assert str(pki) in said


def test_no_certificate_directory(raw: Path, tmp_path: Path) -> None:
    assert "no such directory" in refusal(raw, "--tls-certs", tmp_path / "none")
    assert "no such directory" in refusal(raw, "--tls-certs", raw)


def test_a_key_of_another_certificate(raw: Path, tmp_path: Path, certificates: Certificates) -> None:
    pki = tmp_path / "pki"
    shutil.copytree(certificates.good, pki)
    shutil.copy(certificates.foreign / "server-key.pem", pki)
    assert "does not fit server-cert.pem" in refusal(raw, "--tls-certs", pki)


def test_an_encrypted_key(raw: Path, tmp_path: Path, certificates: Certificates) -> None:
    from cryptography.hazmat.primitives import serialization

    pki = tmp_path / "pki"
    shutil.copytree(certificates.good, pki)
    key = serialization.load_pem_private_key((pki / "server-key.pem").read_bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    (pki / "server-key.pem").write_bytes(locked)
    assert "without a passphrase" in refusal(raw, "--tls-certs", pki)


@pytest.mark.parametrize("damage", ["garbage", "directory"])
def test_a_bad_revocation_list(raw: Path, tmp_path: Path, certificates: Certificates, damage: str) -> None:
    pki = tmp_path / "pki"
    shutil.copytree(certificates.good, pki)
    if damage == "garbage":
        (pki / "ca-crl.pem").write_text("nonsense")
    else:
        (pki / "ca-crl.pem").mkdir()
    assert "ca-crl.pem" in refusal(raw, "-f", "raw", "--tls-certs", pki, "--tls-verify-peer")


# The command line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "IMAGE"),
        (("a", "b"), "unrecognized arguments: b"),
        (("a", "--nonsense"), "--nonsense"),
        (("a", "--read"), "--read"),
        (("a", "-p", "65536"), "'65536' is no port"),
        (("a", "-p", "-1"), "--port"),
        (("a", "-p", "http"), "'http' is no port"),
        (("a", "-o", "1X"), "'1X' is no size"),
        (("a", "-o=-1"), "is no size"),
        (("a", "--size", "1.5X"), "'1.5X' is no size"),
        (("a", "--size", ""), "is no size"),
        (("a", "-e", "0"), "'0' is no number of clients"),
        (("a", "-k", "s", "-p", "1"), "exclude each other"),
        (("a", "-k", "s", "-b", "localhost"), "exclude each other"),
        (("a", "--tls", "on"), "--tls on needs --tls-certs"),
        (("a", "--tls", "require"), "--tls require needs --tls-certs"),
        (("a", "--tls", "maybe"), "maybe"),
        (("a", "--tls-verify-peer"), "--tls-verify-peer needs --tls-certs"),
    ],
)
def test_usage_errors(options: tuple[str, ...], said: str) -> None:
    result = run_nbdserve(*options)
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("nbdserve: error: ")
    assert said in last
    assert result.stdout == ""


@pytest.mark.parametrize("name", ["x" * 4097, "ä" * 2049, os.fsdecode(b"\xff")])
def test_export_names_that_the_wire_cannot_carry(raw: Path, name: str) -> None:
    result = run_nbdserve(raw, "-f", "raw", "-p", "0", "--export-name", name)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith("no client could ask for it")


def test_names_do_not_reach_the_terminal_unescaped(tmp_path: Path) -> None:
    said = refusal(tmp_path / "a\x1b[31m\nb\udcff")
    assert said == f"{tmp_path}/a\\x1b[31m\\nb\\udcff: no such file; check the path"
