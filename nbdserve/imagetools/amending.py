"""Changes options of an existing qcow2 image."""

from __future__ import annotations

from typing import Any

from nbdserve.block import BlockDevice
from nbdserve.errors import OpenError
from nbdserve.formats.qcow2.header import COMPATIBLE_FIELD, LAZY_REFCOUNTS, Header
from nbdserve.formats.qcow2.relinking import relink, upgrade
from nbdserve.formats.qcow2.resizing import resize
from nbdserve.formats.qcow2.writable import WritableQcow2Image
from nbdserve.opening import ReferencePolicy, look_into, open_image

AMENDABLE = ("backing_file", "backing_fmt", "compat", "lazy_refcounts", "size")


def amend(
    path: str, values: dict[str, Any], *, format: str | None = None, policy: ReferencePolicy | None = None
) -> None:
    """Let an image have other options; each change is made in one step, one after the other.

    Args:
        values: options as for a new image, of those in AMENDABLE.

    Raises:
        OpenError: an option cannot be changed, with the reason in one line.
    """
    if wrong := [name for name in values if name not in AMENDABLE]:
        raise OpenError(f"-o {wrong[0]}: cannot be changed in an existing image; convert it, or choose {AMENDABLE}")
    with open_image(path, format=format, policy=policy) as device:
        _check(device, path, values)
        if "size" in values:
            assert isinstance(device, WritableQcow2Image)
            if values["size"] < device.size:
                raise OpenError(f"{path}: would lose its end; say 'resize --shrink' if that is meant")
            resize(device, values["size"])
    with look_into(path, format="qcow2", read_only=False, policy=policy) as image:
        header = Header.read(image.file)
        if values.get("compat") in ("1.1", "v3") and header.version == 2:
            upgrade(image.file)
            header = Header.read(image.file)
        if "lazy_refcounts" in values:
            wanted = LAZY_REFCOUNTS if values["lazy_refcounts"] else 0
            compatible = header.compatible & ~LAZY_REFCOUNTS | wanted
            if compatible != header.compatible:
                image.file.write(COMPATIBLE_FIELD, compatible.to_bytes(8, "big"))
                image.file.sync()
        if "backing_file" in values or "backing_fmt" in values:
            name = values.get("backing_file", header.backing_name) or None
            relink(image.file, name, values.get("backing_fmt", header.backing_format))


def _check(device: BlockDevice, path: str, values: dict[str, Any]) -> None:
    if not isinstance(device, WritableQcow2Image):
        raise OpenError(f"{path}: only qcow2 images can be amended; convert it")
    version = 3 if values.get("compat") in ("1.1", "v3") else device.header.version
    if values.get("compat") in ("0.10", "v2") and version == 3:
        raise OpenError(f"{path}: a version 3 image cannot go back; convert it with -o compat=0.10")
    if values.get("lazy_refcounts") and version == 2:
        raise OpenError(f"{path}: lazy refcounts need version 3; say compat=1.1 as well")
    if "backing_fmt" in values and not (values.get("backing_file") or device.header.backing_name):
        raise OpenError(f"{path}: has no backing file whose format could be recorded")
