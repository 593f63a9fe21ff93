"""A fixed VHD: the guest's bytes as they are, and a footer behind them."""

from __future__ import annotations

from nbdserve.block.file import HostFile
from nbdserve.formats.raw import RawImage
from nbdserve.formats.vpc.header import Footer


class FixedDisk(RawImage):
    """A fixed VHD; its footer lies past the disk's end, out of the guest's reach.

    Attributes:
        footer: what the disk's footer says.
    """

    def __init__(self, file: HostFile, footer: Footer, *, read_only: bool) -> None:
        super().__init__(file, read_only=read_only)
        self.size = footer.size
        self.footer = footer
