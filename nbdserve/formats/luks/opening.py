"""A file -> an image: the header, the passphrase, and where the data lies."""

from __future__ import annotations

from nbdserve.block.file import HostFile
from nbdserve.errors import FormatError, OpenError, Unsupported
from nbdserve.formats import GetPassphrase, OpenOptions
from nbdserve.formats.luks.ciphers import SectorCipher
from nbdserve.formats.luks.file import EncryptedFile
from nbdserve.formats.luks.header import MAGIC, Area, Header
from nbdserve.formats.luks.image import LuksImage
from nbdserve.formats.luks.keyslots import unlock
from nbdserve.formats.luks.luks1 import read_luks1
from nbdserve.formats.luks.luks2 import read_luks2


def read_header(area: Area) -> Header:
    """Read and check a header of whichever version.

    Raises:
        FormatError: it is damaged, or there is none.
        Unsupported: it uses what is not handled.
    """
    start = bytes(area.read(0, min(area.size, len(MAGIC) + 2)))
    if not start.startswith(MAGIC) or len(start) < len(MAGIC) + 2:
        raise FormatError(f"{area.file.name}: not a LUKS image: no LUKS signature; check the format you gave")
    version = int.from_bytes(start[len(MAGIC) :], "big")
    if version not in (1, 2):
        raise Unsupported(f"{area.file.name}: LUKS version {version} is not handled; 1 and 2 are")
    return read_luks1(area) if version == 1 else read_luks2(area)


def open_luks(file: HostFile, options: OpenOptions) -> LuksImage:
    """See nbdserve.formats.luks.open_image()."""
    if options.snapshot is not None:
        raise OpenError(f"{file.name}: LUKS images have no internal snapshots; leave --snapshot out")
    area = Area(file, 0, file.size)
    header = read_header(area)
    size = data_size(area, header)
    cipher = SectorCipher(header.cipher, unlock(area, header, options.passphrase), header.sector_size)
    plain = EncryptedFile(file, cipher, origin=header.offset, number=header.first_number)
    return LuksImage(file, plain, header.offset, size, read_only=options.read_only)


def data_size(area: Area, header: Header) -> int:
    """The length of the data in bytes, whole sectors.

    Raises:
        FormatError: it does not lie inside the file.
    """
    if not header.offset:
        raise area.unsupported("stands apart from the data (a detached header)")
    room = area.size - header.offset
    size = room if header.size is None else header.size
    if size < 0 or size > room:
        raise area.wrong(f"puts the data at {header.offset}, where the file of {area.size} bytes does not hold it")
    if any(slot.offset + header.key_bytes * slot.stripes > header.offset for slot in header.slots):
        raise area.wrong(f"puts the data at {header.offset}, before the end of its key slots")
    return size // header.sector_size * header.sector_size


def open_cipher(area: Area, passphrase: GetPassphrase | None) -> SectorCipher:
    """What the clusters of a qcow2 image are encrypted with, by the LUKS header that it holds.

    Raises:
        OpenError: with the reason in one line.
    """
    header = read_header(area)
    if header.version != 1:
        raise area.unsupported(f"inside a qcow2 image is of version {header.version}")
    return SectorCipher(header.cipher, unlock(area, header, passphrase))
