"""Exports: the disks that a server offers, by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nbdserve.block import BlockDevice
from nbdserve.protocol.constants import TransmissionFlags
from nbdserve.protocol.messages import ExportInfo

_ALWAYS = (
    TransmissionFlags.HAS_FLAGS
    | TransmissionFlags.SEND_FLUSH
    | TransmissionFlags.SEND_FUA
    | TransmissionFlags.SEND_DF
    | TransmissionFlags.SEND_CACHE
    # A flush on one connection covers what was answered on all of them: they share one device.
    | TransmissionFlags.CAN_MULTI_CONN
)
_WRITABLE = TransmissionFlags.SEND_TRIM | TransmissionFlags.SEND_WRITE_ZEROES | TransmissionFlags.SEND_FAST_ZERO


@dataclass(frozen=True, slots=True)
class Export:
    """A device under a name, with a description for people."""

    name: str
    device: BlockDevice
    description: str = ""

    @property
    def info(self) -> ExportInfo:
        """What the handshake announces."""
        device = self.device
        flags = _ALWAYS | (TransmissionFlags.READ_ONLY if device.read_only else _WRITABLE)
        preferred = min(max(device.preferred_block, 4096), 32 << 20)
        return ExportInfo(self.name, device.size, flags, self.description, preferred_block=preferred)


class ExportTable:
    """The exports of one server."""

    def __init__(self, exports: Iterable[Export]) -> None:
        self._exports = {export.name: export for export in exports}

    def __getitem__(self, name: str) -> Export:
        return self._exports[name]

    def find(self, name: str) -> ExportInfo | None:
        """The export a client means, or None."""
        export = self._exports.get(name)
        return export.info if export else None

    def infos(self) -> list[ExportInfo]:
        """All of them, for LIST."""
        return [export.info for export in self._exports.values()]

    def devices(self) -> list[BlockDevice]:
        """The devices behind them, each once."""
        return list({id(export.device): export.device for export in self._exports.values()}.values())
