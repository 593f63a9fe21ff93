"""VHDX images for tests: opened by path, damaged with right checksums, and with logs that a crash might have left."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path

from nbdserve.block import BlockDevice, HostFile
from nbdserve.errors import OpenError
from nbdserve.formats import OpenOptions, OpenReference
from nbdserve.formats.vhdx import MIB, open_image
from nbdserve.formats.vhdx.checksum import checksum_of
from nbdserve.formats.vhdx.create import create_image
from nbdserve.formats.vhdx.image import VhdxImage
from nbdserve.formats.vhdx.log import DATA, DESCRIPTOR, ENTRY
from tests.formats.usage import patch
from tests.reference import run

LOG = MIB
TABLE = 2 * MIB
METADATA = 3 * MIB
BLOCKS = 4 * MIB  # where blocks begin in a small image
HEADERS = (64 << 10, 128 << 10)
REGION_TABLES = (192 << 10, 256 << 10)

Sector = tuple[int, bytes] | tuple[int, int]  # an offset and 4096 bytes, or an offset and how many bytes to zero


def neighbours(directory: Path) -> OpenReference:
    """Opens parents by plain names beside the child, as nbdserve.opening does among other things."""

    def open_reference(name: str, format: str | None) -> BlockDevice:
        assert format == "vhdx"
        path = directory / name
        if not path.exists():
            raise OpenError(f"{path}: no such file; check the path")
        return open_vhdx(path, read_only=True)

    return open_reference


def open_vhdx(path: Path, *, read_only: bool = False, file_type: type[HostFile] = HostFile) -> VhdxImage:
    """Open a VHDX by path; the file is closed again when it is refused."""
    file = file_type.open(str(path), writable=not read_only)
    try:
        device = open_image(file, OpenOptions(read_only=read_only, open_reference=neighbours(path.parent)))
    except BaseException:
        file.close()
        raise
    assert isinstance(device, VhdxImage)
    return device


def make_child(path: Path, parent: str, *, block_size: int = MIB) -> None:
    """A differencing VHDX over the parent of that name beside it."""
    path.unlink(missing_ok=True)
    with open_vhdx(path.parent / parent, read_only=True) as device:
        assert isinstance(device, VhdxImage)
        guid, sector_size = device.data_write_guid, device._layout.sector_size
    create_image(
        path,
        device.size,
        subformat="differencing",
        block_size=block_size,
        sector_size=sector_size,
        parent=parent,
        parent_guid=guid,
    )


def seven_zip_content(path: Path) -> bytes:
    """The guest content as 7-Zip reads it, which knows differencing disks."""
    target = path.with_name("extracted")
    run("7zz", "x", "-y", "-bd", "-t" + ("VHDX" if path.suffix == ".vhdx" else "VHD"), f"-o{target}", path)
    (content,) = target.iterdir()
    data = content.read_bytes()
    content.unlink()
    return data


def sealed(structure: bytes) -> bytes:
    """A header, region table or log entry with the right checksum."""
    return structure[:4] + checksum_of(structure, 4).to_bytes(4, "little") + structure[8:]


def patch_sealed(path: Path, offset: int, at: int, data: bytes, *, size: int = 4096) -> None:
    """Overwrite bytes of a structure of `size` bytes at an offset of the file, and correct its checksum."""
    content = path.read_bytes()[offset : offset + size]
    patch(path, offset, sealed(content[:at] + data + content[at + len(data) :]))


def log_entry(
    guid: uuid.UUID, number: int, tail: int, sectors: Sequence[Sector], flushed_end: int, last_end: int = 0
) -> bytes:
    """A log entry that changes sectors of the file."""
    described = -(-(ENTRY.size + len(sectors) * DESCRIPTOR.size) // 4096) * 4096
    descriptors, data = b"", b""
    for offset, new in sectors:
        if isinstance(new, int):
            descriptors += DESCRIPTOR.pack(b"zero", bytes(4), new, offset, number)
        else:
            first = int.from_bytes(new[:8], "little")
            descriptors += DESCRIPTOR.pack(b"desc", new[-4:], first, offset, number)
            data += DATA.pack(b"data", number >> 32, new[8:-4], number & 0xFFFFFFFF)
    head = ENTRY.pack(
        b"loge",
        described + len(data),
        tail,
        number,
        len(sectors),
        guid.bytes_le,
        flushed_end,
        last_end or flushed_end,
    )
    return sealed((head + descriptors).ljust(described, b"\0") + data)


def set_log_guid(path: Path, guid: uuid.UUID) -> None:
    """Let both headers say that the log's entries with this GUID count."""
    for place in HEADERS:
        patch_sealed(path, place, 48, guid.bytes_le)
