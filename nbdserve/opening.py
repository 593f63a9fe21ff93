"""A name -> a device, and the one gate through which an image may refer to other files.

The policy (CVE-2024-4467, CVE-2024-32498, CVE-2026-24708): nothing an image says opens a host file,
beyond what lies in the image's own directory and is reached without leaving it through a symlink, unless the user
allows more. Names are literal paths, never json: or URLs. A format that was guessed is not trusted: a backing file
whose format the overlay does not record may be read, but may not refer to further files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from nbdserve.block import BlockDevice, HostFile, Window
from nbdserve.errors import FormatError, OpenError
from nbdserve.formats import ALIASES, FORMATS, OpenDataFile, OpenOptions, OpenReference, probe, probe_sectors

MAXIMUM_CHAIN = 100  # each image takes some six frames of Python's stack, of which there are a thousand
_LOOKS_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


@dataclass(frozen=True, slots=True)
class ReferencePolicy:
    """What images may refer to.

    Attributes:
        allowed: directories, besides the image's own, whose files may be referred to.
        trust_all: any local path is fine, and so are guessed formats.
    """

    allowed: tuple[Path, ...] = ()
    trust_all: bool = False


def known_format(name: str) -> str:
    """The table's name for what a user calls a format.

    Raises:
        OpenError: nobody calls a format that we have by this name.
    """
    canonical = ALIASES.get(name, name)
    if canonical not in FORMATS:
        raise OpenError(f"--format {name}: not a format known here; choose one of {', '.join(FORMATS)}")
    return canonical


def open_image(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    read_only: bool = False,
    snapshot: str | None = None,
    policy: ReferencePolicy | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> BlockDevice:
    """Open an image with everything it stands on.

    Args:
        format: a name of formats.FORMATS; None guesses from the content.
        read_only: open nothing for writing.
        snapshot: show this internal snapshot (by name or ID), which makes the device read-only.
        policy: what the image may refer to.
        warn: told, in one line, of what the user should know.

    Raises:
        OpenError: with the reason in one line.
    """
    chain = _Chain(policy or ReferencePolicy(), warn)
    try:
        return chain.open(
            os.fspath(path), format=format, read_only=read_only or snapshot is not None, snapshot=snapshot
        )
    except OSError as error:
        raise OpenError(f"{error.filename or os.fspath(path)}: {error.strerror}") from None


@dataclass(frozen=True)
class _Chain:
    """The images opened on the way down to this point."""

    policy: ReferencePolicy
    warn: Callable[[str], None]
    above: tuple[str, ...] = ()
    seen: frozenset[tuple[int, int]] = frozenset()
    may_refer: bool = True

    def open(self, path: str, *, format: str | None, read_only: bool, snapshot: str | None) -> BlockDevice:
        file = HostFile.open(path, writable=not read_only)
        try:
            below = self._entered(path, file)
            name, options = self._choose(file, format, read_only, snapshot, below)
            return FORMATS[name](file, options)
        except BaseException:
            file.close()
            raise

    def _entered(self, path: str, file: HostFile) -> _Chain:
        """This chain with one more image on it; refuses loops and chains without end."""
        status = os.fstat(file.fd)
        identity = (status.st_dev, status.st_ino)
        if identity in self.seen:
            raise FormatError(f"{path}: the chain of backing files comes back to this file; repair it with rebase -u")
        if len(self.above) >= MAXIMUM_CHAIN:
            raise FormatError(f"{path}: the chain of backing files is longer than {MAXIMUM_CHAIN}; flatten it first")
        return replace(self, above=(*self.above, path), seen=self.seen | {identity})

    def _choose(
        self, file: HostFile, format: str | None, read_only: bool, snapshot: str | None, below: _Chain
    ) -> tuple[str, OpenOptions]:
        guessed = format is None
        name = probe(file) if format is None else known_format(format)
        if name not in FORMATS:
            raise OpenError(f"{file.name}: {name} images are not supported; convert it to qcow2 first")
        if guessed and self.above and not self.policy.trust_all:
            below = replace(below, may_refer=False)
        looks_like = None
        if guessed and name == "raw":
            looks_like = probe_sectors
            if not read_only:
                self.warn(
                    f"{file.name}: no format was given and none recognised, so it is served as raw, and its first "
                    "sector is protected; say --format raw to lift that"
                )
        return name, OpenOptions(
            read_only,
            below.reference_opener(file.name),
            snapshot,
            looks_like,
            below.data_file_opener(file.name),
            self.warn,
        )

    def reference_opener(self, owner: str) -> OpenReference:
        """What opens the files that `owner` refers to."""

        def open_reference(name: str, format: str | None) -> BlockDevice:
            path = self._permitted(owner, name)
            if format is not None and ALIASES.get(format, format) not in FORMATS:
                raise OpenError(f"{owner}: its backing file is said to be {format!r}, which is not supported")
            return self.open(path, format=format, read_only=True, snapshot=None)

        return open_reference

    def data_file_opener(self, owner: str) -> OpenDataFile:
        """What opens the file that holds the guest's data for `owner`."""

        def open_data_file(name: str, *, writable: bool) -> HostFile:
            path = self._permitted(owner, name)
            file = HostFile.open(path, writable=writable)
            try:
                self._entered(path, file)
            except BaseException:
                file.close()
                raise
            return file

        return open_data_file

    def _permitted(self, owner: str, name: str) -> str:
        """The path that a reference means, if the policy lets it be opened."""
        if "\0" in name or not name:
            raise FormatError(f"{owner}: the name of its backing file is damaged")
        home = os.path.dirname(owner) or "."
        path = os.path.join(home, name)
        if self.policy.trust_all:
            return path
        if _LOOKS_REMOTE.match(name) and not os.path.lexists(path):
            raise OpenError(f"{owner}: refers to {name!r}, which is not a plain path; such references are not followed")
        if not self.may_refer:
            raise OpenError(
                f"{owner}: refers to {name!r}, but its own format was only guessed; record it with "
                f"'qemu-img rebase -u -F FORMAT', or allow it with --trust-references"
            )
        real = Path(os.path.realpath(path))
        allowed = [Path(os.path.realpath(home)), *(folder.resolve() for folder in self.policy.allowed)]
        if not any(real.is_relative_to(folder) for folder in allowed):
            raise OpenError(
                f"{owner}: refers to {name!r}, outside its own directory; allow that with "
                f"--allow-path {real.parent} or --trust-references"
            )
        return path


def select_partition(
    device: BlockDevice, selector: str, name: str, warn: Callable[[str], None] = lambda line: None
) -> BlockDevice:
    """One partition as a disk of its own.

    Args:
        selector: its number (logical ones from 5), UUID or label.
        name: the image's, for messages.
        warn: told, in one line, what is wrong with the partition table besides.

    Raises:
        OpenError: there is no such partition; the message lists those there are.
    """
    from nbdserve.partitions import find, read_partitions

    try:
        table = read_partitions(device)
        partition = find(table, selector)
    except OpenError as error:
        raise type(error)(f"{name}: {error}") from None
    for remark in table.remarks:
        warn(f"{name}: {remark}")
    return Window(device, partition.offset, partition.size)


def select_range(device: BlockDevice, offset: int, size: int | None) -> BlockDevice:
    """The part of a device that the user named by offset and size, in bytes.

    Raises:
        OpenError: it does not lie inside the device.
    """
    length = device.size - offset if size is None else size
    if length < 0 or offset + length > device.size:
        raise OpenError(f"--offset/--size: the range reaches past the end of the disk, which has {device.size} bytes")
    return device if (offset, length) == (0, device.size) else Window(device, offset, length)
