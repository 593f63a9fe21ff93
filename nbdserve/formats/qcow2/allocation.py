"""Which free host cluster to take.

Clusters are handed out from a *run*: free clusters in a row, found with one look at the refcounts. The run's refcounts
are raised in one go, when it is used up or a flush needs them. Runs come, in this order, from

    1   clusters that were freed in this session; they have been punched out and read as zeros
    2   clusters that were free when the image was opened. One block of refcounts is looked through for each run, so
        that opening costs nothing and a full image is not read from its beginning before the first write
    3   the end of the file, which reads as zeros

All methods are called under the image's allocation lock.
"""

from __future__ import annotations

from nbdserve.formats.qcow2.refcounts import Refcounts, Row
from nbdserve.formats.qcow2.space import HostSpace, damaged

_RUN = 16 << 20  # bytes in a run at the end of the file
_FEWEST = 16  # clusters in such a run
_MAXIMUM_KNOWN = 65536  # rows of freed clusters to remember; what is forgotten is found again by looking


class Allocator:
    """Takes and gives back host clusters of one image."""

    def __init__(self, space: HostSpace, refcounts: Refcounts) -> None:
        self._space = space
        self._refcounts = refcounts
        self._bits = space.geometry.cluster_bits
        # The run: clusters from _next to _stop are to be handed out, those from _marked on have no refcount yet.
        self._marked = self._next = self._stop = 0
        self._reads_as_zeros = True
        self._known: list[Row] = []
        self._looked_through = 0  # clusters before this one are not worth a look
        self._look_until = self._end = space.fresh_from >> self._bits
        # Where the next compressed cluster may go, in bytes: into the rest of a host cluster that others share.
        self._byte = 0

    def allocate(self, wanted: int) -> tuple[int, int, bool]:
        """Take up to `wanted` free clusters in a row: the first, how many, and whether they read as zeros."""
        if self._next == self._stop:
            self._find_run(wanted)
        first = self._next
        count = min(wanted, self._stop - first)
        self._space.reach(first + count << self._bits)
        self._next = first + count
        return first, count, self._reads_as_zeros

    def allocate_at_once(self, count: int) -> int | None:
        """The first of `count` clusters in a row that read as zeros, if that needs no look at the disk."""
        if self._next + count > self._stop or not self._reads_as_zeros:
            index = self._end // self._refcounts.per_block
            if self._looked_through < self._look_until or not self._refcounts.is_at_hand(index):
                return None
            self._end_run()
            if not self._run_of_known():
                self._run_at_end()
            if self._next + count > self._stop:
                return None
        first = self._next
        self._space.reach(first + count << self._bits)
        self._next = first + count
        return first

    def allocate_row(self, count: int) -> int:
        """The first of exactly `count` new clusters in a row, for a table; they read as zeros."""
        self._end_run()
        free = self._refcounts.zeros(self._end, count)
        if free == count:
            first = self._end
            self._refcounts.take(first, count)
        else:
            if free:
                self.reuse(self._end, free)
            first = self._refcounts.add_row(-(-self._end // self._refcounts.per_block), count)
        self._end = first + count
        self._space.reach(self._end << self._bits)
        return first

    def allocate_bytes(self, length: int) -> int:
        """Where `length` bytes of compressed data, less than a cluster, may be written: a host offset in bytes."""
        size = 1 << self._bits
        left = -self._byte % size
        shared = self._byte >> self._bits
        if left and self._refcounts.refcount(shared) < self._refcounts.maximum:
            if length <= left:
                self._refcounts.share(shared, 1)
                self._byte += length
                return self._byte - length
            following = self.allocate(1)[0]
            if following == shared + 1:
                self._refcounts.share(shared, 1)
                self._byte += length
                self.mark()
                return self._byte - length
        else:
            following = self.allocate(1)[0]
        self._byte = (following << self._bits) + length
        self.mark()
        return following << self._bits

    # Runs

    def _find_run(self, wanted: int) -> None:
        self._end_run()
        if self._run_of_known():
            return
        found = self._look(max(wanted, _FEWEST))
        if found is None:
            self._run_at_end()
        else:
            self._start_run(*found, reads_as_zeros=self._space.punch(*found))

    def _run_of_known(self) -> bool:
        while self._known:
            first, count = self._known.pop()
            count = self._refcounts.zeros(first, count)  # some of it may have been found by looking, too
            if count:
                self._start_run(first, count, reads_as_zeros=True)
                return True
        return False

    def _look(self, wanted: int) -> Row | None:
        """Free clusters in the next block of refcounts that has not been looked through."""
        per_block = self._refcounts.per_block
        index, position = divmod(self._looked_through, per_block)
        if self._looked_through >= self._look_until:
            return None
        block = self._refcounts.block(index)
        try:
            first = index * per_block + block.index(0, position) if block is not None else self._look_until
        except ValueError:
            first = self._look_until
        if first >= self._look_until:
            self._looked_through = (index + 1) * per_block
            return None
        count = self._refcounts.zeros(first, min(wanted, self._look_until - first))
        self._looked_through = first + count
        return first, count

    def _run_at_end(self) -> None:
        per_block = self._refcounts.per_block
        while True:
            index, position = divmod(self._end, per_block)
            block = self._refcounts.block(index)
            if block is None:
                self._refcounts.add_block(index)
                continue
            try:
                self._end = index * per_block + block.index(0, position)
                break
            except ValueError:
                self._end = (index + 1) * per_block
        count = self._refcounts.zeros(self._end, max(_FEWEST, _RUN >> self._bits))
        self._start_run(self._end, count, reads_as_zeros=True)
        self._end += count

    def _start_run(self, first: int, count: int, *, reads_as_zeros: bool) -> None:
        if self._space.holds_table(first, count):
            raise damaged(self._space.file.name, f"host cluster {first} holds a table but has no refcount")
        self._marked = self._next = first
        self._stop = first + count
        self._reads_as_zeros = reads_as_zeros

    def mark(self) -> None:
        """Raise the refcounts of what has been handed out; before anybody looks at refcounts."""
        if self._marked < self._next:
            self._refcounts.take(self._marked, self._next - self._marked)
            self._marked = self._next

    def _end_run(self) -> None:
        self.mark()
        if self._stop == self._end:
            self._end = self._next
        elif self._next < self._stop and self._reads_as_zeros:
            self._known.append((self._next, self._stop - self._next))
        self._stop = self._next

    # Giving back

    def release(self, first: int, count: int) -> list[Row]:
        """Clusters have lost a reference; the rows of those that are free now, for reuse() if they are punched out."""
        self.mark()
        freed = self._refcounts.release(first, count)
        for start, number in freed:
            if start <= (self._byte - 1) >> self._bits < start + number:
                self._byte = 0
        return freed

    def reuse(self, first: int, count: int) -> None:
        """Clusters, all of one block, are free, and read as zeros; they are taken before the file grows further."""
        if self._stop == self._end:
            self._end_run()
        if len(self._known) < _MAXIMUM_KNOWN:
            self._known.append((first, count))
        else:
            self._looked_through = min(self._looked_through, first)
            self._look_until = max(self._look_until, first + count)

    def finish(self) -> int:
        """The last allocation is over: where the file may end, in bytes."""
        self._end_run()
        return self._end << self._bits
