"""A FAT volume: its device, geometry and allocation table, and the marks that say whether it was cleanly unmounted.

The order kept here, so that fsck.vfat can repair what a crash leaves behind, and nothing is lost that was synced:

- Before the first change the volume is marked as in use, in the boot sector (the bit that Linux and fsck.vfat look at)
  and in entry 1 of the table ("FAT Data Structure"), and that is flushed. Only close() takes the marks away, after all
  else was flushed, and only if they were not there before: a dirty volume stays dirty until somebody has checked it.
- Clusters that were given up are still allocated, in memory and on the device, until a flush has returned. Only then is
  it certain that no directory entry leads to them any more, whatever a crash makes of the writes in between, so only
  then may they belong to another file. A crash before leaves them allocated to nobody, which fsck.vfat puts right.

Which write of an operation comes first is told in writing.py.
"""

from __future__ import annotations

import errno
from struct import Struct

from fusemount.filesystems.base import Condition, error
from fusemount.filesystems.fat.boot import Geometry
from fusemount.filesystems.fat.table import Run, Table
from nbdserve.block import BlockDevice

Piece = tuple[int, bytes]
"""Bytes to be written and where on the device."""

_IN_USE = 0x01  # in the state byte of the boot sector
_CLEAN = {16: 0x8000, 32: 0x08000000}  # in entry 1 of the table; FAT12 has no such bits
_NO_ERRORS = {16: 0x4000, 32: 0x04000000}

_INFO_SIGNATURES = (0, b"RRaA"), (484, b"rrAa")  # "FAT32 FSInfo Sector Structure"
_INFO_COUNTS = Struct("<II")
_INFO_COUNTS_OFFSET = 488
_INFO_SIZE = 512

_AT_ONCE = 4096  # bytes that a host writes as a whole or not at all, but for a loss of power


class Volume:
    """A volume on a device.

    Raises:
        FormatError, Unsupported: there is no FAT volume, or one that is not handled.

    Attributes:
        wide: whether directory entries have 32 bits for the first cluster (FAT32).
        parked: how many clusters wait for a flush to become free.
    """

    def __init__(self, device: BlockDevice) -> None:
        self.device = device
        self.geometry = Geometry.read(device)
        self.table = Table(device, self.geometry)
        self.wide = self.geometry.bits == 32
        self.parked = 0
        self._parked: list[Run] = []
        self._in_use = False
        self._info_changed = False
        self._state = device.read(self.geometry.state_offset, 1)[0]
        self._mark = self.table[1]
        self._has_info = self._read_info()

    def condition(self) -> Condition:
        """In which state it is."""
        bits, missing = self.geometry.bits, self.geometry.missing
        dirty = self._was_in_use()
        if missing:
            remark = f"it reaches {missing} bytes past the end of the device; what lies there cannot be read"
            return Condition(readable=True, writable=False, dirty=dirty, remark=remark)
        if self.device.read_only:
            return Condition(readable=True, writable=False, dirty=dirty, remark="the device can only be read")
        remark = "it was not cleanly unmounted; check it with fsck.vfat" if dirty else ""
        if not self._mark & _NO_ERRORS.get(bits, self._mark | 1):
            remark = "the system that used it last met read or write errors; check it with fsck.vfat"
        return Condition(readable=True, writable=True, dirty=dirty, remark=remark)

    def _was_in_use(self) -> bool:
        clean = _CLEAN.get(self.geometry.bits, 0)
        return bool(self._state & _IN_USE) or self._mark & clean != clean

    def read(self, offset: int, size: int) -> bytearray:
        """Bytes of the device; EIO for what lies past its end."""
        if offset + size > self.device.size:
            raise error(errno.EIO)
        return self.device.read(offset, size)

    # Writing

    def begin_change(self) -> None:
        """Has to be called before anything is written."""
        if not self._in_use:
            self._set_marks(self._state | _IN_USE, self._mark & ~_CLEAN.get(self.geometry.bits, 0))
            self.device.flush()
            self._in_use = True

    def _set_marks(self, state: int, mark: int) -> None:
        self.device.write(self.geometry.state_offset, bytes((state,)))
        if mark != self.table[1]:
            self.table[1] = mark
            self.table.flush()

    def write(self, pieces: list[Piece]) -> None:
        """Write pieces of directories in order, those that lie close together at once."""
        waiting: list[Piece] = []
        for piece in pieces:
            together = [*waiting, piece]
            low = min(offset for offset, _ in together)
            if max(offset + len(data) for offset, data in together) - low > _AT_ONCE:
                self._write_at_once(waiting)
                together = [piece]
            waiting = together
        self._write_at_once(waiting)

    def _write_at_once(self, pieces: list[Piece]) -> None:
        if len(pieces) == 1:
            self.device.write(*pieces[0])
        elif pieces:
            low = min(offset for offset, _ in pieces)
            whole = self.device.read(low, max(offset + len(data) for offset, data in pieces) - low)
            for offset, data in pieces:
                whole[offset - low : offset - low + len(data)] = data
            self.device.write(low, whole)

    # Space

    def free(self) -> int:
        """How many clusters are free, or will be with the next flush."""
        return self.table.free() + self.parked

    def allocate(self, count: int, near: int = 0) -> list[Run]:
        """Clusters that nobody uses, not taken until they are linked. Raises ENOSPC."""
        try:
            return self.table.find_free(count, near)
        except OSError as failure:
            if failure.errno != errno.ENOSPC or not self._parked or count > self.free():
                raise
        self._free_parked()
        return self.table.find_free(count, near)

    def park(self, runs: list[Run]) -> None:
        """Clusters to which nothing on the device leads any more; they become free with the next flush."""
        self._parked += runs
        self.parked += sum(count for _, count in runs)
        self._info_changed = True

    def _free_parked(self) -> None:
        self.device.flush()
        self.table.release(self._parked)
        self._parked = []
        self.parked = 0
        self.table.flush()

    def link(self, runs: list[Run], last: int = 0) -> None:
        """Make a chain of allocated clusters, behind the cluster `last` if that is not 0, and write the table."""
        if runs:
            self.table.link(runs)
            if last:
                self.table[last] = runs[0][0]
            self._info_changed = True
        self.table.flush()

    # The end

    def sync(self) -> None:
        """Bring everything to stable storage."""
        if not self._in_use:
            return
        self.table.flush()
        self._write_info()
        self._free_parked()

    def close(self) -> None:
        """Sync, and take the marks away."""
        if not self._in_use:
            return
        self.sync()
        self.device.flush()
        self._set_marks(self._state, self._mark)
        self.device.flush()
        self._in_use = False

    def _read_info(self) -> bool:
        offset = self.geometry.info_offset
        if not offset or offset + _INFO_SIZE > self.device.size:
            return False
        sector = self.device.read(offset, _INFO_SIZE)
        if any(sector[place : place + 4] != signature for place, signature in _INFO_SIGNATURES):
            return False
        self.table.hint = _INFO_COUNTS.unpack_from(sector, _INFO_COUNTS_OFFSET)[1]
        return True

    def _write_info(self) -> None:
        """FSInfo: free clusters, and the last one that was taken."""
        if self._has_info and self._info_changed:
            last = max(self.table.hint - 1, 2)
            self.device.write(self.geometry.info_offset + _INFO_COUNTS_OFFSET, _INFO_COUNTS.pack(self.free(), last))
        self._info_changed = False
