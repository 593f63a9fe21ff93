"""Which kind of VHD a file is, which of its footers to believe, and its parent.

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
from nbdserve.formats.vpc import COOKIE, FOOTER_SIZE, is_footer
from nbdserve.formats.vpc.differencing import DifferencingDisk
from nbdserve.formats.vpc.dynamic import DynamicDisk
from nbdserve.formats.vpc.fixed import FixedDisk
from nbdserve.formats.vpc.header import DiskType, Footer, Layout
from nbdserve.formats.vpc.parent import Parent


def open_vhd(file: HostFile, options: OpenOptions) -> BlockDevice:
    """See nbdserve.formats.vpc.open_image()."""
    if options.snapshot is not None:
        raise OpenError(f"{file.name}: VHD images have no internal snapshots; leave --snapshot out")
    footer, end = find_footer(file)
    if footer.disk_type == DiskType.FIXED:
        return FixedDisk(file, footer, read_only=options.read_only)
    layout = Layout.read(file, footer, end)
    if footer.disk_type == DiskType.DIFFERENCING:
        disk: BlockDevice = _open_differencing(file, footer, layout, end, options)
    else:
        disk = DynamicDisk(file, footer, layout, end, read_only=options.read_only)
    if not options.read_only and not is_footer(bytes(file.read(0, FOOTER_SIZE))):
        # The footer at the end is about to be overwritten whenever the file grows: there must be another.
        file.write(0, footer.content)
        file.sync()
    return disk


def find_footer(file: HostFile) -> tuple[Footer, int]:
    """The footer that counts, and where the part of the file before the one at its end, if that is there, ends.

    Raises:
        FormatError: there is no good one, or it is that of a fixed disk longer than the file.
        Unsupported: of a kind of disk that is not handled.
    """
    end = max(0, file.size - FOOTER_SIZE)
    head = bytes(file.read(0, FOOTER_SIZE))
    tail = bytes(file.read(end, FOOTER_SIZE))
    if is_footer(tail):
        footer = Footer.parse(tail, file.name)
        if footer.disk_type == DiskType.FIXED and footer.size <= end:
            return footer, end
    elif not is_footer(head):
        raise _not_a_vhd(file.name, head, tail)
    if is_footer(head):
        footer = Footer.parse(head, file.name)
    _refuse_all_but_blocks(file.name, footer, end)
    return footer, end if is_footer(tail) else file.size


def _open_differencing(
    file: HostFile, footer: Footer, layout: Layout, end: int, options: OpenOptions
) -> DifferencingDisk:
    parent = Parent.read(file, footer, end)
    below = parent.open(file.name, options.open_reference)
    try:
        return DifferencingDisk(file, footer, parent.protect(layout), end, below, read_only=options.read_only)
    except BaseException:
        below.close()
        raise


def _refuse_all_but_blocks(name: str, footer: Footer, end: int) -> None:
    """Refuse what is not kept in blocks."""
    match footer.disk_type:
        case DiskType.DYNAMIC | DiskType.DIFFERENCING:
            return
        case DiskType.FIXED:
            raise FormatError(
                f"{name}: the footer announces a fixed disk of {footer.size} bytes, but {end} lie before it; "
                "the image is truncated"
            )
        case _:
            raise Unsupported(
                f"{name}: VHD disk type {footer.disk_type} is not handled; fixed (2), dynamic (3), differencing (4) are"
            )


def _not_a_vhd(name: str, head: bytes, tail: bytes) -> FormatError:
    if COOKIE in (head[:8], tail[:8]):
        return FormatError(
            f"{name}: the VHD footer's checksum is wrong, and there is no valid copy; the image is damaged"
        )
    return FormatError(f"{name}: not a VHD image: no footer at its end or start; check the format you gave")
