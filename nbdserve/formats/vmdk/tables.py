"""The grain tables of one sparse extent: kept in memory within a bound, written in an order a crash cannot break.

What is kept here (VDF, "Grain Directory" and "Grain Table"):

- An entry reaches the disk no earlier than the grain it names. New entries wait in memory until flush(): it brings
  everything written so far to stable storage, writes just those, and syncs again.
- There may be two sets of tables. An entry goes into both within one flush, so each set is right on its own at every
  moment. After a crash they may differ; the header then says that the extent was not closed, and the second set is
  made equal to the first when the extent is next opened for writing.
- A new table, all zeros, is stable before the directories name it, the redundant one first.

At most 16 MiB of tables are held. Any may be dropped, because entries that wait are kept apart from them, at most
65,536 of them before they are flushed unasked.
"""

from __future__ import annotations

import errno
import threading
from array import array
from bisect import bisect_right
from collections.abc import Iterator

from nbdserve.block.file import HostFile
from nbdserve.errors import FormatError
from nbdserve.formats.entries import rows_of
from nbdserve.formats.vmdk import SECTOR
from nbdserve.formats.vmdk.header import UNCLEAN_SHUTDOWN
from nbdserve.formats.vmdk.layout import BAD_TABLE, NO_TABLE, Layout, numbers

_CACHED_BYTES = 16 << 20
_MOST_WAITING = 1 << 16
_READ_AT_ONCE = 512  # tables
LAST_SECTOR = 0xFFFFFFFF  # that an entry can name


