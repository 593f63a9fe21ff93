"""A name -> a device, and the one gate through which an image may refer to other files.

The policy (CVE-2024-4467, CVE-2024-32498, CVE-2026-24708): nothing an image says opens a host file,
beyond what lies in the image's own directory and is reached without leaving it through a symlink, unless the user
allows more. Names are literal paths, never json: or URLs. A format that was guessed is not trusted: a backing file
whose format the overlay does not record may be read, but may not refer to further files; neither may a block device,
which may be a guest's raw disk with a header that the guest has written.

What is checked is what is opened: a name is looked up once, to a descriptor that gives no access yet (O_PATH); the
kernel tells the real path of that (/proc/self/fd), and only if the policy lets it pass is that same file opened.
Whoever exchanges files or directories for symlinks meanwhile gains nothing.

Every file is locked (see nbdserve.locking) before anything of it is read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from nbdserve import locking
from nbdserve.block import BlockDevice, HostFile, Window
from nbdserve.errors import FormatError, OpenError
from nbdserve.formats import (
    ALIASES,
    FORMATS,
    GetPassphrase,
    OpenFile,
    OpenOptions,
    OpenReference,
    probe,
    probe_sectors,
)

if TYPE_CHECKING:
    from pathlib import Path

MAXIMUM_CHAIN = 100  # each image takes some six frames of Python's stack, of which there are a thousand
_NBD_URI = r"nbds?(\+\w+)?://"
_LOOKS_REMOTE = r"[A-Za-z][A-Za-z0-9+.-]*:"


@dataclass(frozen=True, slots=True)
class ReferencePolicy:
    """What images may refer to, and what opens those that are encrypted, wherever in the chain they are.

    Attributes:
        allowed: directories, besides the image's own, whose files may be referred to.
        trust_all: any local path is fine, and so are guessed formats.
        passphrase: tells the passphrase; None if there is none.
    """

    allowed: tuple[Path, ...] = ()
    trust_all: bool = False
    passphrase: GetPassphrase | None = None


def format_names() -> tuple[str, ...]:
    """All formats there are, by the table's names."""
    return tuple(FORMATS)


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
    force_share: bool = False,
    snapshot: str | None = None,
    policy: ReferencePolicy | None = None,
    warn: Callable[[str], None] = lambda line: None,
    writable_depth: int = 0,
    durable: bool = True,
) -> BlockDevice:
    """Open an image with everything it stands on.

    Args:
        path: a file, a block device, or an NBD URI (see nbdserve.client.uri).
        format: a name of formats.FORMATS; None guesses from the content.
        read_only: open nothing for writing.
        force_share: put up with other processes that write to the image or its backing files, for a look at a live
            image; only with read_only or snapshot.
        snapshot: show this internal snapshot (by name or ID), which makes the device read-only.
        policy: what the image may refer to.
        warn: told, in one line, of what the user should know.
        writable_depth: open the image so many links below for writing as well, which is what commit needs.
        durable: what is flushed has to survive a crash of the host; False for an image that is only being made.

    Raises:
        Locked: another process uses the image in a way that excludes us.
        OpenError: for any other reason, in one line.
    """
    name = os.fspath(path)
    read_only = read_only or snapshot is not None
    if force_share and not read_only:
        raise OpenError(f"{name}: --force-share is only for looking at an image; open it read-only (-r) as well")
    if is_remote(name):
        return _connect(name, format, read_only, snapshot)
    chain = _Chain(policy or ReferencePolicy(), warn, force_share, writable_depth=writable_depth, durable=durable)
    try:
        return chain.open(name, format=format, read_only=read_only, snapshot=snapshot)
    except OSError as error:
        raise OpenError(f"{error.filename or name}: {error.strerror}") from None


