"""What an image says of itself, in the words of qemu-img's JSON (QEMU, qapi/block-core.json, "ImageInfo")."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from nbdserve.block import HostFile
from nbdserve.errors import OpenError
from nbdserve.opening import ImageFile, ReferencePolicy, is_remote, look_into, open_image

Json = dict[str, Any]


@dataclass(slots=True)
class Facts:
    """What is known of one image file.

    Attributes:
        size: of the disk, in bytes.
        cluster_size: bytes; None where the format has none.
        backing: the name and the format, if that is recorded, of the file it stands on.
        files: the others whose space counts as the image's; QEMU counts no external data file.
        specific: what only this format has to say, in QEMU's words.
        more: further fields of ImageInfo.
    """

    size: int
    cluster_size: int | None = None
    backing: tuple[str, str | None] | None = None
    files: list[HostFile] = field(default_factory=list)
    specific: Json | None = None
    more: Json = field(default_factory=dict)


def describe(
    path: str,
    *,
    format: str | None = None,
    force_share: bool = False,
    policy: ReferencePolicy | None = None,
    whole_chain: bool = False,
) -> list[Json]:
    """ImageInfo of an image and, if that is wanted, of all that it stands on.

    Raises:
        OpenError: with the reason in one line.
    """
    if is_remote(path):
        with open_image(path, format=format, read_only=True) as device:
            return [{"filename": path, "format": "raw", "virtual-size": device.size, "dirty-flag": False}]
    found: list[Json] = []
    with ExitStack() as opened:
        image = opened.enter_context(look_into(path, format=format, force_share=force_share, policy=policy))
        for link, facts in chain_of(image, opened):
            found.append(_as_json(link, facts))
            if not whole_chain:
                break
    return found


def chain_of(image: ImageFile, opened: ExitStack) -> Iterator[tuple[ImageFile, Facts]]:
    """An image and, one after the other, those that it stands on; `opened` closes them."""
    while True:
        facts = read_facts(image)
        for file in facts.files:
            opened.callback(file.close)
        yield image, facts
        if facts.backing is None:
            return
        image = opened.enter_context(image.look_below(*facts.backing))


def read_facts(image: ImageFile) -> Facts:
    """What one image file says.

    Raises:
        OpenError: it is damaged, or of a kind that is not handled.
    """
    return _READERS[image.format](image)


def _as_json(image: ImageFile, facts: Facts) -> Json:
    name = image.file.name
    info: Json = {
        "virtual-size": facts.size,
        "filename": name,
        "format": image.format,
        "actual-size": sum(os.fstat(file.fd).st_blocks * 512 for file in (image.file, *facts.files)),
        "dirty-flag": False,
    }
    if facts.cluster_size is not None:
        info["cluster-size"] = facts.cluster_size
    if facts.backing is not None:
        backing, format = facts.backing
        info |= {"backing-filename": backing, "full-backing-filename": os.path.join(os.path.dirname(name), backing)}
        if format is not None:
            info["backing-filename-format"] = format
    if facts.specific is not None:
        info["format-specific"] = {"type": image.format, "data": facts.specific}
    return info | facts.more


def _raw(image: ImageFile) -> Facts:
    return Facts(image.file.size)


def _qcow2(image: ImageFile) -> Facts:
    from nbdserve.formats.luks.header import Area
    from nbdserve.formats.qcow2.header import LAZY_REFCOUNTS, Encryption, Header, Incompatible

    header = Header.read(image.file)
    specific: Json = {
        "compat": "0.10" if header.version == 2 else "1.1",
        "compression-type": header.compression.name.lower(),
        "refcount-bits": header.refcount_width,
    }
    if header.version >= 3:
        specific |= {
            "lazy-refcounts": bool(header.compatible & LAZY_REFCOUNTS),
            "corrupt": bool(header.incompatible & Incompatible.CORRUPT),
            "extended-l2": bool(header.incompatible & Incompatible.EXTENDED_L2),
        }
    if header.data_name is not None:
        specific |= {"data-file": header.data_name, "data-file-raw": header.has_raw_data_file}
    if bitmaps := _bitmaps(image.file, header):
        specific["bitmaps"] = bitmaps
    more: Json = {"dirty-flag": bool(header.incompatible & Incompatible.DIRTY)}
    if header.encryption != Encryption.NONE:
        more["encrypted"] = True
        specific["encrypt"] = {"format": header.encryption.name.lower()}
        if header.encryption_place is not None:
            specific["encrypt"] |= _luks1(Area(image.file, *header.encryption_place))
    if snapshots := _snapshots(image.file, header):
        more["snapshots"] = snapshots
    return Facts(
        header.size,
        header.geometry.cluster_size,
        None if header.backing_name is None else (header.backing_name, header.backing_format),
        specific=specific,
        more=more,
    )


def _bitmaps(file: HostFile, header: Any) -> list[Json]:
    from nbdserve.formats.qcow2.bitmaps import Flags, read_bitmaps

    words = ((Flags.IN_USE, "in-use"), (Flags.AUTO, "auto"))
    return [
        {
            "name": bitmap.name,
            "granularity": 1 << bitmap.granularity_bits,
            "flags": [word for flag, word in words if bitmap.flags & flag],
        }
        for bitmap in read_bitmaps(file, header)
    ]


def _snapshots(file: HostFile, header: Any) -> list[Json]:
    from nbdserve.formats.qcow2.snapshot_table import read_snapshots

    found = []
    for one in read_snapshots(file, header)[0]:
        entry = {
            "id": one.id,
            "name": one.name,
            "vm-state-size": one.vm_state_size,
            "date-sec": one.seconds,
            "date-nsec": one.nanoseconds,
            "vm-clock-sec": one.guest_nanoseconds // 10**9,
            "vm-clock-nsec": one.guest_nanoseconds % 10**9,
        }
        count = int.from_bytes(one.unknown[:8], "big") if len(one.unknown) >= 8 else None
        if count is not None and count != (1 << 64) - 1:
            entry["icount"] = count
        found.append(entry)
    return found


def _vpc(image: ImageFile) -> Facts:
    from nbdserve.formats.vpc.header import DiskType, Layout
    from nbdserve.formats.vpc.opening import find_footer
    from nbdserve.formats.vpc.parent import Parent

    file = image.file
    footer, end = find_footer(file)
    if footer.disk_type == DiskType.FIXED:
        return Facts(footer.size)
    facts = Facts(footer.size, Layout.read(file, footer, end).block_size)
    if footer.disk_type == DiskType.DIFFERENCING:
        names = Parent.read(file, footer, end).names
        facts.backing = (_first_there(image, names), "vpc")
    return facts


def _vhdx(image: ImageFile) -> Facts:
    from nbdserve.formats.vhdx.headers import Headers
    from nbdserve.formats.vhdx.layout import read_layout
    from nbdserve.formats.vhdx.log import ReplayedFile, read_log
    from nbdserve.formats.vhdx.parent import ParentLocator

    header = Headers(image.file).current
    wanted = read_log(image.file, header)
    layout = read_layout(image.file if wanted is None else ReplayedFile(image.file, wanted), header)
    facts = Facts(layout.size, layout.block_size, more={"dirty-flag": False})
    if layout.parent_locator is not None:
        names = ParentLocator.parse(layout.parent_locator, image.file.name).names
        facts.backing = (_first_there(image, names), "vhdx")
    return facts


def _first_there(image: ImageFile, names: list[str]) -> str:
    """The first of the names under which a parent may be found that exists; the first of all if none does."""
    if not names:
        raise OpenError(f"{image.file.name}: names no parent disk that could be looked for; the image is damaged")
    home = os.path.dirname(image.file.name)
    return next((name for name in names if os.path.exists(os.path.join(home, name))), names[0])


def _vdi(image: ImageFile) -> Facts:
    from nbdserve.formats.vdi.header import ImageType, read_header
    from nbdserve.formats.vdi.parent import find_parent

    header = read_header(image.file)
    facts = Facts(header.size, header.block_size)
    if header.image_type == ImageType.DIFFERENCING:
        facts.backing = (find_parent(image.file, header, image.options), "vdi")
    return facts


def _vmdk(image: ImageFile) -> Facts:
    from nbdserve.formats.vmdk.opening import read_disk

    disk = read_disk(image.file, image.options)
    descriptor = disk.descriptor
    cluster_sizes = [extent.grain_size for extent in disk.extents if extent.grain_size]
    specific: Json = {
        "cid": descriptor.cid,
        "parent-cid": descriptor.parent_cid,
        "create-type": descriptor.create_type,
        "extents": [
            {"virtual-size": extent.size, "filename": extent.name, "format": extent.kind}
            | ({"cluster-size": extent.grain_size} if extent.grain_size else {})
            | ({"compressed": True} if extent.compressed else {})
            for extent in disk.extents
        ],
    }
    return Facts(
        sum(extent.size for extent in disk.extents),
        cluster_sizes[0] if cluster_sizes else None,
        None if descriptor.parent_name is None else (descriptor.parent_name, "vmdk"),
        disk.files,
        specific,
    )


def _luks(image: ImageFile) -> Facts:
    from nbdserve.formats.luks.header import Area
    from nbdserve.formats.luks.opening import data_size, read_header

    area = Area(image.file, 0, image.file.size)
    header = read_header(area)
    if header.version == 1:
        specific = _luks1(area)
    else:  # which QEMU does not know
        specific = {
            "version": header.version,
            "cipher": str(header.cipher),
            "sector-size": header.sector_size,
            "uuid": header.uuid,
            "payload-offset": header.offset,
            "active-slots": len(header.slots),
        }
    return Facts(data_size(area, header), specific=specific, more={"encrypted": True})


def _luks1(area: Any) -> Json:
    """What QEMU tells of a header of version 1 (qapi/crypto.json, QCryptoBlockInfoLUKS)."""
    from nbdserve.formats.luks.ciphers import SECTOR
    from nbdserve.formats.luks.luks1 import ENABLED, parse, text

    found = parse(area)
    mode, _, iv = text(found.cipher_mode).partition("-")
    iv, _, iv_hash = iv.partition(":")
    slots = [
        {"active": True, "iters": slot.iterations, "stripes": slot.stripes, "key-offset": slot.material_offset * SECTOR}
        if slot.active == ENABLED
        else {"active": False, "key-offset": slot.material_offset * SECTOR}
        for slot in found.slots
    ]
    return {
        "cipher-alg": f"{text(found.cipher_name)}-{found.key_bytes * (4 if mode == 'xts' else 8)}",
        "cipher-mode": mode,
        "ivgen-alg": iv,
        **({"ivgen-hash-alg": iv_hash} if iv_hash else {}),
        "hash-alg": text(found.hash_spec),
        "payload-offset": found.payload_offset * SECTOR,
        "master-key-iters": found.digest_iterations,
        "uuid": text(found.uuid),
        "slots": slots,
    }


_READERS: dict[str, Callable[[ImageFile], Facts]] = {
    "raw": _raw,
    "qcow2": _qcow2,
    "vpc": _vpc,
    "vhdx": _vhdx,
    "vdi": _vdi,
    "vmdk": _vmdk,
    "luks": _luks,
}