class GrainTables:
    """The tables of the extent in `file`.

    Attributes:
        loaded: the tables that are in memory, by number; never another dictionary, so that fast paths may keep it.
        end: where the file's used part ends, in bytes: nothing from there on is named by any entry. Only for writing.
        guarded: (starts, ends) of the ranges that hold tables or headers, in order. Only for writing.
    """

    def __init__(self, file: HostFile, layout: Layout, *, read_only: bool) -> None:
        self._file = file
        self._layout = layout
        self._directory = layout.directory
        self._redundant = layout.redundant
        self.loaded: dict[int, array[int]] = {}
        self._most = max(4, _CACHED_BYTES // (layout.slots * (8 if layout.decode else 4)))
        self._loading = threading.RLock()
        self._flushing = threading.Lock()
        self._waiting: dict[int, dict[int, int]] = {}
        self._writing: dict[int, dict[int, int]] = {}
        self._waiting_count = 0
        self._unlinked: set[int] = set()
        self._marked = False
        self.end = 0
        self.guarded: tuple[list[int], list[int]] = ([], [])
        if not read_only:
            self.guarded = self._find_guarded()
            self.end = self._find_end()
            if layout.unclean:
                self._equalize()

    # Reading

    def table(self, index: int) -> array[int] | None:
        """A grain table, read if need be; None where there is none. EIO for one that does not lie in the file."""
        table = self.loaded.get(index)
        if table is not None or self._directory[index] == NO_TABLE:
            return table
        with self._loading:
            table = self.loaded.get(index)
            if table is None:
                table = self._load(index)
            return table

    def is_absent(self, index: int) -> bool:
        """Whether there is no such table."""
        return self._directory[index] == NO_TABLE

    def _place(self, index: int) -> int:
        """Where to read a table: the redundant one stands in for one that cannot be where the directory says."""
        place = self._directory[index]
        return self._redundant[index] if place == BAD_TABLE and self._redundant is not None else place

    def _load(self, index: int) -> array[int]:
        layout = self._layout
        place = self._place(index)
        if place <= BAD_TABLE:
            raise OSError(errno.EIO, f"entry {index} of the grain directory is damaged", self._file.name)
        table = numbers(self._file.read(place, layout.table_size), layout.entry_size)
        if layout.decode is not None:
            table = layout.decode(table)
        for changes in (self._writing, self._waiting):
            for slot, entry in changes.get(index, {}).items():
                table[slot] = entry
        self._keep(index, table)
        return table

    def _keep(self, index: int, table: array[int]) -> None:
        """Have a table in memory, instead of the one that has been there longest if there are many."""
        if len(self.loaded) >= self._most:
            del self.loaded[next(iter(self.loaded))]
        self.loaded[index] = table

    # What is where, before the first write

    def _find_guarded(self) -> tuple[list[int], list[int]]:
        layout = self._layout
        ranges = list(layout.taken)
        for offset, directory in ((layout.directory_offset, layout.directory), self._second()):
            if directory is not None:
                ranges.append((offset, offset + 4 * len(directory)))
                ranges += [(place, place + layout.table_size) for place in directory if place > BAD_TABLE]
        ranges.sort()
        starts, ends = [0], [0]
        for start, end in ranges:
            if start < ends[-1]:
                raise FormatError(
                    f"{self._file.name}: two tables claim the same place at {start}; the image is damaged, open it "
                    "read-only (-r)"
                )
            if start == ends[-1]:
                ends[-1] = end
            else:
                starts.append(start)
                ends.append(end)
        return starts, ends

    def _second(self) -> tuple[int, array[int] | None]:
        return self._layout.redundant_offset, self._redundant

    def _find_end(self) -> int:
        """Behind the file, and behind every grain that an entry names even though the file has lost it."""
        layout = self._layout
        nothing = bytes(_READ_AT_ONCE * layout.table_size)
        highest = 0
        for start, end in self._places_in_a_row():
            raw = self._file.read(start, end - start)
            if raw != nothing[: end - start]:
                highest = max(highest, max(numbers(raw, 4)))
        last = highest * SECTOR + layout.grain_size if highest > 1 else 0
        return max(self._file.size, layout.data_offset, self.guarded[1][-1], last)

    def _places_in_a_row(self) -> Iterator[tuple[int, int]]:
        """The places (start, end) of all tables, those that follow each other in the file together."""
        size = self._layout.table_size
        start = end = 0
        for place in map(self._place, range(len(self._directory))):
            if place <= BAD_TABLE:
                continue
            if place != end or end - start >= _READ_AT_ONCE * size:
                if start < end:
                    yield start, end
                start = place
            end = place + size
        if start < end:
            yield start, end

    def _equalize(self) -> None:
        """Make the redundant tables what the first ones are."""
        if self._redundant is None:
            return
        size = self._layout.table_size
        for place, second in zip(self._directory, self._redundant, strict=True):
            if place > BAD_TABLE and second > BAD_TABLE:
                content = self._file.read(place, size)
                if self._file.read(second, size) != content:
                    self._file.write(second, content)
        self._marked = True  # as the header says already, until we close it

    def is_guarded(self, start: int, end: int) -> bool:
        """Whether [start, end) touches a header or table."""
        starts, ends = self.guarded
        return start < ends[-1] and start < ends[bisect_right(starts, end - 1) - 1]

    # Writing

    def mark(self) -> None:
        """Note in the header that the extent is in use; the next flush makes it stable before any entry."""
        if not self._marked:
            self._file.write(UNCLEAN_SHUTDOWN, b"\1")
            self._marked = True

    def add(self, index: int) -> None:
        """Make an empty table where there is none. Calls must not overlap."""
        size = -(-self._layout.table_size // SECTOR) * SECTOR
        place = -(-self.end // SECTOR) * SECTOR
        end = place + size * (1 if self._redundant is None else 2)
        if end // SECTOR > LAST_SECTOR:
            raise OSError(
                errno.EFBIG, "the VMDK extent has reached 2 TiB, where it can point no further", self._file.name
            )
        self._file.write(place, bytes(end - place))
        starts, ends = self.guarded
        self.end, self.guarded = end, ([*starts, place], [*ends, end])
        with self._loading:
            self._keep(index, array("I", bytes(self._layout.table_size)))
            self._unlinked.add(index)
            if self._redundant is not None:
                self._redundant[index] = place + size
            self._directory[index] = place

    def publish(self, index: int, slot: int, entries: list[int]) -> None:
        """Let the entries of a table from slot on be these; the grains that they name have been written."""
        with self._loading:
            table = self.table(index)
            assert table is not None
            changes = self._waiting.setdefault(index, {})
            for entry in entries:
                table[slot] = changes[slot] = entry
                slot += 1
            self._waiting_count += len(entries)
        if self._waiting_count >= _MOST_WAITING:
            self.flush()

    def flush(self) -> None:
        """Return when all writes and all entries from before this call are on stable storage."""
        with self._flushing:  # whoever comes second must not return before the entries the first one took are written
            with self._loading:
                self._writing, self._waiting, self._waiting_count = self._waiting, {}, 0
                new, self._unlinked = self._unlinked, set()
            try:
                self._file.sync()
                if self._writing:
                    self._write_entries()
                self._link(new)
                if self._writing or new:
                    self._file.sync()
            except OSError:
                with self._loading:
                    for index, changes in self._writing.items():
                        self._waiting[index] = changes | self._waiting.get(index, {})
                    self._waiting_count += sum(map(len, self._writing.values()))
                    self._unlinked |= new
                    self._writing = {}
                raise
            with self._loading:
                self._writing = {}

    def _write_entries(self) -> None:
        for index in sorted(self._writing):
            rows = list(rows_of(self._writing[index], 4, "little"))
            for directory in (self._redundant, self._directory):
                if directory is not None and directory[index] > BAD_TABLE:
                    for slot, row in rows:
                        self._file.write(directory[index] + 4 * slot, row)

    def _link(self, new: set[int]) -> None:
        """Let the directories name new tables."""
        if not new:
            return
        layout = self._layout
        if self._redundant is not None:
            for index in new:
                self._point(layout.redundant_offset + 4 * index, self._redundant[index])
            self._file.sync()
        for index in new:
            self._point(layout.directory_offset + 4 * index, self._directory[index])

    def _point(self, where: int, place: int) -> None:
        self._file.write(where, (place // SECTOR).to_bytes(4, "little"))

    def close(self) -> None:
        """Flush, and note in the header that nobody uses the extent any more."""
        self.flush()
        if self._marked:
            self._file.write(UNCLEAN_SHUTDOWN, b"\0")
            self._file.sync()
            self._marked = False
