"""Sectors, encrypted and decrypted: AES in the modes that QEMU and cryptsetup use.

A cipher is written as dm-crypt does, aes-MODE-IV, where IV says what makes sectors with equal content differ:

    plain64       the number of the sector, 64 bits
    plain         the same, cut to 32 bits
    essiv:sha256  that number, encrypted with the hash of the key

Sectors are numbered in units of 512 bytes, whatever their size is.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from nbdserve.errors import OpenError, Unsupported

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import modes

BLOCK = 16  # bytes; AES encrypts as many at once, and an initialisation vector has as many
SECTOR = 512  # bytes; the unit in which sectors are numbered
_KEY_BYTES = {"xts": (32, 64), "cbc": (16, 24, 32)}  # XTS has two keys of AES
_IVS = ("plain64", "plain", "essiv:sha256")


@dataclass(frozen=True, slots=True)
class CipherSpec:
    """A cipher's name, taken apart.

    Attributes:
        mode: xts or cbc.
        iv: one of plain64, plain and essiv:sha256.
    """

    mode: str
    iv: str

    @classmethod
    def parse(cls, text: str) -> CipherSpec:
        """Take a name like aes-xts-plain64 apart.

        Raises:
            Unsupported: such a cipher is not handled.
        """
        name, _, rest = text.lower().partition("-")
        mode, _, iv = rest.partition("-")
        if name != "aes" or mode not in _KEY_BYTES or iv not in _IVS or (mode == "xts" and ":" in iv):
            raise Unsupported(f"the cipher {text!r} is not handled; aes-xts-plain64 and its kin are")
        return cls(mode, iv)

    def __str__(self) -> str:
        return f"aes-{self.mode}-{self.iv}"

    def takes(self, key_bytes: int) -> bool:
        """Whether there is such a cipher with a key of so many bytes."""
        return key_bytes in _KEY_BYTES[self.mode]

    def is_weak(self, key: bytes) -> bool:
        """Whether the two keys of XTS are one and the same, which libraries refuse."""
        return self.mode == "xts" and key[: len(key) // 2] == key[len(key) // 2 :]


class Engine(Protocol):
    """Encrypts or decrypts sectors in place, each with its initialisation vector."""

    def __call__(self, encrypt: bool, ivs: bytearray, sectors: memoryview, /) -> None: ...


class SectorCipher:
    """Encrypts and decrypts whole sectors; any number of threads may.

    Attributes:
        sector_size: bytes.
        unit: bytes that can be encrypted anew while those around them on the disk stay as they are.
    """

    def __init__(self, spec: CipherSpec, key: bytes, sector_size: int = SECTOR) -> None:
        assert spec.takes(len(key))
        self.sector_size = sector_size
        self.unit = BLOCK if spec.mode == "xts" else sector_size
        self._step = sector_size // SECTOR
        self._most = (1 << 32) - 1 if spec.iv == "plain" else (1 << 64) - 1
        self._hide = _essiv(key) if spec.iv == "essiv:sha256" else None
        self._engine = _engine(spec, key, sector_size)

    def encrypt(self, first: int, sectors: memoryview) -> None:
        """Encrypt whole sectors in place; `first` is the number of the first one."""
        self._engine(True, self._ivs(first, len(sectors)), sectors)

    def decrypt(self, first: int, sectors: memoryview) -> None:
        """Decrypt whole sectors in place; `first` is the number of the first one."""
        self._engine(False, self._ivs(first, len(sectors)), sectors)

    def _ivs(self, first: int, length: int) -> bytearray:
        """The initialisation vectors of sectors in a row, one behind the other."""
        numbers = range(first, first + length // SECTOR, self._step)
        words = array("Q", bytes(BLOCK * len(numbers)))
        words[::2] = array("Q", [number & self._most for number in numbers])
        if array("H", b"\1\0")[0] != 1:  # they stand on the disk with the lowest byte first
            words.byteswap()
        ivs = bytearray(words)
        return ivs if self._hide is None else bytearray(self._hide(ivs))


def _essiv(key: bytes) -> Callable[[bytearray], bytes]:
    """Encrypts numbers of sectors with the hash of the key."""
    from hashlib import sha256

    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    cipher = Cipher(algorithms.AES(sha256(key).digest()), modes.ECB())
    return lambda numbers: cipher.encryptor().update(numbers)


def _engine(spec: CipherSpec, key: bytes, sector_size: int) -> Engine:
    """What encrypts: the system's OpenSSL where it is found, because it need not be set up for every sector."""
    from nbdserve.formats.luks.libcrypto import LibcryptoEngine, load_libcrypto

    library = load_libcrypto()
    if library is not None:
        return LibcryptoEngine(library, spec.mode, key, sector_size)
    return CryptographyEngine(spec.mode, key, sector_size)


class CryptographyEngine:
    """The library cryptography, with a context for every sector."""

    def __init__(self, mode: str, key: bytes, sector_size: int) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        self._cipher = Cipher
        self._key = algorithms.AES(key)
        self._mode: Callable[[bytes], modes.XTS | modes.CBC] = modes.XTS if mode == "xts" else modes.CBC
        self._sector_size = sector_size

    def __call__(self, encrypt: bool, ivs: bytearray, sectors: memoryview, /) -> None:
        size = self._sector_size
        for number, start in enumerate(range(0, len(sectors), size)):
            cipher = self._cipher(self._key, self._mode(bytes(ivs[number * BLOCK : number * BLOCK + BLOCK])))
            context = cipher.encryptor() if encrypt else cipher.decryptor()
            sectors[start : start + size] = context.update(sectors[start : start + size])


def demand_library(name: str) -> None:
    """Say how to get the library that encrypts, where it is missing.

    Raises:
        OpenError: it is.
    """
    try:
        import cryptography.hazmat.primitives.ciphers  # noqa: F401
    except ImportError:
        raise OpenError(
            f"{name}: is encrypted, which needs the library cryptography: pip install 'nbdserve[luks]'"
        ) from None
