"""Runs: where the clusters of an attribute lie.

On disk they are "mapping pairs": for each run its length, and its place as a difference to the run before; a run
without place is a hole. VCN counts the clusters of an attribute, LCN those of the volume.

The rule of this file: every run lies inside the volume, runs follow each other without a gap, and none is empty.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Iterator

from fusemount.filesystems.base import error

HOLE = -1
_MOST_CLUSTERS = 1 << 51


class Runs:
    """The runs of one attribute, in order, from VCN 0 on.

    Attributes:
        end: the first VCN behind them.
    """

    def __init__(self, clusters: int) -> None:
        self._clusters = clusters
        self._starts: list[int] = []
        self._places: list[int] = []
        self.end = 0

    def __len__(self) -> int:
        return len(self._starts)

    def append(self, lowest: int, mapping: bytes) -> None:
        """Add the runs of the next piece of the attribute. Raises EIO when they break the rule above."""
        if lowest != self.end:
            raise error(errno.EIO)
        offset = place = 0
        while offset < len(mapping) and (header := mapping[offset]):
            length_size, place_size = header & 15, header >> 4
            middle = offset + 1 + length_size
            end = middle + place_size
            if not 0 < length_size <= 8 or place_size > 8 or end > len(mapping):
                raise error(errno.EIO)
            length = int.from_bytes(mapping[offset + 1 : middle], "little", signed=True)
            if length <= 0 or self.end + length > _MOST_CLUSTERS:
                raise error(errno.EIO)
            self._starts.append(self.end)
            if place_size:
                place += int.from_bytes(mapping[middle:end], "little", signed=True)
                if place < 0 or place + length > self._clusters:
                    raise error(errno.EIO)
                self._places.append(place)
            else:
                self._places.append(HOLE)
            self.end += length
            offset = end

    def find(self, vcn: int, count: int) -> Iterator[tuple[int, int]]:
        """The places of `count` clusters from a VCN on, as pairs of LCN (or HOLE) and count; clusters behind the end
        are a hole."""
        index = bisect_right(self._starts, vcn) - 1
        while count:
            if vcn >= self.end:
                yield HOLE, count
                return
            stop = self._starts[index + 1] if index + 1 < len(self._starts) else self.end
            part = min(stop - vcn, count)
            place = self._places[index]
            yield (HOLE if place == HOLE else place + vcn - self._starts[index]), part
            vcn += part
            count -= part
            index += 1
