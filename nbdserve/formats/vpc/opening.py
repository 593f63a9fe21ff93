"""Which kind of VHD a file is, and which of its footers to believe.

A fixed disk has one footer, in the file's last 512 bytes, and its first sector belongs to the guest. A dynamic disk has
the same footer at the end and a copy at the start. So the end is asked first: were it the start, a guest could turn its
fixed disk into a dynamic one of its own making by writing to its first sector. The copy at the start counts for what is
not a fixed disk; it outlives a crash while the file grows.
"""

from __future__ import annotations

from nbdserve.block.device import BlockDevice
from nbdserve.block.file import HostFile
from nbdserve.errors import FormatError, OpenError, Unsupported
from nbdserve.formats import OpenOptions
from nbdserve.formats.raw import RawImage
from nbdserve.formats.vpc import COOKIE, FOOTER_SIZE, is_footer
from nbdserve.formats.vpc.dynamic import DynamicDisk
from nbdserve.formats.vpc.header import DiskType, Footer, Layout


class FixedDisk(RawImage):
    """A fixed VHD: the guest's bytes as they are, and a footer that lies past the disk's end, out of its reach."""

    def __init__(self, file: HostFile, footer: Footer, *, read_only: bool) -> None:
        super().__init__(file, read_only=read_only)
        self.size = footer.size


def open_vhd(file: HostFile, options: OpenOptions) -> BlockDevice:
    """See nbdserve.formats.vpc.open_image()."""
    if options.snapshot is not None:
        raise OpenError(f"{file.name}: VHD images have no internal snapshots; leave --snapshot out")
    end = max(0, file.size - FOOTER_SIZE)
    head = bytes(file.read(0, FOOTER_SIZE))
    tail = bytes(file.read(end, FOOTER_SIZE))
    if is_footer(tail):
        footer = Footer.parse(tail, file.name)
        if footer.disk_type == DiskType.FIXED and footer.size <= end:
            return FixedDisk(file, footer, read_only=options.read_only)
    if is_footer(head):
        footer = Footer.parse(head, file.name)
    elif not is_footer(tail):
        raise _not_a_vhd(file.name, head, tail)
    _refuse_all_but_dynamic(file.name, footer, end)
    if not is_footer(tail):
        end = file.size
    layout = Layout.read(file, footer, end)
    if not is_footer(head) and not options.read_only:
        # The footer at the end is about to be overwritten whenever the file grows: there must be another.
        file.write(0, footer.content)
        file.sync()
    return DynamicDisk(file, footer, layout, end, read_only=options.read_only)


def _refuse_all_but_dynamic(name: str, footer: Footer, end: int) -> None:
    match footer.disk_type:
        case DiskType.DYNAMIC:
            return
        case DiskType.FIXED:
            raise FormatError(
                f"{name}: the footer announces a fixed disk of {footer.size} bytes, but {end} lie before it; "
                "the image is truncated"
            )
        case DiskType.DIFFERENCING:
            raise Unsupported(
                f"{name}: differencing VHDs (with a parent disk) are not handled; merge it into its parent first"
            )
        case _:
            raise Unsupported(f"{name}: VHD disk type {footer.disk_type} is not handled; fixed (2) and dynamic (3) are")


def _not_a_vhd(name: str, head: bytes, tail: bytes) -> FormatError:
    if COOKIE in (head[:8], tail[:8]):
        return FormatError(
            f"{name}: the VHD footer's checksum is wrong, and there is no valid copy; the image is damaged"
        )
    return FormatError(f"{name}: not a VHD image: no footer at its end or start; check the format you gave")
