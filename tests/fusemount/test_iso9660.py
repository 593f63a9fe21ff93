"""ISO 9660: equal to the tree that genisoimage and xorriso were given."""

from __future__ import annotations

import os
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from fusemount.filesystems import iso9660
from nbdserve.block import MemoryDevice
from nbdserve.errors import FormatError, OpenError
from tests.fusemount.trees import Facts, Tree, device_of, facts_of, host_tree_of, tree_of

GENISOIMAGE = ("genisoimage", "-quiet", "-o")
XORRISO = ("xorriso", "-as", "mkisofs", "-quiet", "-o")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with all that Rock Ridge can hold."""
    root = tmp_path_factory.mktemp("source")
    deep = root / "a/b/c/d/e/f/g/h/i/j/k"
    deep.mkdir(parents=True)
    (deep / "leaf").write_text("deeper than the eight levels of ISO 9660")
    (deep.parent.parent / "another leaf").write_text("also deep")
    (root / "large").write_bytes(os.urandom(3_000_001))
    (root / "empty").touch()
    (root / "empty directory").mkdir()
    for name in ("UPPER.TXT", "two.dots.txt", ".hidden", "naïve ünïcode 😀.txt", "n" * 248, "rr_moved_not"):
        (root / name).write_text(name)
    (root / "many").mkdir()
    for number in range(500):
        (root / "many" / f"file number {number} with a long name").write_text(str(number))
    os.link(root / "large", root / "many/hard link")
    os.symlink("../many/./../large", root / "a/link")
    os.symlink("/absolute/target", root / "absolute link")
    os.symlink("/".join(letter * 9 for letter in "abcdefghijklmnopqrstuvwxyz"), root / "a/long link")
    os.mkfifo(root / "fifo")
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "disk", stat.S_IFBLK | 0o660, os.makedev(8, 17))
    os.chown(root / "large", 1000, 70_000)
    os.chmod(root / "large", 0o4751)
    os.chmod(root / "empty directory", 0o1777)
    os.utime(root / "empty", (123_456_789, 987_654_321))
    return root


def make_iso(path: Path, source: Path, *command: str) -> Path:
    done = subprocess.run([*command, path, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


def read_iso(path: Path) -> Tree:
    with device_of(path) as device:
        assert iso9660.examine(device).readable
        return tree_of(iso9660.open_filesystem(device, writable=False))


def comparable(tree: Tree) -> Tree:
    """What an image keeps: whole seconds, nothing of the host's directories."""
    return {
        path: replace(facts, mtime_ns=facts.mtime_ns // 10**9, **of_directory(facts)) for path, facts in tree.items()
    }


def of_directory(facts: Facts) -> dict[str, int]:
    return {"size": 0, "links": 0} if stat.S_ISDIR(facts.mode) else {}


@pytest.mark.needs("genisoimage", "xorriso")
@pytest.mark.parametrize(
    "command",
    [
        ("genisoimage", "-quiet", "-R", "-o"),
        ("genisoimage", "-quiet", "-R", "-D", "-J", "-joliet-long", "-o"),
        ("xorriso", "-as", "mkisofs", "-quiet", "-R", "-J", "-o"),
        ("xorriso", "-as", "mkisofs", "-quiet", "-R", "--hardlinks", "-o"),
    ],
    ids=" ".join,
)
def test_rock_ridge(tmp_path: Path, source: Path, command: tuple[str, ...]) -> None:
    tree = read_iso(make_iso(tmp_path / "iso", source, *command))
    assert comparable(tree) == comparable(host_tree_of(source))


@pytest.mark.needs("genisoimage", "xorriso")
@pytest.mark.parametrize(
    "command", [(*GENISOIMAGE[:2], "-J", "-joliet-long", "-o"), (*XORRISO[:4], "-J", "-o")], ids=" ".join
)
def test_joliet(tmp_path: Path, command: tuple[str, ...]) -> None:
    source = tmp_path / "source"
    (source / "Ordner/größer").mkdir(parents=True)
    for name in ("README.TXT", "Ordner/größer/名前.txt", "Ordner/two.dots.txt", "x" * 60 + ".long"):
        (source / name).write_text(name)
    iso = make_iso(tmp_path / "iso", source, *command)
    content = bytearray(iso.read_bytes())
    hide = content.index(b"SP\x07\x01") if b"SP\x07\x01" in content else 0
    content[hide : hide + 2] = b"\0\0"  # xorriso always writes Rock Ridge too: not to be seen as such
    filesystem = iso9660.open_filesystem(MemoryDevice(content), writable=False)
    assert not filesystem.has_owners
    ours = {path: facts.content for path, facts in tree_of(filesystem).items()}
    assert ours == {path: facts.content for path, facts in host_tree_of(source).items()}


@pytest.mark.needs("genisoimage")
def test_plain_names_as_linux_shows_them(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "FOLDER").mkdir(parents=True)
    for name in ("README.TXT", "NODOT", "FOLDER/INSIDE.DAT"):
        (source / name).write_text(name)
    tree = read_iso(make_iso(tmp_path / "iso", source, "genisoimage", "-quiet", "-o"))
    assert sorted(tree) == [b"folder", b"folder/inside.dat", b"nodot", b"readme.txt"]
    assert {stat.S_IMODE(facts.mode) for facts in tree.values()} == {0o555}


@pytest.mark.needs("xorriso")
def test_zisofs(tmp_path: Path, source: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "numbers").write_text("\n".join(map(str, range(100_000))))
    (text / "zeros").write_bytes(bytes(500_000))
    (text / "noise").write_bytes(os.urandom(200_000))
    (text / "short").write_text("short")
    iso = tmp_path / "iso"
    command = ["xorriso", "-outdev", iso, "-map", text, "/", "-set_filter_r", "--zisofs", "/", "--", "-commit"]
    subprocess.run(command, capture_output=True, check=True)
    assert iso.stat().st_size < 900_000, "xorriso did not compress"
    assert comparable(read_iso(iso)) == comparable(host_tree_of(text))


@pytest.mark.needs("genisoimage")
def test_a_file_in_several_extents(tmp_path: Path) -> None:
    """As files of 4 GiB and more are stored: records with one name behind each other."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "AA").write_bytes(b"a" * 4096)
    (source / "AB").write_bytes(b"b" * 5000)
    (source / "AC").write_bytes(b"c")
    iso = make_iso(tmp_path / "iso", source, *GENISOIMAGE)
    content = bytearray(iso.read_bytes())
    first, second = content.index(b"AA.;1"), content.index(b"AB.;1")
    content[first - 8] |= 0x80
    content[second : second + 2] = b"AA"
    filesystem = iso9660.open_filesystem(MemoryDevice(content), writable=False)
    assert [entry.name for entry in filesystem.entries(filesystem.root)] == [b"aa", b"ac"]
    inode = filesystem.lookup(filesystem.root, b"aa")
    assert facts_of(filesystem, inode).size == 9096
    assert filesystem.read(inode, 4000, 200) == b"a" * 96 + b"b" * 104


@pytest.mark.needs("genisoimage")
def test_what_is_refused(tmp_path: Path, source: Path) -> None:
    iso = make_iso(tmp_path / "iso", source, "genisoimage", "-quiet", "-R", "-o")
    content = bytearray(iso.read_bytes())
    with pytest.raises(OpenError, match="only read"):
        iso9660.open_filesystem(MemoryDevice(content), writable=True)
    short = MemoryDevice(content[: 1 << 20])
    condition = iso9660.examine(short)
    assert condition.readable and "cut off" in condition.remark and "\n" not in condition.remark
    filesystem = iso9660.open_filesystem(short, writable=False)
    with pytest.raises(OSError, match="Input/output error"):
        filesystem.read(filesystem.lookup(filesystem.root, b"large"), 2_900_000, 1000)
    nothing = MemoryDevice(bytearray(1 << 20))
    assert not iso9660.examine(nothing).readable
    with pytest.raises(FormatError, match="no primary volume descriptor"):
        iso9660.open_filesystem(nothing, writable=False)
