"""Symbolic links of the guest never lead out of the mount, and lead where they lead in the guest."""

from __future__ import annotations

import posixpath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusemount.filesystems.files import DeviceFiles
from fusemount.vfs import ROOT, Node, Tree
from tests.fusemount.counting_filesystem import CountingFileSystem


def node_at(tree: Tree, path: str) -> Node:
    """Look a path up step by step, as the kernel does."""
    node = ROOT
    for name in path.split("/"):
        node = tree.lookup(node, name.encode())[0]
    return node


def shown(fs: CountingFileSystem, link: str, target: str) -> str:
    fs.put(link, target)
    tree = Tree(fs, path="/mnt/x")
    return tree.read_link(node_at(tree, link)).decode()


@pytest.mark.parametrize(
    ("link", "target", "expected"),
    [
        ("bin", "usr/bin", "usr/bin"),
        ("a/b/l", "../c", "../c"),
        ("a/b/l", "./x//y/", "./x//y/"),
        ("l", "/etc/passwd", "etc/passwd"),
        ("a/l", "/etc/passwd", "../etc/passwd"),
        ("a/b/c/l", "/etc//./passwd", "../../../etc/passwd"),
        ("l", "/", "."),
        ("a/b/l", "/", "../.."),
        ("l", "..", "."),
        ("l", "../../etc/shadow", "etc/shadow"),
        ("a/l", "../../../etc/shadow", "../etc/shadow"),
        ("a/l", "/../../etc/shadow", "../etc/shadow"),
        ("a/l", "x/../../../etc", "../etc"),
        ("a/b/l", "x/../y", "y"),
        ("a/b/l", "x/../../y", "../y"),
        ("a/b/l", "/x/../../y", "../../y"),
    ],
)
def test_targets(link: str, target: str, expected: str) -> None:
    assert shown(CountingFileSystem(), link, target) == expected


def test_up_from_behind_a_link_goes_where_the_link_leads() -> None:
    fs = CountingFileSystem()
    fs.put_directory("deep/down/here")
    fs.put("a/short", "/deep/down/here")
    fs.put("a/up", "..")
    assert shown(fs, "a/l", "short/../there") == "../deep/down/there"
    assert shown(fs, "a/m", "up/../../../etc") == "../etc", "by way of a link that leads up"


def test_links_in_a_circle_end() -> None:
    fs = CountingFileSystem()
    fs.put("a", "/b/../a")
    fs.put("b", "a")
    tree = Tree(fs)
    with pytest.raises(OSError, match="symbolic links"):
        tree.read_link(node_at(tree, "a"))


def test_each_partition_is_a_root_of_its_own() -> None:
    fs = CountingFileSystem()
    fs.put("etc/mtab", "/proc/mounts")
    fs.put("up", "../../p2/secret")
    root = DeviceFiles({}, ["p1"])
    tree = Tree(root, path="/mnt/x")
    tree.mount(ROOT, tree.members[0].node(root.directory("p1")), fs, name=b"p1")
    assert tree.read_link(node_at(tree, "p1/etc/mtab")) == b"../proc/mounts"
    assert tree.read_link(node_at(tree, "p1/up")) == b"p2/secret"


def test_in_a_guest_its_root_is_the_root_of_all() -> None:
    outer, inner = CountingFileSystem(), CountingFileSystem()
    inner.put("grub/fonts", "/usr/share/grub")
    tree = Tree(outer, path="/mnt/x")
    tree.mount(ROOT, tree.members[0].node(outer.put_directory("boot")), inner)
    assert tree.read_link(node_at(tree, "boot/grub/fonts")) == b"../../usr/share/grub"


def test_a_link_in_two_places_leads_through_the_mount_point() -> None:
    fs = CountingFileSystem()
    inode = fs.put("a/b/l", "/etc/passwd")
    fs.link(inode, fs.put_directory("c"), b"l")
    fs.put("d/m", "x/../../../etc")
    fs.link(fs.inode("d/m"), fs.put_directory("c"), b"m")
    tree = Tree(fs, path="/mnt/x")
    for path in ("a/b/l", "c/l", "d/m", "c/m"):
        node_at(tree, path)
    assert tree.read_link(node_at(tree, "a/b/l")) == b"/mnt/x/etc/passwd"
    assert tree.read_link(node_at(tree, "c/m")) == b"/mnt/x/etc"


def test_what_was_moved_lies_deeper() -> None:
    fs = CountingFileSystem()
    fs.put("a/l", "/etc")
    fs.put_directory("x/y")
    tree = Tree(fs)
    link, a, y = node_at(tree, "a/l"), node_at(tree, "a"), node_at(tree, "x/y")
    tree.rename(ROOT, b"a", y, b"a")
    assert tree.read_link(link) == b"../../../etc"
    tree.rename(a, b"l", ROOT, b"l")
    assert tree.read_link(link) == b"etc"


def test_raw_links() -> None:
    fs = CountingFileSystem()
    fs.put("a/l", "/etc/../x")
    tree = Tree(fs, raw_links=True)
    assert tree.read_link(node_at(tree, "a/l")) == b"/etc/../x"


@given(
    st.lists(st.sampled_from(["a", "b", "..", ".", ""]), max_size=8),
    st.sampled_from(["l", "a/l", "a/b/l"]),
    st.booleans(),
)
def test_without_other_links_the_result_is_the_guests(parts: list[str], link: str, absolute: bool) -> None:
    target = ("/" if absolute else "") + "/".join(parts)
    if not target:
        return
    fs = CountingFileSystem()
    fs.put_directory("a/b/a/b")
    result = shown(fs, link, target)
    in_guest = posixpath.normpath(posixpath.join("/", posixpath.dirname(link), target)).replace("//", "/")
    assert not result.startswith("/")
    mount = "/mnt/x"
    assert posixpath.normpath(posixpath.join(mount, posixpath.dirname(link), result)) == posixpath.normpath(
        mount + in_guest
    )
