"""The order in which changed tables reach the disk.

The rule this file keeps: *whatever the disk shows refers only to what is there.* The specification asks for no order,
but a crash must leave an image whose refcounts are never too low and whose tables lead to data that has been written,
even though a disk completes writes in any order between two syncs. Data was *reserved* (allocation.py) and *written*
before its tables change in memory; a flush *publishes* it in phases, each ended by a sync:

    1   the guest's data, which has been written already; refcounts that were raised; tables nothing leads to yet
    1b  what makes new refcount blocks known (entries of the refcount table, or the header's pointer to it)
    2   L2 tables and L1 entries that lead to all that
    3   only now host clusters that lost their last reference are punched out and their refcounts lowered, which may
        reach the disk at any time later

A crash in between leaves clusters with a refcount and no reference: a leak, which costs space and nothing else.

Clusters freed before a flush began are *parked* until its phase 2 is through, and then until every pin has been dropped
that was held when the flush began (see block.pins): somebody may still be reading or sending them. They are punched
out, which gives the host its space back, before they can be reused, so that pages already queued in a socket stay what
they were. Where the host cannot punch holes, clusters are not reused before the image is opened again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from nbdserve.block.file import HostFile
from nbdserve.block.pins import Pins
from nbdserve.formats.qcow2.allocation import Allocator
from nbdserve.formats.qcow2.mapping import Mapping, MappingChanges
from nbdserve.formats.qcow2.refcounts import RefcountChanges, Refcounts, Row, Write
from nbdserve.formats.qcow2.space import HostSpace

_MAXIMUM_PARKED = 4096  # rows of clusters


@dataclass(slots=True)
class _Flush:
    """What one flush writes, copied while nobody could change it."""

    mapping: MappingChanges
    refcounts: RefcountChanges
    contents: list[Write]
    refcount_links: list[Write]
    mapping_links: list[Write]
    parked: list[Row]
    mark: int


@dataclass(slots=True)
class _Waiting:
    """Clusters without a reference on the disk, at which somebody may still be looking."""

    mark: int
    rows: list[Row] = field(default_factory=list)


class WriteBack:
    """Brings the tables of one image to its file.

    Args:
        allocating: the image's allocation lock, never held while waiting for a disk to sync.
        data: the external data file, or None.
    """

    def __init__(
        self,
        space: HostSpace,
        mapping: Mapping,
        refcounts: Refcounts,
        allocator: Allocator,
        pins: Pins,
        allocating: threading.RLock,
        data: HostFile | None,
    ) -> None:
        self._space = space
        self._mapping = mapping
        self._refcounts = refcounts
        self._allocator = allocator
        self._pins = pins
        self._allocating = allocating
        self._data = data
        self._flushing = threading.Lock()
        self._parked: list[Row] = []
        self._waiting: list[_Waiting] = []
        self._unpunchable: list[Row] = []

    def park(self, first: int, count: int) -> None:
        """Host clusters have lost a reference; under the allocation lock."""
        if self._parked and sum(self._parked[-1]) == first:
            first, count = self._parked[-1][0], self._parked[-1][1] + count
            self._parked.pop()
        self._parked.append((first, count))

    @property
    def is_due(self) -> bool:
        """Whether so much has changed that a flush should not wait until somebody asks for it."""
        return (
            self._mapping.changed_tables > self._mapping.capacity // 4
            or self._refcounts.changed_blocks > self._refcounts.capacity // 4
            or len(self._parked) > _MAXIMUM_PARKED
        )

    def flush(self) -> None:
        """Bring everything that has been written and changed so far to stable storage.

        Raises:
            OSError: from the host; nothing is forgotten, the next flush tries it all again.
        """
        with self._flushing:
            with self._allocating:
                flush = self._begin()
            try:
                self._write(flush)
            except BaseException:
                with self._allocating:
                    self._give_back(flush)
                raise
            with self._allocating:
                self._settle(flush)

    def finish(self) -> None:
        """Flush for the last time: nobody looks at anything any more, so all that is free is given up."""
        self.flush()
        with self._flushing, self._allocating:
            waiting, self._waiting = self._waiting, []
            for rows in (*(each.rows for each in waiting), self._unpunchable):
                for row in rows:
                    for freed in self._allocator.release(*row):
                        self._space.punch(*freed)
            end = self._allocator.finish()
        self.flush()
        self._space.trim(end)

    def _begin(self) -> _Flush:
        for row in self._refcounts.take_outgrown():
            self.park(*row)
        self._allocator.mark()
        mapping, refcounts = self._mapping.take_changes(), self._refcounts.take_changes()
        parked, self._parked = self._parked, []
        return _Flush(
            mapping,
            refcounts,
            self._refcounts.contents(refcounts) + self._mapping.contents(mapping),
            self._refcounts.links(refcounts),
            self._mapping.links(mapping),
            parked,
            self._pins.mark() if parked else 0,
        )

    def _write(self, flush: _Flush) -> None:
        if self._data is not None:
            self._data.sync()
        self._write_and_sync(flush.contents)
        for writes in (flush.refcount_links, flush.mapping_links):
            if writes:
                self._write_and_sync(writes)

    def _write_and_sync(self, writes: Iterable[Write]) -> None:
        for offset, content in writes:
            self._space.file.write(offset, content)
        self._space.file.sync()

    def _give_back(self, flush: _Flush) -> None:
        self._mapping.give_back(flush.mapping)
        self._refcounts.give_back(flush.refcounts)
        self._parked = flush.parked + self._parked

    def _settle(self, flush: _Flush) -> None:
        self._mapping.settle(flush.mapping)
        self._refcounts.settle(flush.refcounts)
        if flush.parked:
            self._waiting.append(_Waiting(flush.mark, flush.parked))
        while self._waiting and self._pins.is_past(self._waiting[0].mark):
            for row in self._waiting.pop(0).rows:
                self._release(*row)

    def _release(self, first: int, count: int) -> None:
        for row in self._allocator.release(first, count):
            if self._space.punch(*row):
                self._allocator.reuse(*row)
            else:
                self._refcounts.take(*row)
                self._unpunchable.append(row)
