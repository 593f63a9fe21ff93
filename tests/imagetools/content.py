"""A disk with something of everything in it, as a raw file."""

from __future__ import annotations

import random
from pathlib import Path

MIB = 1 << 20


def mixed(path: Path, size: int = 12 * MIB + 512 * 3) -> bytes:
    """Write a sparse file with random data, text, zeros that are written out, and lone sectors; returns its content."""
    generator = random.Random(7)
    content = bytearray(size)
    for start, length in ((0, 512), (MIB - 4096, 70000), (3 * MIB + 512, MIB), (9 * MIB, 3 * MIB // 2)):
        content[start : start + length] = generator.randbytes(length)
    content[5 * MIB : 7 * MIB] = (b"the same words again and again " * 70000)[: 2 * MIB]
    content[6 * MIB : 6 * MIB + 8192] = bytes(8192)
    content[-1] = 9
    with open(path, "wb") as file:
        file.truncate(size)
        for start in range(0, size, 65536):
            piece = content[start : start + 65536]
            if any(piece) or 6 * MIB <= start < 8 * MIB:
                file.seek(start)
                file.write(piece)
    return bytes(content)
