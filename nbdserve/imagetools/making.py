"""What new images of every format can be like, and how they are made."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

from nbdserve.block import BlockDevice
from nbdserve.errors import OpenError
from nbdserve.formats import ALIASES, FORMATS, GetPassphrase
from nbdserve.opening import known_format

Values: TypeAlias = Mapping[str, int | bool | str]
"""Options of a format with their values, as OPTIONS says of what type they are."""


class Kind(Enum):
    """What the value of an option is."""

    SIZE = "size"
    NUMBER = "number"
    SWITCH = "on|off"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a format.

    Attributes:
        choices: what a text may be; empty if anything.
    """

    kind: Kind
    help: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Backing:
    """What a new image is to stand on.

    Attributes:
        name: as the image is to find it.
        format: a name of formats.FORMATS; None if it is not to be recorded.
        device: the image itself, open; None if nobody is to look at it now.
    """

    name: str
    format: str | None
    device: BlockDevice | None


def _choice(help: str, *choices: str) -> Option:
    return Option(Kind.TEXT, help, choices)


_SIZE = {"size": Option(Kind.SIZE, "length of the disk")}
_BACKING = {
    "backing_file": Option(Kind.TEXT, "name of the image to stand on"),
    "backing_fmt": Option(Kind.TEXT, "its format"),
}

_PASSPHRASE = "passphrase"  # among the values handed to a maker, where no user's option has this name
_ITER_TIME = Option(Kind.NUMBER, "milliseconds to try a passphrase; default: 2000")

OPTIONS: dict[str, dict[str, Option]] = {
    "raw": {
        **_SIZE,
        "preallocation": _choice("falloc: set host space aside; full: write zeros as well", "off", "falloc", "full"),
    },
    "qcow2": {
        **_SIZE,
        **_BACKING,
        "cluster_size": Option(Kind.SIZE, "512 to 2M; default: 64k"),
        "compat": _choice("version of the format; default: 1.1", "0.10", "1.1", "v2", "v3"),
        "compression_type": _choice("how clusters are compressed; default: zlib", "zlib", "zstd"),
        "encrypt.format": _choice("encrypt the guest's data, with --passphrase-file", "luks"),
        "encrypt.iter-time": _ITER_TIME,
        "data_file": Option(Kind.TEXT, "name of a file to hold the guest's data"),
        "data_file_raw": Option(Kind.SWITCH, "let the data file by itself show the disk"),
        "extended_l2": Option(Kind.SWITCH, "allocate in 32nds of a cluster"),
        "lazy_refcounts": Option(Kind.SWITCH, "let QEMU put off writing refcounts"),
        "preallocation": _choice("give every cluster a place", "off", "metadata", "falloc", "full"),
        "refcount_bits": Option(Kind.NUMBER, "1 to 64; default: 16"),
    },
    "vpc": {
        **_SIZE,
        "subformat": _choice("default: dynamic", "dynamic", "fixed"),
        "force_size": Option(Kind.SWITCH, "exactly the given length, not rounded to a geometry"),
        "block_size": Option(Kind.SIZE, "default: 2M; others are unknown to QEMU"),
    },
    "vhdx": {
        **_SIZE,
        "subformat": _choice("default: dynamic", "dynamic", "fixed"),
        "block_size": Option(Kind.SIZE, "1M to 256M; default: by length of the disk"),
        "log_size": Option(Kind.SIZE, "default: 1M"),
    },
    "vdi": {
        **_SIZE,
        "static": Option(Kind.SWITCH, "give every block a place"),
        "block_size": Option(Kind.SIZE, "default: 1M; others are unknown to QEMU"),
    },
    "vmdk": {
        **_SIZE,
        **_BACKING,
        "adapter_type": _choice("default: ide", "ide", "lsilogic", "buslogic", "legacyESX"),
        "compat6": Option(Kind.SWITCH, "hardware version 6"),
        "hwversion": Option(Kind.NUMBER, "hardware version; default: 4"),
        "subformat": _choice(
            "default: monolithicSparse",
            "monolithicSparse",
            "monolithicFlat",
            "twoGbMaxExtentSparse",
            "twoGbMaxExtentFlat",
            "streamOptimized",
        ),
        "zeroed_grain": Option(Kind.SWITCH, "allow grains to be marked as zeros"),
    },
    "luks": {**_SIZE, "iter-time": _ITER_TIME},
}


