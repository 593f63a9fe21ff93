"""The files inside an image, for the verbs that look at or change them without a mount.

A path in an image begins at the guest's root where there is one file system, and with the partition (/p2/etc/fstab)
where there are several. Symbolic links on the way are followed as the guest would, and never out of its file system.
"""

from __future__ import annotations

import argparse
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from fusemount.assembly import Assembly, View
from fusemount.filesystems.base import Attributes
from fusemount.links import followed
from fusemount.vfs import ROOT, Node, Tree
from fusemount.volumes import read_volumes
from nbdserve.cli.img.common import add_format, add_opening, open_named, warn
from nbdserve.errors import NbdserveError, OpenError

DEEPEST = 250
"""Directories below one another that are walked through; more are a loop in a damaged file system, or nearly so."""

_PIECE = 1 << 20
_FOR_MOUNTS = re.compile(r"; (?:--raw shows it .*|mount it without --(?:rw|partition))$")  # advice that is no use here
_PARTITION = re.compile(rb"/*p(\d+)(?:/+(.*))?", re.DOTALL)


class Found(NamedTuple):
    """A file of the guest; the root has itself as its parent, and no name."""

    parent: Node
    name: bytes
    node: Node
    attributes: Attributes


class Guest:
    """The tree of an open image.

    Args:
        tree: with symbolic links as they are stored.
        image: its name, for messages.
    """

    def __init__(self, tree: Tree, image: str) -> None:
        self.tree = tree
        self.image = image

    def find(self, path: bytes, *, follow: bool = True) -> Found:
        """What lies at a path; with follow, what a link there leads to.

        Raises:
            OpenError: nothing does.
        """
        parts = [part for part in path.split(b"/") if part not in (b"", b".")]
        try:
            if follow or not parts or parts[-1] == b"..":
                names = followed(self.tree, [ROOT], parts, absolute=True)[1]
            else:
                names = [*followed(self.tree, [ROOT], parts[:-1], absolute=True)[1], parts[-1]]
            found = Found(ROOT, b"", ROOT, self.tree.attributes(ROOT))
            for name in names:
                found = Found(found.node, name, *self.tree.lookup(found.node, name))
        except OSError as error:
            raise self.failure(path, error) from None
        return found

    def failure(self, path: bytes, error: OSError) -> OpenError:
        """What to say when something is wrong with a file."""
        return OpenError(f"{self.image}:/{os.fsdecode(path).lstrip('/')}: {error.strerror}")

    def children(self, directory: Node) -> list[Found]:
        """The entries of a directory by name; each is counted, see release()."""
        found: list[Found] = []
        position = 0

        def give(name: bytes, node: Node, attributes: Attributes, lasting: bool, following: int) -> bool:
            nonlocal position
            found.append(Found(directory, name, node, attributes))
            position = following
            return True

        while True:
            before = len(found)
            self.tree.entries(directory, position, give)
            if len(found) == before:
                return sorted(found, key=lambda each: each.name)

    def release(self, found: Iterable[Found]) -> None:
        """Done with what children() or find() returned."""
        for each in found:
            self.tree.forget([(each.node, 1)])

    def content(self, found: Found) -> Iterator[tuple[int, memoryview]]:
        """A file's content in pieces of at most 1 MiB, each with its offset; a piece may be all zeros."""
        offset, size = 0, found.attributes.size
        while offset < size:
            piece = memoryview(self.tree.read(found.node, offset, min(_PIECE, size - offset)))
            if not piece:
                return
            yield offset, piece
            offset += len(piece)

    def walk(self, top: Found, path: bytes) -> Iterator[tuple[bytes, Found]]:
        """A file and, below it if it is a directory, all others, with their paths; a directory before its entries."""
        yield from self._walk(top, path, frozenset())

    def _walk(self, top: Found, path: bytes, above: frozenset[Node]) -> Iterator[tuple[bytes, Found]]:
        yield path, top
        if not top.attributes.is_directory:
            return
        self.check_depth(top.node, path, above)
        children = self.children(top.node)
        for child in children:
            yield from self._walk(child, path + b"/" + child.name if path else child.name, above | {top.node})
        self.release(children)

    def check_depth(self, node: Node, path: bytes, above: frozenset[Node]) -> None:
        """Refuse a directory that lies in itself, or too deep; raises OpenError."""
        if node in above or len(above) >= DEEPEST:
            raise OpenError(f"{self.image}:/{os.fsdecode(path)}: lies in itself or too deep; is it damaged?")


def add_guest_options(parser: argparse.ArgumentParser) -> None:
    """How the verbs that know files choose the file system."""
    add_format(parser)
    parser.add_argument("--partition", metavar="N", help="paths begin at the root of this one (number, label or UUID)")
    parser.add_argument(
        "-i", "--inspect", action="store_true", help="paths begin at the guest's root, with what its fstab mounts"
    )


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """The same for verbs that only read."""
    add_guest_options(parser)
    parser.add_argument("--snapshot", metavar="NAME", help="of an internal snapshot (name or ID)")
    add_opening(parser)


@contextmanager
def opened(
    options: argparse.Namespace, image: str, paths: list[bytes], *, writable: bool = False
) -> Iterator[tuple[Guest, list[bytes]]]:
    """The guest in an image, and what is left of the paths when the partition that they begin with is taken away.

    If it was changed all is on stable storage after the with-block.

    Raises:
        OpenError: it cannot be opened (so), or the paths lie on several partitions.
    """
    snapshot = getattr(options, "snapshot", None)
    device = open_named(options, image, format=options.format, read_only=not writable, snapshot=snapshot)
    partition = options.partition
    if partition is None and not options.inspect:
        try:
            partition, paths = _partition_of(image, read_volumes(device, lambda line: None)[0].kind.value, paths)
        except BaseException:
            device.close()
            raise
    view = View(image, writable=writable, partition=partition, inspect=options.inspect, raw_links=True)
    try:
        assembly = Assembly(device, view, warn)
    except NbdserveError as error:
        raise type(error)(_FOR_MOUNTS.sub("", str(error))) from None
    try:
        yield Guest(assembly.tree, image), paths
    finally:
        assembly.close()


def _partition_of(image: str, kind: str, paths: list[bytes]) -> tuple[str | None, list[bytes]]:
    """The partition that all paths begin with, if the disk has any, and the rest of them."""
    if kind == "none":
        return None, paths
    matches = [_PARTITION.fullmatch(path) for path in paths]
    numbers = {match[1] if match else None for match in matches}
    if len(numbers) > 1:
        raise OpenError(f"{image}: the paths lie on several partitions; take one after the other")
    number = numbers.pop() if numbers else None
    if number is None:
        return None, paths
    return number.decode(), [match[2] or b"" for match in matches if match]


def is_zero(piece: memoryview) -> bool:
    """Whether a piece is all zeros, so that a hole can stand for it."""
    return piece.tobytes() == bytes(len(piece))


def kind_of(mode: int) -> str:
    """A type of file in a word."""
    names = {
        stat.S_IFDIR: "directory",
        stat.S_IFREG: "file",
        stat.S_IFLNK: "link",
        stat.S_IFIFO: "fifo",
        stat.S_IFSOCK: "socket",
        stat.S_IFBLK: "block device",
        stat.S_IFCHR: "character device",
    }
    return names.get(stat.S_IFMT(mode), "unknown")
