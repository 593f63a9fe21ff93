"""Internal snapshots: reading their table (QEMU, docs/interop/qcow2, section "Snapshots")."""

from __future__ import annotations

from dataclasses import dataclass

from construct import Int16ub, Int32ub, Int64ub, Struct

from nbdserve.block.file import HostFile
from nbdserve.errors import FormatError, OpenError
from nbdserve.formats.qcow2.header import MAXIMUM_L1_BYTES, Header, l1_entries_for

_MAXIMUM_TABLE = 64 << 20  # bytes; as QEMU
_MAXIMUM_EXTRA = 1024

_ENTRY = Struct(
    "l1_offset" / Int64ub,
    "l1_entries" / Int32ub,
    "id_size" / Int16ub,
    "name_size" / Int16ub,
    "seconds" / Int32ub,
    "nanoseconds" / Int32ub,
    "vm_clock" / Int64ub,
    "vm_state_size" / Int32ub,
    "extra_size" / Int32ub,
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One internal snapshot: its names, the L1 table it keeps, and the size of the disk at that time, in bytes."""

    id: str
    name: str
    l1_offset: int
    l1_entries: int
    size: int


def read_snapshots(file: HostFile, header: Header) -> tuple[list[Snapshot], int]:
    """The snapshots, and where their table ends in the file.

    Raises:
        FormatError: the table or an entry does not lie inside the file.
    """
    found = []
    position, length = header.snapshots_offset, file.size
    for _ in range(header.snapshots):
        if position + _ENTRY.sizeof() > length or position - header.snapshots_offset > _MAXIMUM_TABLE:
            raise FormatError(f"{file.name}: the snapshot table does not lie inside the file; the image is damaged")
        entry = _ENTRY.parse(bytes(file.read(position, _ENTRY.sizeof())))
        if entry.extra_size > _MAXIMUM_EXTRA:
            raise FormatError(f"{file.name}: a snapshot has {entry.extra_size} bytes of extra data; it is damaged")
        position += _ENTRY.sizeof()
        extra = bytes(file.read(position, entry.extra_size))
        position += entry.extra_size
        names = bytes(file.read(position, entry.id_size + entry.name_size))
        position += len(names)
        position += -position % 8  # entries begin at multiples of eight; the table's own offset is one
        size = int.from_bytes(extra[8:16], "big") if len(extra) >= 16 else header.size
        found.append(
            Snapshot(
                id=names[: entry.id_size].decode("utf-8", "replace"),
                name=names[entry.id_size :].decode("utf-8", "replace"),
                l1_offset=entry.l1_offset,
                l1_entries=entry.l1_entries,
                size=size,
            )
        )
    return found, position


def find_snapshot(snapshots: list[Snapshot], wanted: str, file: HostFile, header: Header) -> Snapshot:
    """The snapshot with this ID or, if there is none, this name; its L1 table is checked.

    Raises:
        OpenError: there is none; the message lists those there are.
        FormatError: its L1 table does not fit the file or the disk.
    """
    chosen = [each for each in snapshots if each.id == wanted] or [each for each in snapshots if each.name == wanted]
    if not chosen:
        names = ", ".join(f"{each.name} (ID {each.id})" for each in snapshots) or "none"
        raise OpenError(f"{file.name}: no snapshot {wanted!r}; it has: {names}")
    snapshot = chosen[0]
    if (
        snapshot.l1_offset & (header.cluster_size - 1)
        or 8 * snapshot.l1_entries > MAXIMUM_L1_BYTES
        or snapshot.l1_offset + 8 * snapshot.l1_entries > file.size
        or snapshot.l1_entries < l1_entries_for(snapshot.size, header.cluster_bits)
    ):
        raise FormatError(f"{file.name}: the L1 table of snapshot {wanted!r} is damaged")
    return snapshot
