"""qcow2 images for tests: opened as they are, without the policy on references."""

from __future__ import annotations

from pathlib import Path

from nbdserve.block import BlockDevice, HostFile
from nbdserve.errors import OpenError
from nbdserve.formats import FORMATS, GetPassphrase, OpenOptions, OpenReference, probe
from nbdserve.formats.qcow2 import open_image


def references_of(directory: Path, passphrase: GetPassphrase | None = None) -> OpenReference:
    """Opens any file that an image in the directory names."""

    def open_reference(name: str, format: str | None) -> BlockDevice:
        file = HostFile.open(directory / name, writable=False)
        known = FORMATS.get(format or probe(file))
        if known is None:
            raise OpenError(f"{directory}: {format!r} is no format")
        return known(file, OpenOptions(True, open_reference, passphrase=passphrase))

    return open_reference


def open_qcow2(
    path: Path,
    *,
    read_only: bool = False,
    snapshot: str | None = None,
    file_type: type[HostFile] = HostFile,
    passphrase: GetPassphrase | None = None,
) -> BlockDevice:
    """Open an image, and the files it names in its own directory; the passphrase opens those too."""

    def open_file(name: str, *, writable: bool) -> HostFile:
        return file_type.open(path.parent / name, writable=writable)

    file = file_type.open(path, writable=not read_only)
    try:
        references = references_of(path.parent, passphrase)
        options = OpenOptions(read_only, references, snapshot, None, open_file, passphrase=passphrase)
        return open_image(file, options)
    except BaseException:
        file.close()
        raise


def places(image: bytes) -> list[tuple[int, int]]:
    """The ranges (offset, length) of a sound image that are worth damaging: header, extensions, tables."""

    def number(offset: int, size: int = 8) -> int:
        return int.from_bytes(image[offset : offset + size], "big")

    cluster = 1 << number(20, 4)
    l1, table, snapshots = number(40), number(48), number(64)
    found = [(0, 112), (112, 250), (l1, 64), (table, 64), (number(table), 256), (snapshots, 80)]
    for entry in range(min(number(36, 4), 3)):
        if l2 := number(l1 + 8 * entry) & ((1 << 56) - 512):
            found += [(l2, min(cluster, 1024)), (l2, 64)]
    if number(60, 4):
        found.append((number(snapshots), 64))
    return [(start, length) for start, length in found if 0 <= start < len(image)]
