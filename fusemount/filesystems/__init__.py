"""Guest file systems: a table of adapters, each loaded only when a file system of its kind is opened.

An adapter is a package or module here that offers two functions:

    examine(device) -> Condition                           without changing anything
    open_filesystem(device, *, writable) -> FileSystem     raises nbdserve.errors.OpenError with one line
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

ADAPTERS = {
    "ext2": "fusemount.filesystems.ext",
    "ext3": "fusemount.filesystems.ext",
    "ext4": "fusemount.filesystems.ext",
    "vfat": "fusemount.filesystems.fat",
    "ntfs": "fusemount.filesystems.ntfs",
    "iso9660": "fusemount.filesystems.iso9660",
    "exfat": "fusemount.filesystems.exfat",
    "squashfs": "fusemount.filesystems.squashfs",
}
"""Kind, as blkid names it -> the module that reads it."""


def adapter(kind: str) -> ModuleType | None:
    """The adapter for a kind of file system; None when there is none."""
    name = ADAPTERS.get(kind)
    return import_module(name) if name else None
