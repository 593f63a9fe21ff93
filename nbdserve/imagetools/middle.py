"""delete-middle: take one image out of a chain  below <- middle <- overlays,  so that its overlays show what they did.

Two ways: into the overlays, which get what they need of it and then stand on the image below; or into the image below,
which gets what the middle one holds, and then shows the same disk. The second changes the image below, so nobody else
may stand on that one. With either nobody else may stand on the middle one, for it goes.

Each step keeps every overlay whole (see committing.py and rebasing.py), and the middle image is removed last, when all
links that lead past it are on stable storage. What a crash has left undone is done by another call.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from enum import Enum

from nbdserve.errors import OpenError
from nbdserve.imagetools.chains import Link, Progress, Warn, demand_no_others, folders_of, read_chain
from nbdserve.imagetools.committing import commit
from nbdserve.imagetools.comparing import first_difference
from nbdserve.imagetools.rebasing import rebase
from nbdserve.opening import ReferencePolicy, open_image


class Into(Enum):
    """Where the content of the middle image goes."""

    ABOVE = "above"
    BELOW = "below"


def delete_middle(
    middle: str,
    overlays: Sequence[str],
    into: Into,
    *,
    keep: bool = False,
    folders: Iterable[str] = (),
    policy: ReferencePolicy | None = None,
    warn: Warn = lambda line: None,
    progress: Progress = lambda done: None,
) -> None:
    """Take an image out of its chain, and remove its file.

    Args:
        overlays: all images that stand on it.
        keep: leave the file where it is.
        folders: where to look for other overlays, besides the folders of the images themselves.

    Raises:
        OpenError: an image cannot be read or written, or somebody else depends on one that would be changed.
        OSError: from the host.
    """
    chain = read_chain(middle, policy=policy)
    if len(chain) < 2:
        raise OpenError(f"{middle}: stands on no other image, so it is not in the middle of a chain")
    if chain[0].has_snapshots and not keep:
        raise OpenError(f"{middle}: has internal snapshots, which would be lost; delete them first, or use --keep")
    tops = [read_chain(each, policy=policy) for each in overlays]
    waiting = [top for top in tops if _stands_on(top, chain[0])]
    for top in tops:
        if top not in waiting and not _stands_on(top, chain[1]):
            raise OpenError(f"{top[0].path}: stands neither on {middle} nor, already, on {chain[1].path}")
    _demand_nobody_else(chain, [top[0] for top in tops], waiting, into, [*folders], warn)
    if waiting:
        _move(chain, waiting, into, policy, warn, progress)
    elif into is Into.BELOW and not _show_the_same(chain, policy, progress):
        raise OpenError(
            f"{middle}: nothing that was named stands on it any more, but {chain[1].path} does not show the same disk; "
            "remove it yourself if it is not needed, or commit it first"
        )
    if not keep:
        _remove(middle)


def _stands_on(top: list[Link], base: Link) -> bool:
    return len(top) > 1 and top[1].identity == base.identity


def _demand_nobody_else(
    chain: list[Link], tops: list[Link], waiting: list[list[Link]], into: Into, folders: list[str], warn: Warn
) -> None:
    folders = list(dict.fromkeys([*folders_of([*chain[:2], *tops]), *folders]))
    demand_no_others(chain[:1], tops, folders, warn, "name all overlays of it, or rebase that one first")
    if into is Into.BELOW and waiting:
        done = [top for top in tops if all(top is not each[0] for each in waiting)]
        for link in done:
            raise OpenError(f"{link.path}: stands on {chain[1].path}, which would be changed; use '--into above'")
        demand_no_others(chain[1:2], chain[:1], folders, warn, "use '--into above', or rebase that one first")


def _move(
    chain: list[Link],
    waiting: list[list[Link]],
    into: Into,
    policy: ReferencePolicy | None,
    warn: Warn,
    progress: Progress,
) -> None:
    middle, below = chain[:2]
    if into is Into.BELOW:
        commit(middle.path, format=middle.format, empty=False, force=True, policy=policy, warn=warn, progress=progress)
    for top in waiting:
        overlay = top[0]
        # The image below shows the same now, but for what it has behind the end of a shorter middle one.
        unsafe = into is Into.BELOW and (middle.size >= below.size or overlay.size <= middle.size)
        rebase(
            overlay.path,
            _name_of(below, overlay, middle),
            backing_format=below.format,
            format=overlay.format,
            unsafe=unsafe,
            policy=policy,
            warn=warn,
            progress=progress,
        )


def _name_of(below: Link, overlay: Link, middle: Link) -> str:
    """How the overlay is to find the image below: absolute if the middle one does so, else relative to its folder."""
    assert middle.backing is not None
    if os.path.isabs(middle.backing[0]):
        return middle.backing[0]
    return os.path.relpath(os.path.realpath(below.path), os.path.realpath(os.path.dirname(overlay.path) or "."))


def _show_the_same(chain: list[Link], policy: ReferencePolicy | None, progress: Progress) -> bool:
    """Whether the image below shows what the middle one does, after a commit that a crash has followed."""
    middle, below = (open_image(link.path, format=link.format, read_only=True, policy=policy) for link in chain[:2])
    with middle, below:
        found = first_difference(middle, below, progress)
        return middle.size <= below.size and (found is None or found >= middle.size)


def _remove(path: str) -> None:
    os.unlink(path)
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
