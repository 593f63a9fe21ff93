"""Whose files: which numbers of the guest's users are shown as which of the host's, and back."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

from fusemount.filesystems.base import Attributes, error
from nbdserve.errors import OpenError

NOBODY = 65534
"""What the kernel shows for an owner that no range maps (Documentation/filesystems/idmappings.rst)."""


@dataclass(frozen=True, slots=True)
class IdRange:
    """`count` numbers, of which the first is `guest` in the guest and `host` here."""

    guest: int
    host: int
    count: int


def id_range(text: str) -> IdRange:
    """GUEST:HOST:COUNT, as mount(8) writes X-mount.idmap.

    Raises:
        OpenError: it is not written so, or leaves the 32 bits that such numbers have.
    """
    parts = text.split(":")
    if len(parts) == 3 and all(part.isascii() and part.isdigit() for part in parts):
        guest, host, count = map(int, parts)
        if count and guest + count <= 2**32 - 1 and host + count <= 2**32 - 1:
            return IdRange(guest, host, count)
    raise OpenError(f"{text!r} is no range of numbers; write GUEST:HOST:COUNT, like 0:100000:65536")


@dataclass(frozen=True, slots=True)
class IdMap:
    """Ranges for one kind of number; without any, every number stands for itself."""

    ranges: tuple[IdRange, ...] = ()

    def shown(self, guest: int) -> int:
        """The host's number for one of the guest's."""
        for each in self.ranges:
            if 0 <= guest - each.guest < each.count:
                return each.host + guest - each.guest
        return NOBODY if self.ranges else guest

    def stored(self, host: int) -> int:
        """The guest's number for one of the host's; raises EOVERFLOW where there is none, as idmapped mounts do."""
        for each in self.ranges:
            if 0 <= host - each.host < each.count:
                return each.guest + host - each.host
        if self.ranges:
            raise error(errno.EOVERFLOW)
        return host


@dataclass(frozen=True, slots=True)
class Owners:
    """The policy of one mount.

    Attributes:
        uid, gid: of whoever mounts: what is shown where a file system knows no owners.
        root_of_guest: nothing is checked, and what is created belongs to the guest's root.
    """

    uid: int
    gid: int
    root_of_guest: bool = False
    uids: IdMap = field(default_factory=IdMap)
    gids: IdMap = field(default_factory=IdMap)

    def shown(self, attributes: Attributes, has_owners: bool) -> tuple[int, int]:
        """The user and group that stat(2) is to show."""
        if not has_owners:
            return self.uid, self.gid
        return self.uids.shown(attributes.uid), self.gids.shown(attributes.gid)

    def creator(self, uid: int, gid: int) -> tuple[int, int]:
        """The owner in the guest of what this user of the host creates."""
        return (0, 0) if self.root_of_guest else (self.uids.stored(uid), self.gids.stored(gid))
