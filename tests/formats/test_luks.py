"""LUKS images: what QEMU and cryptsetup encrypt we read, and what we write they do."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nbdserve.block import BlockDevice, Computed, Window
from nbdserve.errors import OpenError
from nbdserve.formats.luks import antiforensic
from nbdserve.formats.luks.ciphers import CipherSpec, CryptographyEngine, SectorCipher
from nbdserve.formats.luks.create import create_image
from nbdserve.formats.luks.libcrypto import LibcryptoEngine, load_libcrypto
from tests.conformance import check_block_device
from tests.formats import luks_images as luks
from tests.formats.crashes import Recorder, Witness, remains_of
from tests.formats.crashes import Remains as Left
from tests.formats.usage import scribble, scribble_in_threads
from tests.reference import needs, qemu_info, run

KIB, MIB = 1 << 10, 1 << 20
SIZE = 200 * KIB

CIPHERS = [
    ("aes-xts-plain64", 512, "sha256"),
    ("aes-xts-plain64", 256, "sha512"),
    ("aes-xts-plain", 512, "sha1"),
    ("aes-cbc-essiv:sha256", 128, "sha1"),
    ("aes-cbc-essiv:sha256", 256, "sha256"),
    ("aes-cbc-plain64", 256, "sha512"),
]


@pytest.fixture(params=["libcrypto", "cryptography"])
def each_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to encrypt."""
    if request.param == "cryptography":
        monkeypatch.setattr("nbdserve.formats.luks.libcrypto.load_libcrypto", lambda: None)
    elif load_libcrypto() is None:
        pytest.skip("no libcrypto here")


def check(original: Path, judge, examples: int = 8) -> None:
    """Run the conformance suite on copies of an image."""
    pristine = original.read_bytes()
    image = original.with_name("work")

    def make() -> BlockDevice:
        image.write_bytes(pristine)
        return luks.open_luks(image)

    def reopen(device: BlockDevice) -> BlockDevice:
        device.close()
        return luks.open_luks(image)

    check_block_device(make, reopen, lambda model: judge(image, model), examples=examples)


# Version 1, which QEMU judges


def qemu_agrees(image: Path, model: bytearray) -> None:
    assert luks.qemu_content_of(image) == model


@needs("qemu-img", "cryptsetup", "module:cryptography")
@pytest.mark.parametrize(("cipher", "bits", "hash"), CIPHERS)
def test_every_cipher_as_qemu_has_it(tmp_path: Path, each_engine: None, cipher: str, bits: int, hash: str) -> None:
    options = ("--cipher", cipher, "--key-size", str(bits), "--hash", hash, "--pbkdf-force-iterations", "1000")
    image = luks.cryptsetup_create(tmp_path / "image", *options, size=2 * MIB + SIZE)
    check(image, qemu_agrees, examples=2)


@needs("qemu-img", "qemu-io", "module:cryptography")
def test_both_directions_with_qemu(tmp_path: Path) -> None:
    image = luks.qemu_create(tmp_path / "image", 2 * MIB)
    luks.qemu_io_on(image, "write -P 7 0 2M", "write -P 8 1000k 600k", "write -P 9 2093056 4k")
    with luks.open_luks(image) as device:
        assert device.size == 2 * MIB
        assert device.read(999 * KIB, 2 * KIB) == b"\7" * KIB + b"\x08" * KIB
        assert device.read(2 * MIB - 4 * KIB, 4 * KIB) == b"\x09" * 4 * KIB
        model = scribble(device, random.Random(1))
    qemu_agrees(image, model)


@needs("qemu-img", "qemu-io", "module:cryptography")
def test_an_image_made_here(tmp_path: Path) -> None:
    image = tmp_path / "image"
    create_image(image, 3 * MIB + 1, luks.passphrase, milliseconds=1)
    info = qemu_info(image, "luks")
    assert (info["virtual-size"], info["encrypted"]) == (3 * MIB + 512, True)
    assert info["format-specific"]["data"]["slots"][0]["iters"] >= 1000
    luks.qemu_io_on(image, "write -P 5 0 3M", "write -P 6 3M 512")
    with luks.open_luks(image) as device:
        assert device.read(0, device.size) == b"\5" * 3 * MIB + b"\6" * 512
    with pytest.raises(FileExistsError):
        create_image(image, MIB, luks.passphrase, milliseconds=1)


def made(directory: Path, size: int = SIZE) -> Path:
    image = directory / "image"
    create_image(image, size, luks.passphrase, milliseconds=1)
    return image


# Version 2, which cryptsetup judges


@needs("cryptsetup", "module:cryptography")
def test_both_directions_with_cryptsetup(tmp_path: Path) -> None:
    image, content = tmp_path / "image", random.Random(2).randbytes(512 * KIB)
    image.write_bytes(content + bytes(2 * MIB))
    luks.cryptsetup_encrypt(image)
    with luks.open_luks(image) as device:
        assert device.read(0, 512 * KIB) == content
        model = scribble(device, random.Random(3), steps=20)
    assert luks.cryptsetup_content(image)[: len(model)] == model


