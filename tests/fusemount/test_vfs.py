"""The tree: nodes, entrances, counting, waiting, closing."""

from __future__ import annotations

import errno
import stat
import threading
from collections.abc import Callable

import pytest

from fusemount.filesystems.base import Attributes, Changes, Inode
from fusemount.filesystems.files import DeviceFiles
from fusemount.vfs import ROOT, Node, Tree
from nbdserve.block import MemoryDevice
from tests.fusemount.counting_filesystem import CountingFileSystem


def names(tree: Tree, directory: Node = ROOT) -> dict[bytes, Node]:
    """What a directory lists; each is given back at once."""
    found: dict[bytes, Node] = {}

    def give(name: bytes, node: Node, attributes: Attributes, lasting: bool, position: int) -> bool:
        found[name] = node
        return True

    tree.entries(directory, 0, give)
    for node in found.values():
        tree.forget([(node, 1)])
    return found


def raises(number: int, call: Callable[[], object]) -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011
        call()
    assert caught.value.errno == number


@pytest.fixture
def partitions() -> tuple[Tree, CountingFileSystem, CountingFileSystem]:
    """Two file systems below a root with a file, as an image with three partitions gives them."""
    first, second = CountingFileSystem(), CountingFileSystem()
    first.put("etc/passwd", b"root")
    second.put("etc/hosts", b"local")
    root = DeviceFiles({"p3": MemoryDevice(bytearray(4096), read_only=True)}, ["p1", "p2"])
    tree = Tree(root, root, path="/mnt")
    for name, fs in (("p1", first), ("p2", second)):
        tree.mount(ROOT, tree.members[0].node(root.directory(name)), fs, fs, name=name.encode())
    return tree, first, second


def test_each_partition_is_a_directory_of_its_own(
    partitions: tuple[Tree, CountingFileSystem, CountingFileSystem],
) -> None:
    tree, first, _ = partitions
    assert set(names(tree)) == {b"p1", b"p2", b"p3"}
    p1, attributes = tree.lookup(ROOT, b"p1")
    p2, _ = tree.lookup(ROOT, b"p2")
    assert attributes.is_directory
    assert (set(names(tree, p1)), set(names(tree, p2))) == ({b"etc"}, {b"etc"})
    etc = tree.lookup(p1, b"etc")[0]
    assert etc != tree.lookup(p2, b"etc")[0]
    passwd, attributes = tree.lookup(etc, b"passwd")
    assert bytes(tree.read(passwd, 1, 9)) == b"oot"
    assert attributes.size == 4
    assert first.given == {first.inode("etc"): 1, first.inode("etc/passwd"): 1}


def test_the_root_is_node_1_and_other_inodes_never_collide_with_it() -> None:
    fs = CountingFileSystem()
    fs.put("a", b"x")
    tree = Tree(fs)
    assert tree.split(ROOT) == (tree.members[0], fs.root)
    for inode in (Inode(0), Inode(1)):
        node = tree.members[0].node(inode)
        assert node not in (0, ROOT)
        assert tree.split(node) == (tree.members[0], inode)
    assert tree.lookup(ROOT, b"a")[0] == fs.inode("a"), "the guest's own numbers show in the first file system"


def test_nodes_of_nobody_are_stale() -> None:
    tree = Tree(CountingFileSystem())
    raises(errno.ESTALE, lambda: tree.attributes(Node(5 << 48 | 7)))


def test_every_node_given_is_counted_and_given_back() -> None:
    fs = CountingFileSystem()
    fs.put("d/a")
    tree = Tree(fs)
    d = tree.lookup(ROOT, b"d")[0]
    assert tree.lookup(ROOT, b"d")[0] == d
    made = tree.create(d, b"b", 0o644, 0, 0)[0]
    linked = tree.link(made, d, b"c")[0]
    assert made == linked
    assert fs.given == {fs.inode("d"): 2, fs.inode("d/b"): 2}
    names(tree, d)  # listing takes and gives back
    tree.forget([(made, 2), (d, 1)])
    tree.forget([(d, 1)])
    assert not +fs.given
    assert tree.trail(d) is None, "nothing is remembered of a directory that was given back"


def test_what_a_listing_does_not_take_is_not_counted() -> None:
    fs = CountingFileSystem()
    for name in ("a", "b", "c"):
        fs.put(name)
    tree = Tree(fs)
    taken: list[tuple[bytes, int]] = []

    def give(name: bytes, node: Node, attributes: Attributes, lasting: bool, position: int) -> bool:
        if len(taken) == 2:
            return False
        taken.append((name, position))
        return True

    tree.entries(ROOT, 0, give)
    assert [name for name, _ in taken] == [b"a", b"b"]
    assert fs.given[fs.inode("c")] == 0
    last = taken[-1][1]
    taken.clear()
    tree.entries(ROOT, last, give)
    assert [name for name, _ in taken] == [b"c"]


