"""One directory in memory: its entries by name, and which of its slots of 32 bytes are free.

A name takes one slot for its short entry and, if it needs them, up to twenty before that for its long one; the whole is
called an entry here. What cannot be made out (a long entry that does not fit its short one) is left alone, and the
short name counts, as the specification says ("Long Directory Entries").

Changes are made in memory and handed out as pieces to be written; the caller decides in which order.
"""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator

from fusemount.filesystems.base import error
from fusemount.filesystems.fat import names
from fusemount.filesystems.fat.boot import ENTRY_SIZE
from fusemount.filesystems.fat.chain import Chain
from fusemount.filesystems.fat.entries import DELETED, LABEL, LONG_NAME, LONG_NAME_MASK, Entry
from fusemount.filesystems.fat.inodes import Inodes
from fusemount.filesystems.fat.table import Run
from fusemount.filesystems.fat.volume import Piece, Volume

_MOST_SLOTS = 65536  # Windows and Linux let no directory grow larger
DOT, DOT_DOT = b".".ljust(11), b"..".ljust(11)


class Directory:
    """The directory whose chain begins with a cluster; 0 is the fixed root directory of FAT12 and FAT16.

    Args:
        inodes: entries of files that are known are shared with them.

    Attributes:
        ambiguous: whether two entries answer to one name, which only damage can bring about.
    """

    def __init__(self, volume: Volume, first: int, inodes: Inodes) -> None:
        self._volume = volume
        self._fixed = not first
        self._chain = Chain(volume.table, first)
        self._entries: dict[int, Entry] = {}  # by the slot of the short entry
        self._order: list[int] = []  # the same slots, sorted
        self._exact: dict[bytes, Entry] = {}
        self._folded: dict[str, Entry] = {}  # by long and short name, case folded
        self._short: set[bytes] = set()
        self._tails: dict[bytes, int] = {}
        self.ambiguous = False
        self._places: list[int] = []  # where each cluster begins on the device
        self._per_place = volume.geometry.root_entries if self._fixed else volume.geometry.cluster_size // ENTRY_SIZE
        raw = self._read()
        self._used = bytearray(len(raw) // ENTRY_SIZE)  # one byte a slot, 1 where it is taken
        self._full_before = 0  # no slot before this one is free
        self._end = len(self._used)  # the first slot that was never used; none behind it counts
        self._parse(raw, inodes)
        self._litter = bool(raw[self._end * ENTRY_SIZE :].strip(b"\0"))  # there is something behind the end

    def _read(self) -> bytes:
        volume, geometry = self._volume, self._volume.geometry
        if self._fixed:
            self._places.append(geometry.root_offset)
            return bytes(volume.read(geometry.root_offset, geometry.root_entries * ENTRY_SIZE))
        count = self._chain.learn(max(1, _MOST_SLOTS * ENTRY_SIZE // geometry.cluster_size))
        runs = list(self._chain.runs(0, count))
        self._extend(runs)
        return b"".join(volume.read(geometry.offset_of(first), size * geometry.cluster_size) for first, size in runs)

    def _extend(self, runs: list[Run]) -> None:
        offset_of = self._volume.geometry.offset_of
        self._places += [offset_of(cluster) for first, count in runs for cluster in range(first, first + count)]

    def _parse(self, raw: bytes, inodes: Inodes) -> None:
        long_parts: list[bytes] = []
        expected = check = -1  # of the long entry that is being collected: its next part, its checksum
        for slot in range(len(self._used)):
            at = slot * ENTRY_SIZE
            order = raw[at]
            if order == 0:
                self._end = slot
                break
            if order == DELETED:
                expected = -1
                continue
            self._used[slot] = 1
            attributes = raw[at + 11]
            if attributes & LONG_NAME_MASK == LONG_NAME:
                if order & 0x40:
                    expected, check, long_parts = order & 0x3F, raw[at + 13], []
                elif order != expected or check != raw[at + 13]:
                    expected = -1
                    continue
                long_parts.append(raw[at + 1 : at + 11] + raw[at + 14 : at + 26] + raw[at + 28 : at + 32])
                expected -= 1
                continue
            whole = expected == 0 and check == names.checksum(raw[at : at + 11])
            expected = -1
            if attributes & LABEL or raw[at : at + 11] in (DOT, DOT_DOT):
                continue
            entry = Entry(raw[at : at + ENTRY_SIZE], wide=self._volume.wide)
            entry.slot, entry.slots = slot, len(long_parts) + 1 if whole else 1
            entry.position = self._position(slot)
            known = inodes.at(entry.position)
            if known is not None:
                entry = known.entry
            else:
                entry.name = (names.long_name(b"".join(reversed(long_parts))) if whole else None) or _short_name(entry)
            self._index(entry)

    def _position(self, slot: int) -> int:
        """Where a slot lies on the device."""
        return self._places[slot // self._per_place] + slot % self._per_place * ENTRY_SIZE

    def _index(self, entry: Entry) -> None:
        self._entries[entry.slot] = entry
        insort(self._order, entry.slot)
        self._short.add(entry.short)
        if entry.name:
            self.ambiguous |= self._exact.setdefault(entry.name, entry) is not entry
            for key in _keys(entry):
                self.ambiguous |= self._folded.setdefault(key, entry) is not entry

    # Looking

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self._used) * ENTRY_SIZE

    @property
    def is_empty(self) -> bool:
        return not self._entries

    def find(self, name: bytes) -> Entry | None:
        """The entry with a name, written in any case; exactly this one is preferred."""
        entry = self._exact.get(name)
        if entry is None:
            text = names.text_of(name)
            entry = self._folded.get(names.fold(text)) if text else None
        return entry

    def entries_behind(self, slot: int) -> Iterator[Entry]:
        """The entries that can be shown, whose slot is greater."""
        for place in self._order[bisect_right(self._order, slot) :]:
            entry = self._entries.get(place)
            if entry is not None and entry.name:
                yield entry

    # Changing

    def make_room(self, text: str) -> None:
        """See to it that an entry with this name can be added. Raises ENOSPC."""
        need = 1 if self._exact_short(text) else 2 + len(text.encode("utf-16-le")) // 26
        if self._free_slots(need) >= 0:
            return
        geometry = self._volume.geometry
        missing = need - (len(self._used) - self._end)
        count = -(-missing * ENTRY_SIZE // geometry.cluster_size)
        slots = count * geometry.cluster_size // ENTRY_SIZE
        if self._fixed or len(self._used) + slots > _MOST_SLOTS:
            raise error(errno.ENOSPC)
        self._chain.learn()
        last = self._chain.last
        runs = self._volume.allocate(count, near=last + 1)
        for first, length in runs:
            self._volume.device.zero(geometry.offset_of(first), length * geometry.cluster_size)
        self._volume.link(runs, last)
        self._chain.extend(runs)
        self._extend(runs)
        self._used += bytes(slots)

    def _free_slots(self, count: int) -> int:
        """Where that many free slots follow each other, or -1."""
        first = self._used.find(0, self._full_before)
        self._full_before = first if first >= 0 else len(self._used)
        return self._used.find(bytes(count), self._full_before)

    def _exact_short(self, text: str) -> tuple[bytes, int] | None:
        """The short name that says a name by itself, if it is free: damaged entries may have it, though not shown."""
        exact = names.exact_short(text)
        return exact if exact and exact[0] not in self._short else None

    def add(self, text: str, entry: Entry) -> list[Piece]:
        """Put an entry for a new name into a free place, which make_room() has found to be there."""
        exact = self._exact_short(text)
        if exact:
            entry.short, entry.case = exact
            raw = b""
        else:
            entry.short, entry.case = names.alias(text, self._short, self._tails), 0
            raw = names.long_slots(text, entry.short)
        entry.name = text.encode()
        raw += entry.pack(wide=self._volume.wide)
        entry.slots = len(raw) // ENTRY_SIZE
        start = self._free_slots(entry.slots)
        assert start >= 0
        entry.slot = start + entry.slots - 1
        entry.position = self._position(entry.slot)
        self._used[start : entry.slot + 1] = b"\1" * entry.slots
        self._index(entry)
        if entry.slot >= self._end:
            self._end = entry.slot + 1
            if self._litter and self._end < len(self._used):
                raw += bytes(ENTRY_SIZE)
        return self._pieces(start, raw)

    def remove(self, entry: Entry) -> list[Piece]:
        """Take an entry out. Its slots are not used again before vacate()."""
        del self._entries[entry.slot]
        del self._order[bisect_left(self._order, entry.slot)]
        self._short.discard(entry.short)
        if self._exact.get(entry.name) is entry:
            del self._exact[entry.name]
        for key in _keys(entry):
            if self._folded.get(key) is entry:
                del self._folded[key]
        start = entry.slot + 1 - entry.slots
        raw = bytearray()
        for offset, data in self._pieces(start, bytes(entry.slots * ENTRY_SIZE)):
            raw += self._volume.read(offset, len(data))
        raw[::ENTRY_SIZE] = bytes((DELETED,)) * entry.slots
        return self._pieces(start, bytes(raw))[::-1]  # the short entry goes first

    def vacate(self, entry: Entry) -> None:
        """The slots of a removed entry are free."""
        start = entry.slot + 1 - entry.slots
        self._used[start : entry.slot + 1] = bytes(entry.slots)
        self._full_before = min(self._full_before, start)

    def _pieces(self, slot: int, raw: bytes) -> list[Piece]:
        """Bytes for some slots, cut where they do not lie together on the device."""
        pieces: list[Piece] = []
        for at in range(0, len(raw), ENTRY_SIZE):
            position, data = self._position(slot + at // ENTRY_SIZE), raw[at : at + ENTRY_SIZE]
            if pieces and pieces[-1][0] + len(pieces[-1][1]) == position:
                pieces[-1] = pieces[-1][0], pieces[-1][1] + data
            else:
                pieces.append((position, data))
        return pieces


def _short_name(entry: Entry) -> bytes:
    name = names.short_text(entry.short, entry.case).encode()
    return name if names.is_presentable(name) else b""


def _keys(entry: Entry) -> set[str]:
    """What an entry answers to, case folded."""
    text = names.text_of(entry.name) or ""
    return {names.fold(text), names.fold(names.short_text(entry.short, entry.case))}
