"""Copies of images in other formats.

A new image gets its name when it is complete; devices and servers are written in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from nbdserve.block import BlockDevice, HostFile, HostOffset
from nbdserve.block.file import ReadBuffer
from nbdserve.errors import OpenError
from nbdserve.formats.base import MappedImage
from nbdserve.formats.raw import RawImage
from nbdserve.imagetools.copying import Copy, Fill
from nbdserve.imagetools.creating import open_backing
from nbdserve.imagetools.making import make_image
from nbdserve.imagetools.staging import is_device, staged
from nbdserve.opening import ReferencePolicy, is_remote, open_image, select_partition

Progress = Callable[[int], None]
Write = Callable[[int, ReadBuffer], None]
Place = Callable[[int, int, Fill], None]
_SECTOR = 512
_STEP = 64 << 10  # bytes; larger clusters are not worth less than that


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be written, and how.

    Attributes:
        format: a name of formats.FORMATS.
        values: options of that format.
        compress: compress all data.
        sparse: runs of so many zero bytes are left out; 0: none are, the target is allocated whole.
        backing, backing_format: what the new image stands on; the source's top image alone is copied then.
        existing: write into the image that is there.
        partition: of the existing image, to be written instead of the whole.
        blank: the existing image is known to read as zeros.
        workers: threads.
        durable: a new image is on stable storage before it gets its name; one that replaces another always is.
    """

    path: str
    format: str
    values: dict[str, Any] = field(default_factory=dict)
    compress: bool = False
    sparse: int = 4096
    backing: str | None = None
    backing_format: str | None = None
    existing: bool = False
    partition: str | None = None
    blank: bool = False
    workers: int = 4
    durable: bool = False


def convert(
    source: BlockDevice,
    target: Target,
    *,
    policy: ReferencePolicy | None = None,
    progress: Progress = lambda done: None,
) -> None:
    """Let the target show what the source does.

    Args:
        policy: what the target's backing file may refer to.
        progress: told now and then how many bytes of the source have been dealt with.

    Raises:
        OpenError: the target cannot be as it is wanted, with the reason in one line.
        OSError: from the host; a new target does not appear then, and an old one of that name stays as it was.
    """
    if target.values.get("subformat") == "streamOptimized" or (target.compress and target.format == "vmdk"):
        _stream(source, target, progress)
        return
    if target.compress and target.format != "qcow2":
        raise OpenError(f"{target.path}: {target.format} images cannot be compressed; qcow2 and vmdk can")
    with _opened(source.size, target, policy) as (device, blank):
        write: Write = device.write
        place: Place | None = None
        unit = step = _STEP
        if isinstance(device, MappedImage):
            step = min(step, device.cluster_size)
        if target.format == "raw":
            step = _SECTOR
        if target.compress:
            write, unit = _compressing(device, target)
            step = unit
        elif blank and target.backing is None and target.sparse:
            write, place = _in_place(device)
        copy = Copy(
            source,
            device,
            write,
            place,
            blank=blank,
            sparse=target.sparse and max(step, target.sparse),
            unit=max(unit, step),
            only_top=target.backing is not None,
            workers=target.workers,
        )
        copy.run(progress)


def _compressing(device: BlockDevice, target: Target) -> tuple[Write, int]:
    """How to write compressed data, and in multiples of what."""
    from nbdserve.formats.qcow2.writable import WritableQcow2Image

    if "encrypt.format" in target.values:
        raise OpenError(f"{target.path}: clusters are either compressed or encrypted; leave one of the two out")
    if not isinstance(device, WritableQcow2Image) or "data_file" in target.values:
        raise OpenError(f"{target.path}: only clusters inside a qcow2 image can be compressed")
    return device.write_compressed, device.header.geometry.cluster_size


def _in_place(device: BlockDevice) -> tuple[Write, Place | None]:
    """The quickest ways to write whole units to a new image: with data, and with a function that puts it in place."""
    if isinstance(device, RawImage):
        file = device.file
        return device.write, lambda offset, length, fill: fill(file, HostOffset(offset), offset, length)
    if not isinstance(device, MappedImage) or type(device).__name__ != "WritableQcow2Image":
        return device.write, None
    from nbdserve.formats.qcow2.writable import WritableQcow2Image

    assert isinstance(device, WritableQcow2Image)
    if device.cluster_size > _STEP:
        return device.write, None
    image = device

    def write(offset: int, data: ReadBuffer) -> None:
        view = memoryview(data)

        def fill(file: HostFile, host_offset: HostOffset, start: int, length: int) -> None:
            file.write(host_offset, view[start - offset : start - offset + length])

        image.write_clusters(offset, len(view), fill)

    return write, image.write_clusters


@contextmanager
def _opened(size: int, target: Target, policy: ReferencePolicy | None) -> Iterator[tuple[BlockDevice, bool]]:
    """The target, open for writing, and whether it reads as zeros."""
    path = target.path
    if target.existing or is_remote(path) or is_device(path):
        with _existing(size, target, policy) as device:
            yield device, target.blank
        return
    with ExitStack() as held:
        below = None
        if target.backing is not None:
            if target.format != "qcow2":
                raise OpenError(f"{path}: only qcow2 images are made with -B; make an overlay first, and say -n")
            below, _ = held.enter_context(open_backing(path, target.backing, target.backing_format, policy))
            # What that image refers to has just been checked.
            policy = replace(policy or ReferencePolicy(), trust_all=True)
        if in_place := "data_file" in target.values:
            made = path
        else:
            made = held.enter_context(staged(path, beside=below is not None, durable=target.durable))
        passphrase = None if policy is None else policy.passphrase
        make_image(made, target.format, size, target.values, below, durable=in_place, passphrase=passphrase)
        with open_image(made, format=target.format, policy=policy, durable=in_place) as device:
            if target.format == "luks":  # reads as random bytes, not as zeros
                device.zero(size, device.size - size)
            yield device, target.format != "luks"


@contextmanager
def _existing(size: int, target: Target, policy: ReferencePolicy | None) -> Iterator[BlockDevice]:
    """A target that is written in place."""
    path = target.path
    if not target.existing and target.format != "raw":
        raise OpenError(f"{path}: gets raw content; for another format make an image there first, and say -n")
    with open_image(path, format=None if is_remote(path) else target.format, policy=policy) as whole:
        device = whole if target.partition is None else select_partition(whole, target.partition, path)
        if device.size < size:
            raise OpenError(f"{path}: {device.size} bytes are too few for the {size} of the source")
        yield device


def _stream(source: BlockDevice, target: Target, progress: Progress) -> None:
    """A stream-optimized VMDK."""
    from nbdserve.formats.vmdk.stream import write_stream_optimized

    if target.backing is not None or target.existing or is_remote(target.path) or is_device(target.path):
        raise OpenError(f"{target.path}: a stream-optimized VMDK is a new file that stands on its own")
    with staged(target.path, durable=target.durable) as made:
        adapter = str(target.values.get("adapter_type", "ide"))
        write_stream_optimized(
            source, made, workers=target.workers, adapter_type=adapter, durable=False, progress=progress
        )
