"""Records on the disk: a few fields of fixed sizes, one behind the other, with a name for each.

For the formats that have to be open within milliseconds: construct, which describes the headers of the others, takes
longer to import than everything else that such an image needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from struct import Struct
from types import SimpleNamespace


class Record:
    """What the fields of a record are called and how they are written, as the module struct has it.

    Args:
        order: ">" for big-endian numbers, "<" for little-endian ones; either way nothing is aligned.
        fields: name=format: B, H, I and Q for 1, 2, 4 and 8 bytes, "5s" for five bytes as they are.

    Attributes:
        size: bytes.
    """

    def __init__(self, order: str, /, **fields: str) -> None:
        self._names = tuple(fields)
        self._struct = Struct(order + "".join(fields.values()))
        self.size = self._struct.size

    def parse(self, content: bytes, offset: int = 0) -> SimpleNamespace:
        """The fields of a record that begins at an offset and lies wholly inside the content."""
        values = self._struct.unpack_from(content, offset)
        return SimpleNamespace(**dict(zip(self._names, values, strict=True)))

    def build(self, fields: Mapping[str, int | bytes]) -> bytes:
        """The record with these fields, of which none may be missing."""
        return self._struct.pack(*(fields[name] for name in self._names))
