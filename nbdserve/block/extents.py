"""Extents: what a device's map() answers about a range of guest bytes.

All lengths and offsets are in bytes. An extent says how the bytes from the asked offset on can be had, for `length` of
them; `depth` says how far down the backing chain they were found (0: in this image itself).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, NewType, TypeAlias

if TYPE_CHECKING:
    from nbdserve.block.file import HostFile

GuestOffset = NewType("GuestOffset", int)
HostOffset = NewType("HostOffset", int)


class Data(NamedTuple):
    """The bytes lie verbatim in a host file."""

    length: int
    file: HostFile
    host_offset: HostOffset
    depth: int = 0


class Zero(NamedTuple):
    """The bytes read as zeros; `allocated` tells whether host space is set aside for them."""

    length: int
    allocated: bool
    depth: int = 0


class Computed(NamedTuple):
    """The bytes must be worked out (compressed, encrypted, remote): ask the device's read_computed()."""

    length: int
    depth: int = 0


Extent: TypeAlias = Data | Zero | Computed
