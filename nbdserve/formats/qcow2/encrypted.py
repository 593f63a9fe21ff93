"""Images whose clusters are encrypted with LUKS (QEMU, docs/interop/qcow2, "Full disk encryption header pointer").

Tables are not encrypted, nor are compressed clusters, which QEMU does not write into such images. Where a guest cluster
lies is found as in any image; only its bytes have to be worked out, by a file that encrypts and decrypts on the way
(HostSpace.guest_file). Hence two rules:

- nothing outside may be told where the bytes lie, so that they are not sent or overwritten as they are
- host space that reads as zeros does not show zeros to the guest, so that a new cluster is written out whole
"""

from __future__ import annotations

from dataclasses import replace

from nbdserve.block.extents import Computed, Data, HostOffset, Zero
from nbdserve.block.file import HostFile, ReadBuffer, WriteBuffer
from nbdserve.formats.base import Reservation
from nbdserve.formats.qcow2.image import Qcow2Image
from nbdserve.formats.qcow2.subclusters import SubclusterImage
from nbdserve.formats.qcow2.writable import WritableQcow2Image
from nbdserve.formats.qcow2.writable_subclusters import WritableSubclusterImage


class EncryptedImage(Qcow2Image):
    """Reads encrypted clusters."""

    def locate(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        return None

    def locate_writable(self, offset: int, length: int) -> tuple[HostFile, HostOffset] | None:
        return None

    def _data_extent(self, host: int, length: int) -> Data | Zero | Computed:
        return Computed(length)

    def decompress(self, offset: int, buffer: WriteBuffer) -> None:
        view = memoryview(buffer)
        while view:
            piece = view[: self.cluster_size - offset % self.cluster_size]
            place = self.place_of(offset)
            if place is None or place[1]:  # compressed, or changed since it was looked up
                super().decompress(offset, piece)
            else:
                self.data_file.read_into(place[0], piece)
            view = view[len(piece) :]
            offset += len(piece)


class EncryptedSubclusterImage(EncryptedImage, SubclusterImage):
    """The same with extended L2 entries."""


class WritableEncryptedImage(EncryptedImage, WritableQcow2Image):
    """Writes encrypted clusters: reserve -> write -> publish as in any image."""

    def reserve(self, offset: int, length: int) -> Reservation:
        return replace(super().reserve(offset, length), zeroed=False)

    def write_nowait(self, offset: int, data: ReadBuffer) -> bool:
        return False

    def write_compressed(self, offset: int, data: ReadBuffer) -> None:
        raise self._refusal()


class WritableEncryptedSubclusterImage(WritableEncryptedImage, WritableSubclusterImage):
    """The same with extended L2 entries."""
