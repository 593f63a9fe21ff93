"""The requests of the kernel's FUSE, answered from a Tree through pyfuse3; this file owns what an error looks like.

Handlers are plain calls. Each is tried at once, on the event loop, which is the fastest there is while nothing has to
be waited for. One that would have to wait raises BlockingIOError, having changed nothing, and then the worker of the
file system calls it again: a slow disk stalls those alone who want something of it.

The kernel may remember nearly everything: nobody else changes the image while it is mounted. So names and attributes
last practically for ever, also names that do not exist; file contents stay in the page cache from one opening to the
next, and the kernel gathers writes (writeback cache) wherever something is writable.

The numbers of open files and directories (file handles) are those of their nodes: there is no other state.

Errors: OSError is the errno it has. What nbdserve raises (a damaged or locked image) is EIO and one line in the log;
so is everything unexpected, with a traceback: the request fails and the mount goes on.
"""

from __future__ import annotations

import errno
import os
import stat
import traceback
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import pyfuse3
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FlagT,
    FUSEError,
    InodeT,
    ModeT,
    ReaddirToken,
    RequestContext,
    SetattrFields,
    StatvfsData,
)

from fusemount.filesystems.base import Attributes, Changes
from fusemount.filesystems.files import DeviceFiles
from fusemount.owners import Owners
from fusemount.vfs import ROOT, Found, Member, Node, Tree
from fusemount.worker import Worker
from nbdserve.errors import NbdserveError

_FOR_EVER = 1e6  # seconds

T = TypeVar("T")
P = ParamSpec("P")


