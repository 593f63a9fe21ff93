"""The conformance suite's state machine: file operations, on a file system and on the model.

Every call must do what the model does, or fail with an errno that the model foresees. At the end, and whenever the file
system was closed and opened again, everything in it must equal the model; then the judge looks at the device.
"""

from __future__ import annotations

import errno
import stat
import sys
from collections.abc import Callable

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from fusemount.filesystems.base import XATTR_CREATE, XATTR_REPLACE, Changes, Inode
from tests.fusemount.model import Node, pattern
from tests.fusemount.subject import MISSING_FEATURE, SECOND, Subject, attempt, compare

PICK = st.integers(0, 15)


class FileSystemMachine(RuleBasedStateMachine):
    """Does the same to a file system and to the model."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject, self.traits = subject, subject.traits
        self.device = subject.make()
        self.fs = subject.open(self.device, writable=True)
        self.hidden = frozenset(entry.name for entry in self.fs.entries(self.fs.root))
        root = self.fs.attributes(self.fs.root)
        self.root = Node(root.mode, root.uid, root.gid, inode=self.fs.root)
        self.orphans: list[Node] = []  # without a name, held
        self.ghosts: list[Node] = []  # without a name, no longer held, not yet forgotten

    # Finding one's way

    def directory(self, pick: int) -> Node:
        directories = [node for node in self.root.below() if node.is_directory]
        return directories[pick % len(directories)]

    def node(self, pick: int, wanted: Callable[[Node], bool]) -> Node | None:
        nodes = [node for node in [*self.root.below(), *self.orphans] if wanted(node)]
        return nodes[pick % len(nodes)] if nodes else None

    def file(self, pick: int) -> Node | None:
        return self.node(pick, lambda node: node.is_file)

    def find(self, directory: Node, name: bytes) -> Node | None:
        found = directory.entries.get(self.traits.key(name))
        return found[1] if found else None

    def number(self, node: Node) -> Inode:
        """The node's inode number, looked up from the root where it is not known."""
        if node.inode is None:
            place = next(
                (parent, name)
                for parent in self.root.below()
                for name, child in parent.entries.values()
                if child is node
            )
            self.told(node, self.fs.lookup(self.number(place[0]), place[1]))
        assert node.inode is not None
        return node.inode

    def told(self, node: Node, inode: Inode) -> None:
        """The file system has said a node's number: no other node may have it."""
        assert 0 < inode < 1 << 48
        others = [other for other in [*self.root.below(), *self.orphans, *self.ghosts] if other is not node]
        assert inode not in [other.inode for other in others], f"inode number {inode} stands for two files"
        assert node.inode in (None, inode)
        node.inode = inode
        node.known += 1

    # Names

    @rule(pick=PICK, data=st.data(), mode=st.sampled_from((0o644, 0o400, 0o755)), uid=st.integers(0, 70000))
    def create(self, pick: int, data: st.DataObject, mode: int, uid: int) -> None:
        kinds = [stat.S_IFREG, stat.S_IFREG, stat.S_IFDIR]
        kinds += [stat.S_IFLNK] * self.traits.symlinks + [stat.S_IFIFO] * self.traits.devices
        kind, name = data.draw(st.sampled_from(kinds)), data.draw(st.sampled_from(self.traits.names))
        parent = self.directory(pick)
        where = self.number(parent)
        expected = {errno.EEXIST} if self.find(parent, name) else set()
        owner = (uid, uid // 2)
        node = Node(self.traits.shown_mode(kind | mode), *owner)
        match kind:
            case stat.S_IFDIR:
                inode = attempt(expected, self.fs.make_directory, where, name, mode, *owner)
            case stat.S_IFLNK:
                node.mode = kind | 0o777
                target = pattern(uid, 1 + uid % 300)
                node.content = bytearray(target.decode("latin-1").encode() if self.traits.text_targets else target)
                inode = attempt(expected, self.fs.make_symlink, where, name, bytes(node.content), *owner)
            case _:
                inode = attempt(expected, self.fs.create, where, name, kind | mode, *owner)
        if inode is not None:
            self.told(node, inode)
            parent.entries[self.traits.key(name)] = name, node
            parent.mtime_ns = None
            if node.is_file:
                self.write_to(node, 0, pattern(uid, uid % 5000))

    @rule(pick=PICK, data=st.data())
    def look_up(self, pick: int, data: st.DataObject) -> None:
        parent, name = self.directory(pick), data.draw(st.sampled_from(self.traits.names))
        node = self.find(parent, name)
        inode = attempt(set() if node else {errno.ENOENT}, self.fs.lookup, self.number(parent), name)
        if node and inode is not None:
            self.told(node, inode)

    @rule(pick=PICK, data=st.data(), directory=st.booleans())
    def remove(self, pick: int, data: st.DataObject, directory: bool) -> None:
        parent = self.directory(pick)
        name = data.draw(st.sampled_from([name for name, _ in parent.entries.values()] or self.traits.names))
        node = self.find(parent, name)
        if node is None:
            expected = {errno.ENOENT}
        elif directory:
            expected = {errno.ENOTDIR} if not node.is_directory else {errno.ENOTEMPTY} if node.entries else set()
        else:
            expected = {errno.EISDIR} if node.is_directory else set()
        call = self.fs.remove_directory if directory else self.fs.unlink
        attempt(expected, call, self.number(parent), name)
        if not expected:
            self.took_away(parent, name)

    def took_away(self, parent: Node, name: bytes) -> None:
        _, node = parent.entries.pop(self.traits.key(name))
        parent.mtime_ns = None
        node.names -= 1
        if not node.names:
            (self.orphans if node.held else self.ghosts).append(node)

    @rule(pick=PICK, into=PICK, data=st.data(), replace=st.integers(0, 5))
    def rename(self, pick: int, into: int, data: st.DataObject, replace: int) -> None:
        parent, new_parent = self.directory(pick), self.directory(into)
        name = data.draw(st.sampled_from([name for name, _ in parent.entries.values()] or self.traits.names))
        taken = [name for name, _ in new_parent.entries.values()]
        new_name = data.draw(st.sampled_from([*self.traits.names, *taken]))
        node, target = self.find(parent, name), self.find(new_parent, new_name)
        in_place = parent is new_parent and self.traits.key(name) == self.traits.key(new_name)
        if in_place and not replace and name != new_name:
            return  # a change of case alone: both answers make sense
        expected = self.refusals_of_rename(node, new_parent, target, bool(replace))
        where = self.number(parent), name, self.number(new_parent), new_name
        attempt(expected, self.fs.rename, *where, replace=bool(replace))
        if expected or node is None or (node is target and not in_place):
            return
        if target and not in_place:
            self.took_away(new_parent, new_name)
        del parent.entries[self.traits.key(name)]
        new_parent.entries[self.traits.key(new_name)] = new_name, node
        parent.mtime_ns = new_parent.mtime_ns = None

    def refusals_of_rename(self, node: Node | None, into: Node, target: Node | None, replace: bool) -> set[int]:
        """The errnos of rename(2) that fit; where several do, an implementation may choose."""
        if node is None:
            return {errno.ENOENT}
        refusals = set()
        if target and not replace:
            refusals.add(errno.EEXIST)
        if node.is_directory and into in node.below():
            refusals.add(errno.EINVAL)
        if target and target is not node:
            if target.is_directory and not node.is_directory:
                refusals.add(errno.EISDIR)
            if target.is_directory and target.entries:
                refusals.add(errno.ENOTEMPTY)
            if node.is_directory and not target.is_directory:
                refusals.add(errno.ENOTDIR)
        return refusals

    @rule(pick=PICK, into=PICK, data=st.data())
    def link(self, pick: int, into: int, data: st.DataObject) -> None:
        node = self.node(pick, lambda node: not node.is_directory and node.names > 0)
        if node is None:
            return
        parent, name = self.directory(into), data.draw(st.sampled_from(self.traits.names))
        taken = self.find(parent, name) is not None
        where = self.number(node), self.number(parent), name
        if not self.traits.links:
            attempt(MISSING_FEATURE | {errno.EEXIST}, self.fs.link, *where)
            return
        attempt({errno.EEXIST} if taken else set(), self.fs.link, *where)
        if not taken:
            parent.entries[self.traits.key(name)] = name, node
            parent.mtime_ns = None
            node.names += 1

    # Content

    def write_to(self, node: Node, offset: int, data: bytes) -> None:
        self.fs.write(self.number(node), offset, data)
        node.write(offset, data)
        node.mtime_ns = None if data else node.mtime_ns
        assert self.fs.attributes(self.number(node)).size == len(node.content)

    @rule(pick=PICK, place=st.integers(0, 1000), end=st.booleans(), length=st.integers(0, 30_000), fill=PICK)
    def write(self, pick: int, place: int, end: bool, length: int, fill: int) -> None:
        node = self.file(pick)
        if node:
            offset = len(node.content) + place % 3 - 1 if end else self.traits.reach * place // 1000
            offset = min(max(0, offset), self.traits.reach)
            self.write_to(node, offset, pattern(fill, length))

    @rule(pick=PICK, place=st.integers(0, 1000), length=st.integers(0, 100_000))
    def read(self, pick: int, place: int, length: int) -> None:
        node = self.file(pick)
        if node:
            offset = self.traits.reach * place // 1000
            assert self.fs.read(self.number(node), offset, length) == node.content[offset : offset + length]

    @rule(pick=PICK, place=st.integers(0, 1000))
    def truncate(self, pick: int, place: int) -> None:
        node = self.file(pick)
        if node:
            size = self.traits.reach * place // 1000
            self.fs.truncate(self.number(node), size)
            node.truncate(size)
            node.mtime_ns = None
            assert self.fs.attributes(self.number(node)).size == size

    # Attributes

    @rule(pick=PICK, mode=st.sampled_from((0o644, 0o755, 0o444, 0o600, 0o500)))
    def change_mode(self, pick: int, mode: int) -> None:
        node = self.node(pick, lambda node: not stat.S_ISLNK(node.mode) and node is not self.root)
        if node:
            self.fs.change(self.number(node), Changes(mode=mode))
            node.mode = self.traits.shown_mode(stat.S_IFMT(node.mode) | mode)

    @rule(pick=PICK, uid=st.integers(0, 70_000), gid=st.none() | st.integers(0, 70_000))
    def change_owner(self, pick: int, uid: int, gid: int | None) -> None:
        node = self.node(pick, lambda node: self.traits.owners)
        if node:
            self.fs.change(self.number(node), Changes(uid=uid, gid=gid))
            node.uid, node.gid = uid, node.gid if gid is None else gid

    @rule(pick=PICK, atime=st.integers(10**9, 2 * 10**9), mtime=st.integers(10**9, 2 * 10**9), nano=st.integers(0, 999))
    def change_times(self, pick: int, atime: int, mtime: int, nano: int) -> None:
        node = self.node(pick, lambda node: node is not self.root)
        if node:
            node.atime_ns, node.mtime_ns = atime * SECOND + nano, mtime * SECOND + nano * 1_000_000
            self.fs.change(self.number(node), Changes(atime_ns=node.atime_ns, mtime_ns=node.mtime_ns))

    @rule(pick=PICK, name=st.sampled_from((b"user.a", b"user.bb")), length=st.integers(0, 300), flags=st.integers(0, 2))
    def set_xattr(self, pick: int, name: bytes, length: int, flags: int) -> None:
        node = self.node(pick, lambda node: node.is_directory or node.is_file)
        if node and self.traits.xattrs:
            expected = set()
            if flags == XATTR_CREATE and name in node.xattrs:
                expected = {errno.EEXIST}
            if flags == XATTR_REPLACE and name not in node.xattrs:
                expected = {errno.ENODATA}
            value = pattern(length, length)
            attempt(expected, self.fs.set_xattr, self.number(node), name, value, flags)
            if not expected:
                node.xattrs[name] = value

    @rule(pick=PICK, name=st.sampled_from((b"user.a", b"user.bb")))
    def remove_xattr(self, pick: int, name: bytes) -> None:
        node = self.node(pick, lambda node: node.is_directory or node.is_file)
        if node and self.traits.xattrs:
            present = name in node.xattrs
            attempt(set() if present else {errno.ENODATA}, self.fs.remove_xattr, self.number(node), name)
            node.xattrs.pop(name, None)

    # Holding, and the end

    @rule(pick=PICK)
    def hold(self, pick: int) -> None:
        node = self.file(pick)
        if node:
            self.fs.hold(self.number(node))
            node.held += 1

    @rule(pick=PICK)
    def let_go(self, pick: int) -> None:
        node = self.node(pick, lambda node: node.held > 0)
        if node:
            self.fs.let_go(self.number(node))
            node.held -= 1
            if not node.held and not node.names:
                self.orphans.remove(node)
                self.ghosts.append(node)

    @rule(pick=PICK)
    def forget(self, pick: int) -> None:
        nodes = [node for node in self.root.below() if node.known and not node.held] + self.ghosts
        if nodes:
            node = nodes[pick % len(nodes)]
            if node.inode is not None:
                self.fs.forget(node.inode, node.known)
            node.inode, node.known = None, 0
            if node in self.ghosts:
                self.ghosts.remove(node)

    @rule(pick=PICK)
    def list_in_two_parts(self, pick: int) -> None:
        inode = self.number(self.directory(pick))
        whole = [entry.name for entry in self.fs.entries(inode)]
        half = [entry for entry, _ in zip(self.fs.entries(inode), range(1 + len(whole) // 2), strict=False)]
        position = half[-1].position if half else 0
        assert [entry.name for entry in half] + [entry.name for entry in self.fs.entries(inode, position)] == whole

    @rule()
    def sync(self) -> None:
        self.fs.sync()

    @rule()
    def check(self) -> None:
        for node in self.orphans:
            compare(self.fs, self.traits, node, self.number(node), frozenset())
        compare(self.fs, self.traits, self.root, self.fs.root, self.hidden)

    @rule()
    def reopen(self) -> None:
        self.fs.close()
        self.fs = self.subject.open(self.device, writable=True)
        self.orphans.clear()
        self.ghosts.clear()
        for node in self.root.below():
            node.inode, node.known, node.held = None, 0, 0
        self.root.inode = self.fs.root
        self.check()

    def teardown(self) -> None:
        if sys.exc_info()[0] is None:
            self.check()
            self.fs.close()
            self.subject.judge(self.device)
            self.reopen()
        self.fs.close()
        self.device.close()
