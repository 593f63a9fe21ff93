"""Which of the guest's owners are shown as which of the host's, and back."""

from __future__ import annotations

import errno

import pytest

from fusemount.filesystems.base import Attributes, Inode
from fusemount.owners import IdMap, IdRange, Owners, id_range
from nbdserve.errors import OpenError

FILE = Attributes(Inode(2), 0o100644, 1, uid=1000, gid=5, size=0, blocks=0, atime_ns=0, mtime_ns=0, ctime_ns=0)


def test_without_ranges_numbers_are_the_guests() -> None:
    owners = Owners(501, 20)
    assert owners.shown(FILE, has_owners=True) == (1000, 5)
    assert owners.creator(501, 20) == (501, 20)


def test_a_file_system_without_owners_shows_who_mounts() -> None:
    assert Owners(501, 20).shown(FILE, has_owners=False) == (501, 20)


def test_the_guests_root_creates() -> None:
    owners = Owners(501, 20, root_of_guest=True)
    assert owners.creator(501, 20) == (0, 0)
    assert owners.shown(FILE, has_owners=True) == (1000, 5)


def test_ranges() -> None:
    ids = IdMap((id_range("0:100000:1000"), id_range("1000:501:1")))
    assert [ids.shown(guest) for guest in (0, 999, 1000, 1001)] == [100000, 100999, 501, 65534]
    assert [ids.stored(host) for host in (100000, 100999, 501)] == [0, 999, 1000]
    with pytest.raises(OSError, match="too large") as caught:
        ids.stored(0)
    assert caught.value.errno == errno.EOVERFLOW


@pytest.mark.parametrize("text", ["", "0:1", "0:1:0", "0:1:x", "0:1:2:3", "-1:0:1", "0:4294967295:1", "0:0:4294967296"])
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(OpenError, match="GUEST:HOST:COUNT"):
        id_range(text)


def test_the_largest_range() -> None:
    assert id_range("0:0:4294967295") == IdRange(0, 0, 2**32 - 1)
