"""Internal snapshots of an image file, which only qcow2 has; see formats/qcow2/snapshots.py for what a crash leaves."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

from nbdserve.errors import OpenError
from nbdserve.imagetools.describing import read_facts
from nbdserve.opening import ReferencePolicy, look_into, open_image


class Change(Enum):
    """What is to be done about a snapshot."""

    CREATE = "create"
    APPLY = "apply"
    DELETE = "delete"


def list_snapshots(
    path: str, *, format: str | None = None, force_share: bool = False, policy: ReferencePolicy | None = None
) -> list[dict[str, Any]]:
    """The internal snapshots of an image, the oldest first, in QEMU's words (qapi/block-core.json, SnapshotInfo).

    Backing files are not opened.

    Raises:
        OpenError: the image cannot be read, or its format has no snapshots.
    """
    with look_into(path, format=format, force_share=force_share, policy=policy) as image:
        _demand_qcow2(path, image.format)
        snapshots: list[dict[str, Any]] = read_facts(image).more.get("snapshots", [])
        return snapshots


def change_snapshots(
    path: str,
    change: Change,
    name: str,
    *,
    format: str | None = None,
    policy: ReferencePolicy | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> None:
    """Create, apply or delete a snapshot; `name` is its tag or, for the latter two, its ID.

    Raises:
        OpenError: the image cannot be changed, or there is no such snapshot.
        OSError: from the host.
    """
    with look_into(path, format=format, policy=policy) as image:
        _demand_qcow2(path, image.format)
    from nbdserve.formats.qcow2 import snapshots
    from nbdserve.formats.qcow2.writable import WritableQcow2Image

    with open_image(path, format="qcow2", policy=policy, warn=warn) as device:
        assert isinstance(device, WritableQcow2Image)
        match change:
            case Change.CREATE:
                if any(one.name == name for one in snapshots.list_snapshots(device)):
                    warn(f"{path}: has a snapshot {name!r} already; tell them apart by their IDs")
                snapshots.create_snapshot(device, name)
            case Change.APPLY:
                snapshots.apply_snapshot(device, name)
            case Change.DELETE:
                snapshots.delete_snapshot(device, name)


def _demand_qcow2(path: str, format: str) -> None:
    if format != "qcow2":
        raise OpenError(f"{path}: {format} images have no internal snapshots; put an overlay on it ('nbdimg overlay')")