def format_for(path: str | None, name: str | None) -> str:
    """The format of a new image: what the user says or, failing that, what the file's name says, or raw.

    Raises:
        OpenError: there is no such format.
    """
    if name is not None:
        return known_format(name)
    suffix = (path or "").rpartition(".")[2].lower()
    suffix = ALIASES.get(suffix, suffix)
    return suffix if suffix in FORMATS else "raw"


def make_image(
    path: str,
    format: str,
    size: int,
    values: Values,
    backing: Backing | None = None,
    *,
    durable: bool = True,
    passphrase: GetPassphrase | None = None,
) -> None:
    """Make an image that does not exist yet.

    Args:
        format: a name of formats.FORMATS.
        size: of the disk, in bytes.
        values: options of that format; size and the backing file are not taken from there.
        durable: bring it to stable storage; False where the caller sees to that.
        passphrase: for an image that is to be encrypted.

    Raises:
        OpenError: such an image cannot be, with the reason in one line.
        OSError: from the host.
    """
    if backing is not None and format in ("raw", "luks"):
        raise OpenError(f"{path}: a {format} image cannot stand on another one; take qcow2")
    _MAKERS[format](path, size, {**values, _PASSPHRASE: passphrase}, backing, durable)


def _raw(path: str, size: int, values: dict[str, Any], _: Backing | None, durable: bool) -> None:
    from nbdserve.formats.newfile import new_file

    with new_file(path, durable=durable) as file:
        file.truncate(size)
        match values.get("preallocation", "off"):
            case "falloc" if size:
                os.posix_fallocate(file.fileno(), 0, size)
            case "full":
                piece = bytes(1 << 20)
                for start in range(0, size, len(piece)):
                    file.write(memoryview(piece)[: size - start])


def _luks(path: str, size: int, values: dict[str, Any], _: Backing | None, __: bool) -> None:
    from nbdserve.formats.luks.create import create_image

    create_image(path, size, values[_PASSPHRASE], milliseconds=values.get("iter-time", 2000))


def _qcow2(path: str, size: int, values: dict[str, Any], backing: Backing | None, durable: bool) -> None:
    from nbdserve.formats.qcow2.create import CreateOptions, create_image
    from nbdserve.formats.qcow2.header import CompressionType

    luks_header = None
    if "encrypt.format" in values:
        from nbdserve.formats.luks.create import build_header

        luks_header = build_header(values[_PASSPHRASE], milliseconds=values.get("encrypt.iter-time", 2000))
    chosen = CreateOptions(
        cluster_size=values.get("cluster_size", 65536),
        version=2 if values.get("compat") in ("0.10", "v2") else 3,
        refcount_bits=values.get("refcount_bits", 16),
        lazy_refcounts=values.get("lazy_refcounts", False),
        extended_l2=values.get("extended_l2", False),
        compression=CompressionType[values.get("compression_type", "zlib").upper()],
        preallocation=values.get("preallocation", "off"),
        backing=None if backing is None else backing.name,
        backing_format=None if backing is None else backing.format,
        data_file=values.get("data_file"),
        data_file_raw=values.get("data_file_raw", False),
        luks_header=luks_header,
    )
    create_image(path, size, chosen, durable=durable)


