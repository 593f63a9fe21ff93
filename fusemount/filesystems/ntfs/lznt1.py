"""LZNT1, the compression of NTFS files (MS-XCA, section 2.5).

The data is a row of chunks of up to 4,096 bytes. A chunk is stored, or it is a row of groups: one byte of flags, then
eight items, each a literal byte or a pair that says how far back and how many bytes to copy. How the 16 bits of a pair
are shared between the two depends on how much of the chunk has been written.
"""

from __future__ import annotations

_CHUNK = 4096


def decompress(data: bytes | bytearray, length: int) -> bytearray:
    """The `length` bytes that were compressed; what the data does not reach is zeros. Raises ValueError if damaged."""
    out = bytearray()
    position = 0
    while len(out) < length and position + 2 <= len(data):
        header = data[position] | data[position + 1] << 8
        if header == 0:
            break
        end = position + 3 + (header & 0xFFF)
        if end > len(data):
            raise ValueError("a chunk goes past the end of the data")
        out += _chunk(data, position + 2, end) if header & 0x8000 else data[position + 2 : end]
        # A chunk that is not the last one stands for 4,096 bytes even if it holds fewer.
        out += bytes(-len(out) % _CHUNK)
        position = end
    del out[length:]
    out += bytes(length - len(out))
    return out


def _chunk(data: bytes | bytearray, position: int, end: int) -> bytearray:
    out = bytearray()
    shift, mask, limit = 12, 0xFFF, 16  # while at most `limit` bytes are out, a pair has 16 - shift bits of distance
    while position < end:
        flags = data[position]
        position += 1
        if flags == 0 and position + 8 <= end:
            out += data[position : position + 8]
            position += 8
            continue
        for _ in range(8):
            if position >= end:
                break
            if not flags & 1:
                out.append(data[position])
                position += 1
            else:
                if position + 2 > end:
                    raise ValueError("half a pair at the end of a chunk")
                pair = data[position] | data[position + 1] << 8
                position += 2
                done = len(out)
                while done > limit:
                    limit <<= 1
                    shift -= 1
                    mask >>= 1
                start = done - (pair >> shift) - 1
                count = (pair & mask) + 3
                if start < 0 or done + count > _CHUNK:
                    raise ValueError("a pair leaves its chunk")
                if start + count <= done:
                    out += out[start : start + count]
                else:
                    pattern = out[start:]
                    out += (pattern * (count // len(pattern) + 1))[:count]
            flags >>= 1
    if len(out) > _CHUNK:
        raise ValueError("a chunk is too long")
    return out
