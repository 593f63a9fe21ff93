"""Images of all kinds, by chance: what we show of them is what QEMU shows, whoever made and changed them.

What "the same" means, given that QEMU sometimes says less than it could (assert_same):

- The content is equal, byte by byte, and so is the length.
- Where `qemu-img map` says that the disk reads as zeros, so do we. We may say so in more places: QEMU does not look for
  the holes of the host's file in every format, and for VHDX it knows nothing but the length of the disk.
- Where it names a place in a file for bytes that we call Data, it is the same place, found as deep in the chain.
- It names none for bytes that we call Computed.

QEMU 7.2 takes differencing VHDs, VHDXs and VDIs for images without parents. We alone make and change those; 7-Zip reads
the first two.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbdserve.block import BlockDevice, Computed, Data, Zero
from nbdserve.imagetools.creating import create
from nbdserve.imagetools.snapshots import Change, change_snapshots
from nbdserve.opening import open_image
from tests.formats.operations import Writer, assert_equal, batch, change
from tests.formats.vhdx_images import seven_zip_content
from tests.reference import qemu_content, qemu_img_create, qemu_info, qemu_map, run

KIB, MIB = 1 << 10, 1 << 20

Options = dict[str, Any]

KINDS = ("qcow2", "chain", "vpc", "vhdx", "vdi", "vmdk", "raw", "converted", "differencing")
_VMDK = ("monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat")
_SUFFIXES = {"vpc": ".vhd", "vhdx": ".vhdx", "vdi": ".vdi"}  # by which 7-Zip goes, and who looks for a VDI's parent
_CHECKED = ("qcow2", "vdi", "vhdx", "vmdk")  # by qemu-img check


@dataclass
class Image:
    """An image and what it must hold.

    Attributes:
        unit: bytes of a cluster, or whatever the format allocates.
        model: the content of the disk.
        snapshots: content of each, by name.
        is_ours: QEMU does not understand it.
    """

    path: Path
    format: str
    options: Options
    is_ours: bool = False
    unit: int = 64 * KIB
    model: bytearray = field(default_factory=bytearray)
    snapshots: dict[str, bytes] = field(default_factory=dict)

    @property
    def is_compressible(self) -> bool:
        return self.format == "qcow2" and "data_file" not in self.options

    @property
    def has_snapshots(self) -> bool:
        return self.is_compressible and self.options.get("refcount_bits", 16) > 4  # many compressed in one cluster

    def writer(self, chosen: random.Random) -> Writer:
        """Who is to make or change the image next."""
        return Writer.US if self.is_ours else chosen.choice(list(Writer))

    def __str__(self) -> str:
        return f"{self.path.name}: {self.format} {self.options}"


def play(kind: str, folder: Path, chosen: random.Random, *, batches: int = 3) -> list[str]:
    """Make, change and compare images of one of KINDS in an empty directory; returns what was made, in words."""
    if kind == "converted":
        return [str(_converted(folder, chosen))]
    chain: list[Image] = []
    formats = _formats(kind, chosen)
    for depth, format in enumerate(formats[:-1]):
        chain.append(_layer(folder / f"base{depth}{_SUFFIXES.get(format, '')}", format, chosen, chain))
    top = _layer(folder / f"image{_SUFFIXES.get(formats[-1], '')}", formats[-1], chosen, chain)
    try:
        for number in range(batches):
            _work(top, f"s{number}", chosen)
        for below in chain:
            assert_same(below)
    except BaseException as error:
        error.add_note(f"of {', on '.join(map(str, [top, *reversed(chain)]))}")
        raise
    return [str(image) for image in (top, *chain)]


def _formats(kind: str, chosen: random.Random) -> list[str]:
    """The formats of a chain, from its base to its top."""
    match kind:
        case "chain":
            return [chosen.choice(("raw", "qcow2", "vpc", "vhdx", "vdi", "vmdk")), *["qcow2"] * chosen.randrange(1, 4)]
        case "differencing":
            return [chosen.choice(("vpc", "vhdx", "vdi", "vmdk"))] * chosen.randrange(2, 4)
        case _:
            return [kind]


# Making


def _layer(path: Path, format: str, chosen: random.Random, chain: list[Image]) -> Image:
    """A new image, on top of the last one of a chain if there is one, with something written to it."""
    size = chosen.choice((64 * KIB + 512, MIB, 3 * MIB + 1024, 6 * MIB - 512))
    if chain and format != "qcow2":
        size = len(chain[-1].model)
    elif chain and chosen.random() < 0.5:
        size = max(512, len(chain[-1].model) + chosen.choice((0, 0, 512, -512, MIB, -MIB)))
        size -= size % 512
    options = options_for(format, chosen, is_overlay=bool(chain))
    image = Image(path, format, options, is_ours=bool(chain) and format in ("vpc", "vhdx", "vdi"))
    image.unit = int(options.get("cluster_size", options.get("block_size", image.unit)))
    if "data_file" in options:
        options["data_file"] = f"{path}.data"  # QEMU looks for a relative name from where it was started
    _make(image, size, image.writer(chosen), chain[-1] if chain else None)
    length = size if image.is_ours else int(qemu_info(path, format)["virtual-size"])
    assert length >= size
    below = chain[-1].model if chain else b""
    image.model = bytearray(below[:length].ljust(length, b"\0"))
    assert_same(image)
    _write(image, chosen)
    assert_same(image)
    return image


def options_for(format: str, chosen: random.Random, *, is_overlay: bool = False) -> Options:
    """Options for a new image, by the names that qemu-img has for them and so have we."""
    match format:
        case "qcow2":
            return _qcow2_options(chosen, is_overlay)
        case "vpc" | "vdi" if is_overlay:
            return {"block_size": chosen.choice((4, 64, 2048)) * KIB}
        case "vhdx" if is_overlay:
            return {"block_size": chosen.choice((1, 2, 8)) * MIB}
        case "vmdk" if is_overlay:
            return {"subformat": "monolithicSparse", "zeroed_grain": chosen.random() < 0.5}
        case "vpc":
            return {"subformat": chosen.choice(("fixed", "dynamic")), "force_size": chosen.random() < 0.5}
        case "vhdx":
            return {"subformat": chosen.choice(("fixed", "dynamic")), "block_size": chosen.choice((1, 2, 8)) * MIB}
        case "vdi":
            return {"static": chosen.random() < 0.5}
        case "vmdk":
            subformat = chosen.choice(_VMDK)
            zeroed = {"zeroed_grain": True} if "Sparse" in subformat and chosen.random() < 0.5 else {}
            return {"subformat": subformat, **zeroed}
        case _:
            return {"preallocation": chosen.choice(("off", "falloc", "full"))}


def _qcow2_options(chosen: random.Random, is_overlay: bool) -> Options:
    options: Options = {"cluster_size": chosen.choice((512, 1024, 4096, 64 * KIB, 64 * KIB, 256 * KIB, 2 * MIB))}
    if chosen.random() < 0.25:
        options["compat"] = "0.10"
    else:
        options["compression_type"] = chosen.choice(("zlib", "zstd"))
        options["refcount_bits"] = 1 << chosen.randrange(7)
        options["lazy_refcounts"] = chosen.random() < 0.3
        options["extended_l2"] = options["cluster_size"] >= 16 * KIB and chosen.random() < 0.5
        if chosen.random() < 0.15:
            options["data_file"] = "data"
            options["data_file_raw"] = not is_overlay and chosen.random() < 0.5
    if not is_overlay and chosen.random() < 0.3:
        options["preallocation"] = chosen.choice(("metadata", "falloc", "full"))
    return options


def _make(image: Image, size: int, maker: Writer, below: Image | None) -> None:
    if maker is Writer.US:
        backing = {"backing": below.path.name, "backing_format": below.format} if below else {}
        create(str(image.path), image.format, size, image.options, **backing)  # type: ignore[arg-type]
        return
    options = _for_qemu(image.options)
    if below is not None:
        options |= {"backing_file": below.path.name, "backing_fmt": below.format}
    qemu_img_create(image.path, size, image.format, **options)


def _for_qemu(options: Options) -> Options:
    return {name: value if not isinstance(value, bool) else "on" if value else "off" for name, value in options.items()}


def _converted(folder: Path, chosen: random.Random) -> Image:
    """What only qemu-img convert makes: compressed images, and stream-optimized VMDKs."""
    raw = Image(folder / "raw", "raw", {})
    raw.model = bytearray(chosen.choice((64 * KIB + 512, 3 * MIB + 1024)))
    raw.path.write_bytes(raw.model)
    _write(raw, chosen)
    if chosen.random() < 0.3:
        image = Image(folder / "image", "vmdk", {"subformat": "streamOptimized"})
        flags = []
    else:
        image = Image(folder / "image", "qcow2", _qcow2_options(chosen, is_overlay=True))
        image.options.pop("data_file", None)
        image.options.pop("data_file_raw", None)
        image.unit, flags = image.options["cluster_size"], ["-c"]
    options = ",".join(f"{name}={value}" for name, value in _for_qemu(image.options).items())
    run("qemu-img", "convert", *flags, "-f", "raw", "-O", image.format, "-o", options, raw.path, image.path)
    image.model = raw.model
    assert_same(image)
    if image.format == "qcow2":
        for number in range(2):
            _work(image, f"s{number}", chosen)
    return image


# Changing


def _work(image: Image, name: str, chosen: random.Random) -> None:
    """Take a snapshot perhaps, or go back to one, or drop one; then change the image, and compare it."""
    if image.has_snapshots and chosen.random() < 0.6:
        action = chosen.choice(list(Change)) if image.snapshots else Change.CREATE
        name = name if action is Change.CREATE else chosen.choice(list(image.snapshots))
        _change_snapshots(image.path, action, name, chosen.choice(list(Writer)))
        match action:
            case Change.CREATE:
                image.snapshots[name] = bytes(image.model)
            case Change.APPLY:
                image.model = bytearray(image.snapshots[name])
            case Change.DELETE:
                del image.snapshots[name]
        _check(image)
        assert_same(image)
    _write(image, chosen)
    _check(image)
    assert_same(image)


def _write(image: Image, chosen: random.Random) -> None:
    writer = image.writer(chosen)
    # QEMU cannot take away what is in the way of a compressed write where version 2 has no word for zeros.
    compressed = image.is_compressible and not (writer is Writer.QEMU and image.options.get("compat") == "0.10")
    operations = batch(chosen, len(image.model), writer, cluster=image.unit, compressed=compressed)
    change(image.path, image.format, writer, operations, image.model, _ours if image.is_ours else qemu_content)


def _ours(path: Path, format: str) -> bytearray:
    """The content of an image that QEMU does not understand."""
    with open_image(path, format=format, read_only=True) as device:
        content = device.read(0, device.size)
    # 7-Zip 26 does not open a VHDX, not even one of QEMU's, whose length is an odd number of sectors.
    is_readable = format == "vpc" or (format == "vhdx" and len(content) % 1024 == 0)
    if is_readable and shutil.which("7zz"):
        assert_equal(content, seven_zip_content(path), "7-Zip does not read, but we")
    return content


def _change_snapshots(path: Path, action: Change, name: str, writer: Writer) -> None:
    if writer is Writer.US:
        change_snapshots(str(path), action, name, format="qcow2")
    else:
        flag = {Change.CREATE: "-c", Change.APPLY: "-a", Change.DELETE: "-d"}[action]
        run("qemu-img", "snapshot", flag, name, path)


def _check(image: Image) -> None:
    """qemu-img check finds nothing, not even leaks."""
    if image.format in _CHECKED and not image.is_ours:
        result = subprocess.run(["qemu-img", "check", "-f", image.format, image.path], capture_output=True, text=True)
        assert result.returncode == 0 or "does not support checks" in result.stderr, result.stdout + result.stderr


# Comparing


def assert_same(image: Image) -> None:
    """We show what QEMU shows, of the image and of its snapshots."""
    with open_image(image.path, format=image.format, read_only=True) as device:
        assert_equal(device.read(0, device.size), image.model, "we read")
        if not image.is_ours:
            _assert_same_map(device, qemu_map(image.path, image.format), image.model)
    for name, content in image.snapshots.items():
        assert_equal(qemu_content(image.path, image.format, "-l", name), content, f"QEMU reads in snapshot {name}")
        with open_image(image.path, format=image.format, read_only=True, snapshot=name) as device:
            assert_equal(device.read(0, device.size), content, f"we read in snapshot {name}")


def _assert_same_map(device: BlockDevice, theirs: list[dict[str, Any]], model: bytearray) -> None:
    """See above for what has to agree."""
    for run_ in theirs:
        offset, end = run_["start"], run_["start"] + run_["length"]
        while offset < end:
            ours = device.map(offset, end - offset)
            where = f"{offset} to {offset + ours.length}: {ours}, but to QEMU {run_}"
            assert not run_["zero"] or isinstance(ours, Zero), where
            match ours:
                case Zero():
                    assert not any(model[offset : offset + ours.length]), where
                case Data() if "offset" in run_:
                    assert ours.host_offset == run_["offset"] + offset - run_["start"], where
                    assert ours.depth == run_["depth"], where
                case Computed():
                    assert "offset" not in run_, where
            offset += ours.length
