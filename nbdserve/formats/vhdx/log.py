"""The log: updates of metadata that were promised before a crash and must be made before anything is read.

The log is a ring of 4 KiB sectors. An entry is a header, descriptors (a sector to write, or a range to zero) and the
sectors; entries with consecutive numbers form a sequence. The sequence that counts is the valid one that ends with the
highest number, and of it the part from the entry on that its last one names as tail ([MS-VHDX] 2.3.2, 2.3.3).

An image opened for reading stays untouched: ReplayedFile shows it as it would be after the replay. Opened for writing,
the updates are made for real. That may be cut short and done again any number of times, because the log is declared
empty (in the headers) only when all of them are on stable storage. This project adds nothing to the log: see image.
"""

from __future__ import annotations

import os
import struct
import uuid
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from nbdserve.block.file import HostFile, WriteBuffer
from nbdserve.errors import FormatError, Unsupported
from nbdserve.formats.vhdx import MAXIMUM_FILE, MIB
from nbdserve.formats.vhdx.checksum import is_intact
from nbdserve.formats.vhdx.headers import NO_GUID, Header

SECTOR = 4096
MAXIMUM_LOG = 128 * MIB  # of an unreplayed log, which may have to be held in memory; Hyper-V and QEMU make 1 MiB
_FIRST_LOGGED = 192 << 10  # the region tables; what lies before is never changed through the log
_ZEROS = bytes(MIB)

ENTRY = struct.Struct("<4s4xIIQI4x16sQQ")  # signature, length, tail, number, descriptors, GUID, flushed and last end
DESCRIPTOR = struct.Struct("<4s4sQQQ")  # signature, last 4 bytes, first 8 bytes or length, offset, number
DATA = struct.Struct("<4sI4084sI")  # signature, high half of the number, bytes 8 to 4092, low half


@dataclass(frozen=True, slots=True)
class Update:
    """Bytes of the file that a log entry changes: to `data`, or to zeros when that is None."""

    start: int
    end: int
    data: bytes | None


@dataclass(frozen=True, slots=True)
class Replay:
    """What is to be done before the file can be used.

    Attributes:
        updates: in the order in which they must be made.
        size: how long the file must be at least, in bytes.
    """

    updates: tuple[Update, ...]
    size: int


@dataclass(frozen=True, slots=True)
class _Entry:
    place: int  # offset in the log
    length: int
    tail: int
    number: int
    flushed_end: int
    last_end: int
    updates: tuple[Update, ...]


