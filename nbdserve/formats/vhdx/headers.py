"""The two headers of a VHDX, of which the one with the higher sequence number counts ([MS-VHDX] 2.2.2).

The invariant kept here (2.2.2.1): at every moment at least one header on the disk is whole. A change goes to the header
that does not count, is synced, and is then made again in the other one.

Before anything else in the file is changed for the first time in a session, FileWriteGuid must change; before guest
bytes are changed, DataWriteGuid, by which differencing disks know that their parent is still what it was.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from construct import Bytes, Const, Int16ul, Int32ul, Int64ul, Padded, Padding, Struct

from nbdserve.block.file import HostFile
from nbdserve.errors import FormatError, Unsupported
from nbdserve.formats.vhdx import HEADER_SECTION, MIB
from nbdserve.formats.vhdx.checksum import checksum_of, is_intact

HEADER_SIZE = 4096
HEADER_PLACES = (64 << 10, 128 << 10)
_CHECKSUM = 4
_LAST_SEQUENCE = (1 << 64) - (1 << 32)  # room for more updates than anybody makes
NO_GUID = uuid.UUID(int=0)

_HEADER = Padded(
    HEADER_SIZE,
    Struct(
        "signature" / Const(b"head"),
        Padding(4),
        "sequence" / Int64ul,
        "file_write_guid" / Bytes(16),
        "data_write_guid" / Bytes(16),
        "log_guid" / Bytes(16),
        "log_version" / Int16ul,
        "version" / Int16ul,
        "log_length" / Int32ul,
        "log_offset" / Int64ul,
    ),
)


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says.

    Attributes:
        sequence: the header with the higher number is current.
        log_guid: marks the log entries that count; NO_GUID when the log is empty.
        log_offset, log_length: the log's place in the file, in bytes, multiples of 1 MiB.
    """

    sequence: int
    file_write_guid: uuid.UUID
    data_write_guid: uuid.UUID
    log_guid: uuid.UUID
    log_offset: int
    log_length: int

    def build(self) -> bytes:
        """The 4 KiB of the header, with its checksum."""
        content = bytearray(
            _HEADER.build(
                {
                    "sequence": self.sequence,
                    "file_write_guid": self.file_write_guid.bytes_le,
                    "data_write_guid": self.data_write_guid.bytes_le,
                    "log_guid": self.log_guid.bytes_le,
                    "log_version": 0,
                    "version": 1,
                    "log_length": self.log_length,
                    "log_offset": self.log_offset,
                }
            )
        )
        content[_CHECKSUM : _CHECKSUM + 4] = checksum_of(content, _CHECKSUM).to_bytes(4, "little")
        return bytes(content)


class Headers:
    """The headers of an open file.

    Attributes:
        current: the one that counts.
    """

    def __init__(self, file: HostFile) -> None:
        """Read them.

        Raises:
            FormatError: neither is whole, or they contradict each other.
            Unsupported: another version of the format.
        """
        self._file = file
        contents = [bytes(file.read(place, HEADER_SIZE)) for place in HEADER_PLACES]
        whole = [
            slot for slot, content in enumerate(contents) if content[:4] == b"head" and is_intact(content, _CHECKSUM)
        ]
        if not whole:
            raise FormatError(f"{file.name}: neither of the two VHDX headers is valid; the image is damaged")
        headers = {slot: _parse(contents[slot], file) for slot in whole}
        self._slot = max(whole, key=lambda slot: (headers[slot].sequence, -slot))
        self.current = headers[self._slot]
        # Disk2vhd writes two headers with the same number; that is fine as long as they say the same.
        if len({(header.sequence, header) for header in headers.values()}) > len(
            {header.sequence for header in headers.values()}
        ):
            raise FormatError(
                f"{file.name}: the two VHDX headers have the same number but differ; the image is damaged"
            )

    def update(
        self,
        *,
        file_write_guid: uuid.UUID | None = None,
        data_write_guid: uuid.UUID | None = None,
        log_guid: uuid.UUID | None = None,
    ) -> None:
        """Change fields, in both headers one after the other, and return when that is on stable storage."""
        for _ in HEADER_PLACES:
            old = self.current
            new = Header(
                sequence=old.sequence + 1,
                file_write_guid=file_write_guid or old.file_write_guid,
                data_write_guid=data_write_guid or old.data_write_guid,
                log_guid=old.log_guid if log_guid is None else log_guid,
                log_offset=old.log_offset,
                log_length=old.log_length,
            )
            self._file.write(HEADER_PLACES[1 - self._slot], new.build())
            self._file.sync()
            self._slot, self.current = 1 - self._slot, new


def _parse(content: bytes, file: HostFile) -> Header:
    fields = _HEADER.parse(content)
    if fields.version != 1 or fields.log_version != 0:
        raise Unsupported(
            f"{file.name}: VHDX version {fields.version} with log version {fields.log_version} is not handled; "
            "version 1 with log version 0 is"
        )
    start, end = fields.log_offset, fields.log_offset + fields.log_length
    if start % MIB or fields.log_length % MIB or (fields.log_length and not HEADER_SECTION <= start < end <= file.size):
        raise FormatError(
            f"{file.name}: the header puts the log at {start} ({fields.log_length} bytes), which is not whole MiB "
            f"inside the file's {file.size} bytes; the image is truncated or damaged"
        )
    if fields.sequence > _LAST_SEQUENCE:
        raise FormatError(
            f"{file.name}: the header's sequence number {fields.sequence} leaves no room; the image is damaged"
        )
    return Header(
        fields.sequence,
        uuid.UUID(bytes_le=fields.file_write_guid),
        uuid.UUID(bytes_le=fields.data_write_guid),
        uuid.UUID(bytes_le=fields.log_guid),
        start,
        fields.log_length,
    )
