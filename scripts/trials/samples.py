"""Sound images with something of everything in them, for others to damage, and where that does the most harm."""

from __future__ import annotations

import errno
import random
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbdserve.block import BlockDevice, MemoryDevice, Window
from nbdserve.errors import OpenError
from nbdserve.formats.vdi.create import create_image as create_vdi
from nbdserve.formats.vdi.header import read_header
from nbdserve.formats.vhdx.create import create_image as create_vhdx
from nbdserve.formats.vmdk.create import Subformat
from nbdserve.formats.vmdk.create import create_image as create_vmdk
from nbdserve.formats.vmdk.stream import write_stream_optimized
from nbdserve.opening import open_image
from nbdserve.partitions import find, read_partitions
from tests.formats import qcow2_images, vhd_images, vhdx_images, vmdk_images
from tests.formats.test_vhdx_log import dirty_image
from tests.formats.usage import use_damaged
from tests.partitions import test_gpt, test_mbr
from tests.reference import qemu_img_create, qemu_io, run

KIB, MIB = 1 << 10, 1 << 20

Places = list[tuple[int, int]]

_REFUSALS = (errno.EIO, errno.EFBIG, errno.ENOSPC)


def _use_image(device: BlockDevice, chosen: random.Random) -> int:
    return use_damaged(device, chosen, allowed=_REFUSALS, lengths=(1, 512, 5000, 100_000))


@dataclass(frozen=True)
class Sample:
    """An image, and what to do to it.

    Attributes:
        image: what is opened.
        format: by which it is opened.
        part: the file that is damaged, which may be the image itself.
        places: ranges (offset, length) of the part that are worth damaging.
        seal: puts right checksums into a damaged part.
        use: uses a damaged image that could be opened, with the errors it may give; returns how many things failed.
    """

    image: Path
    format: str
    part: Path
    places: Places
    seal: Callable[[bytearray, random.Random], None] = lambda content, chosen: None
    use: Callable[[BlockDevice, random.Random], int] = _use_image


def make(kind: str, folder: Path, chosen: random.Random) -> Sample:
    """A sample of one of KINDS in an empty directory."""
    return KINDS[kind](folder, chosen)