def look_into(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    read_only: bool = True,
    force_share: bool = False,
    policy: ReferencePolicy | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> ImageFile:
    """Open the first file of an image, to read or change what it says of itself; nothing that it refers to is opened.

    Arguments and errors are those of open_image().
    """
    name = os.fspath(path)
    chain = _Chain(policy or ReferencePolicy(), warn, force_share)
    try:
        file, below = chain._open_file(name, name, _anywhere, writable=not read_only)
        return below.image_file(file, format, read_only)
    except OSError as error:
        raise OpenError(f"{error.filename or name}: {error.strerror}") from None


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file of a chain, open and locked; all that is known of its content is the format.

    Attributes:
        format: a name of formats.FORMATS.
        options: for opening the image in the file.
    """

    file: HostFile
    format: str
    options: OpenOptions
    _chain: _Chain

    def look_below(self, name: str, format: str | None) -> ImageFile:
        """Open, as look_into() does, a file that this one says it stands on, if the policy allows that.

        Raises:
            OpenError: with the reason in one line.
        """
        file, below = self._chain.open_reference_file(self.file.name, name, format)
        return below.image_file(file, format, read_only=True)

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def __enter__(self) -> ImageFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_remote(name: str) -> bool:
    """Whether open_image() takes a name for an NBD URI."""
    return re.match(_NBD_URI, name) is not None


def _connect(uri: str, format: str | None, read_only: bool, snapshot: str | None) -> BlockDevice:
    """What a server exports, as a raw disk."""
    from nbdserve.client import connect

    if format not in (None, "raw") or snapshot is not None:
        raise OpenError(f"{uri}: an export is a raw disk; give formats and snapshots to the server")
    device = connect(uri, read_only=read_only)
    if device.offered_read_only and not read_only:
        device.close()
        raise OpenError(f"{uri}: the server offers it read-only; open it read-only (-r)")
    return device


Permit: TypeAlias = Callable[[str], None]
"""Told where a file lies; raises OpenError if it must not be used."""


def _anywhere(_: str) -> None:
    """What the user names may lie anywhere."""


@dataclass(frozen=True)
class _Chain:
    """The images opened on the way down to this point.

    Attributes:
        home: the real path of the directory in which the last one was found.
        above: their names, for messages.
        seen: their devices and inodes.
        may_refer: whether the last one may name further files.
        writable_depth: how many links below the first one the image lies that is opened for writing as well.
        durable: see HostFile.
    """

    policy: ReferencePolicy
    warn: Callable[[str], None]
    force_share: bool
    home: str = ""
    above: tuple[str, ...] = ()
    seen: frozenset[tuple[int, int]] = frozenset()
    may_refer: bool = True
    writable_depth: int = 0
    durable: bool = True

    def open(self, path: str, *, format: str | None, read_only: bool, snapshot: str | None) -> BlockDevice:
        """Open the image that the user names, with all that it refers to."""
        file, below = self._open_file(path, path, _anywhere, writable=not read_only)
        return below.open_image(file, format, read_only, snapshot)

    def open_image(self, file: HostFile, format: str | None, read_only: bool, snapshot: str | None) -> BlockDevice:
        """The image in the file that was opened last."""
        try:
            name, options, _ = self._choose(file, format, read_only, snapshot)
            return FORMATS[name](file, options)
        except BaseException:
            file.close()
            raise

    def image_file(self, file: HostFile, format: str | None, read_only: bool) -> ImageFile:
        """The file that was opened last, with its format."""
        try:
            return ImageFile(file, *self._choose(file, format, read_only, None))
        except BaseException:
            file.close()
            raise

    def open_referred(self, owner: str, name: str, *, writable: bool) -> tuple[HostFile, _Chain]:
        """Open a file that `owner`, the last of this chain, refers to; returns the chain with it at the end."""
        path = os.path.join(self.home, name)
        self._check_name(owner, name, path)
        shown = os.path.join(os.path.dirname(owner), name)
        return self._open_file(shown, path, self._gate(owner, name), writable=writable)

    def _open_file(self, name: str, path: str, permit: Permit, *, writable: bool) -> tuple[HostFile, _Chain]:
        """Open and lock the file at path, which messages call name; nothing of it is read."""
        file, home = _open_where_permitted(name, path, permit, writable=writable)
        file.durable = self.durable
        try:
            below = self._entered(file, home)
            self._lock(file, locking.WRITER)
        except BaseException:
            file.close()
            raise
        return file, below

    def _entered(self, file: HostFile, home: str) -> _Chain:
        """This chain with one more image on it; refuses loops and chains without end."""
        name = file.name
        status = os.fstat(file.fd)
        identity = (status.st_dev, status.st_ino)
        if identity in self.seen:
            raise FormatError(f"{name}: the chain of backing files comes back to this file; repair it with rebase -u")
        if len(self.above) >= MAXIMUM_CHAIN:
            raise FormatError(f"{name}: the chain of backing files is longer than {MAXIMUM_CHAIN}; flatten it first")
        return replace(self, home=home, above=(*self.above, name), seen=self.seen | {identity})

    def _lock(self, file: HostFile, writer: locking.Claim) -> None:
        reader = locking.ONLOOKER if self.force_share else locking.READER
        locked = locking.lock(file, writer if file.writable else reader)
        if not locked and file.writable and writer is locking.WRITER:
            self.warn(f"{file.name}: no locks on its file system; see to it that no other program uses it meanwhile")

    def _choose(
        self, file: HostFile, format: str | None, read_only: bool, snapshot: str | None
    ) -> tuple[str, OpenOptions, _Chain]:
        """The format of the file that was opened last, how to open it, and the chain for what it refers to."""
        guessed = format is None
        name = probe(file) if format is None else known_format(format)
        if name not in FORMATS:
            raise OpenError(f"{file.name}: {name} images are not supported; convert it to qcow2 first")
        if name != "raw":
            self._lock(file, locking.GROWER)
        distrusted = guessed and (len(self.above) > 1 or file.is_device) and not self.policy.trust_all
        below = replace(self, may_refer=not distrusted)
        looks_like = None
        if guessed and name == "raw":
            looks_like = probe_sectors
            if not read_only:
                self.warn(
                    f"{file.name}: no format was given and none recognised, so it is served as raw, and its first "
                    "sector is protected; say --format raw to lift that"
                )
        options = OpenOptions(
            read_only,
            below.reference_opener(file.name),
            snapshot,
            looks_like,
            below.file_opener(file.name),
            self.warn,
            self.policy.passphrase,
        )
        return name, options, below

    def reference_opener(self, owner: str) -> OpenReference:
        """What opens the files that `owner`, the last of the chain, refers to."""

        def open_reference(name: str, format: str | None) -> BlockDevice:
            writable = len(self.above) == self.writable_depth
            file, below = self.open_reference_file(owner, name, format, writable=writable)
            return below.open_image(file, format, read_only=not writable, snapshot=None)

        return open_reference

    def open_reference_file(
        self, owner: str, name: str, format: str | None, *, writable: bool = False
    ) -> tuple[HostFile, _Chain]:
        """Open the first file of an image that `owner` refers to."""
        if format is not None and ALIASES.get(format, format) not in FORMATS:
            raise OpenError(f"{owner}: its backing file is said to be {format!r}, which is not supported")
        return self.open_referred(owner, name, writable=writable)

    def file_opener(self, owner: str) -> OpenFile:
        """What opens, as they are, the files that `owner` consists of besides its own; never an image above it."""

        def open_file(name: str, *, writable: bool) -> HostFile:
            file, below = self.open_referred(owner, name, writable=writable)
            try:
                below._lock(file, locking.GROWER)
            except BaseException:
                file.close()
                raise
            return file

        return open_file

    def _check_name(self, owner: str, name: str, path: str) -> None:
        """Refuse a reference for what it says, before anything is looked up."""
        if "\0" in name or not name:
            raise FormatError(f"{owner}: the name of its backing file is damaged")
        if self.policy.trust_all:
            return
        if re.match(_LOOKS_REMOTE, name) and not os.path.lexists(path):
            raise OpenError(f"{owner}: refers to {name!r}, which is not a plain path; such references are not followed")
        if not self.may_refer:
            remedy = "record it with 'qemu-img rebase -u -F FORMAT'" if len(self.above) > 1 else "give it with --format"
            raise OpenError(
                f"{owner}: refers to {name!r}, but its own format was only guessed; {remedy}, or allow it with "
                "--trust-references"
            )

    def _gate(self, owner: str, name: str) -> Permit:
        """Lets pass what lies in the owner's directory, or in one that the user allows."""
        if self.policy.trust_all:
            return _anywhere
        allowed = [self.home, *map(os.path.realpath, self.policy.allowed)]

        def permit(real: str) -> None:
            if not any(os.path.commonpath((folder, real)) == folder for folder in allowed):
                raise OpenError(
                    f"{owner}: refers to {name!r}, outside its own directory; allow that with "
                    f"--allow-path {os.path.dirname(real)} or --trust-references"
                )

        return permit


def _open_where_permitted(name: str, path: str, permit: Permit, *, writable: bool) -> tuple[HostFile, str]:
    """The open file, and the real path of the directory in which it was found, if the policy lets both pass."""
    head, tail = os.path.split(path)
    home = ""

    def opener(_: str, flags: int) -> int:
        nonlocal home
        with _pinned(head or ".", os.O_DIRECTORY) as folder, _pinned(tail or ".", dir_fd=folder) as found:
            home = _real_path(folder)
            permit(os.path.join(home, tail))  # where a symlink lies counts, because it is what further names start from
            permit(_real_path(found))
            return os.open(f"/proc/self/fd/{found}", flags)

    return HostFile.open(name, writable=writable, opener=opener), home


@contextmanager
def _pinned(path: str, flags: int = 0, dir_fd: int | None = None) -> Iterator[int]:
    """A descriptor that stands for what the path leads to at this moment, and has no effect on it."""
    fd = os.open(path, flags | os.O_PATH | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def _real_path(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        raise OpenError("images can be opened only where /proc is mounted; mount it") from None


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
