"""The directory of internal snapshots, read and built (QEMU, docs/interop/qcow2, "Snapshots")."""

from __future__ import annotations

from dataclasses import dataclass

from nbdserve.block.file import HostFile
from nbdserve.errors import FormatError, OpenError
from nbdserve.formats.qcow2.entries import ENTRY_SIZE
from nbdserve.formats.qcow2.header import MAXIMUM_L1, Header, check_place
from nbdserve.formats.record import Record

_ENTRY = Record(
    ">",
    l1_table_offset="Q",
    l1_size="I",
    id_length="H",
    name_length="H",
    seconds="I",
    nanoseconds="I",
    guest_nanoseconds="Q",
    vm_state_size="I",
    extra_size="I",
)
_EXTRA = Record(">", vm_state_size="Q", disk_size="Q")
_MAXIMUM_EXTRA = 1024  # bytes, as in QEMU
_MAXIMUM_DIRECTORY = 64 << 20  # bytes, as in QEMU


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One entry.

    Attributes:
        l1_offset, l1_entries: where its L1 table lies in bytes, and how many entries it has.
        size: length of the disk in bytes when the snapshot was taken.
        seconds, nanoseconds: when that was, since the epoch.
        guest_nanoseconds: how long the guest had been running.
        vm_state_size: bytes of the saved state of a virtual machine; 0: none was saved.
        unknown: what newer versions say besides.
    """

    id: str
    name: str
    l1_offset: int
    l1_entries: int
    size: int
    seconds: int = 0
    nanoseconds: int = 0
    guest_nanoseconds: int = 0
    vm_state_size: int = 0
    unknown: bytes = b""


def read_snapshots(file: HostFile, header: Header) -> tuple[list[Snapshot], int]:
    """All entries of the directory, in its order, and its length in bytes.

    Raises:
        FormatError: the directory, or the place of a snapshot's L1 table, is impossible.
    """
    snapshots: list[Snapshot] = []
    position = header.snapshots_offset
    for number in range(header.snapshots):
        snapshot, length = _read_entry(file, header, number, position)
        snapshots.append(snapshot)
        position += length
        if position - header.snapshots_offset > _MAXIMUM_DIRECTORY:
            raise FormatError(f"{file.name}: the snapshot table is longer than {_MAXIMUM_DIRECTORY} bytes")
    return snapshots, position - header.snapshots_offset


def _read_entry(file: HostFile, header: Header, number: int, position: int) -> tuple[Snapshot, int]:
    what = f"entry {number} of the snapshot table"
    fields = _ENTRY.parse(bytes(file.read(position, _ENTRY.size)))
    variable = fields.extra_size + fields.id_length + fields.name_length
    length = -(-(_ENTRY.size + variable) // 8) * 8
    if fields.extra_size > _MAXIMUM_EXTRA or position + _ENTRY.size + variable > file.size:
        raise FormatError(f"{file.name}: {what} is longer than the file or than is possible; the image is damaged")
    rest = bytes(file.read(position + _ENTRY.size, variable))
    extra, names = rest[: fields.extra_size], rest[fields.extra_size :]
    if fields.l1_size * ENTRY_SIZE > MAXIMUM_L1:
        raise FormatError(f"{file.name}: {what} announces an L1 table of {fields.l1_size} entries")
    check_place(file, header.geometry, f"L1 table of {what}", fields.l1_table_offset, fields.l1_size * ENTRY_SIZE)
    snapshot = Snapshot(
        id=names[: fields.id_length].decode("utf-8", "surrogateescape"),
        name=names[fields.id_length :].decode("utf-8", "surrogateescape"),
        l1_offset=fields.l1_table_offset,
        l1_entries=fields.l1_size,
        size=int.from_bytes(extra[8:16], "big") if len(extra) >= 16 else header.size,
        seconds=fields.seconds,
        nanoseconds=fields.nanoseconds,
        guest_nanoseconds=fields.guest_nanoseconds,
        vm_state_size=int.from_bytes(extra[:8], "big") if len(extra) >= 8 else fields.vm_state_size,
        unknown=extra[16:],
    )
    return snapshot, length


def build_snapshots(snapshots: list[Snapshot]) -> bytes:
    """The directory as it lies on the disk."""
    return b"".join(_build_entry(snapshot) for snapshot in snapshots)


def _build_entry(snapshot: Snapshot) -> bytes:
    id, name = (text.encode("utf-8", "surrogateescape") for text in (snapshot.id, snapshot.name))
    extra = _EXTRA.build({"vm_state_size": snapshot.vm_state_size, "disk_size": snapshot.size}) + snapshot.unknown
    fixed = _ENTRY.build(
        {
            "l1_table_offset": snapshot.l1_offset,
            "l1_size": snapshot.l1_entries,
            "id_length": len(id),
            "name_length": len(name),
            "seconds": snapshot.seconds,
            "nanoseconds": snapshot.nanoseconds,
            "guest_nanoseconds": snapshot.guest_nanoseconds,
            "vm_state_size": min(snapshot.vm_state_size, (1 << 32) - 1),
            "extra_size": len(extra),
        }
    )
    entry = fixed + extra + id + name
    return entry.ljust(-(-len(entry) // 8) * 8, b"\0")


def find_snapshot(file: HostFile, header: Header, snapshots: list[Snapshot], wanted: str) -> Snapshot:
    """The snapshot with an ID or, failing that, a name.

    Raises:
        OpenError: there is none.
        FormatError: its L1 table is too small for its disk.
    """
    found = [one for one in snapshots if one.id == wanted] or [one for one in snapshots if one.name == wanted]
    if not found:
        names = ", ".join(f"{one.name} (ID {one.id})" for one in snapshots[:20]) or "none"
        raise OpenError(f"{file.name}: no snapshot {wanted!r}; it has: {names}")
    snapshot = found[0]
    if snapshot.size >= 1 << 63 or snapshot.l1_entries << header.geometry.table_shift < snapshot.size:
        raise FormatError(f"{file.name}: snapshot {wanted!r} has an L1 table too small for its {snapshot.size} bytes")
    return snapshot
