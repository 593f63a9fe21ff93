"""LUKS: encrypted disks, versions 1 and 2, read and write; and what encrypts the clusters of a qcow2 image.

    header      what both versions say: cipher, key slots, where the data lies
    luks1       version 1, a fixed header; luks2: version 2, JSON
    keyslots    passphrase -> volume key
    antiforensic  keys stored so that losing any part of them loses them
    ciphers     sectors, encrypted and decrypted; libcrypto: the same, quicker
    file        a host file whose bytes are encrypted where they lie
    image       the disk
    opening     a file -> an image
    create      new images

Sources: "LUKS1 On-Disk Format Specification", version 1.2.3 (Fruhwirth, 2018); "LUKS2 On-Disk Format Specification",
version 1.1.3 (Broz, 2024). What a key slot says costs time and memory before it is known to be right, so both are
bounded (keyslots).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbdserve.block.device import BlockDevice
    from nbdserve.block.file import HostFile
    from nbdserve.formats import OpenOptions


def open_image(file: HostFile, options: OpenOptions) -> BlockDevice:
    """Open a LUKS image with the passphrase from the options; the device takes the file over.

    Raises:
        OpenError: with the reason in one line.
    """
    from nbdserve.formats.luks.opening import open_luks

    return open_luks(file, options)
