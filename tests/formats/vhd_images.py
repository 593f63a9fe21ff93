"""Dynamic VHDs with blocks of any size: qemu-img makes only those with 2 MiB, too large to write hundreds of."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

from nbdserve.block import BlockDevice, HostFile
from nbdserve.errors import OpenError
from nbdserve.formats import OpenOptions, OpenReference
from nbdserve.formats.vpc import open_image
from nbdserve.formats.vpc.create import create_image

UNUSED = 0xFFFFFFFF
TABLE_OFFSET = 1536


def seal(header: bytes, field: int) -> bytes:
    """The header with a right checksum at `field`."""
    blank = header[:field] + bytes(4) + header[field + 4 :]
    return header[:field] + struct.pack(">I", ~sum(blank) & 0xFFFFFFFF) + header[field + 4 :]


def footer(
    size: int, *, disk_type: int = 3, creator: bytes = b"qem2", geometry: tuple[int, int, int] = (1, 1, 1)
) -> bytes:
    """A footer of a disk of `size` bytes."""
    offset = 512 if disk_type != 2 else 0xFFFFFFFFFFFFFFFF
    fields = struct.pack(
        ">8sIIQI4sI4sQQHBBII16s",
        *(b"conectix", 2, 0x10000, offset, 0, creator, 0, b"Wi2k", size, size, *geometry, disk_type, 0, bytes(16)),
    )
    return seal(fields.ljust(512, b"\0"), 64)


def header(entries: int, block_size: int, *, table_offset: int = TABLE_OFFSET) -> bytes:
    """A dynamic disk header."""
    fields = struct.pack(">8sQQIII", b"cxsparse", UNUSED << 32 | UNUSED, table_offset, 0x10000, entries, block_size)
    return seal(fields.ljust(1024, b"\0"), 36)


def dynamic(
    size: int, block_size: int, *, table: Sequence[int] | None = None, space: int = 0, disk_type: int = 3
) -> bytes:
    """A dynamic VHD: `table` gives the entries (sectors), `space` the bytes between table and footer."""
    entries = -(-size // block_size)
    table = [UNUSED] * entries if table is None else table
    raw = struct.pack(f">{len(table)}I", *table)
    raw += b"\xff" * (-len(raw) % 512) + bytes(space)
    ends = footer(size, disk_type=disk_type)
    return ends + header(entries, block_size) + raw + ends


def neighbours(directory: Path) -> OpenReference:
    """Opens parents by plain names beside the child, as nbdserve.opening does among other things."""

    def open_reference(name: str, format: str | None) -> BlockDevice:
        assert format == "vpc"
        path = directory / name
        if not path.exists():
            raise OpenError(f"{path}: no such file; check the path")
        return open_vhd(path, read_only=True)

    return open_reference


def open_vhd(path: Path, *, read_only: bool = False, file_type: type[HostFile] = HostFile) -> BlockDevice:
    """Open a VHD by path; the file is closed again when it is refused."""
    file = file_type.open(str(path), writable=not read_only)
    try:
        return open_image(file, OpenOptions(read_only=read_only, open_reference=neighbours(path.parent)))
    except BaseException:
        file.close()
        raise


def make_parent(path: Path, content: bytes, block_size: int) -> None:
    """A dynamic VHD with that content."""
    create_image(path, len(content), force_size=True, block_size=block_size)
    with open_vhd(path) as device:
        device.write(0, content)


def make_child(path: Path, parent: str, block_size: int) -> None:
    """A differencing VHD over the parent of that name beside it."""
    path.unlink(missing_ok=True)
    with open_vhd(path.parent / parent, read_only=True) as device:
        footer = device.footer  # type: ignore[attr-defined]
    create_image(
        path, footer.size, subformat="differencing", block_size=block_size, parent=parent, parent_footer=footer
    )
