"""LUKS headers that are damaged, made to do harm, or use what is not handled: one line, soon, and little memory."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nbdserve.errors import FormatError, OpenError, Unsupported
from nbdserve.formats.luks.create import create_image
from tests.formats import luks_images as luks
from tests.formats.usage import patch
from tests.reference import needs

pytestmark = needs("module:cryptography")

MIB = 1 << 20
SLOT = 208  # the first of eight, 48 bytes each


def number(value: int, length: int = 4) -> bytes:
    return value.to_bytes(length, "big")


def made(directory: Path) -> Path:
    image = directory / "image"
    create_image(image, MIB, luks.passphrase, milliseconds=1)
    return image


@pytest.mark.parametrize(
    ("at", "data", "error", "words"),
    [
        (0, b"LUKT", FormatError, "no LUKS signature"),
        (6, number(3, 2), Unsupported, "version 3"),
        (8, b"serpent\0", Unsupported, "serpent-xts-plain64"),
        (40, b"ecb\0", Unsupported, "aes-ecb"),
        (40, b"xts-essiv:sha256\0", Unsupported, "aes-xts-essiv"),
        (40, b"\x1b[31m\xff\0", Unsupported, "not handled"),
        (72, b"ripemd160\0", Unsupported, "'ripemd160'"),
        (72, b"shake_128\0", Unsupported, "'shake_128'"),
        (104, number(0), Unsupported, "detached"),
        (104, number(0xFFFFFFFF), FormatError, "does not hold it"),
        (104, number(100), FormatError, "before the end of its key slots"),
        (108, number(0), FormatError, "a key of 0 bytes"),
        (108, number(48), FormatError, "a key of 48 bytes"),
        (108, number(0xFFFFFFFF), FormatError, "a key of 4294967295 bytes"),
        (164, number(0), FormatError, "does not exist"),
        (164, number(0xFFFFFFFF), Unsupported, "minutes of work"),
        (SLOT, number(7), FormatError, "key slot 0"),
        (SLOT + 4, number(0), FormatError, "does not exist"),
        (SLOT + 4, number(0xFFFFFFFF), Unsupported, "minutes of work"),
        (SLOT + 40, number(0xFFFFFFFF), FormatError, "past the end"),
        (SLOT + 44, number(0), FormatError, "in 0 stripes"),
        (SLOT + 44, number(0xFFFFFFFF), FormatError, "4294967295 stripes"),
        (SLOT, number(0xDEAD), OpenError, "no key slot is in use"),
    ],
)
def test_version_1(tmp_path: Path, at: int, data: bytes, error: type[OpenError], words: str) -> None:
    image = made(tmp_path)
    patch(image, at, data)
    for read_only in (True, False):
        with pytest.raises(error, match=words) as caught:
            luks.open_luks(image, read_only=read_only)
        assert str(caught.value).startswith(str(image))


@pytest.mark.parametrize("length", [0, 5, 7, 100, 591, 592, 4096, 200_000])
def test_cut_short(tmp_path: Path, length: int) -> None:
    image = made(tmp_path)
    content = image.read_bytes()
    image.write_bytes(content[:length])
    with pytest.raises(FormatError):
        luks.open_luks(image)


def _segment(**values: object) -> Callable[[dict[str, Any]], object]:
    return lambda found: found["segments"]["0"].update(values)


def _slot(part: str, **values: object) -> Callable[[dict[str, Any]], object]:
    return lambda found: (found["keyslots"]["0"][part] if part else found["keyslots"]["0"]).update(values)


def _digest(**values: object) -> Callable[[dict[str, Any]], object]:
    return lambda found: found["digests"]["0"].update(values)


def _requires(*names: str) -> Callable[[dict[str, Any]], object]:
    return lambda found: found["config"].update(requirements={"mandatory": names})


SALT = luks.in_base64(bytes(32))


@needs("cryptsetup")
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (_requires("online-reencrypt-v2"), Unsupported, "reencryption is under way"),
        (_requires("opal"), Unsupported, "requires opal"),
        (_requires("x" * 1000), Unsupported, "requires x{90,200}, which is not handled"),
        (_segment(integrity={"type": "hmac(sha256)"}), Unsupported, "integrity"),
        (_segment(type="linear"), Unsupported, "'linear'"),
        (_segment(encryption="aegis128-random"), Unsupported, "aegis128"),
        (_segment(sector_size=8192), FormatError, "JSON"),
        (_segment(sector_size=True), FormatError, "JSON"),
        (_segment(offset="0"), Unsupported, "detached"),
        (_segment(offset="-1"), FormatError, "JSON"),
        (_segment(offset=str(1 << 62)), FormatError, "does not hold it"),
        (_segment(offset="9" * 5000), FormatError, "JSON"),
        (_segment(offset=16777216), FormatError, "JSON"),
        (_segment(size=str(1 << 40)), FormatError, "does not hold it"),
        (_segment(iv_tweak="x"), FormatError, "JSON"),
        (lambda found: found["segments"].update({"1": found["segments"]["0"]}), Unsupported, "in 2 segments"),
        (lambda found: found["segments"].clear(), Unsupported, "in 0 segments"),
        (lambda found: found.update(segments=[]), FormatError, "JSON"),
        (lambda found: found.pop("config"), FormatError, "JSON"),
        (lambda found: found["digests"].clear(), FormatError, "recognised"),
        (_digest(keyslots=["9"]), FormatError, "JSON"),
        (_digest(keyslots=[{}]), FormatError, "JSON"),
        (_digest(keyslots=["0"] * 100), FormatError, "JSON"),
        (_digest(keyslots=[]), OpenError, "no key slot is in use"),
        (_digest(iterations=(1 << 32) - 1), Unsupported, "minutes of work"),
        (_digest(salt="?"), FormatError, "JSON"),
        (_digest(hash="md5"), Unsupported, "'md5'"),
        (_slot("", type="tpm"), Unsupported, "'tpm'"),
        (_slot("", key_size=1 << 31), FormatError, "JSON"),
        (_slot("", key_size=33), FormatError, "a key of 33 bytes"),
        (_slot("area", offset=str(1 << 50)), FormatError, "past the end"),
        (_slot("area", encryption="aes-gcm-random"), Unsupported, "aes-gcm"),
        (_slot("area", key_size=7), FormatError, "with a key of 7 bytes"),
        (_slot("af", stripes=(1 << 32) - 1), FormatError, "stripes"),
        (_slot("kdf", type="scrypt"), Unsupported, "'scrypt'"),
        (_slot("kdf", iterations=1 << 31), Unsupported, "minutes of work"),
        (_slot("kdf", type="argon2id", time=4, memory=1 << 22, cpus=4, salt=SALT), Unsupported, "4194304 KiB"),
        (_slot("kdf", type="argon2id", time=1 << 20, memory=1 << 20, cpus=4, salt=SALT), Unsupported, "minutes"),
        (_slot("kdf", type="argon2id", time=4, memory=1024, cpus=9999, salt=SALT), Unsupported, "9999 threads"),
        (_slot("kdf", type="argon2id", time=0, memory=1024, cpus=4, salt=SALT), FormatError, "does not exist"),
    ],
)
def test_version_2(
    luks2: bytes, tmp_path: Path, change: Callable[[dict[str, Any]], object], error: type[OpenError], words: str
) -> None:
    image = tmp_path / "image"
    image.write_bytes(luks2)
    luks.change_luks2(image, change)
    with pytest.raises(error, match=words) as caught:
        luks.open_luks(image)
    assert str(caught.value).startswith(str(image))
    assert len(str(caught.value)) < 500 + len(str(image))


@pytest.fixture(scope="module")
def luks2(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An image that is as short as it can be."""
    options = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
    image = luks.cryptsetup_create(tmp_path_factory.mktemp("luks2") / "image", *options, type="luks2", size=17 * MIB)
    with image.open("r+b") as file:
        file.truncate(2 * MIB)
    luks.change_luks2(image, _segment(offset=str(MIB)))
    return image.read_bytes()


