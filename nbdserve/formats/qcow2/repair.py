"""Refcounts made anew from the tables, for an image that was left dirty (lazy refcounts, or a crash in snapshots.py).

What the mapping says is right by definition; the refcounts follow from it. The new ones go behind the end of the file,
and only when they are on stable storage does the header lead to them; until the very last step the image stays marked
as dirty, so a crash anywhere costs nothing but doing it again. The former blocks are free then, because nothing refers
to them.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import replace

from nbdserve.block.file import HostFile
from nbdserve.errors import FormatError
from nbdserve.formats.qcow2.bitmaps import bitmap_places
from nbdserve.formats.qcow2.entries import COMPRESSED, COPIED, ENTRY_SIZE, read_table, table_bytes
from nbdserve.formats.qcow2.header import (
    INCOMPATIBLE_FIELD,
    MAXIMUM_REFCOUNT_TABLE,
    REFCOUNT_ORDER_FIELD,
    REFCOUNT_TABLE_FIELDS,
    Header,
    Incompatible,
)
from nbdserve.formats.qcow2.packing import empty_block, pack_block
from nbdserve.formats.qcow2.refcounts import Row, append_row
from nbdserve.formats.qcow2.snapshot_table import read_snapshots

_SECTOR = 512


def rebuild_refcounts(file: HostFile, header: Header, *, width: int | None = None) -> Header:
    """Make the refcounts of a dirty image right and clear its dirty bit; returns the header as it is then.

    Args:
        width: bits of each refcount from now on, for an image of version 3; None: as many as so far.

    Raises:
        FormatError: the tables lead outside the file, so that more is damaged than refcounts.
    """
    header = replace(header, refcount_width=width or header.refcount_width)
    references = _References(file, header)
    l1 = read_table(file, header.l1_offset, header.l1_entries)
    snapshots, directory_size = read_snapshots(file, header)
    references.add_bytes(0, header.geometry.cluster_size)
    references.add_bytes(header.l1_offset, len(l1) * ENTRY_SIZE)
    references.add_bytes(header.snapshots_offset, directory_size)
    if header.encryption_place is not None:
        references.add_bytes(*header.encryption_place)
    for offset, length in bitmap_places(file, header):
        references.add_bytes(offset, length)
    tables = Counter(entry & header.geometry.offset_mask for entry in l1)
    for snapshot in snapshots:
        references.add_bytes(snapshot.l1_offset, snapshot.l1_entries * ENTRY_SIZE)
        inactive = read_table(file, snapshot.l1_offset, snapshot.l1_entries)
        tables.update(entry & header.geometry.offset_mask for entry in inactive)
    del tables[0]
    for offset, times in tables.items():
        references.add_bytes(offset, header.geometry.cluster_size, times)
        for row in table_rows(header, read_table(file, offset, header.geometry.table_words)):
            references.add(*row, times)

    if not header.incompatible & Incompatible.DIRTY:
        file.write(INCOMPATIBLE_FIELD, (header.incompatible | Incompatible.DIRTY).to_bytes(8, "big"))
        file.sync()
    table_offset, clusters = references.write()
    _lead_to(file, header, table_offset, clusters)
    _restore_copied(file, header, l1, references)
    file.sync()
    clean = header.incompatible & ~Incompatible.DIRTY
    file.write(INCOMPATIBLE_FIELD, clean.to_bytes(8, "big"))
    file.sync()
    return replace(header, incompatible=clean, refcount_table_offset=table_offset, refcount_table_clusters=clusters)


def _lead_to(file: HostFile, header: Header, table_offset: int, clusters: int) -> None:
    """Let the header say where the refcounts are and how wide, with one write of its sector."""
    sector = file.read(0, _SECTOR)
    place = table_offset.to_bytes(8, "big") + clusters.to_bytes(4, "big")
    sector[REFCOUNT_TABLE_FIELDS : REFCOUNT_TABLE_FIELDS + len(place)] = place
    if header.version >= 3:
        order = header.refcount_width.bit_length() - 1
        sector[REFCOUNT_ORDER_FIELD : REFCOUNT_ORDER_FIELD + 4] = order.to_bytes(4, "big")
    file.write(0, sector)
    file.sync()


def table_rows(header: Header, table: array[int]) -> list[Row]:
    """The host clusters that the entries of an L2 table refer to."""
    rows: list[Row] = []
    for entry in table[:: header.geometry.words]:
        if entry:
            first, count = header.geometry.host_clusters(entry)
            if count:
                append_row(rows, first, count)
    return rows


class _References:
    """Counts references to host clusters, in blocks as refcounts are kept."""

    def __init__(self, file: HostFile, header: Header) -> None:
        self._file = file
        self._header = header
        self._bits = header.geometry.cluster_bits
        self._width = header.refcount_width
        self._per_block = header.geometry.cluster_size * 8 // header.refcount_width
        self._end = -(-file.size >> self._bits)
        self._blocks: dict[int, array[int]] = {}

    def _damaged(self, what: str) -> FormatError:
        return FormatError(
            f"{self._file.name}: was not closed properly, and {what}; repair it with 'qemu-img check -r all', or open "
            "it read-only"
        )

    def add_bytes(self, offset: int, length: int, times: int = 1) -> None:
        """A part of the file is referred to."""
        first = offset >> self._bits
        self.add(first, -(-(offset + length) >> self._bits) - first, times)

    def add(self, first: int, count: int, times: int = 1) -> None:
        """Clusters in a row are referred to."""
        if first + count > self._end + 1:  # compressed data may be said to reach a little further than the file
            raise self._damaged(f"cluster {first + count - 1} lies outside the file")
        for cluster in range(first, first + count):
            index, position = divmod(cluster, self._per_block)
            block = self._blocks.get(index)
            if block is None:
                block = self._blocks[index] = empty_block(self._width, self._per_block)
            if block[position] + times >= 1 << self._width:
                raise FormatError(
                    f"{self._file.name}: cluster {cluster} has more references than {self._width} bits can hold"
                )
            block[position] += times

    def count(self, cluster: int) -> int:
        """How many references there are to a cluster."""
        index, position = divmod(cluster, self._per_block)
        return self._blocks[index][position] if index in self._blocks else 0

    def write(self) -> tuple[int, int]:
        """Write blocks and a table for them behind the file's end: the table's offset in bytes, and its clusters."""
        clusters = self._make_room()
        size = self._header.geometry.cluster_size
        table = array("Q", bytes(clusters * size))
        first = self._end + 1
        self.add_new(first, len(self._blocks) + clusters)
        for number, (index, block) in enumerate(sorted(self._blocks.items())):
            table[index] = first + number << self._bits
            self._file.write(table[index], pack_block(self._width, block))
        table_offset = first + len(self._blocks) << self._bits
        self._file.write(table_offset, table_bytes(table))
        self._file.sync()
        return table_offset, clusters

    def _make_room(self) -> int:
        """Make the blocks that describe the new blocks and the table as well; how many clusters the table has."""
        while True:
            entries = max(self._blocks) + 1
            clusters = -(-entries * ENTRY_SIZE // self._header.geometry.cluster_size)
            if clusters << self._bits > MAXIMUM_REFCOUNT_TABLE:
                raise self._damaged("its refcount table would be too large")
            stop = self._end + 1 + len(self._blocks) + clusters
            wanted = range((self._end + 1) // self._per_block, (stop - 1) // self._per_block + 1)
            missing = [index for index in wanted if index not in self._blocks]
            if not missing:
                return clusters
            for index in missing:
                self._blocks[index] = empty_block(self._width, self._per_block)

    def add_new(self, first: int, count: int) -> None:
        """Clusters behind the file's end are used by what is being made."""
        for cluster in range(first, first + count):
            index, position = divmod(cluster, self._per_block)
            self._blocks[index][position] = 1


def _restore_copied(file: HostFile, header: Header, l1: array[int], references: _References) -> None:
    """Let COPIED say of everything in use whether its refcount is 1."""
    geometry = header.geometry

    def flagged(entry: int) -> int:
        host = entry & geometry.offset_mask
        if not host or entry & COMPRESSED:
            return entry
        return entry | COPIED if references.count(host >> geometry.cluster_bits) == 1 else entry & ~COPIED

    for key, entry in enumerate(l1):
        if not entry & geometry.offset_mask:
            continue
        if not geometry.is_external:
            table = read_table(file, entry & geometry.offset_mask, geometry.table_words)
            words = array("Q", map(flagged, table[:: geometry.words]))
            if words != table[:: geometry.words]:
                table[:: geometry.words] = words
                file.write(entry & geometry.offset_mask, table_bytes(table))
        if flagged(entry) != entry:
            file.write(header.l1_offset + key * ENTRY_SIZE, flagged(entry).to_bytes(ENTRY_SIZE, "big"))