def _answered(handler: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """The handler, called where the answer is found, as pyfuse3 wants it.

    Every failure becomes an errno: pyfuse3 ends the mount for any other exception. The first argument behind `self`
    says which file system is meant: a node, the file handle that is one, or else that of the root.
    """

    @wraps(handler)
    async def answer(*args: P.args, **kwargs: P.kwargs) -> T:
        self = cast("GuestOperations", args[0])
        self.requests += 1
        try:
            try:
                return handler(*args, **kwargs)
            except BlockingIOError:
                return await self.later(args[1], handler, *args, **kwargs)
        except FUSEError:
            raise
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from None
        except NbdserveError as error:
            self.log(str(error))
            raise FUSEError(errno.EIO) from None
        except Exception:
            self.log("unexpected: " + traceback.format_exc())
            raise FUSEError(errno.EIO) from None

    return answer


class GuestOperations(pyfuse3.Operations):
    """The handlers.

    Args:
        facts: extended attributes of the mount's root that are not the guest's and are not listed, for whoever wants
            to know the process behind the mount.
        log: takes one line for each failure that deserves one.

    Attributes:
        requests: how many there have been.
        handed_on: how many of them workers have not answered yet.
    """

    supports_dot_lookup = False
    enable_acl = False

    def __init__(self, tree: Tree, owners: Owners, facts: dict[bytes, bytes], log: Callable[[str], None]) -> None:
        super().__init__()
        self.tree = tree
        self.owners = owners
        self.facts = facts
        self.log = log
        self.requests = 0
        self.handed_on = 0
        self.read_only = all(member.fs.read_only for member in tree.members)
        self.enable_writeback_cache = not self.read_only
        self._workers = [Worker(f"file system {index}") for index in range(len(tree.members))]

    def stop_workers(self) -> None:
        """Return when everything that the kernel has asked for is done."""
        for worker in self._workers:
            worker.stop()

    async def sync_changes(self) -> None:
        """Bring to the disk what has been changed since the last time."""
        for member in self.tree.members:
            if member.changed:
                try:
                    await self.later(member.root, self.tree.sync, member)
                except (OSError, NbdserveError) as error:
                    self.log(f"writing to the image: {error}")

    async def later(self, node: object, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Have the worker of a node's file system call something."""
        index = self.tree.members.index(self._member(node if isinstance(node, int) else ROOT))
        self.handed_on += 1
        try:
            return await self._workers[index].run(function, *args, **kwargs)
        finally:
            self.handed_on -= 1

    def _member(self, node: int) -> Member:
        return self.tree.split(Node(node))[0]

    # What the kernel is told

    def _entry(
        self, node: Node, attributes: Attributes, *, lasting: bool = True, named: bool = True
    ) -> EntryAttributes:
        member = self._member(node)
        entry = EntryAttributes()
        entry.st_ino = InodeT(node)
        entry.entry_timeout = _FOR_EVER if lasting and named else 0
        entry.attr_timeout = _FOR_EVER if lasting else 0
        entry.st_mode = ModeT(attributes.mode)
        entry.st_nlink = attributes.links
        entry.st_uid, entry.st_gid = self.owners.shown(attributes, member.fs.has_owners)
        entry.st_rdev = attributes.device
        entry.st_size = attributes.size
        entry.st_blocks = attributes.blocks
        entry.st_atime_ns = attributes.atime_ns
        entry.st_mtime_ns = attributes.mtime_ns
        entry.st_ctime_ns = attributes.ctime_ns
        return entry

    def _found(self, parent: int, found: Found) -> EntryAttributes:
        return self._entry(*found, named=self._member(parent).fs.names_last)

    # Looking

    @_answered
    def lookup(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> EntryAttributes:
        try:
            found = self.tree.lookup(Node(parent_inode), name)
        except FileNotFoundError:
            if not self._member(parent_inode).fs.names_last:
                raise
            missing = EntryAttributes()
            missing.st_ino = InodeT(0)
            missing.entry_timeout = _FOR_EVER
            return missing
        return self._found(parent_inode, found)

    @_answered
    def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        return self._entry(Node(inode), self.tree.attributes(Node(inode)))

    @_answered
    def readlink(self, inode: InodeT, ctx: RequestContext) -> bytes:
        return self.tree.read_link(Node(inode))

    @_answered
    def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        return FileHandleT(inode)

    @_answered
    def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        """Positions: 1 is behind `.`, 2 behind `..`, and those of the tree are shifted by that."""
        directory = Node(fh)
        start = start_id
        for number, name in enumerate((b".", b"..")):
            if start == number:
                entry = EntryAttributes()  # of which the kernel takes no more than what it is
                entry.st_ino = InodeT(directory)
                entry.st_mode = ModeT(stat.S_IFDIR)
                if not pyfuse3.readdir_reply(token, name, entry, number + 1):
                    return
                start += 1
        named = self._member(directory).fs.names_last

        def give(name: bytes, node: Node, attributes: Attributes, lasting: bool, position: int) -> bool:
            entry = self._entry(node, attributes, lasting=lasting, named=named)
            return pyfuse3.readdir_reply(token, name, entry, position + 2)

        try:
            self.tree.entries(directory, start - 2, give)
        except BlockingIOError:
            if start == start_id:  # else the kernel has something, and asks for the rest
                raise

    @_answered
    def releasedir(self, fh: FileHandleT) -> None:
        return

    @_answered
    def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        return cast(bytes, self.tree.read(Node(fh), off, size))

    @_answered
    def statfs(self, ctx: RequestContext) -> StatvfsData:
        space = self.tree.space()
        result = StatvfsData()
        result.f_bsize = result.f_frsize = space.block_size
        result.f_blocks = space.blocks
        result.f_bfree = result.f_bavail = space.free_blocks
        result.f_files = space.inodes
        result.f_ffree = result.f_favail = space.free_inodes
        result.f_namemax = space.longest_name
        return result

    @_answered
    def getxattr(self, inode: InodeT, name: bytes, ctx: RequestContext) -> bytes:
        if inode == ROOT and name in self.facts:
            return self.facts[name]
        return self.tree.xattr(Node(inode), name)

    @_answered
    def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[bytes]:
        return self.tree.xattr_names(Node(inode))

    @_answered
    def access(self, inode: InodeT, mode: ModeT, ctx: RequestContext) -> bool:
        raise FUSEError(errno.ENOSYS)  # always allowed; the kernel does not ask again

    # Opening

    @_answered
    def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        node = Node(inode)
        fs = self._member(node).fs
        if fs.read_only and flags & os.O_ACCMODE != os.O_RDONLY:
            raise FUSEError(errno.EROFS)
        if flags & os.O_TRUNC:
            self.tree.change(node, Changes(), 0)
        self.tree.hold(node)
        overlaps = isinstance(fs, DeviceFiles) and not fs.read_only  # what is written to `disk` shows in `p1` as well
        return FileInfo(fh=FileHandleT(node), keep_cache=not overlaps)

    @_answered
    def create(
        self, parent_inode: InodeT, name: bytes, mode: ModeT, flags: FlagT, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        owner = self.owners.creator(ctx.uid, ctx.gid)
        found = self.tree.create(Node(parent_inode), name, mode, *owner, hold=True)
        return FileInfo(fh=FileHandleT(found[0]), keep_cache=True), self._found(parent_inode, found)

    @_answered
    def release(self, fh: FileHandleT) -> None:
        self.tree.let_go(Node(fh))

    @_answered
    def flush(self, fh: FileHandleT) -> None:
        raise FUSEError(errno.ENOSYS)  # closing needs nothing of us; the kernel does not ask again

    @_answered
    def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        self.tree.sync(self._member(fh))

    @_answered
    def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        self.tree.sync(self._member(fh))

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        """Nodes of several file systems may come together."""
        by_member: dict[InodeT, list[tuple[Node, int]]] = {}
        for inode, count in inode_list:
            by_member.setdefault(InodeT(self._member(inode).root), []).append((Node(inode), count))
        for root, nodes in by_member.items():
            with suppress(FUSEError):  # nobody waits for an answer
                await self._forget(root, nodes)

    @_answered
    def _forget(self, root: InodeT, nodes: Sequence[tuple[Node, int]]) -> None:
        self.tree.forget(nodes)

    # Changing

    @_answered
    def setattr(
        self, inode: InodeT, attr: EntryAttributes, fields: SetattrFields, fh: FileHandleT | None, ctx: RequestContext
    ) -> EntryAttributes:
        node = Node(inode)
        has_owners = self._member(node).fs.has_owners
        uid = self._new_owner(attr.st_uid, self.owners.uids.stored, self.owners.uid, has_owners, fields.update_uid)
        gid = self._new_owner(attr.st_gid, self.owners.gids.stored, self.owners.gid, has_owners, fields.update_gid)
        changes = Changes(
            mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
            uid=uid,
            gid=gid,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        size = attr.st_size if fields.update_size else None
        return self._entry(node, self.tree.change(node, changes, size))

    @staticmethod
    def _new_owner(
        wanted: int, stored: Callable[[int], int], shown: int, has_owners: bool, changes: bool
    ) -> int | None:
        """The number to store; none where owners are not stored and the one that is shown is wanted anyway."""
        if not changes:
            return None
        if has_owners:
            return stored(wanted)
        if wanted != shown:
            raise FUSEError(errno.EPERM)
        return None

    @_answered
    def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        self.tree.write(Node(fh), off, buf)
        return len(buf)

    @_answered
    def mknod(self, parent_inode: InodeT, name: bytes, mode: ModeT, rdev: int, ctx: RequestContext) -> EntryAttributes:
        owner = self.owners.creator(ctx.uid, ctx.gid)
        return self._found(parent_inode, self.tree.create(Node(parent_inode), name, mode, *owner, rdev))

    @_answered
    def mkdir(self, parent_inode: InodeT, name: bytes, mode: ModeT, ctx: RequestContext) -> EntryAttributes:
        owner = self.owners.creator(ctx.uid, ctx.gid)
        return self._found(parent_inode, self.tree.make_directory(Node(parent_inode), name, mode, *owner))

    @_answered
    def symlink(self, parent_inode: InodeT, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        owner = self.owners.creator(ctx.uid, ctx.gid)
        return self._found(parent_inode, self.tree.make_symlink(Node(parent_inode), name, target, *owner))

    @_answered
    def link(self, inode: InodeT, new_parent_inode: InodeT, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        return self._found(new_parent_inode, self.tree.link(Node(inode), Node(new_parent_inode), new_name))

    @_answered
    def unlink(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> None:
        self.tree.unlink(Node(parent_inode), name)

    @_answered
    def rmdir(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> None:
        self.tree.remove_directory(Node(parent_inode), name)

    @_answered
    def rename(
        self,
        parent_inode_old: InodeT,
        name_old: bytes,
        parent_inode_new: InodeT,
        name_new: bytes,
        flags: FlagT,
        ctx: RequestContext,
    ) -> None:
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise FUSEError(errno.EINVAL)
        old, new = Node(parent_inode_old), Node(parent_inode_new)
        self.tree.rename(old, name_old, new, name_new, replace=not flags)

    @_answered
    def setxattr(self, inode: InodeT, name: bytes, value: bytes, ctx: RequestContext) -> None:
        """The flags of setxattr(2) never come here: pyfuse3 sees to them by asking for the old value."""
        self.tree.set_xattr(Node(inode), name, value)

    @_answered
    def removexattr(self, inode: InodeT, name: bytes, ctx: RequestContext) -> None:
        self.tree.remove_xattr(Node(inode), name)
