"""`fusemount --list`: what an image holds, for people and, as JSON, for programs."""

from __future__ import annotations

import json
from typing import Any

from fusemount.volumes import Volume, Warn, read_volumes
from nbdserve.block import BlockDevice
from nbdserve.cli.common import printable, short_size


def describe(image: str, device: BlockDevice, warn: Warn) -> dict[str, Any]:
    """What the image holds, in the terms of JSON: sizes and offsets in bytes, modes "rw", "ro" or null."""
    table, volumes = read_volumes(device, warn)
    return {
        "image": image,
        "size": device.size,
        "partition_table": table.kind.value,
        "volumes": [_describe_volume(each) for each in volumes],
    }


def _describe_volume(volume: Volume) -> dict[str, Any]:
    part, signature, condition = volume.partition, volume.signature, volume.condition
    return {
        "name": volume.name,
        "offset": volume.offset,
        "size": volume.size,
        "filesystem": signature.kind if signature else None,
        "label": signature.label if signature else "",
        "uuid": signature.uuid if signature else "",
        "partition_label": part.label if part else "",
        "partition_uuid": part.uuid if part else "",
        "partition_type": (f"0x{part.type:02x}" if isinstance(part.type, int) else str(part.type)) if part else "",
        "bootable": part.bootable if part else False,
        "mode": "rw" if condition.writable else "ro" if condition.readable else None,
        "dirty": condition.dirty,
        "remark": condition.remark,
    }


def as_json(description: dict[str, Any]) -> str:
    """For programs."""
    return json.dumps(description, indent=2)


def as_table(description: dict[str, Any]) -> str:
    """For people: one line a volume, and one for each remark."""
    rows = [("NAME", "OFFSET", "SIZE", "FILE SYSTEM", "MODE", "STATE", "LABEL", "UUID")]
    remarks = []
    for each in description["volumes"]:
        state = "dirty" if each["dirty"] else "clean" if each["mode"] else "-"
        label = each["label"] or each["partition_label"] or "-"
        kind = each["filesystem"] or "-"
        row = (each["name"], str(each["offset"]), short_size(each["size"]), kind, each["mode"] or "-", state, label)
        rows.append((*row, each["uuid"] or "-"))
        if each["remark"]:
            remarks.append(f"{each['name']}: {each['remark']}")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = {1, 2}
    lines = [
        "  ".join(
            printable(cell).rjust(width) if column in right else printable(cell).ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, *map(printable, remarks)])
