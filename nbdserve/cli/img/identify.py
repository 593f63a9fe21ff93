"""nbdimg identify: what a file holds, from the image's format down to what starts a computer from it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nbdserve.cli.common import human_size, policy_of, printable
from nbdserve.cli.img.common import (
    Subparsers,
    add_format,
    add_opening,
    add_output,
    add_verb,
    open_named,
    print_json,
    warn,
)
from nbdserve.cli.img.partition_table import describe_partitions
from nbdserve.cli.img.partitions import shown_filesystem
from nbdserve.errors import NbdserveError, OpenError

if TYPE_CHECKING:
    from fusemount.filesystems.base import FileSystem, Inode
    from nbdserve.block import BlockDevice

EXAMPLES = """\
  nbdimg identify unknown.bin
  nbdimg identify --json disk.vmdk
"""

# Files that are no disks but are often taken for some, by the bytes that they begin with.
_OTHER_FILES = (
    (0, b"\x1f\x8b", "gzip data; unpack it with gunzip"),
    (0, b"\xfd7zXZ\0", "xz data; unpack it with unxz"),
    (0, b"\x28\xb5\x2f\xfd", "Zstandard data; unpack it with unzstd"),
    (0, b"BZh", "bzip2 data; unpack it with bunzip2"),
    (0, b"PK\3\4", "a ZIP archive; unpack it with unzip"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-zip archive; unpack it with 7z x"),
    (257, b"ustar", "a tar archive (or an OVA); unpack it with tar -xf"),
    (0, b"\x7fELF", "an ELF program or library"),
    (0, b"%PDF-", "a PDF document"),
)
_MOST_LOADERS = 64


def add_parser(subparsers: Subparsers) -> None:
    """The verb's command line."""
    description = "Tell what a file holds: format, chain, partitions, file systems, boot loaders."
    parser = add_verb(subparsers, "identify", description, EXAMPLES)
    parser.add_argument("image", metavar="FILE", help="file, block device or NBD URI")
    add_format(parser)
    add_output(parser)
    add_opening(parser)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says."""
    found = _identify(options)
    if options.output == "json":
        print_json(found)
    else:
        print("\n".join(_lines(found)))
    return 0


def _identify(options: argparse.Namespace) -> dict[str, Any]:
    from nbdserve.imagetools.describing import describe

    image = options.image
    chain, broken = [], ""
    arguments: dict[str, Any] = {
        "format": options.format,
        "force_share": options.force_share,
        "policy": policy_of(options),
    }
    try:
        chain = describe(image, **arguments, whole_chain=True)
    except OpenError as error:
        chain, broken = describe(image, **arguments), str(error)
    found: dict[str, Any] = {"filename": image, "chain": chain}
    if broken:
        return found | {"broken": broken}
    top = chain[0]
    with open_named(options, image, format=None if top["format"] == "nbd" else top["format"]) as device:
        if top["format"] == "raw":
            start = bytes(device.read(0, min(512, device.size)))
            other = next((what for at, magic, what in _OTHER_FILES if start[at:].startswith(magic)), None)
            if other is not None:
                return found | {"other": other}
        try:
            found["disk"] = describe_partitions(image, top["format"], device, lambda line: warn(f"{image}: {line}"))
            found["boot"] = _boot(device)
        except NbdserveError as error:
            found["broken"] = str(error)
    return found


def _boot(device: BlockDevice) -> dict[str, Any]:
    """What could start a computer from the disk."""
    from fusemount.volumes import read_volumes
    from nbdserve.imagetools.bootcode import master_boot_code, partition_boot_code, starts_as_cd

    _, volumes = read_volumes(device, lambda line: None)
    whole = len(volumes) == 1 and volumes[0].partition is None
    sectors = {each.name: partition_boot_code(each.device) for each in volumes if each.partition is not None}
    loaders: list[str] = []
    for each in volumes:
        if each.kind == "vfat" and len(loaders) < _MOST_LOADERS:
            loaders += (f"{each.name}:/{path}" for path in _efi_loaders(each))
    return {
        "mbr": partition_boot_code(device) if whole else master_boot_code(device),
        "partitions": {name: code for name, code in sectors.items() if code},
        "efi": loaders[:_MOST_LOADERS],
        "cd": starts_as_cd(device),
    }


def _efi_loaders(volume: Any) -> Iterator[str]:
    """The programs that UEFI firmware could start: /EFI/*/*.efi."""
    from fusemount.volumes import open_volume

    try:
        fs = open_volume(volume, writable=False).fs
    except (NbdserveError, OSError):
        return
    try:
        for top, directory in _children(fs, fs.root):
            if top.lower() != "efi":
                continue
            for vendor, inner in _children(fs, directory):
                for name, _ in _children(fs, inner):
                    if name.lower().endswith(".efi"):
                        yield f"{top}/{vendor}/{name}"
    except OSError:
        return
    finally:
        fs.close()


def _children(fs: FileSystem, directory: Inode) -> list[tuple[str, Inode]]:
    if not fs.attributes(directory).is_directory:
        return []
    names = [entry.name for _, entry in zip(range(1000), fs.entries(directory), strict=False)]
    return [(name.decode("utf-8", "backslashreplace"), fs.lookup(directory, name)) for name in names]


def _lines(found: dict[str, Any]) -> Iterator[str]:
    for depth, info in enumerate(found["chain"]):
        prefix = found["filename"] if not depth else f"{'  ' * depth}on {info['filename']}"
        yield f"{prefix}: {', '.join(_image_words(info))}"
    if "broken" in found:
        yield f"  damaged: {found['broken']}"
    if "other" in found:
        yield f"  no disk, but {found['other']}"
    if "disk" in found:
        yield from _disk_lines(found["disk"], found["boot"])


def _image_words(info: dict[str, Any]) -> Iterator[str]:
    data = info.get("format-specific", {}).get("data", {})
    kind = data.get("create-type") or (
        f"version {'2' if data['compat'] == '0.10' else '3'}" if "compat" in data else ""
    )
    yield f"{info['format']} {kind}".strip()
    yield f"virtual size {human_size(info['virtual-size'])} ({info['virtual-size']} bytes)"
    if "actual-size" in info:
        yield f"{human_size(info['actual-size'])} on the host"
    if info.get("encrypted"):
        yield "encrypted"
    if info["dirty-flag"]:
        yield "not closed properly"
    if info.get("snapshots"):
        yield f"{len(info['snapshots'])} internal snapshots"
    if "backing-filename" in info:
        yield f"an overlay of {info['backing-filename']}"


def _disk_lines(disk: dict[str, Any], boot: dict[str, Any]) -> Iterator[str]:
    if disk["partition-table"] == "none":
        yield f"  no partition table; file system: {shown_filesystem(disk.get('filesystem'))}"
    else:
        count = len(disk["partitions"])
        yield f"  partition table: {disk['partition-table'].upper()} with {count} partition{'s' * (count != 1)}"
    for part in disk["partitions"]:
        label = f' "{printable(part["label"])}"' if part["label"] else ""
        code = boot["partitions"].get(f"p{part['number']}")
        yield (
            f"    {part['number']}{' *' if part['bootable'] else ''}: {human_size(part['size'])} at {part['offset']}, "
            f"{part['type-name'] or part['type']}{label}, {shown_filesystem(part['filesystem'])}"
            + (f", boot sector: {code}" if code else "")
        )
    yield f"  boot code: {boot['mbr'] or 'none'}"
    if boot["cd"]:
        yield "  starts as a CD (El Torito)"
    for path in boot["efi"]:
        yield f"  EFI: {printable(path)}"
