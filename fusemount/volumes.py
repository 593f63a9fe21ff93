"""What an image holds: its partitions, and on each a file system or something else, with what can be done about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import NamedTuple

from fusemount.cache import WriteBackCache
from fusemount.filesystems import adapter
from fusemount.filesystems.base import Condition, FileSystem
from fusemount.filesystems.detect import CONTAINERS, ENCRYPTED, Signature, detect
from fusemount.vfs import Hasty
from nbdserve.block import BlockDevice, Window
from nbdserve.errors import NbdserveError, OpenError
from nbdserve.partitions import Partition, PartitionTable, TableKind, read_partitions

Warn = Callable[[str], None]

_WITH_CACHE = frozenset(("ext2", "ext3", "ext4"))
"""Kinds whose adapter has a cache of its own, because what it caches is not what lies on the device.

The engines of the others put their writes into an order in which a process may be killed, so their cache keeps it.
"""


@dataclass(frozen=True)
class Volume:
    """A partition, or the whole of a disk that has none.

    Attributes:
        name: p1, p2, ...; "disk" for a whole one.
        offset, size: bytes.
        partition: what the table says of it; None for a whole disk.
        signature: what lies on it; None when that is not known.
    """

    name: str
    offset: int
    size: int
    device: BlockDevice
    partition: Partition | None
    signature: Signature | None

    @cached_property
    def condition(self) -> Condition:
        """Whether it can be mounted, and how; found out only when somebody wants to know."""
        try:
            module = self.adapter()
            looked_at = Window(self.device, 0, self.size)
            looked_at.read_only = False  # the question is whether the file system could be written, not the image
            condition = module.examine(looked_at)
            assert isinstance(condition, Condition)
            return condition
        except NbdserveError as error:
            return Condition(False, False, False, str(error))
        except OSError as error:
            return Condition(False, False, False, f"cannot be read: {error}")

    def adapter(self) -> ModuleType:
        """What reads its file system.

        Raises:
            OpenError: nothing does; the message says what it is, and what can be done.
        """
        kind = self.kind
        if not kind:
            raise OpenError("no known file system; --raw shows it as a file")
        if kind in ENCRYPTED:
            raise OpenError(f"encrypted ({ENCRYPTED[kind]}); --raw shows it as a file that can be unlocked")
        if kind in CONTAINERS:
            raise OpenError(f"{CONTAINERS[kind]}, no file system; --raw shows it as a file")
        try:
            module = adapter(kind)
        except ImportError as error:
            raise OpenError(f"{kind} needs {error.name}; pip install 'nbdserve[fuse]'") from None
        if module is None:
            raise OpenError(f"{kind} is not read here; --raw shows it as a file")
        return module

    @property
    def kind(self) -> str:
        """What blkid calls its content; "" when that is not known."""
        return self.signature.kind if self.signature else ""

    def is_called(self, selector: str) -> bool:
        """Whether its file system has this label or UUID."""
        signature = self.signature
        return bool(signature and selector) and selector.lower() in (
            signature.label.lower() if signature else "",
            signature.uuid.lower() if signature else "",
        )


class Opened(NamedTuple):
    """An open file system; what tells its device not to wait; and the cache that is to be closed after it, if any."""

    fs: FileSystem
    hasty: Hasty
    cache: WriteBackCache | None


def read_volumes(device: BlockDevice, warn: Warn) -> tuple[PartitionTable, list[Volume]]:
    """The partition table of a disk, and its volumes in the order of their numbers.

    Partitions that reach past the end of the disk are left out, with a warning.

    Raises:
        OpenError: the table is damaged beyond use.
    """
    table = read_partitions(device)
    for remark in table.remarks:
        warn(remark)
    if table.kind is TableKind.NONE:
        return table, [_volume("disk", device, 0, device.size, None)]
    volumes = []
    for part in table.partitions:
        if part.is_container or part.size <= 0:
            continue
        if part.offset + part.size > device.size:
            warn(f"partition {part.number} reaches past the end of the disk and is left out; is the image truncated?")
            continue
        volumes.append(_volume(f"p{part.number}", device, part.offset, part.size, part))
    return table, volumes


def _volume(name: str, disk: BlockDevice, offset: int, size: int, partition: Partition | None) -> Volume:
    device = disk if partition is None else Window(disk, offset, size)
    try:
        signature = detect(device)
    except (OSError, NbdserveError):
        signature = None
    return Volume(name, offset, size, device, partition, signature)


def select(table: PartitionTable, volumes: list[Volume], selector: str) -> Volume:
    """The volume with this number, or with this UUID or label of the partition or of its file system.

    Raises:
        OpenError: there is none, or more than one.
    """
    number = selector.removeprefix("p") if selector[1:].isdecimal() else selector
    found = [each for each in volumes if each.partition and str(each.partition.number) == number]
    found = found or [each for each in volumes if each.partition and each.partition.uuid == selector.lower()]
    found = found or [each for each in volumes if each.partition and selector and each.partition.label == selector]
    found = found or [each for each in volumes if each.is_called(selector)]
    names = ", ".join(each.name for each in found or volumes)
    if len(found) > 1:
        raise OpenError(f"more than one partition matches {selector!r}: {names}; choose by number")
    if not found:
        if table.kind is TableKind.NONE:
            raise OpenError("this disk has no partition table; mount it without --partition")
        raise OpenError(f"no partition {selector!r} on this disk; it has: {names or 'none'}")
    return found[0]


def overlapping(volumes: Iterable[Volume]) -> set[str]:
    """The names of the writable volumes that share bytes with other writable ones: writing to both would harm both."""
    names: set[str] = set()
    last: Volume | None = None
    for each in sorted((each for each in volumes if each.condition.writable), key=lambda each: each.offset):
        if last is not None and each.offset < last.offset + last.size:
            names |= {last.name, each.name}
        if last is None or each.offset + each.size > last.offset + last.size:
            last = each
    return names


def open_volume(volume: Volume, *, writable: bool) -> Opened:
    """Open the file system on a volume.

    Raises:
        OpenError: it cannot be opened so.
    """
    module = volume.adapter()
    if volume.kind in _WITH_CACHE:
        fs = module.open_filesystem(volume.device, writable=writable)
        return Opened(fs, fs.cache, None)
    cache = WriteBackCache(volume.device, in_order=True)
    cache.read_only = not writable
    return Opened(module.open_filesystem(cache, writable=writable), cache, cache)
