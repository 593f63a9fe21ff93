"""Symbolic links of the guest, kept inside the mount.

In the guest an absolute link starts at its root, and `..` does not lead above that. Seen through a mount, both would
lead to files of the host. So a target is shown as it is only while it cannot leave: relative, with no more leading `..`
than the link lies deep, and none further on (behind a name, which may be a link itself, `..` could lead anywhere).
Every other target is replaced by a relative one that leads to the same file from where the link lies: an absolute one
by as many `..` as it takes, one with an inner `..` by what it comes to when it is followed within the guest.

Where a link lies is known from its last lookup. One that was found in several directories (hard links to symbolic
links exist) has no such place; it gets an absolute target, through the mount point.
"""

from __future__ import annotations

import errno
import stat
from typing import TYPE_CHECKING

from fusemount.filesystems.base import error

if TYPE_CHECKING:
    from fusemount.vfs import Node, Tree

_MOST_LINKS = 40  # as many as the kernel follows (include/linux/namei.h)
_LONGEST = 4095


def contained(tree: Tree, link: Node, target: bytes) -> bytes:
    """What to show as the target of a link that the guest stores as `target`."""
    absolute = target.startswith(b"/")
    parts = _parts(target)
    if not absolute and b".." not in parts:
        return target
    trail = tree.trail(link)
    leading = next((index for index, part in enumerate(parts) if part != b".."), len(parts))
    if b".." in parts[leading:]:
        ups, names = followed(tree, trail or [tree.home(link)], parts, absolute)
    elif trail is not None and not absolute and leading < len(trail):
        return target
    else:
        ups, names = len(trail or [b""]) - 1, parts[leading:]
    path = [b".."] * ups + names if trail is not None else [tree.path_of_home(link), *names]
    shown = b"/".join(path) or b"."
    if len(shown) > _LONGEST:
        raise error(errno.ENAMETOOLONG)
    return shown


def _parts(target: bytes) -> list[bytes]:
    return [part for part in target.split(b"/") if part not in (b"", b".")]


def followed(tree: Tree, trail: list[Node], parts: list[bytes], absolute: bool) -> tuple[int, list[bytes]]:
    """Follow `parts` from the directory at the end of the trail, or from its start if absolute.

    From the first name on that does not exist, `..` can only be taken by the letter.

    Returns:
        how many `..` lead up from that directory, and the names that lead down again.
    """
    depth = len(trail) - 1
    ups, names = (depth, []) if absolute else (0, list[bytes]())
    nodes = trail[: depth + 1 - ups]  # those on the way that exist, from the guest's root on
    ahead, links = parts[::-1], 0
    while ahead:
        part = ahead.pop()
        if part == b"..":
            if names:
                names.pop()
            elif ups < depth:
                ups += 1
            del nodes[depth + 1 - ups + len(names) :]
            continue
        found = tree.peek(nodes[-1], part) if len(nodes) == depth + 1 - ups + len(names) else None
        if found is None or not stat.S_ISLNK(found[1].mode):
            names.append(part)
            nodes += [found[0]] if found else []
            continue
        links += 1
        if links > _MOST_LINKS:
            raise error(errno.ELOOP)
        target = tree.stored_target(found[0])
        if target.startswith(b"/"):
            ups, names = depth, []
            del nodes[1:]
        ahead += _parts(target)[::-1]
        if len(ahead) > _LONGEST:
            raise error(errno.ENAMETOOLONG)
    return ups, names
