"""NtfsWriter: an NTFS volume that can be changed.

Looking is NtfsReader's, straight from the device. Changing is libntfs-3g's, one operation at a time; behind each, what
was read before is forgotten.

What it keeps, whenever the machine stops between two writes:

- The volume is marked as in need of a check (the dirty flag of $Volume) from the first moment to a clean close.
- A file that is renamed gets its new name before it loses the old one. A file that the new name belonged to is put
  aside first, under a name of its own in the root directory, and goes last; so does a file that loses its last name
  while it is open. After a crash these are found there, as .fusemount-removed-N, with all their content.

What is made here is made as ntfs-3g makes it: names in the POSIX name space, symbolic links and devices as Interix
has them, a security descriptor that lets everyone in.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fusemount.filesystems.base import XATTR_CREATE, XATTR_REPLACE, Attributes, Changes, Inode, Space, error
from fusemount.filesystems.ntfs import links
from fusemount.filesystems.ntfs.directory import Directory, Name
from fusemount.filesystems.ntfs.library import CHANGED, MODIFIED, Mount
from fusemount.filesystems.ntfs.links import FileAttributes
from fusemount.filesystems.ntfs.reading import INFORMATION, NtfsReader, stream_name, to_ntfs_time
from fusemount.filesystems.ntfs.records import DataFlags, Reference, Type
from fusemount.filesystems.ntfs.state import DIRTY, volume_flags
from fusemount.filesystems.ntfs.volume import Node, Volume, inode_of, reference_of
from nbdserve.block.file import ReadBuffer

_LONGEST_NAME = 255  # in units of UTF-16


class NtfsWriter(NtfsReader):
    """A volume opened for writing."""

    read_only = False

    def __init__(self, volume: Volume) -> None:
        """Raises: OpenError: libntfs-3g is missing or refuses the volume."""
        super().__init__(volume)
        self._held: dict[Inode, int] = {}
        self._aside: dict[Inode, bytes] = {}
        self._device = volume.device
        self._mount: Mount | None = Mount(volume.device, volume.geometry)
        self._flags = volume_flags(volume)[0]
        with self._changing() as library:
            library.check(library.calls.ntfs_volume_write_flags(library.volume, self._flags | DIRTY))
        self._device.flush()

    # Looking

    def attributes(self, inode: Inode) -> Attributes:
        found = super().attributes(inode)
        return found._replace(links=found.links - 1) if inode in self._aside else found

    def directory(self, inode: Inode) -> Directory:
        known = super().directory(inode)
        if inode == self.root:
            for name in self._aside.values():
                if name in known.names:
                    known.remove(name)
        return known

    def space(self) -> Space:
        self._free = self._library.volume.free_clusters
        return super().space()

    # Holding

    def hold(self, inode: Inode) -> None:
        self._held[inode] = self._held.get(inode, 0) + 1

    def let_go(self, inode: Inode) -> None:
        left = self._held[inode] - 1
        if left:
            self._held[inode] = left
            return
        del self._held[inode]
        if inode in self._aside:
            self._bury(inode)

    # Changing

    def create(self, directory: Inode, name: bytes, mode: int, uid: int, gid: int, device: int = 0) -> Inode:
        kind = stat.S_IFMT(mode) or stat.S_IFREG
        if kind in (stat.S_IFCHR, stat.S_IFBLK):
            return self._make(directory, name, kind, "ntfs_create_device", kind, device)
        inode = self._make(directory, name, kind, "ntfs_create", kind)
        if kind == stat.S_IFREG and not mode & 0o200:
            self.change(inode, Changes(mode=mode))
        return inode

    def make_directory(self, directory: Inode, name: bytes, mode: int, uid: int, gid: int) -> Inode:
        return self._make(directory, name, stat.S_IFDIR, "ntfs_create", stat.S_IFDIR)

    def make_symlink(self, directory: Inode, name: bytes, target: bytes, uid: int, gid: int) -> Inode:
        text = self._library.text(decoded(target))
        return self._make(directory, name, stat.S_IFLNK, "ntfs_create_symlink", text, len(text))

    def _make(self, directory: Inode, name: bytes, kind: int, function: str, *details: Any) -> Inode:
        self._check_new(directory, name)
        with self._changing(directory) as library:
            text = library.text(decoded_name(name))
            with library.inode(reference_of(directory)) as parent:
                made = library.check(getattr(library.calls, function)(parent, 0, text, len(text), *details))
                number = made.mft_no
                library.calls.ntfs_inode_mark_dirty(made)
                library.check(library.calls.ntfs_inode_close_in_dir(made, parent))
                library.calls.ntfs_inode_update_times(parent, MODIFIED | CHANGED)
        reference = self.volume.system(number).reference
        self._add(directory, name, reference, kind)
        return inode_of(reference)

    def link(self, inode: Inode, directory: Inode, name: bytes) -> None:
        if self.node(inode).is_directory:
            raise error(errno.EPERM)
        if inode in self._aside:
            raise error(errno.ENOENT)
        self._check_new(directory, name)
        self._link(inode, directory, name)

    def unlink(self, directory: Inode, name: bytes) -> None:
        inode = self.lookup(directory, name)
        if self._kind(inode) == stat.S_IFDIR:
            raise error(errno.EISDIR)
        self._drop(inode, directory, name)

    def remove_directory(self, directory: Inode, name: bytes) -> None:
        inode = self.lookup(directory, name)
        if self._kind(inode) != stat.S_IFDIR:
            raise error(errno.ENOTDIR)
        if self.directory(inode).names:
            raise error(errno.ENOTEMPTY)
        self._drop(inode, directory, name)

    def rename(
        self, directory: Inode, name: bytes, new_directory: Inode, new_name: bytes, *, replace: bool = True
    ) -> None:
        inode = self.lookup(directory, name)
        target = self._inode_at(new_directory, new_name)
        if target is not None and not replace:
            raise error(errno.EEXIST)
        if target == inode:
            return
        decoded_name(new_name)
        is_directory = self._kind(inode) == stat.S_IFDIR
        if is_directory and self._is_inside(new_directory, inode):
            raise error(errno.EINVAL)
        if target is not None:
            self._check_replaceable(is_directory, target)
            self._put_aside(target, new_directory, new_name)
        try:
            self._link(inode, new_directory, new_name)
        except OSError:
            if target is not None:
                self._link(target, new_directory, new_name)
                self._bury(target)
            raise
        self._remove(inode, directory, name)
        if target is not None and target not in self._held:
            self._bury(target)

    def write(self, inode: Inode, offset: int, data: ReadBuffer) -> None:
        node = self._regular(inode)
        if not len(data):
            return
        with self._changing() as library, library.inode(node.reference) as opened:
            with library.data(opened) as stream:
                self._put(library, node, stream, offset, data)
            library.calls.ntfs_inode_update_times(opened, MODIFIED | CHANGED)

    def truncate(self, inode: Inode, size: int) -> None:
        node = self._regular(inode)
        content = node.stream(Type.DATA)
        with self._changing() as library, library.inode(node.reference) as opened:
            with library.data(opened) as stream:
                if content.flags & DataFlags.COMPRESSED and size > content.size:
                    # The library lets a compressed stream grow by writing only.
                    self._put(library, node, stream, size - 1, b"\0")
                elif size != content.size:
                    library.check(library.calls.ntfs_attr_truncate(stream, size))
            library.calls.ntfs_inode_update_times(opened, MODIFIED | CHANGED)

    def change(self, inode: Inode, changes: Changes) -> None:
        self.attributes(inode)  # raises EIO where these are damaged
        node = self.node(inode)
        created, modified, _, accessed, flags = INFORMATION.unpack_from(node.values(Type.STANDARD_INFORMATION)[0])
        if changes.mtime_ns is not None:
            modified = to_ntfs_time(changes.mtime_ns)
        if changes.atime_ns is not None:
            accessed = to_ntfs_time(changes.atime_ns)
        with self._changing() as library, library.inode(node.reference) as opened:
            if changes.mode is not None and not node.is_directory:
                flags &= ~FileAttributes.READ_ONLY
                flags |= 0 if changes.mode & 0o200 else FileAttributes.READ_ONLY
                library.check(library.calls.ntfs_set_ntfs_attrib(opened, flags.to_bytes(4, "little"), 4, 0))
            if changes.mtime_ns is not None or changes.atime_ns is not None:
                times = b"".join(value.to_bytes(8, "little") for value in (created, modified, accessed))
                library.check(library.calls.ntfs_inode_set_times(opened, times, len(times), 0))
            else:
                library.calls.ntfs_inode_update_times(opened, CHANGED)

    def set_xattr(self, inode: Inode, name: bytes, value: bytes, flags: int = 0) -> None:
        node = self.node(inode)
        stream = stream_name(name)
        if "\0" in stream or len(stream.encode("utf-16-le", "surrogatepass")) > 2 * _LONGEST_NAME:
            raise error(errno.ERANGE)
        exists = node.has(Type.DATA, stream)
        if exists and flags & XATTR_CREATE:
            raise error(errno.EEXIST)
        if not exists and flags & XATTR_REPLACE:
            raise error(errno.ENODATA)
        with self._changing() as library, library.inode(node.reference) as opened:
            if not exists:
                text = library.text(stream)
                library.check(library.calls.ntfs_attr_add(opened, Type.DATA, text, len(text), library.ffi.NULL, 0))
            with library.data(opened, stream) as content:
                library.check(library.calls.ntfs_attr_truncate(content, 0))
                self._put(library, node, content, 0, value, stream)
            library.calls.ntfs_inode_update_times(opened, CHANGED)

    def remove_xattr(self, inode: Inode, name: bytes) -> None:
        node = self.node(inode)
        stream = stream_name(name)
        if not node.has(Type.DATA, stream):
            raise error(errno.ENODATA)
        with self._changing() as library, library.inode(node.reference) as opened:
            text = library.text(stream)
            library.check(library.calls.ntfs_attr_remove(opened, Type.DATA, text, len(text)))
            library.calls.ntfs_inode_update_times(opened, CHANGED)

    def sync(self) -> None:
        self._library.settle()
        self._device.flush()

    def close(self) -> None:
        if self._mount is None:
            return
        try:
            for inode in list(self._aside):
                self._bury(inode)
            if not self._mount.damaged:
                self._mount.check(self._mount.calls.ntfs_volume_write_flags(self._mount.volume, self._flags))
        finally:
            mount, self._mount = self._mount, None
            mount.unmount()
            self._device.flush()

    # Steps of the methods above

    @property
    def _library(self) -> Mount:
        assert self._mount is not None, "the file system was closed"
        return self._mount

    @contextmanager
    def _changing(self, *directories: Inode) -> Iterator[Mount]:
        """Around a change: settle it, forget what was read; when it fails, the names in the directories too."""
        library = self._library
        try:
            yield library
            library.settle()
        except BaseException:
            for directory in directories:
                self._directories.pop(directory, None)
            raise
        finally:
            self.volume.reload()

    def _link(self, inode: Inode, directory: Inode, name: bytes) -> None:
        """One more name, for a directory too (in a rename)."""
        kind = self._kind(inode)
        with self._changing(directory) as library:
            text = library.text(decoded_name(name))
            with library.inode(reference_of(inode)) as opened:
                # The directory is closed first: closing the file updates the directory's copy of its times.
                with library.inode(reference_of(directory)) as parent:
                    library.check(library.calls.ntfs_link(opened, parent, text, len(text)))
                    library.calls.ntfs_inode_update_times(parent, MODIFIED | CHANGED)
                library.calls.ntfs_inode_update_times(opened, CHANGED)
        self._add(directory, name, reference_of(inode), kind)

    def _drop(self, inode: Inode, directory: Inode, name: bytes) -> None:
        """Take a name away; a file that is held lives on without one."""
        if inode in self._held and (self.node(inode).is_directory or self.link_count(self.node(inode)) == 1):
            self._put_aside(inode, directory, name)
        else:
            self._remove(inode, directory, name)

    def _put_aside(self, inode: Inode, directory: Inode, name: bytes) -> None:
        """Move a file from a name to one in the root directory that nobody sees."""
        taken = self.directory(self.root).names
        number = inode & 0xFFFFFFFF
        while (hidden := b".fusemount-removed-%d" % number) in taken or hidden in self._aside.values():
            number += 1
        if inode in self._aside:
            raise error(errno.EBUSY)
        self._link(inode, self.root, hidden)
        self._aside[inode] = hidden
        self._directories.pop(self.root, None)
        self._remove(inode, directory, name)

    def _bury(self, inode: Inode) -> None:
        """Remove the name that a file has aside, and with it the file if it has no other."""
        self._remove(inode, self.root, self._aside[inode])
        del self._aside[inode]

    def _remove(self, inode: Inode, directory: Inode, name: bytes) -> None:
        with self._changing(directory) as library:
            text = library.text(decoded_name(name))
            calls, null = library.calls, library.ffi.NULL
            opened = library.check(calls.ntfs_inode_open(library.volume, whole_reference(inode)))
            parent = calls.ntfs_inode_open(library.volume, whole_reference(directory))
            if not parent:
                failure = library.failure()
                calls.ntfs_inode_close(opened)
                raise failure
            # It closes both, whatever happens.
            library.check(calls.ntfs_delete(library.volume, null, opened, parent, text, len(text)))
        if directory in self._directories:
            self._directories[directory].remove(name)

    def _add(self, directory: Inode, name: bytes, reference: Reference, kind: int) -> None:
        if directory in self._directories:
            flags = {stat.S_IFDIR: FileAttributes.DIRECTORY, stat.S_IFREG: 0}.get(kind, FileAttributes.SYSTEM)
            self._directories[directory].add(name, Name(reference, flags, 0))

    def _put(self, library: Mount, node: Node, stream: Any, offset: int, data: ReadBuffer, name: str = "") -> None:
        """Write to an open stream."""
        view = library.ffi.from_buffer(data)
        done = 0
        while done < len(data):
            done += (
                library.check(library.calls.ntfs_attr_pwrite(stream, offset + done, len(data) - done, view + done))
                or self._nothing_written()
            )
        if node.has(Type.DATA, name) and node.stream(Type.DATA, name).flags & DataFlags.COMPRESSED:
            library.check(library.calls.ntfs_attr_pclose(stream))

    @staticmethod
    def _nothing_written() -> int:
        raise error(errno.EIO)

    def _regular(self, inode: Inode) -> Node:
        node = self.node(inode)
        if node.is_directory:
            raise error(errno.EISDIR)
        if links.tag_of(node):
            raise error(errno.EOPNOTSUPP)
        if node.stream(Type.DATA).flags & DataFlags.ENCRYPTED:
            raise error(errno.EACCES)
        return node

    def _kind(self, inode: Inode) -> int:
        return stat.S_IFMT(self.attributes(inode).mode)

    def _inode_at(self, directory: Inode, name: bytes) -> Inode | None:
        found = self.directory(directory).names.get(name)
        return None if found is None else inode_of(found.reference)

    def _check_new(self, directory: Inode, name: bytes) -> None:
        decoded_name(name)
        if name in self.directory(directory).names:
            raise error(errno.EEXIST)

    def _check_replaceable(self, by_directory: bool, target: Inode) -> None:
        if self._kind(target) == stat.S_IFDIR:
            if not by_directory:
                raise error(errno.EISDIR)
            if self.directory(target).names:
                raise error(errno.ENOTEMPTY)
        elif by_directory:
            raise error(errno.ENOTDIR)

    def _is_inside(self, directory: Inode, above: Inode) -> bool:
        """Whether a directory is `above`, or lies below it."""
        seen: set[Inode] = set()
        while directory != self.root and directory not in seen:
            if directory == above:
                return True
            seen.add(directory)
            directory = self.parent(self.node(directory))
        return False


def decoded(text: bytes) -> str:
    """UTF-8 as NTFS can store it. Raises EILSEQ for what would come back as something else."""
    try:
        result = text.decode("utf-8", "surrogatepass")
        stored = result.encode("utf-16-le", "surrogatepass")
        if stored.decode("utf-16-le", "surrogatepass").encode("utf-8", "surrogatepass") == text:
            return result
    except UnicodeDecodeError:
        pass
    raise error(errno.EILSEQ)


def decoded_name(name: bytes) -> str:
    """A name, checked; ENAMETOOLONG behind 255 units of UTF-16."""
    result = decoded(name)
    if len(result.encode("utf-16-le", "surrogatepass")) > 2 * _LONGEST_NAME:
        raise error(errno.ENAMETOOLONG)
    return result


def whole_reference(inode: Inode) -> int:
    """The file reference of an inode in one number, as on disk."""
    reference = reference_of(inode)
    return reference.sequence << 48 | reference.number