def test_a_failed_look_counts_nothing() -> None:
    fs = CountingFileSystem()
    fs.broken.add(fs.put("a"))
    tree = Tree(fs)
    raises(errno.EIO, lambda: tree.lookup(ROOT, b"a"))
    assert not +fs.given


def test_a_damaged_inode_is_still_listed() -> None:
    fs = CountingFileSystem()
    fs.broken.add(fs.put("a"))
    fs.put("b", b"12")
    tree = Tree(fs)
    seen: dict[bytes, tuple[bool, int]] = {}

    def give(name: bytes, node: Node, attributes: Attributes, lasting: bool, position: int) -> bool:
        seen[name] = lasting, stat.S_IFMT(attributes.mode)
        return True

    tree.entries(ROOT, 0, give)
    assert seen == {b"a": (False, stat.S_IFREG), b"b": (True, stat.S_IFREG)}


# Entrances


def test_an_entrance_is_neither_removed_nor_renamed() -> None:
    outer, inner = CountingFileSystem(), CountingFileSystem()
    boot = outer.put_directory("boot")
    outer.put_directory("other")
    inner.put("vmlinuz", b"kernel")
    tree = Tree(outer)
    tree.mount(ROOT, tree.members[0].node(boot), inner)
    where = tree.lookup(ROOT, b"boot")[0]
    assert set(names(tree, where)) == {b"vmlinuz"}
    raises(errno.EBUSY, lambda: tree.remove_directory(ROOT, b"boot"))
    raises(errno.EBUSY, lambda: tree.rename(ROOT, b"boot", ROOT, b"b"))
    raises(errno.EBUSY, lambda: tree.rename(ROOT, b"other", ROOT, b"boot"))
    tree.remove_directory(ROOT, b"other")
    tree.forget([(where, 1)])
    assert not +outer.given
    assert not +inner.given


def test_nothing_moves_between_file_systems() -> None:
    outer, inner = CountingFileSystem(), CountingFileSystem()
    tree = Tree(outer)
    outer.put("a", b"a")
    tree.mount(ROOT, tree.members[0].node(outer.put_directory("d")), inner)
    inside = tree.lookup(ROOT, b"d")[0]
    raises(errno.EXDEV, lambda: tree.rename(ROOT, b"a", inside, b"a"))
    raises(errno.EXDEV, lambda: tree.link(tree.lookup(ROOT, b"a")[0], inside, b"a"))


def test_space_is_that_of_all() -> None:
    outer, inner = CountingFileSystem(), CountingFileSystem()
    tree = Tree(outer)
    assert tree.space().blocks == 1000
    tree.mount(ROOT, tree.members[0].node(outer.put_directory("d")), inner)
    assert (tree.space().blocks, tree.space().free_blocks) == (2000, 1000)


# Waiting


def test_the_hasty_thread_never_waits() -> None:
    fs = CountingFileSystem(slow=True)
    fs.put("a", b"text")
    tree = Tree(fs, fs)
    tree.hasty = threading.get_ident()
    with pytest.raises(BlockingIOError):
        tree.lookup(ROOT, b"a")
    with pytest.raises(BlockingIOError):
        names(tree)
    assert not +fs.given
    results: list[Node] = []
    worker = threading.Thread(target=lambda: results.append(tree.lookup(ROOT, b"a")[0]))
    worker.start()
    worker.join(10)
    assert results == [fs.inode("a")]
    fs.slow = False
    assert tree.lookup(ROOT, b"a")[0] == results[0]
    assert not fs.nowait, "the switch is put back"


def test_a_taken_lock_is_not_waited_for() -> None:
    fs = CountingFileSystem()
    fs.put("a")
    tree = Tree(fs, fs)
    with tree.members[0]:
        tree.hasty = threading.get_ident()
        with pytest.raises(BlockingIOError):
            tree.lookup(ROOT, b"a")
    assert tree.lookup(ROOT, b"a")


def test_without_a_switch_everything_may_wait() -> None:
    fs = CountingFileSystem()
    tree = Tree(fs)
    tree.hasty = threading.get_ident()
    with pytest.raises(BlockingIOError):
        tree.attributes(ROOT)


