"""A full check of an image: what the tables refer to against what the refcounts say, as QEMU's `check` counts it.

A *leak* is a host cluster whose refcount is higher than the number of references: it costs space. A *corruption* is
everything else that is wrong, first of all a refcount that is too low: such a cluster might be handed out again.

Repairs: refcounts of leaked clusters are lowered where they lie, which no crash can turn into harm. For the rest all
refcounts are made anew from the tables (repair.py), under the mark of a dirty image, and tables' entries that lead
nowhere stay as they are, because nobody knows better.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from nbdserve.block.file import HostFile
from nbdserve.formats.qcow2.bitmaps import bitmap_places
from nbdserve.formats.qcow2.entries import (
    ALL_SUBCLUSTERS,
    COMPRESSED,
    COPIED,
    ENTRY_SIZE,
    SUBCLUSTERS,
    ZERO,
    read_table,
)
from nbdserve.formats.qcow2.header import INCOMPATIBLE_FIELD, Header, Incompatible
from nbdserve.formats.qcow2.packing import empty_block, pack_block, unpack_block
from nbdserve.formats.qcow2.repair import rebuild_refcounts
from nbdserve.formats.qcow2.snapshot_table import read_snapshots

_MOST_PROBLEMS = 1000  # lines that are kept


@dataclass(slots=True)
class Findings:
    """What was found.

    Attributes:
        corruptions, leaks: how many.
        problems: a line for each, up to a limit.
        end: where the last host cluster in use ends, in bytes.
        total, allocated, fragmented, compressed: guest clusters.
        surplus: by leaked cluster, how many references there really are.
    """

    corruptions: int = 0
    leaks: int = 0
    problems: list[str] = field(default_factory=list)
    end: int = 0
    total: int = 0
    allocated: int = 0
    fragmented: int = 0
    compressed: int = 0
    surplus: dict[int, int] = field(default_factory=dict)

    def corruption(self, line: str) -> None:
        """Something is wrong."""
        self.corruptions += 1
        self._note(f"ERROR {line}")

    def leak(self, cluster: int, refcount: int, references: int) -> None:
        """A cluster is counted more often than it is referred to."""
        self.leaks += 1
        self.surplus[cluster] = references
        self._note(f"Leaked cluster {cluster} refcount={refcount} reference={references}")

    def _note(self, line: str) -> None:
        if len(self.problems) < _MOST_PROBLEMS:
            self.problems.append(line)


def check(file: HostFile, header: Header) -> Findings:
    """Look at all tables and all refcounts.

    Raises:
        FormatError: a table that leads to others is impossible, so nothing can be counted.
    """
    return _Check(file, header).run()


def repair_leaks(file: HostFile, header: Header, found: Findings) -> None:
    """Lower the refcounts of leaked clusters to the number of references."""
    per_block = header.geometry.cluster_size * 8 // header.refcount_width
    length = header.refcount_table_clusters << header.geometry.cluster_bits
    table = read_table(file, header.refcount_table_offset, length // ENTRY_SIZE)
    by_block: dict[int, list[int]] = {}
    for cluster in found.surplus:
        by_block.setdefault(cluster // per_block, []).append(cluster)
    for index, clusters in by_block.items():
        block = unpack_block(header.refcount_width, file.read(table[index], header.geometry.cluster_size))
        for cluster in clusters:
            block[cluster % per_block] = found.surplus[cluster]
        file.write(table[index], pack_block(header.refcount_width, block))
    file.sync()


def repair_all(file: HostFile, header: Header) -> Header:
    """Make all refcounts anew; returns the header as it is then.

    Raises:
        FormatError: more is damaged than refcounts.
    """
    if header.version >= 3:
        marked = header.incompatible | Incompatible.DIRTY
        file.write(INCOMPATIBLE_FIELD, marked.to_bytes(8, "big"))
        file.sync()
        header = replace(header, incompatible=marked)
    return rebuild_refcounts(file, header)


def clear_marks(file: HostFile, header: Header) -> None:
    """An image that was found sound is no longer marked as corrupt or dirty."""
    sound = header.incompatible & ~(Incompatible.CORRUPT | Incompatible.DIRTY)
    if sound != header.incompatible:
        file.write(INCOMPATIBLE_FIELD, sound.to_bytes(8, "big"))
        file.sync()


class _Check:
    """A check under way: `references` counts, for every cluster of the file, what refers to it."""

    def __init__(self, file: HostFile, header: Header) -> None:
        self.file, self.header, self.geometry = file, header, header.geometry
        self.bits = header.geometry.cluster_bits
        self.clusters = -(-file.size >> self.bits)
        self.references = array("I", bytes(4 * self.clusters))
        self.blocks: dict[int, array[int]] = {}
        self.found = Findings(total=-(-header.size >> self.bits))
        self.file_end = self.clusters << self.bits

    def run(self) -> Findings:
        file, header = self.file, self.header
        self._refcounts()
        self._refer(0, self.geometry.cluster_size, "the header")
        if header.encryption_place is not None:
            self._refer(*header.encryption_place, "the encryption header")
        snapshots, directory = read_snapshots(file, header)
        self._refer(header.snapshots_offset, directory, "the snapshot table")
        for offset, length in bitmap_places(file, header):
            self._refer(offset, length, "a bitmap")
        self._check_l1(header.l1_offset, header.l1_entries, "the active L1 table", is_active=True)
        for snapshot in snapshots:
            self._check_l1(snapshot.l1_offset, snapshot.l1_entries, f"the L1 table of snapshot {snapshot.id}")
        self._compare()
        return self.found

    def _refer(self, offset: int, length: int, what: str) -> None:
        """Count a reference to a part of the file."""
        if not length:
            return
        first, last = offset >> self.bits, offset + length - 1 >> self.bits
        if last >= self.clusters:
            self.found.corruption(f"{what} at {offset:#x} reaches past the end of the file")
            last = self.clusters - 1
        for cluster in range(first, last + 1):
            self.references[cluster] += 1

    # Refcounts

    def _refcounts(self) -> None:
        header, size = self.header, self.geometry.cluster_size
        length = header.refcount_table_clusters << self.bits
        self._refer(header.refcount_table_offset, length, "the refcount table")
        per_block = size * 8 // header.refcount_width
        for index, entry in enumerate(read_table(self.file, header.refcount_table_offset, length // ENTRY_SIZE)):
            if not entry:
                continue
            if entry & size - 1 or entry >= self.file_end:
                self.found.corruption(f"refcount block {index} is said to lie at {entry:#x}")
                continue
            self._refer(entry, size, f"refcount block {index}")
            if index * per_block < self.clusters:
                self.blocks[index] = unpack_block(header.refcount_width, self.file.read(entry, size))

    def _refcount(self, cluster: int) -> int:
        index, inside = divmod(cluster, self.geometry.cluster_size * 8 // self.header.refcount_width)
        block = self.blocks.get(index)
        return 0 if block is None else block[inside]

    def _compare(self) -> None:
        """Set every refcount beside the number of references."""
        per_block = self.geometry.cluster_size * 8 // self.header.refcount_width
        none = empty_block(self.header.refcount_width, per_block)
        for start in range(0, self.clusters, per_block):
            counted = self.blocks.get(start // per_block, none)[: self.clusters - start]
            referred = self.references[start : start + per_block]
            if list(counted) == list(referred):
                self._note_end(start, counted)
                continue
            for inside, (refcount, references) in enumerate(zip(counted, referred, strict=True)):
                if refcount or references:
                    self.found.end = (start + inside + 1) << self.bits
                if refcount < references:
                    self.found.corruption(f"cluster {start + inside} refcount={refcount} reference={references}")
                elif refcount > references:
                    self.found.leak(start + inside, refcount, references)

    def _note_end(self, start: int, counted: array[int]) -> None:
        last = len(counted)
        while last and not counted[last - 1]:
            last -= 1
        if last:
            self.found.end = (start + last) << self.bits

    # The mapping

    def _check_l1(self, offset: int, entries: int, what: str, *, is_active: bool = False) -> None:
        self._refer(offset, entries * ENTRY_SIZE, what)
        size, mask = self.geometry.cluster_size, self.geometry.offset_mask
        for key, entry in enumerate(read_table(self.file, offset, entries)):
            table = entry & mask
            if not entry:
                continue
            if entry & ~(mask | COPIED) or not 0 < table < self.file_end:
                self.found.corruption(f"entry {key} of {what} is {entry:#x}, which leads nowhere")
                continue
            self._refer(table, size, f"L2 table {key}")
            if is_active:
                self._check_copied(entry, table, f"L2 table {key}")
            self._check_l2(table, is_active)

    def _check_copied(self, entry: int, host: int, what: str) -> None:
        if bool(entry & COPIED) != (self._refcount(host >> self.bits) == 1):
            self.found.corruption(f"OFLAG_COPIED of {what} at {host:#x} contradicts its refcount")

    def _check_l2(self, offset: int, is_active: bool) -> None:
        geometry, found, size = self.geometry, self.found, self.geometry.cluster_size
        table = read_table(self.file, offset, geometry.table_words)
        expected = 0
        for entry, bitmap in self._entries(table):
            if entry & COMPRESSED:
                if entry & COPIED or bitmap:
                    found.corruption(
                        f"the entry {entry:#x} of compressed data in the table at {offset:#x} says too much"
                    )
                place, length = geometry.compressed_place(entry)
                if place >= self.file_end:
                    found.corruption(f"compressed data is said to lie at {place:#x}, past the end of the file")
                    continue
                self._refer(place, min(length, self.file_end - place), "compressed data")
                if is_active:
                    found.allocated, found.compressed = found.allocated + 1, found.compressed + 1
                    found.fragmented += 1
                continue
            if not self._is_sound(entry, bitmap):
                subclusters = f" with subclusters {bitmap:#x}" if geometry.words > 1 else ""
                found.corruption(
                    f"L2 entry {entry:#x}{subclusters} in the table at {offset:#x} leads nowhere or contradicts itself"
                )
                continue
            if not geometry.is_placed(entry):
                continue
            host = entry & geometry.offset_mask
            if is_active:
                found.allocated += 1
                found.fragmented += bool(expected) and host != expected
                expected = host + size
            if not geometry.is_external:
                self.references[host >> self.bits] += 1
                if is_active:
                    self._check_copied(entry, host, "data cluster")

    def _is_sound(self, entry: int, bitmap: int) -> bool:
        """Whether an entry that is not compressed leads into the file, and does not contradict itself or its format."""
        geometry = self.geometry
        allocated, zeros = bitmap & ALL_SUBCLUSTERS, bitmap >> SUBCLUSTERS
        if entry & geometry.reserved or allocated & zeros:
            return False
        if not geometry.is_placed(entry):
            return not allocated
        return geometry.is_external or entry & geometry.offset_mask < self.file_end

    def _entries(self, table: array[int]) -> Iterator[tuple[int, int]]:
        """The entries that say more than that nothing is here, or zeros: the first word, and the subclusters' bits."""
        words = table[:: self.geometry.words]
        if self.geometry.words > 1:
            return ((entry, bitmap) for entry, bitmap in zip(words, table[1::2], strict=True) if entry or bitmap)
        nothing = ZERO if self.geometry.has_zero_flag else 0
        return ((entry, 0) for entry in words if entry & ~nothing) if any(words) else iter(())