@needs("cryptsetup")
@pytest.mark.parametrize("text", [b"", b"[" * 12000, b'{"a":' * 2000, b"[]", b"7" * 12000, b"\xff", b'{"config":{}}'])
def test_json_that_is_none(luks2: bytes, tmp_path: Path, text: bytes) -> None:
    image = tmp_path / "image"
    image.write_bytes(luks2)
    luks.seal_luks2(image, text)
    with pytest.raises(FormatError, match="JSON"):
        luks.open_luks(image)


@needs("cryptsetup")
@pytest.mark.parametrize("version", [1, 2])
def test_mutations(luks2: bytes, tmp_path: Path, version: int) -> None:
    """Whatever is wrong in a header, the image is refused in one line, or its disk can be read and written."""
    image = tmp_path / "image"
    pristine = made(tmp_path).read_bytes() if version == 1 else luks2
    chosen = random.Random(version)
    opened = 0
    for _ in range(60):
        image.write_bytes(pristine)
        for _ in range(chosen.randint(1, 3)):
            if version == 1:
                patch(image, chosen.randrange(592), chosen.choice((b"\0", b"\xff", chosen.randbytes(4))))
            else:
                text = bytearray(luks.json_of(image))
                text[chosen.randrange(len(text))] = chosen.choice(b'0129"{}[],x\0')
                luks.seal_luks2(image, bytes(text))
        with suppress(OpenError), luks.open_luks(image) as device:
            opened += 1
            device.write(100, b"x" * 1000)
            assert device.read(100, 1000) == b"x" * 1000
    assert 0 < opened < 60
