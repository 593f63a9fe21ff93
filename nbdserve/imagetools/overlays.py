"""overlay: a new, empty qcow2 image on top of another one, which from then on is only to be read."""

from __future__ import annotations

import os

from nbdserve.errors import OpenError
from nbdserve.imagetools.chains import Link, Warn, read_chain
from nbdserve.opening import ReferencePolicy


def create_overlay(
    path: str,
    base: str,
    *,
    size: int | None = None,
    base_format: str | None = None,
    cluster_size: int | None = None,
    policy: ReferencePolicy | None = None,
    warn: Warn = lambda line: None,
) -> list[Link]:
    """Put an overlay on an image; returns the chain, the overlay first.

    The base is recorded with its format, and as the user names it: absolute, or relative to the overlay's folder.

    Args:
        base: its path, from the present folder.
        size: of the disk in bytes; None: as long as the base.
        base_format: None guesses it from the content.

    Raises:
        OpenError: the base cannot be read, or there is a file where the overlay is to be.
    """
    from nbdserve.formats.qcow2.create import CreateOptions, create_image

    if os.path.lexists(path):
        raise OpenError(f"{path}: exists already; an overlay starts empty, so choose another name")
    below = read_chain(base, format=base_format, policy=policy)
    name = recorded_name(path, base)
    options = CreateOptions(backing=name, backing_format=below[0].format)
    if cluster_size is not None:
        options = CreateOptions(backing=name, backing_format=below[0].format, cluster_size=cluster_size)
    create_image(path, below[0].size if size is None else size, options)
    try:
        return read_chain(path, format="qcow2", policy=policy)
    except OpenError as error:  # it is as it was asked for, only that it may not be opened just so
        warn(str(error))
        return below


def recorded_name(overlay: str, base: str) -> str:
    """What leads from an overlay to a base whose path starts in the present folder; absolute paths stay so."""
    if os.path.isabs(base):
        return base
    return os.path.relpath(os.path.abspath(base), os.path.realpath(os.path.dirname(overlay) or "."))
