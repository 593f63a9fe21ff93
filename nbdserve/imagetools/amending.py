"""Changes options of an existing qcow2 image."""

from __future__ import annotations

from typing import Any

from nbdserve.block import HostFile
from nbdserve.errors import FormatError, OpenError
from nbdserve.formats.qcow2.downgrading import demand_downgradable
from nbdserve.formats.qcow2.header import (
    AUTOCLEAR_FIELD,
    COMPATIBLE_FIELD,
    LAZY_REFCOUNTS,
    Autoclear,
    Header,
    Incompatible,
)
from nbdserve.formats.qcow2.relinking import downgrade, relink, rename_data_file, upgrade
from nbdserve.formats.qcow2.repair import rebuild_refcounts
from nbdserve.formats.qcow2.resizing import resize
from nbdserve.formats.qcow2.writable import WritableQcow2Image
from nbdserve.opening import ReferencePolicy, look_into, open_image

AMENDABLE = (
    *("backing_file", "backing_fmt", "compat", "data_file", "data_file_raw", "lazy_refcounts", "refcount_bits", "size"),
)

Values = dict[str, Any]


def amend(path: str, values: Values, *, format: str | None = None, policy: ReferencePolicy | None = None) -> None:
    """Let an image have other options; each change is made in one step, one after the other.

    Args:
        values: options as for a new image, of those in AMENDABLE.

    Raises:
        OpenError: an option cannot be changed, with the reason in one line.
    """
    if wrong := [name for name in values if name not in AMENDABLE]:
        raise OpenError(
            f"-o {wrong[0]}: cannot be changed in an existing image; convert it, or choose {', '.join(AMENDABLE)}"
        )
    version = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}.get(values.get("compat", ""))
    with look_into(path, format=format, read_only=False, policy=policy) as image:
        if image.format != "qcow2":
            raise OpenError(f"{path}: only qcow2 images can be amended; convert it")
        header = Header.read(image.file)
        goes_back = version == 2 and header.version == 3
        _check(header, path, values, version or header.version)
        if goes_back:
            demand_downgradable(image.file, header, values.get("size", header.size))
        _change_before(image.file, path, values, version)
    if "size" in values or goes_back:
        with open_image(path, format="qcow2", policy=policy) as device:
            assert isinstance(device, WritableQcow2Image)
            if "size" in values:
                resize(device, values["size"])
            if goes_back:
                device.clear_zero_flags()
    with look_into(path, format="qcow2", read_only=False, policy=policy) as image:
        _change_after(image.file, values)
        if goes_back:
            downgrade(image.file)


def _check(header: Header, path: str, values: Values, version: int) -> None:
    """Refuse what does not go together before anything is changed."""
    width = values.get("refcount_bits", header.refcount_width)
    for is_wrong, what in (
        (header.incompatible & Incompatible.CORRUPT, "is marked as corrupt; repair it with 'nbdimg check -r all'"),
        (values.get("size", header.size) < header.size, "would lose its end; say 'resize --shrink' if that is meant"),
        (values.get("lazy_refcounts") and version == 2, "lazy refcounts need version 3; say compat=1.1 as well"),
        (width not in (1, 2, 4, 8, 16, 32, 64), f"refcounts have 1, 2, 4, 8, 16, 32 or 64 bits, not {width}"),
        (width != 16 and version == 2, "version 2 has refcounts of 16 bits; say compat=1.1 or refcount_bits=16"),
        (
            "backing_fmt" in values and not (values.get("backing_file") or header.backing_name),
            "has no backing file whose format could be recorded",
        ),
        (
            ("data_file" in values or "data_file_raw" in values) and not header.geometry.is_external,
            "has no external data file; convert it with -o data_file=NAME",
        ),
        (
            values.get("data_file_raw") and not header.has_raw_data_file,
            "its data file was not made to show the disk by itself; convert it with -o data_file_raw=on",
        ),
    ):
        if is_wrong:
            raise OpenError(f"{path}: {what}")


def _change_before(file: HostFile, path: str, values: Values, version: int | None) -> None:
    """What a new length, or an older version, may need; in the header, and in what it leads to."""
    header = Header.read(file)
    if version == 3 and header.version == 2:
        upgrade(file)
        header = Header.read(file)
    if "data_file" in values:
        rename_data_file(file, values["data_file"])
    width = values.get("refcount_bits", header.refcount_width)
    if width != header.refcount_width or header.incompatible & Incompatible.DIRTY:
        try:
            rebuild_refcounts(file, Header.read(file), width=width)
        except FormatError as error:
            raise OpenError(f"{path}: refcounts of {width} bits do not do; {error}") from None


def _change_after(file: HostFile, values: Values) -> None:
    """What concerns nothing but the header."""
    header = Header.read(file)
    if values.get("data_file_raw") is False and header.autoclear & Autoclear.RAW_DATA:
        _write_field(file, AUTOCLEAR_FIELD, header.autoclear & ~Autoclear.RAW_DATA)
    if "lazy_refcounts" in values and header.version == 3:
        wanted = LAZY_REFCOUNTS if values["lazy_refcounts"] else 0
        _write_field(file, COMPATIBLE_FIELD, header.compatible & ~LAZY_REFCOUNTS | wanted)
    if "backing_file" in values or "backing_fmt" in values:
        name = values.get("backing_file", header.backing_name) or None
        relink(file, name, values.get("backing_fmt", header.backing_format))


def _write_field(file: HostFile, place: int, bits: int) -> None:
    file.write(place, bits.to_bytes(8, "big"))
    file.sync()
