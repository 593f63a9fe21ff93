"""Looking into a guest: which file system is its root, and where its fstab mounts the others (fstab(5))."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable
from dataclasses import dataclass

from fusemount.filesystems.base import FileSystem, Inode
from fusemount.links import followed
from fusemount.vfs import ROOT, Node, Tree
from fusemount.volumes import Opened, Volume, Warn
from nbdserve.errors import OpenError

_LONGEST_FSTAB = 1 << 20
_MOST_MOUNTS = 256
_ESCAPE = re.compile(r"\\([0-7]{3})")
_DISK_NAME = re.compile(r"/dev/(?:(?:sd|vd|hd|xvd)[a-z](\d+)|(?:nvme\d+n\d+|mmcblk\d+|vd[a-z]|loop\d+)p(\d+))")
_WHOLE_DISK = re.compile(r"/dev/(?:(?:sd|vd|hd|xvd)[a-z]|nvme\d+n\d+|mmcblk\d+)")
_BY = {"by-uuid": "UUID", "by-label": "LABEL", "by-partuuid": "PARTUUID", "by-partlabel": "PARTLABEL"}

Open = Callable[[Volume], Opened]


def looks_like_root(fs: FileSystem) -> bool:
    """Whether an operating system starts from this file system: Linux and its kin, or Windows."""
    if _has(fs, b"etc/fstab") or (_has(fs, b"etc/os-release") and _has(fs, b"usr")):
        return _has(fs, b"bin") or _has(fs, b"usr")
    return _has(fs, b"Windows/System32/config") or _has(fs, b"windows/system32/config")


def _has(fs: FileSystem, path: bytes) -> bool:
    inode = fs.root
    given: list[Inode] = []
    try:
        for name in path.split(b"/"):
            inode = fs.lookup(inode, name)
            given.append(inode)
    except OSError:
        return False
    finally:
        for each in given:
            fs.forget(each)
    return True


@dataclass(frozen=True, slots=True)
class Line:
    """One file system in an fstab: what is to be mounted, and where."""

    source: str
    place: bytes


def read_fstab(text: bytes) -> list[Line]:
    """The lines that mount something at a path below `/`, what is nearer to the root first."""
    lines = []
    for each in text.decode("utf-8", "surrogateescape").splitlines():
        fields = [_ESCAPE.sub(lambda found: chr(int(found[1], 8)), field) for field in each.split()]
        if len(fields) >= 2 and not fields[0].startswith("#") and fields[1].startswith("/") and fields[1].strip("/"):
            lines.append(Line(fields[0].replace('"', ""), fields[1].encode("utf-8", "surrogateescape")))
    return sorted(lines[:_MOST_MOUNTS], key=lambda line: line.place.count(b"/"))


def is_disk(source: str) -> bool:
    """Whether a source in fstab means a disk of the guest's, rather than a network share or a pseudo file system."""
    return source.startswith("/dev/") or source.partition("=")[0] in (*_BY.values(), "ID")


def find_volume(volumes: list[Volume], source: str) -> Volume | None:
    """The volume that a source in fstab means. Names of disks are taken to mean this one, whatever its letter."""
    if source.startswith("/dev/disk/"):
        by, _, value = source.removeprefix("/dev/disk/").partition("/")
        source = f"{_BY.get(by, by)}={value}"
    key, _, value = source.partition("=")
    for each in volumes:
        part, signature = each.partition, each.signature
        matches = {
            "UUID": signature and signature.uuid.lower() == value.lower(),
            "LABEL": signature and signature.label == value,
            "PARTUUID": part and part.uuid == value.lower(),
            "PARTLABEL": part and part.label == value,
        }
        if value and matches.get(key):
            return each
        named = _DISK_NAME.fullmatch(source)
        if named and part and part.number == int(named[1] or named[2]):
            return each
        if _WHOLE_DISK.fullmatch(source) and part is None:
            return each
    return None


def mount_fstab(tree: Tree, root: Volume, volumes: list[Volume], open_volume: Open, warn: Warn) -> None:
    """Mount in the tree, whose root is the guest's, what its fstab says; what cannot be is told and left out."""
    mounted = {root.name}
    for line in read_fstab(_content(tree, [b"etc", b"fstab"])):
        place = line.place.decode("utf-8", "backslashreplace")
        volume = find_volume(volumes, line.source)
        if volume is None:
            if is_disk(line.source) and place != "/":
                warn(f"fstab: {line.source}, for {place}, is not on this disk")
            continue
        if volume.name in mounted:
            continue
        if volume.kind == "swap":
            continue
        where = _directory(tree, line.place)
        if where is None:
            warn(f"fstab: {place}: there is no such directory in the guest; {volume.name} is left out")
            continue
        try:
            opened = open_volume(volume)
        except OpenError as error:
            warn(f"fstab: {place}: {error}")
            continue
        tree.mount(*where, opened.fs, opened.hasty)
        mounted.add(volume.name)


def _walk(tree: Tree, path: list[bytes]) -> tuple[Node, Node] | None:
    """The directory that holds the file at a path of the guest, and the file; links on the way are followed."""
    parent = node = ROOT
    for name in followed(tree, [ROOT], path, absolute=True)[1]:
        found = tree.peek(node, name)
        if found is None:
            return None
        parent, node = node, found[0]
    return parent, node


def _directory(tree: Tree, place: bytes) -> tuple[Node, Node] | None:
    try:
        found = _walk(tree, [name for name in place.split(b"/") if name not in (b"", b".")])
        return found if found and found[1] != ROOT and tree.attributes(found[1]).is_directory else None
    except OSError:
        return None


def _content(tree: Tree, path: list[bytes]) -> bytes:
    try:
        found = _walk(tree, path)
        if found is None or not stat.S_ISREG(tree.attributes(found[1]).mode):
            return b""
        return bytes(tree.read(found[1], 0, _LONGEST_FSTAB))
    except OSError:
        return b""
