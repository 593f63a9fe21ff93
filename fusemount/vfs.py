"""Tree: several file systems as one, in terms of numbered nodes; all that is above the adapters and below FUSE.

A node is what FUSE calls an inode number: 16 bits say which file system, 48 are its own inode. The root of the first
one is node 1, as FUSE wants it; whatever else of that file system would fall on 0 or 1 has the topmost bit set.

Directories may be entrances to other file systems, as mount points are in the kernel. What is hidden below an entrance
cannot be reached, and the entrance itself neither be removed nor renamed.

Locking: adapters take one call at a time, so each file system has a lock, held only while it is called. Two locks are
held at once in one place, by entries(), from a file system to one that is mounted on it; entrances form a tree, so that
never closes a circle.

A thread that must not wait (the event loop's, see `hasty`) gets BlockingIOError where a lock is taken or the device
would have to be waited for. Such a call has changed nothing, and counts nothing, and may be repeated in another thread.
What changes something cannot stop half way; the event loop does it in one case only, see _Patient.

Counting: a node is the kernel's for as often as lookup(), entries(), create() and their kin have given it out; forget()
takes that back, and is handed on to the adapter one for one. Entrances are never counted: they are kept.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from threading import Lock, get_ident
from typing import NewType, Protocol

from fusemount.filesystems.base import Attributes, Changes, Entry, FileSystem, Inode, Space, error
from fusemount.links import contained
from nbdserve.block.file import ReadBuffer

Node = NewType("Node", int)
"""The number of a file in the tree."""

ROOT = Node(1)

_SHIFT = 48
_INODE = (1 << _SHIFT) - 1
_MOVED = 1 << 63
_MOST_MEMBERS = 1 << 15
_DEEPEST = 4096
_UNIT = 4096
_NOWHERE = Node(0)
_SET_ID = stat.S_ISUID | stat.S_ISGID

Found = tuple[Node, Attributes]

Give = Callable[[bytes, Node, Attributes, bool, int], bool]
"""Takes an entry from entries(): name, node, attributes, whether they may be kept, and the position behind it. Returns
False when it takes no more; such an entry is not counted."""


class Hasty(Protocol):
    """What may be told not to wait for the host's disk, but to raise BlockingIOError."""

    nowait: bool


class Member:
    """A file system of the tree, with the lock around its calls.

    Attributes:
        root: its root's node.
        home: the node that absolute symbolic links in it start from.
        path: where its root lies on the host, if it is a home.
        above: the directory that its root hangs in; _NOWHERE for the first.
        changed: whether it has been changed since the last sync().
        lock: held while it is called.
        covers: whether some of its directories are entrances.
    """

    def __init__(self, tree: Tree, index: int, fs: FileSystem, hasty: Hasty | None) -> None:
        assert index < _MOST_MEMBERS
        self.tree = tree
        self.fs = fs
        self.base = index << _SHIFT
        self.root = Node(self.base | fs.root) if index else ROOT
        self.home = self.root
        self.path = tree.path
        self.above = _NOWHERE
        self.changed = False
        self.covers = False
        self._hasty = hasty
        self.lock = Lock()

    def __enter__(self) -> FileSystem:
        if get_ident() != self.tree.hasty:
            self.lock.acquire()
        elif self._hasty is None or not self.lock.acquire(blocking=False):
            raise error(errno.EAGAIN)
        else:
            self._hasty.nowait = True
        return self.fs

    def __exit__(self, *_: object) -> None:
        if self._hasty is not None:
            self._hasty.nowait = False
        self.lock.release()

    def changing(self) -> _Patient:
        """For a with-block that changes something."""
        return _Patient(self, changes=True)

    def patiently(self) -> _Patient:
        """For a with-block of calls that may have to wait for the device."""
        return _Patient(self, changes=False)

    @property
    def is_alone(self) -> bool:
        """Whether it is the tree's only file system, and can be told not to wait where it only looks."""
        return self._hasty is not None and len(self.tree.members) == 1

    def node(self, inode: Inode) -> Node:
        """The node of one of its inodes."""
        number = self.base | inode
        return self.tree.entrances.get(number) or Node(number if number > ROOT else number | _MOVED)


