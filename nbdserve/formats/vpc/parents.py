"""Finding the parent of a differencing VHD or VHDX, whose child knows it by names that Windows would understand.

A relative name is tried as it stands. An absolute one means something here only if it has no drive letter; of one that
has, only the last part helps: the parent may have been copied beside its child. None of this lets an image reach
further than the gate (open_reference) allows, and the caller checks the identity of what was opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from nbdserve.block.device import BlockDevice
from nbdserve.errors import FormatError, OpenError
from nbdserve.formats import OpenReference


def local_names(relative: Iterable[str], absolute: Iterable[str]) -> list[str]:
    """The names under which to look for a parent, in order, without repetition."""
    names = [name.replace("\\", "/").removeprefix("./") for name in relative]
    for name in absolute:
        plain = name.replace("\\", "/")
        names += [plain] if plain.startswith("/") and not plain.startswith("//") else []
        names.append(plain.rpartition("/")[2])
    return list(dict.fromkeys(name for name in names if name))


def windows_name(name: str) -> str:
    """How a relative name of this system is written into an image."""
    plain = name.replace("/", "\\")
    return plain if plain.startswith((".\\", "..\\")) else f".\\{plain}"


def open_parent(
    owner: str,
    names: list[str],
    format: str,
    open_reference: OpenReference,
    check: Callable[[BlockDevice], str | None],
) -> BlockDevice:
    """Open the first of `names` that is the parent.

    Args:
        owner: the child's name, for messages.
        format: what the parent must be.
        check: says in a few words why an opened device is not the parent, or None when it is.

    Raises:
        OpenError: none is; the message tells of the first.
    """
    first: OpenError | None = None
    for name in names:
        try:
            device = open_reference(name, format)
        except OpenError as error:
            first = first or type(error)(f"{owner}: its parent disk: {error}")
            continue
        wrong = check(device)
        if wrong is None:
            return device
        device.close()
        first = first or FormatError(
            f"{owner}: the parent disk {name!r} {wrong}; put the parent as it was when this disk was made in its place"
        )
    raise first or FormatError(f"{owner}: names no parent disk that could be looked for; the image is damaged")