def test_the_hasty_thread_changes_the_only_file_system() -> None:
    fs = CountingFileSystem()
    tree = Tree(fs, fs)
    tree.hasty = threading.get_ident()
    made = tree.create(ROOT, b"a", 0o644, 0, 0, hold=True)[0]
    tree.write(made, 0, b"text")
    assert tree.read(made, 0, 9) == b"text"
    tree.let_go(made)
    tree.forget([(made, 1)])
    assert not +fs.held
    assert not +fs.given
    with pytest.raises(BlockingIOError):
        tree.sync(tree.members[0])
    with tree.members[0].lock, pytest.raises(BlockingIOError):
        tree.unlink(ROOT, b"a")
    assert tree.peek(ROOT, b"a")


def test_the_hasty_thread_changes_nothing_where_there_are_several() -> None:
    fs, other = CountingFileSystem(), CountingFileSystem()
    other.put("a", b"text")
    fs.put("d/x")
    tree = Tree(fs, fs)
    directory = tree.lookup(ROOT, b"d")[0]
    root = tree.mount(ROOT, directory, other, other).root
    tree.hasty = threading.get_ident()
    for change in (
        lambda: tree.create(root, b"b", 0o644, 0, 0),
        lambda: tree.unlink(root, b"a"),
        lambda: tree.forget([(directory, 1)]),
    ):
        with pytest.raises(BlockingIOError):
            change()
    found = tree.peek(root, b"a")
    assert found is not None
    assert found[1].size == 4
    assert not +other.given, "peeking counts nothing"
    tree.hasty = 0
    assert list(names(tree, root)) == [b"a"]


def test_a_read_only_file_system_holds_nothing() -> None:
    fs = CountingFileSystem(read_only=True)
    fs.put("a")
    tree = Tree(fs, fs)
    node = tree.lookup(ROOT, b"a")[0]
    tree.hold(node)
    assert not +fs.held
    tree.let_go(node)
    assert not +fs.held


# Owners and modes


def test_set_group_id_directories_hand_their_group_on() -> None:
    fs = CountingFileSystem()
    tree = Tree(fs)
    above = tree.make_directory(ROOT, b"d", 0o755, 1, 1)[0]
    tree.change(above, Changes(mode=0o2775, gid=7))
    assert tree.create(above, b"f", 0o644, 1, 1)[1].gid == 7
    assert tree.make_symlink(above, b"s", b"x", 1, 1)[1].gid == 7
    below = tree.make_directory(above, b"e", 0o755, 1, 1)[1]
    assert (below.gid, stat.S_IMODE(below.mode)) == (7, 0o2755)


@pytest.mark.parametrize(("before", "after"), [(0o6755, 0o755), (0o4644, 0o644), (0o2644, 0o2644), (0o2654, 0o654)])
def test_writing_takes_set_id_bits(before: int, after: int) -> None:
    fs = CountingFileSystem()
    node = Node(fs.put("f", b"old", before))
    tree = Tree(fs)
    tree.write(node, 0, b"new")
    assert stat.S_IMODE(tree.attributes(node).mode) == after
    tree.change(node, Changes(mode=before))
    tree.write(node, 0, b"new")
    assert stat.S_IMODE(tree.attributes(node).mode) == after, "also those that were set meanwhile"
    tree.change(node, Changes(mode=before))
    assert stat.S_IMODE(tree.change(node, Changes(uid=7)).mode) == after


# The end


def test_closing_lets_go_of_what_was_held_and_closes_all() -> None:
    outer, inner = CountingFileSystem(), CountingFileSystem()
    tree = Tree(outer)
    tree.mount(ROOT, tree.members[0].node(outer.put_directory("d")), inner)
    inside = tree.lookup(ROOT, b"d")[0]
    made = tree.create(inside, b"f", 0o600, 0, 0)[0]
    tree.hold(made)
    tree.unlink(inside, b"f")
    inode = tree.split(made)[1]
    assert inode in inner
    tree.close()
    assert inode not in inner
    assert outer.closed
    assert inner.closed


def test_a_failure_to_close_one_does_not_keep_the_others_open(monkeypatch: pytest.MonkeyPatch) -> None:
    outer, inner = CountingFileSystem(), CountingFileSystem()
    tree = Tree(outer)
    tree.mount(ROOT, tree.members[0].node(outer.put_directory("d")), inner)

    def fail() -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(inner, "close", fail)
    raises(errno.ENOSPC, tree.close)
    assert outer.closed


def test_sync_tells_who_was_changed() -> None:
    fs = CountingFileSystem()
    tree = Tree(fs)
    member = tree.members[0]
    assert not member.changed
    tree.create(ROOT, b"f", 0o600, 0, 0)
    assert member.changed
    tree.sync(member)
    assert fs.syncs == 1
    assert not member.changed