class _Patient:
    """A with-block in which a file system is called that may wait for its device, since it cannot stop half way.

    The hasty thread may do so where there is one file system alone: whoever else wants something then wants it of that
    one, and would have to wait for its lock anyway.
    """

    __slots__ = ("_changes", "_member")

    def __init__(self, member: Member, *, changes: bool) -> None:
        self._member = member
        self._changes = changes

    def __enter__(self) -> FileSystem:
        member = self._member
        if get_ident() != member.tree.hasty:
            member.lock.acquire()
        elif not member.is_alone or not member.lock.acquire(blocking=False):
            raise error(errno.EAGAIN)
        member.changed |= self._changes
        return member.fs

    def __exit__(self, *_: object) -> None:
        self._member.lock.release()


class Tree:
    """The file systems of one mount.

    Args:
        root: the one whose root is the tree's.
        hasty: tells its device not to wait; None: every call may have to.
        path: where the tree is mounted, for links that lie in several places.

    Attributes:
        hasty: the thread (threading.get_ident) in which calls raise BlockingIOError rather than wait; 0: none.
        members: the file systems.
        entrances: 48 bits of inode and the index of its file system -> the root that is found there.
        raw_links: show the targets of symbolic links as they are stored.
    """

    def __init__(
        self, root: FileSystem, hasty: Hasty | None = None, *, path: str = "/", raw_links: bool = False
    ) -> None:
        self.hasty = 0
        self.path = os.fsencode(path).rstrip(b"/")
        self.raw_links = raw_links
        self.entrances: dict[int, Node] = {}
        self.members = [Member(self, 0, root, hasty)]
        self.entrances[root.root] = ROOT
        self._held: Counter[Node] = Counter()
        self._places: dict[Node, tuple[int, Node]] = {}  # directories and links: how often given out, and where found
        self._harmless: set[Node] = set()  # files known to have no set-id bits

    # Assembling, before anyone else uses the tree

    def mount(
        self, parent: Node, directory: Node, fs: FileSystem, hasty: Hasty | None = None, *, name: bytes | None = None
    ) -> Member:
        """Let the root of a file system appear in place of a directory that lies in `parent`.

        Args:
            name: if given, absolute links in it start at its own root, which has this name in the tree's root; else
                they start where those of the file system above do.
        """
        above, inode = self.split(directory)
        member = Member(self, len(self.members), fs, hasty)
        member.above = parent
        if name is None:
            member.home = above.home
        else:
            member.path = self.path + b"/" + name
        above.covers = True
        self.members.append(member)
        self.entrances[above.base | inode] = member.root
        self.entrances[member.root] = member.root
        return member

    def split(self, node: Node) -> tuple[Member, Inode]:
        """The file system and the inode that a node stands for."""
        if node == ROOT:
            return self.members[0], self.members[0].fs.root
        number = node & ~_MOVED
        index = number >> _SHIFT
        if index >= len(self.members):
            raise error(errno.ESTALE)
        return self.members[index], Inode(number & _INODE)

    # Looking

    def lookup(self, parent: Node, name: bytes) -> Found:
        """The node that a name stands for, counted, with its attributes."""
        member, directory = self.split(parent)
        with member as fs:
            inode = fs.lookup(directory, name)
            entrance = self.entrances.get(member.base | inode)
            if entrance is None:
                return self._counted(member, parent, inode)
            fs.forget(inode)
        return entrance, self.attributes(entrance)

    def _counted(self, member: Member, parent: Node, inode: Inode) -> Found:
        """An inode that the adapter has just given out, as a node; not given out after all if that fails."""
        try:
            attributes = member.fs.attributes(inode)
        except BaseException:
            member.fs.forget(inode)
            raise
        node = member.node(inode)
        self._note(node, parent, attributes.mode)
        return node, attributes

    def _note(self, node: Node, parent: Node, mode: int) -> None:
        if stat.S_ISDIR(mode) or stat.S_ISLNK(mode):
            count, before = self._places.get(node, (0, parent))
            if before != parent:
                before = parent if stat.S_ISDIR(mode) else _NOWHERE
            self._places[node] = count + 1, before

    def attributes(self, node: Node) -> Attributes:
        """What is known about a node."""
        member, inode = self.split(node)
        with member as fs:
            return fs.attributes(inode)

    def entries(self, directory: Node, position: int, give: Give) -> None:
        """Hand over the entries of a directory from a position on, without `.` and `..`, each counted once taken.

        An entry that cannot be looked at is handed over with its type alone. What stops the listing later than at its
        first entry is left for the call that will go on from there.
        """
        member, inode = self.split(directory)
        started = False
        with member as fs:
            try:
                for entry in fs.entries(inode, position):
                    if not self._give(member, directory, inode, entry, give):
                        return
                    started = True
            except OSError:
                if not started:
                    raise

    def _give(self, member: Member, parent: Node, directory: Inode, entry: Entry, give: Give) -> bool:
        entrance = self.entrances.get(member.base | entry.inode)
        if entrance is not None:
            return give(entry.name, entrance, self.attributes(entrance), True, entry.position)
        fs = member.fs
        try:
            inode = fs.lookup_entry(directory, entry)
        except FileNotFoundError:
            return True  # gone since, or not to be found by its damaged name
        node = member.node(inode)
        taken = False
        try:
            try:
                attributes, lasting = fs.attributes(inode), True
            except BlockingIOError:
                raise
            except OSError:
                attributes, lasting = Attributes(inode, entry.type, 1, 0, 0, 0, 0, 0, 0, 0), False
            taken = give(entry.name, node, attributes, lasting, entry.position)
            if taken:
                self._note(node, parent, attributes.mode)
        finally:
            if not taken:
                fs.forget(inode)
        return taken

    def read(self, node: Node, offset: int, length: int) -> ReadBuffer:
        """Bytes of a file; see FileSystem.read()."""
        member, inode = self.split(node)
        with member as fs:
            return fs.read(inode, offset, length)

    def read_link(self, node: Node) -> bytes:
        """The target of a symbolic link, changed so that it stays inside the guest (see links) unless raw_links."""
        target = self.stored_target(node)
        return target if self.raw_links else contained(self, node, target)

    def stored_target(self, node: Node) -> bytes:
        """The target of a symbolic link as it is stored."""
        member, inode = self.split(node)
        with member as fs:
            return bytes(fs.read_link(inode))

    def xattr_names(self, node: Node) -> list[bytes]:
        """The names of the extended attributes of a node."""
        member, inode = self.split(node)
        with member as fs:
            return fs.xattr_names(inode)

    def xattr(self, node: Node, name: bytes) -> bytes:
        """An extended attribute."""
        member, inode = self.split(node)
        with member as fs:
            return bytes(fs.xattr(inode, name))

    def space(self) -> Space:
        """Of the file system that is the tree's root; where others hang below, of all of them together."""
        spaces = []
        for member in self.members:
            with member as fs:
                spaces.append(fs.space())
        if len(spaces) == 1:
            return spaces[0]
        return Space(
            block_size=_UNIT,
            blocks=sum(each.blocks * each.block_size for each in spaces) // _UNIT,
            free_blocks=sum(each.free_blocks * each.block_size for each in spaces) // _UNIT,
            inodes=sum(each.inodes for each in spaces),
            free_inodes=sum(each.free_inodes for each in spaces),
            longest_name=min(each.longest_name for each in spaces),
        )

    # Where nodes lie, for links

    def peek(self, parent: Node, name: bytes) -> Found | None:
        """Like lookup(), but not counted, and None where there is nothing."""
        member, directory = self.split(parent)
        with member as fs:
            try:
                inode = fs.lookup(directory, name)
            except (FileNotFoundError, NotADirectoryError):
                return None
            try:
                entrance = self.entrances.get(member.base | inode)
                if entrance is None:
                    return member.node(inode), fs.attributes(inode)
            finally:
                fs.forget(inode)
        return entrance, self.attributes(entrance)

    def home(self, node: Node) -> Node:
        """Where absolute symbolic links in this node's file system start."""
        return self.split(node)[0].home

    def path_of_home(self, node: Node) -> bytes:
        """The path on the host of home()."""
        return self.split(self.home(node))[0].path

    def trail(self, link: Node) -> list[Node] | None:
        """The directories on the way from home() to the one that holds the link; None if that is not certain."""
        home = self.home(link)
        trail: list[Node] = []
        node = self._places.get(link, (0, _NOWHERE))[1]
        while node != home:
            if node == _NOWHERE or len(trail) > _DEEPEST:
                return None
            trail.append(node)
            member = self.split(node)[0]
            node = member.above if node == member.root else self._places.get(node, (0, _NOWHERE))[1]
        return [home, *reversed(trail)]

    # Holding

    def hold(self, node: Node) -> None:
        """See FileSystem.hold(). Where nothing can be removed, nothing needs to be held."""
        member, inode = self.split(node)
        if member.fs.read_only:
            return
        with member as fs:
            fs.hold(inode)
            self._held[node] += 1

    def let_go(self, node: Node) -> None:
        """See FileSystem.let_go(); may have to wait, because the content of the file may go."""
        member, inode = self.split(node)
        if member.fs.read_only:
            return
        with member.patiently() as fs:
            self._held[node] -= 1
            if not self._held[node]:
                del self._held[node]
                self._harmless.discard(node)
            fs.let_go(inode)

    def forget(self, nodes: Sequence[tuple[Node, int]]) -> None:
        """The kernel gives nodes of one file system back, each for a number of times."""
        member, _ = self.split(nodes[0][0])
        with member if member.fs.read_only else member.patiently() as fs:
            for node, count in nodes:
                other, inode = self.split(node)
                assert other is member
                if node == member.root:
                    continue
                if node in self._places:
                    left, parent = self._places[node]
                    if left > count:
                        self._places[node] = left - count, parent
                    else:
                        del self._places[node]
                fs.forget(inode, count)

    # Changing

    def create(
        self, parent: Node, name: bytes, mode: int, uid: int, gid: int, device: int = 0, *, hold: bool = False
    ) -> Found:
        """See FileSystem.create(). What is created in a set-group-ID directory belongs to its group.

        Args:
            hold: see hold().
        """
        member, directory = self.split(parent)
        with member.changing() as fs:
            above = fs.attributes(directory)
            if above.mode & stat.S_ISGID:
                gid = above.gid
            inode = fs.create(directory, name, mode, uid, gid, device)
            node, attributes = self._counted(member, parent, inode)
            if hold:
                fs.hold(inode)
                self._held[node] += 1
            return node, attributes

    def make_directory(self, parent: Node, name: bytes, mode: int, uid: int, gid: int) -> Found:
        """See FileSystem.make_directory(). Set-group-ID is inherited."""
        member, directory = self.split(parent)
        with member.changing() as fs:
            above = fs.attributes(directory)
            if above.mode & stat.S_ISGID:
                gid, mode = above.gid, mode | stat.S_ISGID
            return self._counted(member, parent, fs.make_directory(directory, name, mode, uid, gid))

    def make_symlink(self, parent: Node, name: bytes, target: bytes, uid: int, gid: int) -> Found:
        """See FileSystem.make_symlink()."""
        member, directory = self.split(parent)
        with member.changing() as fs:
            above = fs.attributes(directory)
            if above.mode & stat.S_ISGID:
                gid = above.gid
            return self._counted(member, parent, fs.make_symlink(directory, name, target, uid, gid))

    def link(self, node: Node, parent: Node, name: bytes) -> Found:
        """One more name for a file, within its file system (else EXDEV)."""
        member, inode = self.split(node)
        other, directory = self.split(parent)
        if member is not other:
            raise error(errno.EXDEV)
        with member.changing() as fs:
            fs.link(inode, directory, name)
            return self._counted(member, parent, fs.lookup(directory, name))

    def unlink(self, parent: Node, name: bytes) -> None:
        """See FileSystem.unlink()."""
        member, directory = self.split(parent)
        with member.changing() as fs:
            fs.unlink(directory, name)

    def remove_directory(self, parent: Node, name: bytes) -> None:
        """See FileSystem.remove_directory(); EBUSY for an entrance."""
        member, directory = self.split(parent)
        with member.changing() as fs:
            self._check_no_entrance(member, directory, name)
            fs.remove_directory(directory, name)

    def rename(self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, *, replace: bool = True) -> None:
        """See FileSystem.rename(); EXDEV between file systems, EBUSY for an entrance."""
        member, directory = self.split(parent)
        other, new_directory = self.split(new_parent)
        if member is not other:
            raise error(errno.EXDEV)
        with member.changing() as fs:
            self._check_no_entrance(member, directory, name)
            self._check_no_entrance(member, new_directory, new_name)
            fs.rename(directory, name, new_directory, new_name, replace=replace)
            if parent != new_parent:
                self._moved(member, new_directory, new_name, new_parent)

    def _check_no_entrance(self, member: Member, directory: Inode, name: bytes) -> None:
        if not member.covers:
            return
        try:
            inode = member.fs.lookup(directory, name)
        except FileNotFoundError:
            return
        member.fs.forget(inode)
        if member.base | inode in self.entrances:
            raise error(errno.EBUSY)

    def _moved(self, member: Member, directory: Inode, name: bytes, parent: Node) -> None:
        inode = member.fs.lookup(directory, name)
        member.fs.forget(inode)
        node = member.node(inode)
        if node in self._places:
            count, before = self._places[node]
            self._places[node] = count, before and parent

    def write(self, node: Node, offset: int, data: ReadBuffer) -> None:
        """See FileSystem.write(). A program that is written to loses its set-user-ID and set-group-ID bits."""
        member, inode = self.split(node)
        with member.changing() as fs:
            if node not in self._harmless:
                self._clear_set_id(fs, inode)
                self._harmless.add(node)
            fs.write(inode, offset, data)

    def change(self, node: Node, changes: Changes, size: int | None = None) -> Attributes:
        """Set attributes, and the size; see FileSystem.change() and truncate(). Returns what they are then.

        A program that is cut or gets another owner loses its set-user-ID and set-group-ID bits.
        """
        member, inode = self.split(node)
        with member.changing() as fs:
            self._harmless.discard(node)
            if size is not None:
                fs.truncate(inode, size)
            if changes.mode is None and (size, changes.uid, changes.gid) != (None, None, None):
                self._clear_set_id(fs, inode)
            if changes != Changes():
                fs.change(inode, changes)
            return fs.attributes(inode)

    @staticmethod
    def _clear_set_id(fs: FileSystem, inode: Inode) -> None:
        """Without group execution, set-group-ID means something else (mandatory locks) and stays, as in the kernel."""
        mode = fs.attributes(inode).mode
        taken = mode & (_SET_ID if mode & stat.S_IXGRP else stat.S_ISUID)
        if taken and stat.S_ISREG(mode):
            fs.change(inode, Changes(mode=stat.S_IMODE(mode) & ~taken))

    def set_xattr(self, node: Node, name: bytes, value: bytes) -> None:
        """See FileSystem.set_xattr()."""
        member, inode = self.split(node)
        with member.changing() as fs:
            fs.set_xattr(inode, name, value)

    def remove_xattr(self, node: Node, name: bytes) -> None:
        """See FileSystem.remove_xattr()."""
        member, inode = self.split(node)
        with member.changing() as fs:
            fs.remove_xattr(inode, name)

    def sync(self, member: Member) -> None:
        """Return when what was changed in a file system so far is on stable storage. Not for the hasty thread."""
        if get_ident() == self.hasty:
            raise error(errno.EAGAIN)
        with member as fs:
            changed, member.changed = member.changed, False
            try:
                fs.sync()
            except BaseException:
                member.changed = changed
                raise

    def close(self) -> None:
        """Close all file systems, whatever happens to one of them; the first failure is raised in the end.

        What the kernel has not given back, because the mount was torn off, is let go.
        """
        failure: Exception | None = None
        for node, count in list(self._held.items()):
            for _ in range(count):
                failure = _attempt(lambda node=node: self.let_go(node), failure)  # type: ignore[misc]
        for member in reversed(self.members):
            with member as fs:
                failure = _attempt(fs.close, failure)
        if failure is not None:
            raise failure


def _attempt(action: Callable[[], None], failure: Exception | None) -> Exception | None:
    """Do it, and return the first failure so far."""
    try:
        action()
    except Exception as error:
        return failure or error
    return failure
