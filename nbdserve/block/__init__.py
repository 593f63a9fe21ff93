"""What a disk is: a mapping from guest offsets to places where bytes live.

    extents   the answer of a mapping: Data, Zero or Computed
    device    BlockDevice, the interface of everything that can be read like a disk
    file      HostFile, one open host file with positioned, thread-safe access
    window    a slice of another device (a partition, an offset)
    memory    a disk in a bytearray, the model that tests measure others against
    tables    a bounded cache of mapping tables
    pins      keeps freed host space from being reused under those who still look at it

Nothing here knows an image format, the network or trio.
"""

from nbdserve.block.device import BlockDevice
from nbdserve.block.extents import Computed, Data, Extent, GuestOffset, HostOffset, Zero
from nbdserve.block.file import HostFile
from nbdserve.block.memory import MemoryDevice
from nbdserve.block.window import Window

__all__ = [
    "BlockDevice",
    "Computed",
    "Data",
    "Extent",
    "GuestOffset",
    "HostFile",
    "HostOffset",
    "MemoryDevice",
    "Window",
    "Zero",
]
