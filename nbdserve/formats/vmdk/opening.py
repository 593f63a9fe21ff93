"""Opening a VMDK: the descriptor, the parent disk, then every extent."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from nbdserve.block.device import BlockDevice
from nbdserve.block.file import HostFile
from nbdserve.block.window import Window
from nbdserve.errors import FormatError, OpenError, Unsupported
from nbdserve.formats import OpenOptions
from nbdserve.formats.raw import RawImage
from nbdserve.formats.vmdk import SECTOR
from nbdserve.formats.vmdk.descriptor import (
    MAXIMUM_SIZE,
    Access,
    Descriptor,
    ExtentLine,
    ExtentType,
    parse_descriptor,
)
from nbdserve.formats.vmdk.disk import NoExtent, VmdkDisk, ZeroExtent
from nbdserve.formats.vmdk.esx import COWD_MAGIC, read_cowd, read_se_sparse
from nbdserve.formats.vmdk.header import Described, is_sparse, read_header
from nbdserve.formats.vmdk.layout import Layout
from nbdserve.formats.vmdk.sparse import SparseExtent


def open_vmdk(file: HostFile, options: OpenOptions) -> VmdkDisk:
    """See nbdserve.formats.vmdk.open_image()."""
    if options.snapshot is not None:
        raise OpenError(f"{file.name}: VMDK images have no internal snapshots; leave --snapshot out")
    layout, place, descriptor = _read_descriptor(file)
    builder = _Builder(file, descriptor, options)
    try:
        builder.open_parent()
        if isinstance(layout, Layout):
            builder.add_sparse(file, layout)
        else:
            builder.add_all()
        cid_span = (place + descriptor.cid_span[0], place + descriptor.cid_span[1])
        return VmdkDisk(file, builder.extents, descriptor.cid, cid_span, builder.parent, read_only=options.read_only)
    except BaseException:
        builder.close()
        raise


def _read_descriptor(file: HostFile) -> tuple[Layout | Described | None, int, Descriptor]:
    """What kind of sparse extent the file is, if it is one; where the descriptor lies in it, and what that says."""
    start = bytes(file.read(0, SECTOR))
    if start.startswith(COWD_MAGIC):
        raise Unsupported(f"{file.name}: is one extent of a disk; open the disk's descriptor instead")
    layout = read_header(file) if is_sparse(start) else None
    if layout is None:
        place, length = 0, file.size
        if length > MAXIMUM_SIZE:
            raise FormatError(f"{file.name}: not a VMDK image: neither an extent nor a descriptor")
    else:
        place, length = layout.descriptor[0], layout.descriptor[1] - layout.descriptor[0]
    text = bytes(file.read(place, length))
    if layout is not None and not text.strip(b"\0"):
        raise FormatError(f"{file.name}: is one extent of a VMDK disk; open the disk's descriptor instead")
    descriptor = parse_descriptor(text, file.name)
    return layout, place, descriptor


@dataclass(frozen=True, slots=True)
class ExtentFacts:
    """What is to be told of one extent.

    Attributes:
        size: bytes of the disk that it covers.
        name: of its file, empty without one.
        kind: how it keeps its bytes; empty for the extent that holds the descriptor.
        grain_size: bytes; 0 where it has no grains.
    """

    size: int
    name: str
    kind: str
    grain_size: int = 0
    compressed: bool = False


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """What a disk consists of.

    Attributes:
        files: the extents' files, open; the caller's to close.
    """

    descriptor: Descriptor
    extents: list[ExtentFacts]
    files: list[HostFile]


def read_disk(file: HostFile, options: OpenOptions) -> DiskFacts:
    """Read what a disk consists of, without opening its parent.

    Raises:
        OpenError: it is damaged, or a file of it is missing.
    """
    layout, _, descriptor = _read_descriptor(file)
    if isinstance(layout, Layout):
        return DiskFacts(descriptor, [_facts(layout, file.name, "")], [])
    found = DiskFacts(descriptor, [], [])
    try:
        for line in descriptor.extents:
            name = os.path.join(os.path.dirname(file.name), line.name) if line.name else ""
            if line.access == Access.NONE or line.type == ExtentType.ZERO:
                found.extents.append(ExtentFacts(line.size, name, line.type))
                continue
            found.files.append(options.open_file(line.name, writable=False))
            if line.type in (ExtentType.FLAT, ExtentType.VMFS):
                found.extents.append(ExtentFacts(line.size, name, line.type))
            else:
                found.extents.append(_facts(_sparse_layout(found.files[-1], line.type), name, line.type))
    except BaseException:
        for extent in found.files:
            extent.close()
        raise
    return found


def _facts(layout: Layout, name: str, kind: str) -> ExtentFacts:
    return ExtentFacts(layout.size, name, kind, layout.grain_size, layout.compressed)


@dataclass
class _Builder:
    """A disk that is being put together."""

    file: HostFile
    descriptor: Descriptor
    options: OpenOptions
    parent: BlockDevice | None = None
    extents: list[BlockDevice] = field(default_factory=list)
    position: int = 0
    sparse_files: set[tuple[int, int]] = field(default_factory=set)

    def close(self) -> None:
        """Let go of everything but the descriptor's own file."""
        for extent in self.extents:
            if not (isinstance(extent, SparseExtent) and extent.file is self.file):
                extent.close()
        if self.parent is not None:
            self.parent.close()

    def open_parent(self) -> None:
        """Open the disk that this one stands on, which must not have changed since."""
        name = self.descriptor.parent_name
        if name is None:
            return
        self.parent = self.options.open_reference(name, "vmdk")
        if isinstance(self.parent, VmdkDisk) and self.parent.cid != self.descriptor.parent_cid:
            raise FormatError(
                f"{self.file.name}: its parent {name} has been written to since this disk was made on it (content ID "
                f"{self.parent.cid:08x}, not {self.descriptor.parent_cid:08x})"
            )

    def add_all(self) -> None:
        """Open the extents that the descriptor names."""
        if not self.descriptor.extents:
            raise FormatError(f"{self.file.name}: the VMDK descriptor has no extents; it is damaged")
        for line in self.descriptor.extents:
            self._add(line)

    def _add(self, line: ExtentLine) -> None:
        if line.access == Access.NONE:
            self._append(NoExtent(line.size, self.file.name))
        elif line.type == ExtentType.ZERO:
            self._append(ZeroExtent(line.size))
        else:
            writable = not self.options.read_only and line.access == Access.READ_WRITE
            file = self.options.open_file(line.name, writable=writable)
            try:
                self._add_file(file, line, writable)
            except BaseException:
                file.close()
                raise

    def _add_file(self, file: HostFile, line: ExtentLine, writable: bool) -> None:
        if line.type in (ExtentType.FLAT, ExtentType.VMFS):
            self._append(self._flat(file, line, writable))
            return
        layout = _sparse_layout(file, line.type)
        if layout.size != line.size:
            raise FormatError(
                f"{file.name}: an extent of {layout.size} bytes, but the descriptor {self.file.name} says "
                f"{line.size}; one of the two is damaged"
            )
        self.add_sparse(file, layout, read_only=not writable)

    def _flat(self, file: HostFile, line: ExtentLine, writable: bool) -> BlockDevice:
        if line.offset + line.size > file.size:
            raise FormatError(
                f"{file.name}: {file.size} bytes, but the extent reaches to {line.offset + line.size}; it is truncated"
            )
        return Window(RawImage(file, read_only=not writable), line.offset, line.size)

    def add_sparse(self, file: HostFile, layout: Layout, *, read_only: bool | None = None) -> None:
        """Append a sparse extent, over its part of the parent."""
        read_only = self.options.read_only if read_only is None else read_only
        if layout.frozen is not None and not read_only:
            raise Unsupported(f"{file.name}: {layout.frozen}")
        status = os.fstat(file.fd)
        if (status.st_dev, status.st_ino) in self.sparse_files:
            raise FormatError(f"{self.file.name}: two extents lie in {file.name}; the descriptor is damaged")
        self.sparse_files.add((status.st_dev, status.st_ino))
        self._append(SparseExtent(file, layout, self._below(layout.size), read_only=read_only))

    def _below(self, size: int) -> BlockDevice | None:
        """The parent's part under the next extent."""
        parent = self.parent
        if parent is None or self.position >= parent.size:
            return None
        return Window(parent, self.position, min(size, parent.size - self.position))

    def _append(self, extent: BlockDevice) -> None:
        self.extents.append(extent)
        self.position += extent.size


def _sparse_layout(file: HostFile, kind: ExtentType) -> Layout:
    if kind == ExtentType.SE_SPARSE:
        return read_se_sparse(file)
    if bytes(file.read(0, 4)) == COWD_MAGIC:
        return read_cowd(file)
    layout = read_header(file)
    if isinstance(layout, Described):
        raise FormatError(f"{file.name}: is a descriptor, where an extent should be")
    return layout
