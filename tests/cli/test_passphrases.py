"""Encrypted images on the command lines: --passphrase-file, new images, and what goes wrong with either."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from nbdserve.cli.attach import main as nbdattach
from tests.cli.img import NBDIMG, nbdimg
from tests.formats import luks_images as luks
from tests.reference import needs, qemu_info, run
from tests.serving import COMMAND, Served

pytestmark = needs("module:cryptography", "qemu-img")

MIB = 1 << 20
ENCRYPTED = ("-o", "encrypt.format=luks,encrypt.iter-time=1")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return luks.key_file(tmp_path)


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    """Half data, half zeros, not quite a whole number of sectors long; in the file `plain`."""
    content = random.Random(1).randbytes(300_000) + bytes(300_001)
    (tmp_path / "plain").write_bytes(content)
    return content


@pytest.mark.parametrize(("format", "options"), [("luks", ("-o", "iter-time=1")), ("qcow2", ENCRYPTED)])
def test_convert_there_and_back(
    tmp_path: Path, key: Path, content: bytes, format: str, options: tuple[str, ...]
) -> None:
    image, plain, back = tmp_path / "image", tmp_path / "plain", tmp_path / "back"
    nbdimg("convert", "-f", "raw", "-O", format, *options, "--passphrase-file", key, plain, image)
    assert luks.qemu_content_of(image, format) == content.ljust(-(-len(content) // 512) * 512, b"\0")
    nbdimg("compare", "--passphrase-file", key, "-f", "raw", plain, image)
    nbdimg("convert", "--passphrase-file", key, "-O", "raw", image, back)
    assert back.read_bytes()[: len(content)] == content
    assert "is encrypted" in nbdimg("convert", "-O", "raw", image, back, status=1)
    nbdimg("check", "--passphrase-file", key, image)
    (depth,) = {each["depth"] for each in json.loads(nbdimg("map", "--json", "--passphrase-file", key, image))}
    assert depth == 0


@pytest.mark.parametrize(("format", "options"), [("luks", ("-o", "iter-time=1")), ("qcow2", ENCRYPTED)])
def test_what_info_tells(tmp_path: Path, key: Path, format: str, options: tuple[str, ...]) -> None:
    image = tmp_path / "image"
    nbdimg("create", "-f", format, *options, "--passphrase-file", key, image, "3M")
    ours, theirs = json.loads(nbdimg("info", "--json", image)), qemu_info(image, format)
    assert ours["encrypted"]
    for name in ("virtual-size", "format", "encrypted", "format-specific"):
        assert ours[name] == theirs[name]
    assert "encrypted: yes" in nbdimg("info", image)


def test_a_chain_with_one_passphrase(tmp_path: Path, key: Path, content: bytes) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    chosen = ("--passphrase-file", key)
    nbdimg("convert", "-f", "raw", "-O", "qcow2", *ENCRYPTED, *chosen, tmp_path / "plain", base)
    nbdimg("create", "-f", "qcow2", *ENCRYPTED, *chosen, "-b", "base", "-F", "qcow2", top)
    nbdimg("compare", *chosen, base, top)
    with luks.open_image_by_name(top) as device:
        device.write(1000, b"new")
    nbdimg("commit", *chosen, top)
    assert luks.qemu_content_of(base, "qcow2")[: len(content)] == content[:1000] + b"new" + content[1003:]


def test_measure_as_qemu_does(key: Path) -> None:
    options = ("-o", "encrypt.format=luks,encrypt.key-secret=s")
    theirs = run("qemu-img", "measure", "--output=json", *luks.SECRET, "-O", "qcow2", *options, "--size", "1G")
    ours = nbdimg("measure", "--output=json", "-O", "qcow2", "-o", "encrypt.format=luks", "--size", "1G")
    assert json.loads(ours) == json.loads(theirs)


@needs("nbdinfo")
def test_serve(tmp_path: Path, key: Path, content: bytes) -> None:
    image = tmp_path / "image"
    nbdimg(
        "convert", "-f", "raw", "-O", "luks", "-o", "iter-time=1", "--passphrase-file", key, tmp_path / "plain", image
    )
    with Served(image, "--passphrase-file", key) as server:
        run("qemu-io", "-f", "raw", "-c", "write -P 7 1000 3000", "-c", "read -P 7 1000 3000", server.uri)
    expected = content[:1000] + b"\7" * 3000 + content[4000:]
    assert luks.qemu_content_of(image)[: len(content)] == expected


def test_from_standard_input(tmp_path: Path) -> None:
    image = tmp_path / "image"
    command = [*NBDIMG, "create", "-q", "-f", "luks", "-o", "iter-time=1", "--passphrase-file", "-", image, "1M"]
    subprocess.run(command, input=b"secret", check=True)
    assert len(luks.qemu_content_of(image)) == MIB


@pytest.mark.parametrize(
    ("secret", "words"),
    [
        (b"wrong", "the passphrase does not open it"),
        (b"", "is empty"),
        (None, "No such file"),
        (bytes((8 << 20) + 1), "is longer than 8 MiB"),
    ],
)
def test_a_passphrase_that_is_none(tmp_path: Path, key: Path, secret: bytes | None, words: str) -> None:
    image, other = tmp_path / "image", tmp_path / "other"
    nbdimg("create", "-f", "luks", "-o", "iter-time=1", "--passphrase-file", key, image, "1M")
    if secret is not None:
        other.write_bytes(secret)
    said = nbdimg("compare", "--passphrase-file", other, image, image, status=2)
    assert words in said
    assert said.count("\n") == 1
    for command in (COMMAND, [sys.executable, "-m", "fusemount", "--list"]):
        result = subprocess.run([*command, image, "--passphrase-file", other], capture_output=True, text=True)
        assert result.returncode == 1
        assert words in result.stderr
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("create", "-f", "luks"), "give it with --passphrase-file FILE"),
        (("create", "-f", "qcow2", *ENCRYPTED), "give it with --passphrase-file FILE"),
        (("create", "-f", "luks", "-o", "key-secret=s"), "the passphrase is given with --passphrase-file"),
        (("create", "-f", "qcow2", "-o", "encrypt.format=aes"), "encrypt.format is luks"),
        (("create", "-f", "luks", "-b", "plain", "-F", "raw"), "cannot stand on another one"),
    ],
)
def test_new_images_that_cannot_be(tmp_path: Path, content: bytes, arguments: tuple[str, ...], words: str) -> None:
    image = tmp_path / "image"
    assert words in nbdimg(*arguments, image, "1M", status=1)
    assert not image.exists()


def test_compressed_and_encrypted(tmp_path: Path, key: Path, content: bytes) -> None:
    arguments = ("-c", "-f", "raw", "-O", "qcow2", *ENCRYPTED, "--passphrase-file", key)
    assert "either compressed or encrypted" in nbdimg(
        "convert", *arguments, tmp_path / "plain", tmp_path / "image", status=1
    )
    assert not (tmp_path / "image").exists()


def test_space_set_aside_would_not_be_zeros(tmp_path: Path, key: Path) -> None:
    image = tmp_path / "image"
    nbdimg("create", "-f", "qcow2", *ENCRYPTED, "--passphrase-file", key, image, "1M")
    arguments = ("resize", "--passphrase-file", key, image, "2M")
    assert "space set aside is not zeros" in nbdimg(*arguments, "--preallocation=metadata", status=1)
    nbdimg(*arguments)
    assert luks.qemu_content_of(image, "qcow2") == bytes(2 * MIB)


def test_attach_hands_it_on(tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "image").touch()
    arguments = ["--dry-run", "--backend", "native", "--passphrase-file", str(key), str(tmp_path / "image")]
    with pytest.raises(SystemExit) as end:
        nbdattach(arguments)
    assert end.value.code == 0
    assert f"--passphrase-file {key}" in capsys.readouterr().out
    for wrong in (["--backend", "qemu", *arguments[3:]], ["--passphrase-file", "-", arguments[-1]]):
        with pytest.raises(SystemExit) as end:
            nbdattach(wrong)
        assert end.value.code == 2
