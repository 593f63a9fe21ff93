"""Looks for damage in images, and repairs what can be repaired."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from nbdserve.block import BlockDevice
from nbdserve.errors import OpenError
from nbdserve.opening import ImageFile, ReferencePolicy, look_into, open_image

Repair = Literal["leaks", "all"]
_STEP = 64 << 10  # bytes that are passed over behind a damaged entry


@dataclass(slots=True)
class Report:
    """What was found, and what is left of it.

    Attributes:
        corruptions, leaks: what is still wrong.
        corruptions_fixed, leaks_fixed: what was repaired.
        problems: a line for each that was found.
        end, total, allocated, fragmented, compressed: as in formats.qcow2.checking.Findings; 0 for other formats.
    """

    format: str
    corruptions: int = 0
    leaks: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    problems: list[str] = field(default_factory=list)
    end: int = 0
    total: int = 0
    allocated: int = 0
    fragmented: int = 0
    compressed: int = 0


def check(
    path: str,
    *,
    format: str | None = None,
    repair: Repair | None = None,
    force_share: bool = False,
    policy: ReferencePolicy | None = None,
) -> Report | None:
    """Check an image, but not those that it stands on; None if its format has nothing that could be checked.

    Args:
        repair: leaks: give leaked space back; all: make everything right that can be.

    Raises:
        OpenError: it cannot be opened, or not be repaired.
    """
    if repair is not None and force_share:
        raise OpenError(f"{path}: an image that others write to cannot be repaired; leave --force-share out")
    with look_into(path, format=format, read_only=repair is None, force_share=force_share, policy=policy) as image:
        if image.format == "raw":
            return None
        if image.format == "qcow2":
            return _check_qcow2(image, repair)
        format = image.format
    with open_image(
        path, format=format, read_only=repair is None, force_share=force_share, policy=policy
    ) as device:  # opening for writing replays what a crash has left
        return _check_mapping(device, format)


def _check_qcow2(image: ImageFile, repair: Repair | None) -> Report:
    from nbdserve.formats.qcow2 import checking
    from nbdserve.formats.qcow2.header import Header

    file, header = image.file, Header.read(image.file)
    first = found = checking.check(file, header)
    if repair == "all" and found.corruptions:
        header = checking.repair_all(file, header)
        found = checking.check(file, header)
    if repair is not None and found.leaks:
        checking.repair_leaks(file, header, found)
        found = checking.check(file, header)
    if repair == "all" and not found.corruptions:
        checking.clear_marks(file, header)
    return Report(
        "qcow2",
        corruptions=found.corruptions,
        leaks=found.leaks,
        corruptions_fixed=max(0, first.corruptions - found.corruptions),
        leaks_fixed=max(0, first.leaks - found.leaks),
        problems=first.problems,
        end=found.end,
        total=found.total,
        allocated=found.allocated,
        fragmented=found.fragmented,
        compressed=found.compressed,
    )


def _check_mapping(device: BlockDevice, format: str) -> Report:
    """Ask where every byte lies: each entry of every table is looked at, and a damaged one says so."""
    report, offset = Report(format), 0
    lookup: Callable[[int, int], Any] = getattr(device, "lookup", device.map)
    while offset < device.size:
        try:
            offset += lookup(offset, device.size - offset).length
        except OSError as error:
            report.corruptions += 1
            report.problems.append(f"ERROR at guest offset {offset:#x}: {error.strerror}")
            step = max(_STEP, getattr(device, "cluster_size", 0))
            offset = (offset // step + 1) * step
    return report
