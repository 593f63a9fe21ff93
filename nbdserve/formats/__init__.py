"""How image formats map guest bytes: one module a format, and the table that names them.

    base     reading, writing and backing chains, once for all
    raw      the identity
    qcow2    QEMU's copy-on-write format, versions 2 and 3
    vpc      Virtual PC's and Hyper-V's VHD: fixed, dynamic and differencing
    vhdx     Hyper-V's VHDX: fixed, dynamic and differencing
    vdi      VirtualBox's disk images: dynamic, static and differencing
    vmdk     VMware's disks: sparse, flat, split and stream-optimized
    luks     LUKS, encrypted disks, versions 1 and 2
    entries  entries of tables, written back in rows
    record   headers and the like, described field by field
    newfile  files that appear under their names only when they are complete

A format never opens another file by itself: references go through the `open_reference` and `open_file` it is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, TypeAlias

from nbdserve.block.device import BlockDevice
from nbdserve.block.file import HostFile
from nbdserve.errors import OpenError


class OpenReference(Protocol):
    """Opens, read-only, a file that an image names; the policy on what may be opened is its own business."""

    def __call__(self, name: str, format: str | None) -> BlockDevice:
        """Open `name` as the image wrote it; `format` is what the image says of it, None when it says nothing."""
        ...


class OpenFile(Protocol):
    """Opens a file that is a part of an image, as it is; the same policy as for OpenReference applies."""

    def __call__(self, name: str, *, writable: bool) -> HostFile:
        """Open `name` as the image wrote it."""
        ...


GetPassphrase: TypeAlias = Callable[[], bytes]
"""Tells the passphrase of encrypted images; called only where one is needed, so that it may ask a person."""


def no_files(name: str, *, writable: bool) -> HostFile:
    """The OpenFile of images that stand on their own."""
    raise OpenError(f"{name}: files that belong to an image cannot be opened here")


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """How to open one image file.

    Attributes:
        read_only: never write to the file.
        open_reference: for backing files.
        snapshot: name or ID of an internal snapshot to show instead of the present state, or None.
        looks_like: for raw images whose format was guessed: the probe that their first and last sectors must never
            satisfy.
        open_file: for the other files that an image consists of.
        warn: told, in one line, of what the user should know.
        passphrase: for an encrypted image; None if the user has given none.
    """

    read_only: bool
    open_reference: OpenReference
    snapshot: str | None = None
    looks_like: Callable[[bytes, bytes], str | None] | None = None
    open_file: OpenFile = no_files
    warn: Callable[[str], None] = lambda line: None
    passphrase: GetPassphrase | None = None


def _open_raw(file: HostFile, options: OpenOptions) -> BlockDevice:
    from nbdserve.formats.raw import RawImage

    if options.snapshot is not None:
        raise OpenError(f"{file.name}: raw images have no internal snapshots; leave --snapshot out")
    return RawImage(file, read_only=options.read_only, looks_like=options.looks_like)


def _opener(module: str) -> Callable[[HostFile, OpenOptions], BlockDevice]:
    """The module's open_image(), imported only when an image of its format is opened."""

    def open_image(file: HostFile, options: OpenOptions) -> BlockDevice:
        device: BlockDevice = import_module(module).open_image(file, options)
        return device

    return open_image


FORMATS: dict[str, Callable[[HostFile, OpenOptions], BlockDevice]] = {
    "raw": _open_raw,
    "qcow2": _opener("nbdserve.formats.qcow2"),
    "vpc": _opener("nbdserve.formats.vpc"),
    "vhdx": _opener("nbdserve.formats.vhdx"),
    "vdi": _opener("nbdserve.formats.vdi"),
    "vmdk": _opener("nbdserve.formats.vmdk"),
    "luks": _opener("nbdserve.formats.luks"),
}

ALIASES = {"vhd": "vpc", "img": "raw"}

# A VMDK descriptor is text whose first line that is neither empty nor a comment says the version.
_VMDK_DESCRIPTOR = rb"(?:#[^\n]*\n|[ \t]*\r?\n)*version *= *[0-9]"


def probe_start(start: bytes) -> str | None:
    """The format that an image's first 512 bytes announce, of all that QEMU would recognise; None: raw or fixed VHD."""
    signatures = (
        (b"QFI\xfb\x00\x00\x00\x02", "qcow2"),
        (b"QFI\xfb\x00\x00\x00\x03", "qcow2"),
        (b"QFI\xfb", "qcow"),
        (b"QED\x00", "qed"),
        (b"conectix", "vpc"),
        (b"vhdxfile", "vhdx"),
        (b"KDMV", "vmdk"),
        (b"COWD", "vmdk"),
        (b"# Disk DescriptorFile", "vmdk"),
        (b"LUKS\xba\xbe", "luks"),
        (b"WithoutFreeSpace", "parallels"),
        (b"WithouFreSpacExt", "parallels"),
        (b"#!/bin/sh\n#V2.0 Format\n", "cloop"),
    )
    for signature, name in signatures:
        if start.startswith(signature):
            return name
    if start[64:68] == b"\x7f\x10\xda\xbe":
        return "vdi"
    return "vmdk" if re.match(_VMDK_DESCRIPTOR, start) else None


def probe_sectors(first: bytes, last: bytes) -> str | None:
    """The format that the first and the last 512 bytes of a file announce, or None."""
    announced = probe_start(first)
    if announced is None and last.startswith(b"conectix"):
        from nbdserve.formats.vpc import is_footer

        return "vpc" if is_footer(last) else None  # a fixed VHD has nothing but a footer
    return announced


def probe(file: HostFile) -> str:
    """The format a file announces; "raw" when it announces none."""
    return probe_sectors(bytes(file.read(0, 512)), bytes(file.read(max(0, file.size - 512), 512))) or "raw"