@needs("cryptsetup", "module:cryptography")
@pytest.mark.parametrize(
    ("cipher", "bits", "sector"),
    [("aes-xts-plain64", 512, 4096), ("aes-cbc-essiv:sha256", 256, 2048), ("aes-cbc-plain64", 192, 1024)],
)
def test_sectors_of_other_sizes(tmp_path: Path, cipher: str, bits: int, sector: int) -> None:
    image, content = tmp_path / "image", random.Random(2).randbytes(512 * KIB)
    image.write_bytes(content + bytes(2 * MIB))
    options = ("--cipher", cipher, "--key-size", str(bits), "--sector-size", str(sector))
    luks.cryptsetup_encrypt(image, *options)
    with luks.open_luks(image) as device:
        assert device.read(0, 512 * KIB) == content
        model = scribble(device, random.Random(3), steps=10)
    assert luks.cryptsetup_content(image)[: len(model)] == model


def small_luks2(directory: Path, sector: int, size: int) -> Path:
    """An image whose data begins after 1 MiB instead of 16, so that copies are cheap."""
    options = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--sector-size", str(sector))
    image = luks.cryptsetup_create(directory / "image", *options, type="luks2", size=16 * MIB + size)
    content = image.read_bytes()
    image.write_bytes(content[:MIB] + content[16 * MIB :])
    luks.change_luks2(image, lambda found: found["segments"]["0"].update(offset=str(MIB)))
    return image