def _filled(image: Path, chosen: random.Random, *, step: int, format: str) -> None:
    """Write a little everywhere."""
    with open_image(image, format=format) as device:
        for offset in range(0, device.size - step, step):
            match chosen.randrange(4):
                case 0 | 1:
                    device.write(offset + chosen.randrange(512), chosen.randbytes(chosen.choice((3, 512, step // 2))))
                case 2:
                    device.zero(offset, step)


# qcow2


def _qcow2(folder: Path, chosen: random.Random) -> Sample:
    image, size = folder / "image.qcow2", chosen.choice((256 * KIB, 512 * KIB + 512))
    cluster = chosen.choice((512, 1024, 4096, 16384, 65536))
    options: dict[str, Any] = {"cluster_size": cluster}
    if chosen.random() < 0.2:
        options |= {"compat": "0.10"}
    else:
        options["refcount_bits"] = chosen.choice((1, 4, 16, 16, 64))
        options["lazy_refcounts"] = chosen.choice(("on", "off"))
        options["compression_type"] = chosen.choice(("zlib", "zstd"))
        if cluster >= 16384 and chosen.random() < 0.6:
            options["extended_l2"] = "on"
        if chosen.random() < 0.15:
            options |= {"data_file": folder / "data", "data_file_raw": chosen.choice(("on", "off"))}
    if "data_file" not in options and chosen.random() < 0.5:
        (folder / "base").write_bytes(b"b" * (size - chosen.choice((0, 1000, 70_000))))
        options |= {"backing_file": "base", "backing_fmt": "raw"}
    qemu_img_create(image, size, **options)
    commands = ["write -P 1 0 60k", "write -z 8k 8k", "write -P 5 200k 2k"]
    if "data_file" not in options:
        commands += ["write -c -P 2 64k 64k", "write -c -P 3 128k 64k"]
    qemu_io(image, *commands)
    if options.get("compat") is None and chosen.random() < 0.5:
        run("qemu-img", "bitmap", "--add", "-g", "4096", image, "changes")
    if options.get("refcount_bits", 16) > 4 and "data_file" not in options and chosen.random() < 0.7:
        run("qemu-img", "snapshot", "-c", "before", image)
    qemu_io(image, "write -P 4 20k 8k")
    content = bytearray(image.read_bytes())
    if options.get("compat") is None and chosen.random() < 0.3:
        content[79] |= chosen.choice((1, 1, 2))
        image.write_bytes(content)
    return Sample(image, "qcow2", image, qcow2_images.places(bytes(content)))


# VHD


def _vpc(folder: Path, chosen: random.Random) -> Sample:
    image, size, block = folder / "image.vhd", 32 * 4096, chosen.choice((4096, 8192))
    match chosen.choice(("dynamic", "dynamic", "child", "fixed")):
        case "fixed":
            image.write_bytes(chosen.randbytes(size) + vhd_images.footer(size, disk_type=2))
            return Sample(image, "vpc", image, [(size, 90)], _seal_vhd)
        case "child":
            vhd_images.make_parent(folder / "parent.vhd", b"p" * size, block)
            vhd_images.make_child(image, "parent.vhd", block)
        case _:
            image.write_bytes(vhd_images.dynamic(size, block))
    _filled(image, chosen, step=4096, format="vpc")
    end = image.stat().st_size - 512
    table = (vhd_images.TABLE_OFFSET, 4 * size // block)
    first = vhd_images.TABLE_OFFSET + 512
    places = [(0, 90), (end, 90), (512, 64), (512 + 64, 600), table, table, (first, min(1024, end - first))]
    return Sample(image, "vpc", image, places, _seal_vhd)


def _seal_vhd(content: bytearray, chosen: random.Random) -> None:
    if len(content) < 2048:
        return
    content[512:1536] = vhd_images.seal(bytes(content[512:1536]), 36)
    content[-512:] = vhd_images.seal(bytes(content[-512:]), 64)
    content[:512] = vhd_images.seal(bytes(content[:512]), 64)
    if chosen.random() < 0.6:
        content[-512:] = content[:512]


# VHDX


def _vhdx(folder: Path, chosen: random.Random) -> Sample:
    image = folder / "image.vhdx"
    kind = chosen.choice(("dynamic", "fixed", "child", "log", "log"))
    match kind:
        case "log":
            dirty_image(image, number=chosen.randrange(1, 1 << 40))
        case "child":
            create_vhdx(folder / "parent.vhdx", 4 * MIB, block_size=MIB)
            vhdx_images.make_child(image, "parent.vhdx")
        case _:
            create_vhdx(image, 4 * MIB, subformat=kind, block_size=MIB)
    if kind != "log":
        with open_image(image) as device:
            device.write(100, chosen.randbytes(MIB))
    regions = [(place, 16 + 2 * 32) for place in vhdx_images.REGION_TABLES]
    values = (vhdx_images.METADATA + (64 << 10), 40)
    table = [(vhdx_images.TABLE, 64), (vhdx_images.TABLE + 8 * 4096, 8)]
    places = [(0, 64), *((place, 96) for place in vhdx_images.HEADERS), *regions, values, *table, *table]
    places += [(vhdx_images.METADATA, 32), (vhdx_images.METADATA + 32, 6 * 32)]
    if kind == "log":
        places += [(vhdx_images.LOG, 200), (vhdx_images.LOG + 8192, 200)] * 3
    return Sample(image, "vhdx", image, places, _seal_vhdx)


def _seal_vhdx(content: bytearray, chosen: random.Random) -> None:
    sizes = [(place, 4096) for place in vhdx_images.HEADERS] + [
        (place, 64 << 10) for place in vhdx_images.REGION_TABLES
    ]
    place = vhdx_images.LOG
    while content[place : place + 4] == b"loge" and place < vhdx_images.TABLE:
        length = int.from_bytes(content[place + 8 : place + 12], "little")
        sizes.append((place, min(length, 64 << 10)))
        place += max(4096, min(length, 64 << 10))
    for place, size in sizes:
        if place + size <= len(content):
            content[place : place + size] = vhdx_images.sealed(bytes(content[place : place + size]))


# VDI


def _vdi(folder: Path, chosen: random.Random) -> Sample:
    image, size, block = folder / "image.vdi", 32 * 4096, chosen.choice((4096, 8192))
    parent = None
    if chosen.random() < 0.3:
        create_vdi(folder / "parent.vdi", size, block_size=block)
        with open_image(folder / "parent.vdi") as device:
            device.write(0, b"p" * size)
            parent = read_header(device.file)  # type: ignore[attr-defined]
    create_vdi(image, size, static=parent is None and chosen.random() < 0.3, block_size=block, parent=parent)
    _filled(image, chosen, step=4096, format="vdi")
    table = int.from_bytes(image.read_bytes()[340:344], "little")
    return Sample(image, "vdi", image, [(64, 408), (340, 52), (64, 16), (table, 128), (table, 128)])


# VMDK


def _vmdk(folder: Path, chosen: random.Random) -> Sample:
    image, size = folder / "image.vmdk", 32 * 4096
    kind = chosen.choice(("sparse", "sparse", "split", "child", "stream", "cowd", "sesparse", "flat", "text"))
    grains = {number: chosen.randbytes(4096) for number in chosen.sample(range(16), 6)}
    match kind:
        case "stream":
            write_stream_optimized(MemoryDevice(bytearray(chosen.randbytes(size))), image, workers=1)
        case "cowd" | "sesparse":
            raw = (
                vmdk_images.cowd(16 * 8, grains) if kind == "cowd" else vmdk_images.se_sparse(16 * 8, {**grains, 1: 1})
            )
            (folder / "delta.vmdk").write_bytes(raw)
            extent = f'RW 128 {"VMFSSPARSE" if kind == "cowd" else "SESPARSE"} "delta.vmdk"'
            image.write_text(vmdk_images.descriptor([extent], "vmfsSparse" if kind == "cowd" else "seSparse"))
        case "split":
            create_vmdk(image, size, subformat=Subformat.SPLIT_SPARSE, grain_size=4096)
        case "flat" | "text":
            create_vmdk(image, size, subformat=chosen.choice((Subformat.SPLIT_FLAT, Subformat.MONOLITHIC_FLAT)))
        case "child":
            create_vmdk(folder / "base.vmdk", size, grain_size=4096)
            below = (vmdk_images.cid_of(folder / "base.vmdk"), "base.vmdk")
            create_vmdk(image, size, grain_size=4096, zeroed_grains=chosen.random() < 0.5, parent=below)
        case _:
            create_vmdk(image, size, grain_size=4096, zeroed_grains=chosen.random() < 0.5)
    if kind in ("split", "flat", "text", "child", "sparse"):
        _filled(image, chosen, step=4096, format="vmdk")
    others = [path for path in folder.glob("*.vmdk") if path not in (image, folder / "base.vmdk")]
    part = others[0] if others and kind in ("cowd", "sesparse", "split") else image
    return Sample(image, "vmdk", part, list(_vmdk_places(part.read_bytes())))


def _vmdk_places(content: bytes) -> Iterator[tuple[int, int]]:
    if text := re.search(rb"# Disk DescriptorFile[^\0]*", content):
        yield text.start(), len(text[0])
    if content.startswith(b"KDMV"):
        yield 4, 75
        yield 4, 75
        for field in (vmdk_images.REDUNDANT, vmdk_images.DIRECTORY):
            directory = struct.unpack_from("<Q", content, field)[0] * 512
            if directory + 4 <= len(content):
                yield directory, 8
                yield struct.unpack_from("<I", content, directory)[0] * 512, 128
        if len(content) > 4096:
            yield len(content) - 1536, 1536  # the footer and the markers of a stream
    elif content.startswith(b"COWD"):
        yield from ((4, 40), (2048, 8), (2560, 64))
    elif content.startswith(b"\xbe\xba\xfe\xca"):
        yield from ((0, 208), (512, 32), (4096, 8), (4608, 128), (4608, 128))


# Partition tables, on raw disks


def _partitions(folder: Path, chosen: random.Random) -> Sample:
    image = folder / "disk"
    places: Places = [(446, 66)]
    if chosen.random() < 0.6:
        size = chosen.choice((128, 256))
        entries = b"".join(test_gpt.gpt_entry(40 + 4 * each, 43 + 4 * each, f"n{each}", size) for each in range(8))
        hybrid = test_mbr.record(test_mbr.entry(0xEE, 1, 39), test_mbr.entry(0x83, 40, 10))
        protective = test_mbr.record(test_mbr.entry(0xEE, 1, 199))
        disk = test_gpt.disk_with(entries, size=size, first_sector=chosen.choice((hybrid, protective)))
        places += [(512, 92), (1024, len(entries)), (167 * 512, len(entries)), (199 * 512, 92)]
    else:
        disk = bytearray(200 * 512)
        disk[:512] = test_mbr.record(
            *(test_mbr.entry(*fields) for fields in ((0x83, 1, 5), (5, 10, 180), (0xC, 190, 5)))
        )
        for place in range(10, 180, 10):
            disk[place * 512 : place * 512 + 512] = test_mbr.record(
                test_mbr.entry(0x83, 1, 5), test_mbr.entry(5, place, 10)
            )
            places.append((place * 512 + 446, 66))
    image.write_bytes(disk)
    return Sample(image, "raw", image, places, _seal_gpt, _use_partitions)


def _seal_gpt(content: bytearray, chosen: random.Random) -> None:
    for header in (512, 199 * 512):
        if content[header : header + 8] != b"EFI PART" or header + 512 > len(content):
            continue
        first, count, size = struct.unpack_from("<QII", content, header + 72)
        if chosen.random() < 0.8 and count * size <= 1 << 20:
            entries = content[first * 512 : first * 512 + count * size]
            content[header + 88 : header + 92] = struct.pack("<I", zlib.crc32(entries))
        length = min(512, int.from_bytes(content[header + 12 : header + 16], "little"))
        content[header + 16 : header + 20] = bytes(4)
        crc = zlib.crc32(content[header : header + length])
        content[header + 16 : header + 20] = struct.pack("<I", crc)


def _use_partitions(device: BlockDevice, chosen: random.Random) -> int:
    failures = 0
    try:
        table = read_partitions(device)
    except OpenError:
        return 1
    assert len(table.partitions) < 10_000
    for part in table.partitions:
        try:
            found = find(table, part.number)
        except OpenError:
            failures += 1
            continue
        assert 0 <= found.offset < found.offset + found.size <= device.size
        window = Window(device, found.offset, found.size)
        failures += use_damaged(window, chosen)
    return failures


KINDS: dict[str, Callable[[Path, random.Random], Sample]] = {
    "qcow2": _qcow2,
    "vpc": _vpc,
    "vhdx": _vhdx,
    "vdi": _vdi,
    "vmdk": _vmdk,
    "partitions": _partitions,
}
