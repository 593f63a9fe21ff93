"""Lists of what could not be read, in the form that ddrescue and its kin understand (GNU ddrescue manual, "Mapfile
structure"), so that those can go on where a conversion left holes."""

from __future__ import annotations

import os

from nbdserve.formats.newfile import new_file


def write_map(path: str, size: int, unreadable: list[tuple[int, int]]) -> None:
    """Write the list; an existing file is replaced.

    Args:
        size: of the source, in bytes.
        unreadable: (offset, bytes) of each part, in any order.
    """
    lines = ["# Mapfile. Written by nbdimg", "# current_pos  current_status  current_pass", f"{size:#010x}  +  1"]
    lines.append("#      pos        size  status")
    position = 0
    for offset, length in _merged(unreadable):
        if offset > position:
            lines.append(f"{position:#010x}  {offset - position:#010x}  +")
        lines.append(f"{offset:#010x}  {length:#010x}  -")
        position = offset + length
    if position < size:
        lines.append(f"{position:#010x}  {size - position:#010x}  +")
    if os.path.lexists(path):
        os.unlink(path)
    with new_file(path) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())


def _merged(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for offset, length in sorted(parts):
        if merged and sum(merged[-1]) == offset:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((offset, length))
    return merged
