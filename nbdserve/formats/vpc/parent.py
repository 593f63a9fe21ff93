"""How a differencing VHD names its parent: by several paths, and by the parent's unique ID.

The dynamic header holds the ID, a time stamp, a name and up to eight locators, each a path in an encoding of its own
("Dynamic Disk Header Format"). Paths are tried as vpc.parents says.

A parent with another ID is refused. Its time stamp is when it was made, so it must not be later than the one that the
child noted; that the child noted the file's time of last change, as some programs do, says nothing once it was copied.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from construct import Array, Bytes, Int32ub, Int64ub, Padding, Struct

from nbdserve.block.device import BlockDevice
from nbdserve.block.file import HostFile
from nbdserve.errors import FormatError
from nbdserve.formats import OpenReference
from nbdserve.formats.vpc.dynamic import DynamicDisk
from nbdserve.formats.vpc.fixed import FixedDisk
from nbdserve.formats.vpc.header import HEADER_SIZE, SECTOR, Footer, Layout
from nbdserve.formats.vpc.parents import local_names, open_parent

_LONGEST_PATH = 64 << 10  # bytes; Windows knows none of more than 32767 characters

_PARENT = Struct(
    Padding(40),
    "unique_id" / Bytes(16),
    "timestamp" / Int32ub,
    Padding(4),
    "name" / Bytes(512),
    "locators"
    / Array(8, Struct("platform" / Bytes(4), "space" / Int32ub, "length" / Int32ub, Padding(4), "offset" / Int64ub)),
)

_RELATIVE = {b"W2ru": "utf-16-le", b"Wi2r": "latin-1"}
_ABSOLUTE = {b"W2ku": "utf-16-le", b"Wi2k": "latin-1", b"MacX": "utf-8"}


@dataclass(frozen=True, slots=True)
class Parent:
    """What a differencing disk says of its parent.

    Attributes:
        unique_id: the one in the parent's footer.
        timestamp: seconds since the start of 2000; 0 says nothing.
        names: where to look for it, in order, as local paths.
        places: the ranges (start, end) of the file that hold paths.
    """

    unique_id: bytes
    timestamp: int
    names: list[str]
    places: tuple[tuple[int, int], ...]

    @classmethod
    def read(cls, file: HostFile, footer: Footer, end: int) -> Parent:
        """Read it from a dynamic header that Layout.read() has accepted; `end` as there.

        Raises:
            FormatError: a path lies outside the file.
        """
        fields = _PARENT.parse(bytes(file.read(footer.header_offset, HEADER_SIZE)))
        relative: list[str] = []
        absolute: list[str] = []
        places = []
        for locator in fields.locators:
            encoding = _RELATIVE.get(locator.platform) or _ABSOLUTE.get(locator.platform)
            if encoding is None or not locator.length:
                continue
            stop = locator.offset + locator.length
            if locator.length > _LONGEST_PATH or stop > end:
                raise FormatError(
                    f"{file.name}: a path to its parent disk lies at {locator.offset} ({locator.length} bytes), "
                    f"outside the file's {end} bytes; the image is damaged"
                )
            places.append((locator.offset, -(-stop // SECTOR) * SECTOR))
            path = bytes(file.read(locator.offset, locator.length)).decode(encoding, "replace").rstrip("\0")
            (relative if locator.platform in _RELATIVE else absolute).append(path)
        absolute.append(fields.name.decode("utf-16-be", "replace").partition("\0")[0])
        return cls(fields.unique_id, fields.timestamp, local_names(relative, absolute), tuple(places))

    def protect(self, layout: Layout) -> Layout:
        """The layout with the paths among what no block may touch."""
        return replace(layout, metadata=layout.metadata + self.places)

    def open(self, owner: str, open_reference: OpenReference) -> BlockDevice:
        """Open the parent, which must be the disk that the child was made for."""

        def check(device: BlockDevice) -> str | None:
            if not isinstance(device, FixedDisk | DynamicDisk):
                return "is no VHD"
            if device.footer.unique_id != self.unique_id:
                return "is another disk than the one this disk was made for (its unique ID differs)"
            if self.timestamp and device.footer.timestamp > self.timestamp:
                return "is newer than this disk (its time stamp is later than the one noted here)"
            return None

        return open_parent(owner, self.names, "vpc", open_reference, check)
