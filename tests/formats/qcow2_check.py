"""A small `qemu-img check` that runs in this process, written from the specification and from nothing of ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

OFFSET = (1 << 56) - 512
COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1


def _number(content: bytes, offset: int, size: int = 8) -> int:
    return int.from_bytes(content[offset : offset + size].ljust(size, b"\0"), "big")


def _table(content: bytes, offset: int, entries: int) -> list[int]:
    return [_number(content, offset + 8 * index) for index in range(entries)]


class Check:
    """Counts references and compares them with the refcounts (whole bytes only); `leaks` counts what is too high."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.bits = _number(content, 20, 4)
        self.size = 1 << self.bits
        self.width = 1 << (_number(content, 96, 4) if _number(content, 4, 4) > 2 else 4)
        features = _number(content, 72) if _number(content, 4, 4) > 2 else 0
        self.words = 2 if features & 16 else 1
        self.is_external = bool(features & 4)
        self.references: Counter[int] = Counter()
        self.copied: list[tuple[int, bool]] = []
        self.leaks = 0

    def run(self) -> None:
        """Raise AssertionError unless the image is free of errors, leaks aside."""
        self._refer(0, self.size, "header")
        self._l1(_number(self.content, 40), _number(self.content, 36, 4), active=True)
        for offset, entries in self._snapshots():
            self._l1(offset, entries, active=False)
        table, clusters = _number(self.content, 48), _number(self.content, 56, 4)
        self._refer(table, clusters * self.size, "refcount table")
        blocks = _table(self.content, table, clusters * self.size // 8)
        for block in blocks:
            if block:
                self._refer(block, self.size, "refcount block")
        self._compare(blocks)

    def _snapshots(self) -> Iterator[tuple[int, int]]:
        start = position = _number(self.content, 64)
        for _ in range(_number(self.content, 60, 4)):
            yield _number(self.content, position), _number(self.content, position + 8, 4)
            lengths = ((12, 2), (14, 2), (36, 4))
            position += 40 + sum(_number(self.content, position + at, size) for at, size in lengths)
            position = -(-position // 8) * 8
        if position > start:
            self._refer(start, position - start, "snapshot table")

    def _l1(self, offset: int, entries: int, *, active: bool) -> None:
        self._refer(offset, entries * 8, "L1 table")
        for entry in _table(self.content, offset, entries):
            if entry:
                self._refer(entry & OFFSET, self.size, "L2 table")
                if active:
                    self.copied.append(((entry & OFFSET) >> self.bits, bool(entry & COPIED)))
                for l2_entry in _table(self.content, entry & OFFSET, self.size // 8)[:: self.words]:
                    self._l2_entry(l2_entry, active)

    def _l2_entry(self, entry: int, active: bool) -> None:
        if entry & COMPRESSED:
            shift = 62 - (self.bits - 8)
            offset = entry & (1 << shift) - 1
            sectors = (entry & COMPRESSED - 1) >> shift
            start = offset & ~511
            self._refer(start, (sectors + 1) * 512, "compressed data")
        elif entry & OFFSET and not self.is_external:
            self._refer(entry & OFFSET, self.size, "data")
            if active:
                self.copied.append(((entry & OFFSET) >> self.bits, bool(entry & COPIED)))

    def _refer(self, offset: int, length: int, what: str) -> None:
        if what not in ("compressed data", "snapshot table"):
            assert offset % self.size == 0, f"{what} at {offset}"
        self.references.update(range(offset >> self.bits, (offset + length - 1 >> self.bits) + 1))

    def _compare(self, blocks: list[int]) -> None:
        per_block = self.size * 8 // self.width

        def refcount(cluster: int) -> int:
            index, position = divmod(cluster, per_block)
            if index >= len(blocks) or not blocks[index]:
                return 0
            return _number(self.content, blocks[index] + position * self.width // 8, self.width // 8)

        for cluster, references in self.references.items():
            assert refcount(cluster) >= references, f"cluster {cluster}: {refcount(cluster)} < {references}"
            self.leaks += refcount(cluster) > references
        for cluster, is_copied in self.copied:
            assert is_copied == (refcount(cluster) == 1), f"cluster {cluster}: COPIED {is_copied}"
