"""New, empty images, alone or on top of others.

The link to a backing file is followed before anything is made: a name that leads nowhere is an error now, not when
the overlay is first used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from nbdserve.block import BlockDevice
from nbdserve.errors import OpenError
from nbdserve.formats import probe
from nbdserve.imagetools.making import Backing, Values, make_image
from nbdserve.imagetools.staging import is_device, staged
from nbdserve.opening import ReferencePolicy, is_remote, known_format, look_into, open_image


def create(
    path: str,
    format: str,
    size: int | None,
    values: Values,
    *,
    backing: str | None = None,
    backing_format: str | None = None,
    unchecked: bool = False,
    policy: ReferencePolicy | None = None,
) -> tuple[int, list[str]]:
    """Make an empty image; an existing one is replaced when the new one is complete.

    Args:
        format: a name of formats.FORMATS.
        size: of the disk in bytes; None for that of the backing file.
        backing: the name of the image to stand on, from the new one's own directory.
        unchecked: do not look at the backing file.
        policy: what the backing file may refer to, and the passphrase for what is encrypted.

    Returns:
        The length of the disk in bytes, and the paths of the images it stands on, the nearest first.

    Raises:
        OpenError: such an image cannot be, with the reason in one line.
    """
    if is_remote(path) or is_device(path):
        raise OpenError(f"{path}: images are made in files; convert writes to devices and servers")
    passphrase = None if policy is None else policy.passphrase
    if backing is None:
        if size is None:
            raise OpenError(f"{path}: how large is the disk to be? Give a size")
        with _stage(path, values) as made:
            make_image(made, format, size, values, passphrase=passphrase)
        return size, []
    if unchecked:
        if size is None:
            raise OpenError(f"{path}: without a look at the backing file its size is not known; give one")
        with _stage(path, values) as made:
            make_image(made, format, size, values, Backing(backing, backing_format, None), passphrase=passphrase)
        return size, []
    with open_backing(path, backing, backing_format, policy) as (below, chain):
        assert below.device is not None
        size = below.device.size if size is None else size
        with _stage(path, values) as made:
            make_image(made, format, size, values, below, passphrase=passphrase)
    return size, chain


@contextmanager
def _stage(path: str, values: Values) -> Iterator[str]:
    """Where to make an image; one whose data file lies where the user says is made in its own place."""
    if "data_file" not in values:
        with staged(path) as made:
            yield made
        return
    yield path


@contextmanager
def open_backing(
    path: str, name: str, format: str | None, policy: ReferencePolicy | None = None
) -> Iterator[tuple[Backing, list[str]]]:
    """The image that one at `path` is to stand on, open and of known format, with the paths of all images below.

    Raises:
        OpenError: the name leads nowhere from the directory of `path`, or the image may not be relied on.
    """
    found = os.path.join(os.path.dirname(path), name)
    if is_remote(name) or not name:
        raise OpenError(f"{path}: {name!r} is no path; a backing file has to be a local file")
    if os.path.realpath(found) == os.path.realpath(path):
        raise OpenError(f"{path}: an image cannot stand on itself; give the new one another name")
    if not os.path.exists(found):
        better = os.path.relpath(name, os.path.dirname(path) or ".")
        hint = f"say -b {better}" if os.path.exists(name) else "check the name"
        raise OpenError(
            f"{path}: its backing file {name}, looked for from the image's own directory, would be {found}, which does "
            f"not exist; {hint}"
        )
    from nbdserve.imagetools.describing import chain_of

    with ExitStack() as opened:
        chain: list[str] = []
        link = opened.enter_context(look_into(found, format=format, policy=policy))
        if format is None:
            raise OpenError(
                f"{path}: the format of its backing file has to be recorded; it looks like {probe(link.file)}, "
                f"so say -F {link.format}"
            )
        for each, _ in chain_of(link, opened):
            chain.append(each.file.name)
        device: BlockDevice = opened.enter_context(open_image(found, format=format, read_only=True, policy=policy))
        yield Backing(name, known_format(format), device), chain


def is_outside(path: str, name: str) -> bool:
    """Whether a file that an image refers to lies where it is opened only with the user's permission."""
    home = os.path.realpath(os.path.dirname(path) or ".")
    found = os.path.realpath(os.path.join(home, name))
    return os.path.commonpath((home, found)) != home
