"""rebase and flatten: let an overlay stand on another image, or on none.

The rule this file keeps: *the overlay shows the same disk at every moment* (but for rebase -u, whose point is that
nothing is read). Where the old and the new backing file differ, the overlay is first given clusters of its own with
the old content; when they are on stable storage, one sector of its header is changed (formats/qcow2/relinking.py).
A crash before that leaves an overlay of the old backing file that takes more space than it needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext

from nbdserve.block import BlockDevice, Data, Extent, Zero
from nbdserve.errors import OpenError
from nbdserve.formats.base import MappedImage, Unallocated
from nbdserve.imagetools.chains import Progress, Warn, identity_of, read_chain
from nbdserve.opening import ReferencePolicy, known_format, look_into, open_image

_PIECE = 1 << 20  # bytes


def rebase(
    path: str,
    backing: str | None,
    *,
    backing_format: str | None = None,
    format: str | None = None,
    unsafe: bool = False,
    force: bool = False,
    policy: ReferencePolicy | None = None,
    warn: Warn = lambda line: None,
    progress: Progress = lambda done: None,
) -> None:
    """Let a qcow2 image stand on another backing file.

    Args:
        backing: the name to record; relative ones start in the image's folder. None: it is to stand on its own.
        backing_format: None: what the content says is recorded.
        unsafe: change nothing but the record; what is shown may change, and neither backing file need exist.
        force: even if it has internal snapshots, which may show something else afterwards.

    Raises:
        OpenError: an image cannot be read or written.
        OSError: from the host.
    """
    backing_format = None if backing_format is None else known_format(backing_format)
    with look_into(path, format=format, policy=policy) as image:
        if image.format != "qcow2":
            raise OpenError(f"{path}: is {image.format}; only qcow2 images can be rebased; convert it")
    if unsafe:
        from nbdserve.formats.qcow2.relinking import relink

        with look_into(path, format="qcow2", read_only=False, policy=policy) as image:
            relink(image.file, backing, backing_format or _format_if_there(path, backing))
        return
    if backing is not None:
        backing_format = _check_new(path, backing, backing_format, policy)
    _rebase_safely(path, backing, backing_format, force, policy, warn, progress)


def _format_if_there(path: str, backing: str | None) -> str | None:
    """The format of the new backing file, if there is such a file already."""
    full = None if backing is None else full_name(path, backing)
    if full is None or not os.path.exists(full):
        return None
    with look_into(full, force_share=True) as image:
        return image.format


def full_name(path: str, backing: str) -> str:
    """Where the image at `path` will look for a backing file of that name."""
    return os.path.join(os.path.dirname(path), backing)


def _check_new(path: str, backing: str, format: str | None, policy: ReferencePolicy | None) -> str:
    """See that the new chain can be opened and does not come back to the image; returns the format to record."""
    full = full_name(path, backing)
    if not os.path.exists(full):
        elsewhere = "; names of backing files start in the folder of the image" if os.path.exists(backing) else ""
        raise OpenError(f"{full}: no such file{elsewhere}")
    chain = read_chain(full, format=format, policy=policy)
    if identity_of(path) in {link.identity for link in chain}:
        raise OpenError(f"{full}: stands on {path} itself; choose another backing file")
    return chain[0].format


def _rebase_safely(
    path: str,
    backing: str | None,
    backing_format: str | None,
    force: bool,
    policy: ReferencePolicy | None,
    warn: Warn,
    progress: Progress,
) -> None:
    from nbdserve.formats.qcow2.relinking import relink
    from nbdserve.formats.qcow2.writable import WritableQcow2Image

    with open_image(path, format="qcow2", policy=policy, warn=warn) as image:
        assert isinstance(image, WritableQcow2Image)
        if image.header.snapshots and not force:
            raise OpenError(
                f"{path}: has internal snapshots, which may show something else on another backing file; delete them "
                "first, or use --force"
            )
        new = None
        if backing is not None:
            full = full_name(path, backing)
            new = open_image(full, format=backing_format, read_only=True, policy=policy, warn=warn)
        old, image.backing = image.backing, new  # whoever zeroes clusters has to know what they would show otherwise
        with old or nullcontext():
            copy_up(image, old, new, progress)
            image.flush()
            relink(image.file, backing, backing_format)


def copy_up(image: MappedImage, old: BlockDevice | None, new: BlockDevice | None, progress: Progress) -> None:
    """Let an overlay hold everything in which its old backing device differs from the new one (None: zeros)."""
    offset, piece = 0, max(_PIECE, image.cluster_size)
    while offset < image.size:
        own = image.lookup(offset, min(piece, image.size - offset))
        if isinstance(own, Unallocated):
            for start, content in _differences(old, new, offset, offset + own.length, image.cluster_size):
                _keep(image, start, content)
        offset += own.length
        progress(offset)


def _differences(
    old: BlockDevice | None, new: BlockDevice | None, offset: int, end: int, unit: int
) -> Iterator[tuple[int, bytearray]]:
    """What the old device shows otherwise than the new one, in multiples of `unit` from offset on: where, and what."""
    while offset < end:
        before, after = _extent(old, offset, end - offset), _extent(new, offset, end - offset)
        alike = min(before.length, after.length)
        whole = alike if offset + alike == end else alike // unit * unit
        stop = offset + (whole or min(unit, end - offset))
        if not whole or not _same_place(before, after):
            yield from _compared(old, new, offset, stop, unit)
        offset = stop


def _compared(
    old: BlockDevice | None, new: BlockDevice | None, start: int, stop: int, unit: int
) -> Iterator[tuple[int, bytearray]]:
    """Pieces are compared as bytearrays, which takes a tenth of the time that memoryviews do."""
    before, after = _content(old, start, stop), _content(new, start, stop)
    if before == after:
        return
    differs_from: int | None = None
    for at in range(0, stop - start, unit):
        if before[at : at + unit] != after[at : at + unit]:
            differs_from = at if differs_from is None else differs_from
        elif differs_from is not None:
            yield start + differs_from, before[differs_from:at]
            differs_from = None
    if differs_from == 0:
        yield start, before
    elif differs_from is not None:
        yield start + differs_from, before[differs_from:]


def _extent(device: BlockDevice | None, offset: int, length: int) -> Extent:
    if device is None or offset >= device.size:
        return Zero(length, allocated=False)
    return device.map(offset, min(length, device.size - offset))


def _same_place(one: Extent, other: Extent) -> bool:
    """Whether two extents show the same bytes, so that they need not be read."""
    if isinstance(one, Zero) and isinstance(other, Zero):
        return True
    if not isinstance(one, Data) or not isinstance(other, Data) or one.host_offset != other.host_offset:
        return False
    return os.path.sameopenfile(one.file.fd, other.file.fd)


def _content(device: BlockDevice | None, start: int, stop: int) -> bytearray:
    """The bytes of a range; behind the end of the device there are zeros."""
    inside = 0 if device is None else max(0, min(stop, device.size) - start)
    content = device.read(start, inside) if device is not None and inside else bytearray()
    content.extend(bytes(stop - start - inside))
    return content


def _keep(image: MappedImage, start: int, content: bytearray) -> None:
    """Let whole clusters of the overlay hold something by themselves."""
    if content == bytes(len(content)):
        image.zero(start, len(content))
    else:
        image.write(start, content)
