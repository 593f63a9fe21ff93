"""Entries of tables on the disk, as the formats with plain tables write them back: neighbours together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal


def rows_of(entries: Mapping[int, int], width: int, byteorder: Literal["little", "big"]) -> Iterator[tuple[int, bytes]]:
    """Rows of neighbouring entries, in order: the index of the first, and what stands on the disk from there on.

    Args:
        entries: by their index in the table.
        width: bytes of an entry.
    """
    first, row = 0, bytearray()
    for index in sorted(entries):
        if row and first + len(row) // width != index:
            yield first, bytes(row)
            row.clear()
        if not row:
            first = index
        row += entries[index].to_bytes(width, byteorder)
    if row:
        yield first, bytes(row)
