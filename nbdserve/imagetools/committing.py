"""commit: write what an overlay holds into an image below it.

The rule this file keeps: *the overlay shows the same disk at every moment*. Only bytes that the overlay, or an image
between it and the base, holds themselves are written to the base, so nothing that is read through it changes. The
overlay is emptied when all of them are on stable storage in the base, and not before; where it has been emptied the
base shows the same. A crash leaves work to do again.
"""

from __future__ import annotations

from nbdserve.block import BlockDevice, Zero
from nbdserve.errors import OpenError
from nbdserve.imagetools.chains import Link, Progress, Warn, demand_no_others, folders_of, identity_of, read_chain
from nbdserve.imagetools.lengthening import resize
from nbdserve.opening import ReferencePolicy, open_image

_PIECE = 2 << 20  # bytes


def commit(
    path: str,
    *,
    format: str | None = None,
    base: str | None = None,
    empty: bool = True,
    force: bool = False,
    policy: ReferencePolicy | None = None,
    warn: Warn = lambda line: None,
    progress: Progress = lambda done: None,
) -> str:
    """Write an overlay's content into the image below it, or into one further down; returns that one's path.

    A base that is shorter than the overlay is made longer. Images between the two do not show anything of use
    afterwards.

    Args:
        base: the image to write to; None: the one right below.
        empty: let the overlay hold nothing of its own afterwards. It never is emptied when there are images between.
        force: even where other overlays or internal snapshots will show something else than before.

    Raises:
        OpenError: an image cannot be read or written, or somebody depends on what would be changed.
        OSError: from the host.
    """
    chain = read_chain(path, format=format, policy=policy)
    depth = _depth_of(chain, base)
    above, target = chain[:depth], chain[depth]
    empty = empty and depth == 1
    if empty and chain[0].format != "qcow2":
        raise OpenError(f"{path}: {chain[0].format} overlays cannot be emptied; keep it as it is, with -d")
    if not force:
        _demand_safety(chain, depth, empty, warn)
    if chain[0].size > target.size:
        with open_image(target.path, format=target.format, policy=policy) as device:
            resize(device, target.path, chain[0].size)
    with open_image(
        path, format=chain[0].format, read_only=not empty, policy=policy, warn=warn, writable_depth=depth
    ) as top:
        below = top
        for _ in range(depth):
            below = below.backing  # type: ignore[attr-defined]  # whatever stands on something has this
        _copy_down(top, below, depth, progress)
        below.flush()
        if empty:
            _empty(top)
    for link in above[1:]:
        warn(f"{link.path}: lay between the two, and shows nothing of use any more; delete it after {path}")
    return target.path


def _depth_of(chain: list[Link], base: str | None) -> int:
    """How many links the base lies below the top."""
    path = chain[0].path
    if len(chain) < 2:
        raise OpenError(f"{path}: stands on no other image, so there is nothing to commit to")
    if base is None:
        return 1
    for depth, link in enumerate(chain[:-1], start=1):
        if link.backing is not None and link.backing[0] == base:
            return depth
    try:
        wanted = identity_of(base)
    except OSError as error:
        raise OpenError(f"-b {base}: {error.strerror}") from None
    for depth, link in enumerate(chain[1:], start=1):
        if link.identity == wanted:
            return depth
    below = ", ".join(link.path for link in chain[1:])
    raise OpenError(f"{path}: does not stand on {base!r}; it stands on {below}")


def _demand_safety(chain: list[Link], depth: int, empty: bool, warn: Warn) -> None:
    if empty and chain[0].has_snapshots:
        raise OpenError(
            f"{chain[0].path}: has internal snapshots, which would show something else when the image below has "
            "changed; delete them first, or use --force"
        )
    remedy = "rebase or flatten it first, or use --force"
    demand_no_others(chain[1 : depth + 1], chain[:depth], folders_of(chain[: depth + 1]), warn, remedy)


def _copy_down(top: BlockDevice, below: BlockDevice, depth: int, progress: Progress) -> None:
    """Write to the base what is held above it."""
    offset = 0
    while offset < top.size:
        extent = top.map(offset, min(_PIECE, top.size - offset))
        if extent.depth < depth:
            if isinstance(extent, Zero):
                below.zero(offset, extent.length)
            else:
                below.write(offset, top.read(offset, extent.length))
        offset += extent.length
        progress(offset)


def _empty(top: BlockDevice) -> None:
    from nbdserve.formats.qcow2.writable import WritableQcow2Image

    assert isinstance(top, WritableQcow2Image)
    top.give_up_from(0)
    top.flush()
