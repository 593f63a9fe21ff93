"""Which images stand on which: down a chain by what its files say, up only by looking into the files of a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeAlias

from nbdserve.errors import NbdserveError, OpenError
from nbdserve.imagetools.describing import chain_of, read_facts
from nbdserve.opening import ReferencePolicy, look_into

Identity: TypeAlias = tuple[int, int]
"""A file whatever it is called: device and inode."""

Warn: TypeAlias = Callable[[str], None]
Progress: TypeAlias = Callable[[int], None]
"""Told how many bytes of the disk are done."""


@dataclass(frozen=True, slots=True)
class Link:
    """An image of a chain.

    Attributes:
        path: where it was found.
        size: of its disk, in bytes.
        backing: what it says of the image below: name and recorded format; None for the last one.
        has_snapshots: whether it holds internal snapshots.
    """

    path: str
    format: str
    size: int
    identity: Identity
    backing: tuple[str, str | None] | None
    has_snapshots: bool


def read_chain(
    path: str, *, format: str | None = None, force_share: bool = False, policy: ReferencePolicy | None = None
) -> list[Link]:
    """An image and, one after the other, those that it stands on.

    Raises:
        OpenError: one of them cannot be read.
    """
    with ExitStack() as opened:
        top = opened.enter_context(look_into(path, format=format, force_share=force_share, policy=policy))
        return [
            Link(
                image.file.name,
                image.format,
                facts.size,
                _identity(os.fstat(image.file.fd)),
                facts.backing,
                "snapshots" in facts.more,
            )
            for image, facts in chain_of(top, opened)
        ]


def overlays_on(bases: Collection[Identity], folders: Iterable[str], warn: Warn) -> dict[str, Identity]:
    """The images in some folders that stand directly on one of `bases`: path -> that base.

    Nothing is opened but the files in the folders themselves, and those only for a look; those that cannot be read are
    told of, because what they stand on is not known.
    """
    found: dict[str, Identity] = {}
    for path in _files(folders):
        if not os.access(path, os.R_OK):
            warn(f"{path}: cannot be read, so whether it stands on one of the images is not known")
            continue
        try:
            with look_into(path, force_share=True) as image:
                backing = read_facts(image).backing
            below = None if backing is None else _identity(os.stat(os.path.join(os.path.dirname(path), backing[0])))
        except (NbdserveError, OSError):
            continue  # no image, or one that is broken whatever is done to others
        if below is not None and below in bases:
            found[path] = below
    return found


def demand_no_others(
    changed: Collection[Link], known: Collection[Link], folders: Iterable[str], warn: Warn, remedy: str
) -> None:
    """Refuse to change images on which others stand than those that are `known`.

    Raises:
        OpenError: it names them.
    """
    bases = {link.identity: link.path for link in changed}
    ours = {link.identity for link in known}
    for path, base in overlays_on(bases.keys(), folders, warn).items():
        if _identity(os.stat(path)) not in ours:
            raise OpenError(f"{path}: stands on {bases[base]}, too, and would be damaged; {remedy}")


def folders_of(links: Iterable[Link]) -> list[str]:
    """The folders that images lie in, each once."""
    return list(dict.fromkeys(os.path.dirname(link.path) or "." for link in links))


def identity_of(path: str) -> Identity:
    """The file that a path leads to; raises OSError."""
    return _identity(os.stat(path))


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino


def _files(folders: Iterable[str]) -> Iterator[str]:
    for folder in folders:
        with os.scandir(folder) as entries:
            yield from sorted(entry.path for entry in entries if entry.is_file())
