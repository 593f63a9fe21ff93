"""Encrypted images for tests, and how QEMU and cryptsetup look at them. All of them have the same passphrase."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbdserve.block import BlockDevice, HostFile
from nbdserve.formats import GetPassphrase, OpenOptions
from nbdserve.formats.luks import keyslots, open_image
from nbdserve.formats.luks.header import Area, Header
from nbdserve.opening import ReferencePolicy
from nbdserve.opening import open_image as open_named
from tests.formats.qcow2_images import references_of
from tests.reference import run

SECRET = ("--object", "secret,id=s,data=secret")
"""For QEMU's tools."""


def passphrase() -> bytes:
    """That of all images."""
    return b"secret"


def open_luks(
    path: Path,
    *,
    read_only: bool = False,
    secret: GetPassphrase | None = passphrase,
    file_type: type[HostFile] = HostFile,
) -> BlockDevice:
    """Open an image."""
    file = file_type.open(path, writable=not read_only)
    try:
        return open_image(file, OpenOptions(read_only, references_of(path.parent), passphrase=secret))
    except BaseException:
        file.close()
        raise


def remember_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Derive the key of an image once only, for tests that open it, and what crashes leave of it, very often."""
    keys: dict[bytes, bytes] = {}

    def unlock(area: Area, header: Header, passphrase: GetPassphrase | None) -> bytes:
        if header.digest not in keys:
            keys[header.digest] = keyslots.unlock(area, header, passphrase)
        return keys[header.digest]

    monkeypatch.setattr("nbdserve.formats.luks.opening.unlock", unlock)


def as_qemu_opens(path: Path, format: str = "luks", more: str = "") -> list[str]:
    """The arguments by which QEMU's tools open an encrypted image."""
    prefix = "encrypt." if format == "qcow2" else ""
    return [*SECRET, "--image-opts", f"driver={format},{prefix}key-secret=s,file.filename={path}{more}"]


def qemu_content_of(path: Path, format: str = "luks", more: str = "") -> bytearray:
    """The guest content as qemu-img reads it."""
    raw = path.with_name(path.name + ".reference")
    run("qemu-img", "convert", *as_qemu_opens(path, format, more), "-O", "raw", raw)
    content = bytearray(raw.read_bytes())
    raw.unlink()
    return content


def qemu_io_on(path: Path, *commands: str, format: str = "luks", more: str = "") -> str:
    """Run qemu-io commands on an encrypted image."""
    return run("qemu-io", *(part for each in commands for part in ("-c", each)), *as_qemu_opens(path, format, more))


def qemu_check_of(path: Path, more: str = "") -> None:
    """qemu-img check finds nothing wrong with an encrypted qcow2 image, but for leaks."""
    run("qemu-img", "check", *as_qemu_opens(path, "qcow2", more))


def qemu_create(path: Path, size: int, format: str = "luks") -> Path:
    """qemu-img create, which takes two seconds to find out how quick this machine is."""
    names = {"encrypt.format": "luks", "encrypt.key-secret": "s", "encrypt.iter-time": 10}
    wanted = names if format == "qcow2" else {"key-secret": "s", "iter-time": 10}
    listed = ",".join(f"{name}={value}" for name, value in wanted.items())
    run("qemu-img", "create", "-q", "-f", format, *SECRET, "-o", listed, path, str(size))
    return path


def key_file(directory: Path) -> Path:
    """The passphrase in a file."""
    file = directory / "passphrase"
    file.write_bytes(passphrase())
    return file


def cryptsetup_create(path: Path, *options: str, type: str = "luks1", size: int = 0) -> Path:
    """cryptsetup luksFormat, which writes a header and leaves the data as it is."""
    path.touch()
    with path.open("r+b") as file:
        file.truncate(size)
    run("cryptsetup", "luksFormat", "-q", "--type", type, *options, "--key-file", key_file(path.parent), path)
    return path


def cryptsetup_encrypt(path: Path, *options: str) -> None:
    """Let cryptsetup encrypt a raw image in place: LUKS2, with a header of 1 MiB in front. The last 2 MiB are lost."""
    run(
        *("cryptsetup", "reencrypt", "-q", "--encrypt", "--type", "luks2", "--reduce-device-size", "2M"),
        *("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", *options),
        *("--key-file", key_file(path.parent), path),
    )


def cryptsetup_content(path: Path) -> bytes:
    """What cryptsetup decrypts a LUKS2 image made by cryptsetup_encrypt() to."""
    copy, header = path.with_name("decrypted"), path.with_name("header")
    copy.write_bytes(path.read_bytes())
    header.unlink(missing_ok=True)
    run(
        *("cryptsetup", "reencrypt", "-q", "--decrypt", "--force-offline-reencrypt", "--header", header),
        *("--key-file", key_file(path.parent), copy),
    )
    return copy.read_bytes()


def json_of(path: Path) -> bytes:
    """The JSON of a LUKS2 header."""
    with path.open("rb") as file:
        return file.read(0x4000)[4096:].rstrip(b"\0")


def seal_luks2(path: Path, text: bytes) -> None:
    """Write JSON to both copies of a LUKS2 header, with checksums that are right."""
    area = text.ljust(0x3000, b"\0")
    assert len(area) == 0x3000
    with path.open("r+b") as file:
        for place in (0, 0x4000):
            file.seek(place)
            binary = bytearray(file.read(4096))
            binary[448:512] = bytes(64)
            binary[448:480] = hashlib.sha256(binary + area).digest()
            file.seek(place)
            file.write(binary + area)


def change_luks2(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the JSON of a LUKS2 header."""
    found = json.loads(json_of(path))
    change(found)
    seal_luks2(path, json.dumps(found, separators=(",", ":")).encode())


def in_base64(content: bytes) -> str:
    """Bytes as they stand in JSON."""
    return base64.b64encode(content).decode()


def open_image_by_name(path: Path) -> BlockDevice:
    """Open an image as the command lines do."""
    return open_named(path, policy=ReferencePolicy(passphrase=passphrase))
