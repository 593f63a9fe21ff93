"""In which state a volume was left: may it be written to?

Windows keeps what it has not written yet in $LogFile, and in memory that it expects to find again when it wakes. So a
volume is written to only when neither is there: its log is closed, Windows is not hibernated on it (nor shut down with
"fast startup", which is the same for the disk), and it is not marked as damaged. Reading is harmless always; it shows
what the disk holds, and the log is never replayed and never emptied.

The layout of the restart pages of the log is that of libntfs-3g's logfile.h; so are the rules, which that library
applies again when it opens a volume.
"""

from __future__ import annotations

import errno
import struct

from fusemount.filesystems.base import error
from fusemount.filesystems.ntfs.directory import read_directory
from fusemount.filesystems.ntfs.records import Type, apply_fixups, parse_record
from fusemount.filesystems.ntfs.volume import LOG, MFT, MIRROR, ROOT, VOLUME, Volume

DIRTY = 0x0001
"""The flag of $Volume that asks for a check."""

_RESTART_PAGE = struct.Struct("<16x II H hh")
_RESTART_AREA = struct.Struct("<Q HHH H")
_VOLUME_IS_CLEAN = 2
_NO_CLIENT = 0xFFFF
_HIBERNATED = (b"hibr", b"HIBR")
_LARGEST_PAGE = 64 << 10

_CHECK = "Let Windows check it (chkdsk /f), or run ntfsfix; reading works"


def volume_flags(volume: Volume) -> tuple[int, tuple[int, int]]:
    """The flags of $Volume, and the version of NTFS."""
    for value in volume.system(VOLUME).values(Type.VOLUME_INFORMATION):
        if len(value) >= 12:
            major, minor, flags = struct.unpack_from("<8xBBH", value)
            return flags, (major, minor)
    raise error(errno.EIO)


def obstacle(volume: Volume) -> tuple[bool, str]:
    """Whether the volume was left in use, and one line on why it must not be written to ("": it may be)."""
    try:
        flags, version = volume_flags(volume)
        if is_hibernated(volume):
            return True, (
                "NTFS: Windows is hibernated on this volume, or was shut down with fast startup; "
                "shut it down fully (shutdown /s /t 0). Reading works, and shows what is on the disk"
            )
        if log := _log_obstacle(volume):
            return True, log
        if flags & DIRTY:
            return True, f"NTFS: the volume was not cleanly unmounted. {_CHECK}"
        if version not in ((1, 2), (3, 0), (3, 1)):
            return False, f"NTFS: version {version[0]}.{version[1]} is only read"
        if not _mirror_agrees(volume):
            return False, f"NTFS: $MFTMirr, the copy of the first files, differs from them. {_CHECK}"
    except BlockingIOError:
        raise
    except OSError:
        return False, f"NTFS: system files of the volume are damaged. {_CHECK}"
    return False, ""


def is_hibernated(volume: Volume) -> bool:
    """Whether hiberfil.sys says that Windows sleeps."""
    for name, entry in read_directory(volume.system(ROOT), volume.geometry).names.items():
        if name.lower() == b"hiberfil.sys":
            content = volume.node(entry.reference).stream(Type.DATA)
            # One too short for an image is left by a Windows that hibernated with this volume as a further disk.
            return content.size < 4096 or bytes(content.read(0, 4)) in _HIBERNATED
    return False


def _log_obstacle(volume: Volume) -> str:
    log = volume.system(LOG).stream(Type.DATA)
    newest: tuple[int, int, bool] | None = None
    position = 0
    empty = True
    while position + 512 <= min(log.size, _LARGEST_PAGE + 512):
        head = bytes(log.read(position, 512))
        if head[:4] == b"\xff\xff\xff\xff":
            if not empty:
                break
        else:
            empty = False
        if head[:4] == b"RCRD":
            break
        if head[:4] in (b"RSTR", b"CHKD") and (page := _restart_page(bytes(log.read(position, _LARGEST_PAGE)))):
            newest = page if newest is None else max(newest, page, key=lambda page: page[0])
            if position:
                break
        position = position * 2 or 512
    if empty:
        return ""
    if newest is None:
        return f"NTFS: the log of the volume is damaged. {_CHECK}"
    _, major, clean = newest
    if major == 2:
        return (
            "NTFS: Windows keeps changes of this volume in its cache; shut it down fully (shutdown /s /t 0). "
            "Reading works, and shows what is on the disk"
        )
    return "" if clean else f"NTFS: the log holds changes that are not on the volume yet. {_CHECK}"


def _restart_page(page: bytes) -> tuple[int, int, bool] | None:
    """Of a restart page: its age (a log sequence number), the major version, whether the log is closed."""
    size, _, area, _, major = _RESTART_PAGE.unpack_from(page)
    if not 512 <= size <= len(page) or size & (size - 1) or area + _RESTART_AREA.size > size:
        return None
    block = bytearray(page[:size])
    if page[:4] == b"RSTR" or block[6:8] != b"\0\0":
        try:
            apply_fixups(block, page[:4])
        except OSError:
            return None
    lsn, _, _, in_use, flags = _RESTART_AREA.unpack_from(block, area)
    return lsn, major, in_use == _NO_CLIENT or bool(flags & _VOLUME_IS_CLEAN)


def _mirror_agrees(volume: Volume) -> bool:
    geometry = volume.geometry
    mirror = volume.system(MIRROR).stream(Type.DATA)
    for number in range(MFT, min(mirror.size // geometry.record, 4)):
        offset = number * geometry.record
        copy = parse_record(number, volume.device.read(geometry.mirror * geometry.cluster + offset, geometry.record))
        if copy.attributes != volume.record(number).attributes:
            return False
    return True