def _vpc(path: str, size: int, values: dict[str, Any], backing: Backing | None, _: bool) -> None:
    from nbdserve.formats.vpc.create import create_image
    from nbdserve.formats.vpc.dynamic import DynamicDisk
    from nbdserve.formats.vpc.fixed import FixedDisk

    chosen: dict[str, Any] = {"subformat": values.get("subformat", "dynamic")}
    if backing is not None:
        device = _parent(path, backing, FixedDisk | DynamicDisk, "VHD")
        chosen = {"subformat": "differencing", "parent": backing.name, "parent_footer": device.footer}
    create_image(
        path, size, force_size=values.get("force_size", False), block_size=values.get("block_size", 2 << 20), **chosen
    )


def _vhdx(path: str, size: int, values: dict[str, Any], backing: Backing | None, _: bool) -> None:
    from nbdserve.formats.vhdx.create import create_image
    from nbdserve.formats.vhdx.image import VhdxImage

    chosen: dict[str, Any] = {"subformat": values.get("subformat", "dynamic")}
    if backing is not None:
        device = _parent(path, backing, VhdxImage, "VHDX")
        chosen = {"subformat": "differencing", "parent": backing.name, "parent_guid": device.data_write_guid}
    create_image(
        path, size, block_size=values.get("block_size") or None, log_size=values.get("log_size", 1 << 20), **chosen
    )


def _vdi(path: str, size: int, values: dict[str, Any], backing: Backing | None, _: bool) -> None:
    from nbdserve.formats.vdi.create import create_image
    from nbdserve.formats.vdi.header import read_header
    from nbdserve.formats.vdi.image import VdiImage

    static, block_size = values.get("static", False), values.get("block_size", 1 << 20)
    if not 4096 <= block_size <= 1 << 30 or block_size & block_size - 1:
        raise OpenError(f"{path}: blocks of {block_size} bytes do not exist in a VDI; choose a power of two from 4k")
    parent = None
    if backing is not None:
        if static or os.path.dirname(backing.name):
            raise OpenError(f"{path}: a VDI that stands on another must be dynamic, and lie in the same directory")
        parent = read_header(_parent(path, backing, VdiImage, "VDI").file)
    create_image(path, size, static=static, block_size=block_size, parent=parent)


def _vmdk(path: str, size: int, values: dict[str, Any], backing: Backing | None, _: bool) -> None:
    from nbdserve.formats.vmdk.create import Subformat, create_image
    from nbdserve.formats.vmdk.disk import VmdkDisk

    name = values.get("subformat", Subformat.MONOLITHIC_SPARSE)
    if name not in tuple(Subformat):
        raise OpenError(f"{path}: a {name} disk is written once and as a whole; use convert")
    subformat, zeroed = Subformat(name), values.get("zeroed_grain", False)
    if subformat.is_flat and (backing is not None or zeroed):
        raise OpenError(f"{path}: a flat disk has neither a backing file nor grains; take a sparse subformat")
    create_image(
        path,
        size,
        subformat=subformat,
        zeroed_grains=zeroed,
        parent=None if backing is None else (_parent(path, backing, VmdkDisk, "VMDK").cid, backing.name),
        adapter_type=values.get("adapter_type", "ide"),
        hardware_version=6 if values.get("compat6") else values.get("hwversion", 4),
    )


def _parent(path: str, backing: Backing, kind: Any, called: str) -> Any:
    """The open parent of a new image, which has to be of the same format."""
    if backing.device is None:
        raise OpenError(f"{path}: the file it is to stand on has to be looked at; leave -u out")
    if not isinstance(backing.device, kind):
        raise OpenError(f"{path}: a {called} can stand only on a {called}, which {backing.name} is not; take qcow2")
    return backing.device


_MAKERS: dict[str, Callable[[str, int, dict[str, Any], Backing | None, bool], None]] = {
    "raw": _raw,
    "qcow2": _qcow2,
    "vpc": _vpc,
    "vhdx": _vhdx,
    "vdi": _vdi,
    "vmdk": _vmdk,
    "luks": _luks,
}