@needs("cryptsetup", "module:cryptography")
@pytest.mark.parametrize("sector", [512, 4096])
def test_version_2_conforms(tmp_path: Path, sector: int) -> None:
    check(small_luks2(tmp_path, sector, SIZE // 4096 * 4096), lambda image, model: None, examples=4)


@needs("cryptsetup", "module:cryptography")
@pytest.mark.parametrize("kind", ["argon2i", "argon2id", "pbkdf2"])
def test_how_keys_are_derived(tmp_path: Path, kind: str) -> None:
    costs = ("--pbkdf-memory", "64", "--pbkdf-parallel", "2") if kind != "pbkdf2" else ()
    iterations = "4" if costs else "1000"
    options = ("--pbkdf", kind, "--pbkdf-force-iterations", iterations, *costs)
    image = luks.cryptsetup_create(tmp_path / "image", *options, type="luks2", size=20 * MIB)
    with luks.open_luks(image, read_only=True) as device:
        assert device.size == 4 * MIB
    with pytest.raises(OpenError, match="does not open it"):
        luks.open_luks(image, secret=lambda: b"wrong")


@needs("cryptsetup", "module:cryptography")
def test_the_second_copy_of_a_header(tmp_path: Path) -> None:
    options = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
    image = luks.cryptsetup_create(tmp_path / "image", *options, type="luks2", size=20 * MIB)
    with image.open("r+b") as file:
        file.seek(5000)
        file.write(b"rubbish")
    luks.open_luks(image, read_only=True).close()
    with image.open("r+b") as file:
        file.seek(0x4000 + 5000)
        file.write(b"rubbish")
    with pytest.raises(OpenError, match="no copy whose checksum is right"):
        luks.open_luks(image)


# Passphrases


@needs("module:cryptography")
@pytest.mark.parametrize("secret", [b"wrong", b"secret\n\n", b"\nsecret", b"Secret", b"\0"])
def test_a_wrong_passphrase(tmp_path: Path, secret: bytes) -> None:
    image = made(tmp_path)
    before = image.read_bytes()
    with pytest.raises(OpenError, match="the passphrase does not open it; check the file"):
        luks.open_luks(image, secret=lambda: secret)
    assert image.read_bytes() == before


@needs("module:cryptography")
def test_no_passphrase(tmp_path: Path) -> None:
    with pytest.raises(OpenError, match="is encrypted; give its passphrase with --passphrase-file FILE"):
        luks.open_luks(made(tmp_path), secret=None)
    with pytest.raises(OpenError, match="needs a passphrase"):
        create_image(tmp_path / "new", MIB, None)


@needs("module:cryptography", "cryptsetup")
def test_a_newline_at_the_end(tmp_path: Path) -> None:
    """An editor's does not count, but one that belongs to the passphrase does."""
    luks.open_luks(made(tmp_path), secret=lambda: b"secret\n").close()
    image = tmp_path / "other"
    with pytest.raises(OpenError, match="ends with a newline"):
        create_image(image, MIB, lambda: b"secret\n")
    assert not image.exists()
    key, options = tmp_path / "key", ("--type", "luks1", "--pbkdf-force-iterations", "1000")
    key.write_bytes(b"secret\n")
    image.write_bytes(bytes(3 * MIB))
    run("cryptsetup", "luksFormat", "-q", *options, "--key-file", key, image)
    luks.open_luks(image, secret=lambda: b"secret\n").close()
    with pytest.raises(OpenError, match="does not open it"):
        luks.open_luks(image)


@needs("module:cryptography", "cryptsetup")
def test_every_key_slot(tmp_path: Path) -> None:
    image, new = made(tmp_path), tmp_path / "new"
    new.write_bytes(b"another")
    options = ("-q", "--pbkdf-force-iterations", "1000", "--key-file", luks.key_file(tmp_path))
    run("cryptsetup", "luksAddKey", *options, "--key-slot", "7", image, new)
    for secret in (b"secret", b"another"):
        luks.open_luks(image, secret=lambda: secret).close()  # noqa: B023
    run("cryptsetup", "luksKillSlot", "-q", image, "0")
    with pytest.raises(OpenError, match="does not open it"):
        luks.open_luks(image)
    luks.open_luks(image, secret=lambda: b"another").close()
    run("cryptsetup", "luksKillSlot", "-q", image, "7")
    with pytest.raises(OpenError, match="no key slot is in use"):
        luks.open_luks(image)


@needs("module:cryptography")
def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = made(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives.ciphers", None)
    with pytest.raises(OpenError, match=r"pip install 'nbdserve\[luks\]'"):
        luks.open_luks(image)


# Ciphers and keys


@needs("module:cryptography")
@pytest.mark.parametrize(("mode", "length"), [("xts", 32), ("xts", 64), ("cbc", 16), ("cbc", 24), ("cbc", 32)])
def test_both_engines_agree(mode: str, length: int) -> None:
    library = load_libcrypto()
    if library is None:
        pytest.skip("no libcrypto here")
    chosen = random.Random(1)
    key, plain = chosen.randbytes(length), chosen.randbytes(8192)
    for size in (512, 4096):
        ivs = bytearray(chosen.randbytes(8192 // size * 16))
        one, other = LibcryptoEngine(library, mode, key, size), CryptographyEngine(mode, key, size)
        first, second = bytearray(plain), bytearray(plain)
        one(True, ivs, memoryview(first))
        other(True, ivs, memoryview(second))
        assert first == second != plain
        one(False, ivs, memoryview(first))
        other(False, ivs, memoryview(second))
        assert first == second == plain


@needs("module:cryptography")
def test_numbers_of_sectors_beyond_32_bits() -> None:
    key = bytes(range(64))
    far, near = (bytearray(512) for _ in range(2))
    for name, same in (("aes-xts-plain", True), ("aes-xts-plain64", False)):
        cipher = SectorCipher(CipherSpec.parse(name), key)
        far[:] = near[:] = bytes(512)
        cipher.encrypt(5, memoryview(near))
        cipher.encrypt((1 << 32) + 5, memoryview(far))
        assert (near == far) == same


@pytest.mark.parametrize("hash", ["sha1", "sha256", "sha512"])
@pytest.mark.parametrize("length", [16, 32, 64])
def test_stripes(hash: str, length: int) -> None:
    key = random.Random(length).randbytes(length)
    material = antiforensic.split(key, 20, hash)
    assert len(material) == 20 * length
    assert antiforensic.merge(material, 20, hash) == key
    damaged = bytearray(material)
    damaged[3] ^= 1
    assert antiforensic.merge(damaged, 20, hash) != key


# What is promised of every device


@needs("module:cryptography")
def test_nothing_of_it_is_to_be_had_without_decrypting(tmp_path: Path) -> None:
    with luks.open_luks(made(tmp_path)) as device:
        device.write(0, bytes(SIZE))
        assert list(device.extents(0, SIZE)) == [Computed(SIZE)]
        assert device.locate(0, 512) is None
        assert device.locate_writable(0, 512) is None
        device.discard(0, SIZE)
        assert device.read(0, SIZE) == bytes(SIZE)


@needs("module:cryptography", "cryptsetup")
@pytest.mark.parametrize("cipher", ["aes-xts-plain64", "aes-cbc-essiv:sha256"])
def test_threads_that_share_sectors(tmp_path: Path, cipher: str) -> None:
    options = ("--cipher", cipher, "--key-size", "256", "--pbkdf-force-iterations", "1000")
    image = luks.cryptsetup_create(tmp_path / "image", *options, size=3 * MIB)
    with luks.open_luks(image) as whole:
        device = Window(whole, 100, 4 * 5003)  # shares meet inside sectors
        device.zero(0, device.size)
        model = scribble_in_threads(device, 4, steps=60, flush_every=30, lengths=(1, 17, 100, 600, 1500))
        assert device.read(0, device.size) == model


@needs("module:cryptography", "cryptsetup")
def test_no_crash_spoils_what_was_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the rest of a sector of 4 KiB of which a crash has kept only a part."""
    luks.remember_keys(monkeypatch)
    image = small_luks2(tmp_path, 4096, 64 * KIB)
    with luks.open_luks(image) as device:
        device.zero(0, device.size)
    start = Left.of(image)
    device = luks.open_luks(image, file_type=Recorder)
    with device:
        witness = Witness(device, device.file.log, [range(device.size // 512)])  # type: ignore[attr-defined]
        witness.work(random.Random(4), steps=12)
    crashed = tmp_path / "crashed"
    for moment, left in remains_of(start, witness.log, random.Random(5), samples=1):
        crashed.unlink(missing_ok=True)
        left.write_to(crashed)
        with luks.open_luks(crashed, read_only=True) as device:
            witness.check(device, moment)