def read_log(file: HostFile, header: Header) -> Replay | None:
    """What the log asks for; None when it is empty.

    Raises:
        FormatError: it asks for something that cannot be.
        Unsupported: it is not empty, and larger than what may be held in memory.
    """
    if header.log_guid == NO_GUID or not header.log_length:
        return None
    if header.log_length > MAXIMUM_LOG:
        raise Unsupported(
            f"{file.name}: has a log of {header.log_length} bytes to be replayed, more than the {MAXIMUM_LOG} handled "
            "here; let Hyper-V or 'qemu-img check -r all' replay it"
        )
    entries = _active_sequence(_Ring(file, header))
    if not entries:
        return None
    size = file.size
    if entries[-1].last_end > MAXIMUM_FILE:
        raise FormatError(
            f"{file.name}: the log wants a file of {entries[-1].last_end} bytes, more than a VHDX can have; "
            "the image is damaged"
        )
    if entries[-1].flushed_end > size:
        raise FormatError(
            f"{file.name}: the log was written when the file had {entries[-1].flushed_end} bytes, now it has {size}; "
            "the image is truncated"
        )
    size = max(size, -(-entries[-1].last_end // MIB) * MIB)
    updates = tuple(update for entry in entries for update in entry.updates)
    log = (header.log_offset, header.log_offset + header.log_length)
    for update in updates:
        if not _FIRST_LOGGED <= update.start <= update.end <= size or (update.start < log[1] and log[0] < update.end):
            raise FormatError(
                f"{file.name}: the log would change the bytes from {update.start} to {update.end}, where no metadata "
                "can be; the image is damaged"
            )
    return Replay(updates, size)


class _Ring:
    """The log's bytes, and which of its entries are valid."""

    def __init__(self, file: HostFile, header: Header) -> None:
        self.length = header.log_length
        self._file = file
        self._start = header.log_offset
        self._guid = header.log_guid

    def _read(self, place: int, length: int) -> bytearray:
        """Bytes of the log, from its beginning again after its end."""
        first = min(length, self.length - place)
        return self._file.read(self._start + place, first) + self._file.read(self._start, length - first)

    def candidates(self) -> Iterator[int]:
        """Where entries may begin."""
        for start in range(0, self.length, MIB):
            piece = self._file.read(self._start + start, MIB)
            yield from (start + place for place in range(0, MIB, SECTOR) if piece[place : place + 4] == b"loge")

    def entry(self, place: int) -> _Entry | None:
        """The entry that begins there, if a valid one does (2.3.1).

        Its length must be that of its parts, so no two valid entries overlap, and checking all takes linear time.
        """
        head = ENTRY.unpack(self._read(place, ENTRY.size))
        signature, length, tail, number, count, guid, flushed_end, last_end = head
        if signature != b"loge" or uuid.UUID(bytes_le=guid) != self._guid or not number:
            return None
        described = -(-(ENTRY.size + count * DESCRIPTOR.size) // SECTOR) * SECTOR
        if length % SECTOR or not described <= length <= self.length or tail % SECTOR or tail >= self.length:
            return None
        raw = self._read(place, described)
        places = range(ENTRY.size, ENTRY.size + count * DESCRIPTOR.size, DESCRIPTOR.size)
        wanted = sum(raw[at : at + 4] == b"desc" for at in places)
        if length != described + wanted * SECTOR:
            return None
        content = self._read(place, length)
        updates = _updates(content, count, described, number)
        if updates is None or not is_intact(content, 4):
            return None
        return _Entry(place, length, tail, number, flushed_end, last_end, tuple(updates))


def _updates(content: bytearray, count: int, described: int, number: int) -> list[Update] | None:
    """What an entry's descriptors ask for; None when one of them, or its data, is not valid."""
    updates = []
    place = described
    for index in range(count):
        signature, tail, head, offset, own = DESCRIPTOR.unpack_from(content, ENTRY.size + index * DESCRIPTOR.size)
        if own != number or offset % SECTOR:
            return None
        if signature == b"zero" and head % SECTOR == 0:
            updates.append(Update(offset, offset + head, None))
        elif signature == b"desc":
            mark, high, middle, low = DATA.unpack_from(content, place)
            if mark != b"data" or high << 32 | low != number:
                return None
            updates.append(Update(offset, offset + SECTOR, head.to_bytes(8, "little") + middle + tail))
            place += SECTOR
        else:
            return None
    return updates


def _active_sequence(ring: _Ring) -> list[_Entry]:
    """The entries to replay, in order; none when no valid sequence is there."""
    entries = {place: entry for place in ring.candidates() if (entry := ring.entry(place)) is not None}
    following = {place: _next(entry, entries, ring.length) for place, entry in entries.items()}
    later = {entry.place for entry in following.values() if entry is not None}
    best: list[_Entry] = []
    for place, first in entries.items():
        if place in later:
            continue
        sequence = [first]
        while (entry := following[sequence[-1].place]) is not None:
            sequence.append(entry)
        tail = next((index for index, entry in enumerate(sequence) if entry.place == sequence[-1].tail), None)
        if tail is not None and (not best or sequence[-1].number > best[-1].number):
            best = sequence[tail:]
    return best


def _next(entry: _Entry, entries: dict[int, _Entry], length: int) -> _Entry | None:
    """The entry that continues the sequence behind this one, in a ring of `length` bytes."""
    after = entries.get((entry.place + entry.length) % length)
    return after if after is not None and after.number == entry.number + 1 else None


def replay(file: HostFile, wanted: Replay) -> None:
    """Make the updates, and return when they are on stable storage."""
    if file.size < wanted.size and not file.is_device:
        os.ftruncate(file.fd, wanted.size)
    for update in wanted.updates:
        if update.data is not None:
            file.write(update.start, update.data)
        elif not file.zero_range(update.start, update.end - update.start):
            file.write_zeros(update.start, update.end - update.start)
    file.sync()


class ReplayedFile:
    """A file as it reads after the replay, which is kept in memory: at most as many bytes as the log has.

    Attributes:
        size: the length it would have, in bytes.
    """

    def __init__(self, file: HostFile, wanted: Replay) -> None:
        self.file = file
        self.name = file.name
        self.size = wanted.size
        self._starts: list[int] = []
        self._updates: list[Update] = []  # sorted, none overlaps another
        for update in wanted.updates:
            if update.start < update.end:
                self._put(update)

    def _put(self, update: Update) -> None:
        """Add an update that overrules what it overlaps."""
        first = bisect_right(self._starts, update.start)
        if first and self._updates[first - 1].end > update.start:
            first -= 1
        last = bisect_left(self._starts, update.end)
        pieces = [update]
        for old in self._updates[first:last]:
            pieces += [_cut(old, old.start, update.start), _cut(old, update.end, old.end)]
        pieces = sorted((piece for piece in pieces if piece.start < piece.end), key=lambda piece: piece.start)
        self._updates[first:last] = pieces
        self._starts[first:last] = [piece.start for piece in pieces]

    def next_update(self, offset: int, end: int) -> tuple[bool, int]:
        """Whether the replay has changed the byte at offset, and up to where that holds, no further than end."""
        index = bisect_right(self._starts, offset)
        if index and self._updates[index - 1].end > offset:
            return True, min(self._updates[index - 1].end, end)
        return False, min(self._starts[index], end) if index < len(self._starts) else end

    def read(self, offset: int, length: int) -> bytearray:
        """The bytes from offset on."""
        buffer = bytearray(length)
        self.read_into(offset, buffer)
        return buffer

    def read_into(self, offset: int, buffer: WriteBuffer) -> None:
        """Fill the buffer with the bytes from offset on."""
        self.file.read_into(offset, buffer)
        end = offset + len(buffer)
        first = max(0, bisect_right(self._starts, offset) - 1)
        for update in self._updates[first : bisect_left(self._starts, end)]:
            start, stop = max(update.start, offset), min(update.end, end)
            if start < stop:
                data = update.data
                new = bytes(stop - start) if data is None else data[start - update.start : stop - update.start]
                buffer[start - offset : stop - offset] = new


def _cut(update: Update, start: int, end: int) -> Update:
    """The part of an update between two offsets; empty when start >= end."""
    data = update.data
    if data is not None:
        data = data[max(0, start - update.start) : max(0, end - update.start)]
    return Update(start, end, data)
