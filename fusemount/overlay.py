"""Writing beside the image: a qcow2 file that holds what is changed, over the image, which stays untouched."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from fusemount.volumes import Warn
from nbdserve.block import BlockDevice, HostFile
from nbdserve.errors import OpenError
from nbdserve.formats import probe
from nbdserve.formats.qcow2.create import CreateOptions, create_image
from nbdserve.formats.qcow2.header import Header
from nbdserve.opening import ReferencePolicy, known_format, open_image

DISCARD = "discard"
"""The overlay that is thrown away in the end."""


def open_overlay(image: str, overlay: str, format: str | None, policy: ReferencePolicy, warn: Warn) -> BlockDevice:
    """The image, to be read and written, with every change going to the overlay.

    Args:
        image: the path of the image, which is only read.
        overlay: the path of a qcow2 file, made if there is none yet; or DISCARD for one without a name.
        format: the image's; None guesses it.

    Raises:
        OpenError: one of the two cannot be opened, or the overlay is one over another image.
    """
    policy = replace(policy, allowed=(*policy.allowed, Path(os.path.realpath(image)).parent))
    if overlay != DISCARD:
        if os.path.lexists(overlay):
            _check_belongs(overlay, image)
        else:
            _create(overlay, image, format, policy, warn)
        return open_image(overlay, format="qcow2", policy=policy, warn=warn)
    folder = tempfile.mkdtemp(prefix="fusemount-")
    try:
        path = os.path.join(folder, "overlay.qcow2")
        _create(path, image, format, policy, warn)
        return open_image(path, format="qcow2", policy=policy, warn=warn)
    finally:
        shutil.rmtree(folder)  # what is open stays, without a name


def _create(overlay: str, image: str, format: str | None, policy: ReferencePolicy, warn: Warn) -> None:
    with open_image(image, format=format, read_only=True, policy=policy, warn=warn) as device:
        size = device.size
    beside = os.path.realpath(os.path.dirname(overlay) or ".") == os.path.realpath(os.path.dirname(image) or ".")
    name = os.path.basename(image) if beside else os.path.realpath(image)
    try:
        create_image(overlay, size, CreateOptions(backing=name, backing_format=_format_of(image, format)))
    except OSError as error:
        raise OpenError(f"--overlay {overlay}: {error.strerror}; choose a place where files can be made") from None


def _format_of(image: str, format: str | None) -> str:
    if format is not None:
        return known_format(format)
    with HostFile.open(image, writable=False) as file:
        return probe(file)


def _check_belongs(overlay: str, image: str) -> None:
    with HostFile.open(overlay, writable=False) as file:
        header = Header.read(file)
    backing = os.path.join(os.path.dirname(overlay), header.backing_name or "")
    try:
        belongs = header.backing_name is not None and os.path.samefile(backing, image)
    except OSError:
        belongs = False
    if not belongs:
        over = f"an overlay of {header.backing_name}" if header.backing_name else "an image of its own"
        raise OpenError(f"--overlay {overlay}: is {over}, not of {image}; choose another file for the overlay")
