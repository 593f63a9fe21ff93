"""nbdimg tar: write a tree inside an image as a tar archive."""

from __future__ import annotations

import argparse
import io
import os
import stat
import sys
import tarfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from nbdserve.cli.img.common import Subparsers, add_verb, warn
from nbdserve.errors import OpenError

if TYPE_CHECKING:
    from fusemount.vfs import Node
    from nbdserve.cli.img.guest_tree import Found, Guest

EXAMPLES = """\
  nbdimg tar disk.qcow2 /p2/home | zstd > home.tar.zst
  nbdimg tar -o root.tar --partition 2 disk.qcow2
"""

_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
}


def add_parser(subparsers: Subparsers) -> None:
    """The verb's command line."""
    from nbdserve.cli.img.guest_tree import add_reading_options

    parser = add_verb(subparsers, "tar", "Write a tree inside an image as a tar archive, to stdout.", EXAMPLES)
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("path", metavar="PATH", nargs="?", default="/")
    parser.add_argument("-o", "--file", metavar="FILE", help="write to this file")
    add_reading_options(parser)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says."""
    from nbdserve.cli.img.guest_tree import opened
    from nbdserve.imagetools.staging import staged

    if options.file is None and sys.stdout.isatty():
        raise OpenError("an archive is nothing for a terminal; send it to a file or another program, or use -o FILE")
    with opened(options, options.image, [os.fsencode(options.path)]) as (guest, (path,)):
        top = guest.find(path)
        if options.file is None:
            write_archive(guest, top, sys.stdout.buffer)
        else:
            with staged(options.file) as made, open(made, "xb") as file:
                write_archive(guest, top, file)
    return 0


def write_archive(guest: Guest, top: Found, file: BinaryIO) -> None:
    """Write a file, or what a directory holds, in the format of POSIX.1-2001 (pax).

    Names start at the top. Files with several names are stored once. Extended attributes are stored as star, GNU tar
    and bsdtar do (SCHILY.xattr), times to the nanosecond.
    """
    stored: dict[Node, str] = {}
    names = guest.walk(top, b"." if top.attributes.is_directory else top.name)
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT, errors="surrogateescape") as archive:
        for path, found in names:
            entry = _entry(guest, path, found)
            if entry is None:
                warn(f"{guest.image}: {os.fsdecode(path)}: is a socket, which archives cannot hold; left out")
                continue
            if found.node in stored:
                entry.type, entry.linkname, entry.size = tarfile.LNKTYPE, stored[found.node], 0
            elif found.attributes.links > 1 and not found.attributes.is_directory:
                stored[found.node] = entry.name
            archive.addfile(entry, _Content(guest, found) if entry.isreg() else None)


def _entry(guest: Guest, path: bytes, found: Found) -> tarfile.TarInfo | None:
    attributes = found.attributes
    kind = _TYPES.get(stat.S_IFMT(attributes.mode))
    if kind is None:
        return None
    entry = tarfile.TarInfo(os.fsdecode(path))
    entry.type = kind
    entry.mode = stat.S_IMODE(attributes.mode)
    entry.uid, entry.gid = attributes.uid, attributes.gid
    seconds, rest = divmod(attributes.mtime_ns, 10**9)
    entry.mtime = seconds
    more = {"mtime": f"{seconds}.{rest:09}"} if rest and seconds >= 0 else {}
    if kind == tarfile.REGTYPE:
        entry.size = attributes.size
    elif kind == tarfile.SYMTYPE:
        entry.linkname = os.fsdecode(guest.tree.stored_target(found.node))
    elif kind in (tarfile.BLKTYPE, tarfile.CHRTYPE):
        entry.devmajor, entry.devminor = os.major(attributes.device), os.minor(attributes.device)
    for name in guest.tree.xattr_names(found.node):
        value = guest.tree.xattr(found.node, name)
        key = f"SCHILY.xattr.{os.fsdecode(name)}"
        more[key] = value.decode("utf-8", "surrogateescape")
    entry.pax_headers = more
    return entry


class _Content(io.RawIOBase):
    """A file's content for tarfile, which reads it from its beginning to its end."""

    def __init__(self, guest: Guest, found: Found) -> None:
        self._pieces: Iterator[tuple[int, memoryview]] = guest.content(found)
        self._rest = memoryview(b"")

    def read(self, size: int = -1) -> bytes:
        if not self._rest:
            self._rest = next(self._pieces, (0, memoryview(b"")))[1]
        taken, self._rest = self._rest[:size], self._rest[size:]
        if len(taken) < size and self._rest.nbytes == 0:
            following = next(self._pieces, None)
            if following is not None:
                self._rest = following[1]
                return taken.tobytes() + self.read(size - len(taken))
        return taken.tobytes()
