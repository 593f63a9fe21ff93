"""The contract of FileSystem, point by point: names, directories, inode numbers."""

from __future__ import annotations

import errno
import stat

from fusemount.filesystems.base import LONGEST_UTF16_NAME, Entry
from tests.fusemount.subject import (
    MISSING_FEATURE,
    Subject,
    attempt,
    content,
    mounted,
    names,
    new_file,
)


def check_refusals(subject: Subject) -> None:
    """What does not make sense fails with the kernel's errno."""
    with mounted(subject) as fs:
        file, directory = new_file(fs, b"file", b"text"), fs.make_directory(fs.root, b"dir", 0o755, 0, 0)
        inside = new_file(fs, b"inside", directory=directory)
        for name in (b"file", b"dir"):
            attempt({errno.EEXIST}, fs.create, fs.root, name, stat.S_IFREG | 0o644, 0, 0)
            attempt({errno.EEXIST}, fs.make_directory, fs.root, name, 0o755, 0, 0)
        for call in (fs.lookup, fs.unlink, fs.remove_directory):
            attempt({errno.ENOENT}, call, fs.root, b"missing")
            attempt({errno.ENOTDIR}, call, file, b"name")
            attempt({errno.ENAMETOOLONG, errno.ENOENT}, call, fs.root, b"n" * 256)
        attempt({errno.ENOTDIR}, lambda: list(fs.entries(file)))
        attempt({errno.ENOTDIR}, fs.create, file, b"name", stat.S_IFREG | 0o644, 0, 0)
        attempt({errno.ENOTDIR}, fs.make_directory, file, b"name", 0o755, 0, 0)
        attempt({errno.ENAMETOOLONG}, fs.create, fs.root, b"n" * 256, stat.S_IFREG | 0o644, 0, 0)
        attempt({errno.ENAMETOOLONG}, fs.make_directory, fs.root, b"n" * 256, 0o755, 0, 0)
        attempt({errno.ENAMETOOLONG}, fs.rename, fs.root, b"file", fs.root, b"n" * 256)
        attempt({errno.EISDIR}, fs.read, directory, 0, 1)
        attempt({errno.EISDIR}, fs.write, directory, 0, b"x")
        attempt({errno.EISDIR}, fs.truncate, directory, 0)
        attempt({errno.EINVAL}, fs.read_link, file)
        attempt({errno.ENODATA, *MISSING_FEATURE}, fs.xattr, file, b"user.missing")
        attempt({errno.ENODATA, *MISSING_FEATURE}, fs.remove_xattr, file, b"user.missing")
        attempt({errno.ENOTEMPTY}, fs.remove_directory, fs.root, b"dir")
        attempt({errno.EISDIR}, fs.unlink, fs.root, b"dir")
        attempt({errno.ENOTDIR}, fs.remove_directory, fs.root, b"file")
        attempt({errno.EPERM, *MISSING_FEATURE}, fs.link, directory, fs.root, b"second")
        attempt({errno.ENOTDIR}, fs.rename, fs.root, b"file", file, b"name")
        if not subject.traits.symlinks:
            attempt(MISSING_FEATURE, fs.make_symlink, fs.root, b"symlink", b"target", 0, 0)
        if not subject.traits.devices:
            attempt(MISSING_FEATURE, fs.create, fs.root, b"fifo", stat.S_IFIFO | 0o644, 0, 0)
        if not subject.traits.xattrs:
            attempt(MISSING_FEATURE, fs.set_xattr, file, b"user.a", b"value")
            assert fs.xattr_names(file) == []
        assert sorted(set(names(fs, fs.root)) & {b"file", b"dir", b"missing", b"symlink", b"fifo"}) == [b"dir", b"file"]
        assert content(fs, file) == b"text" and content(fs, inside) == b""


def check_names(subject: Subject) -> None:
    """Any name that is not refused comes back as it was given."""
    awkward = [
        b"x" * 255,
        "\u00e9".encode() * 100,
        "\U0001f600".encode() * 60,
        b"a b",
        b"  lead",
        b"~1",
        b".hidden",
        b"...",
    ]
    awkward += [b"a" * n for n in range(1, 30)] + [
        b"x.tar.gz",
        b"#$%&'()-@^_`{}!",
        b"+,;=[]",
        "\u1e9e\u0130\u0131".encode(),
    ]
    with mounted(subject) as fs:
        taken = []
        for name in awkward:
            inode = attempt({errno.EINVAL}, new_file, fs, name, name, may_succeed=True)
            taken += [name] * (inode is not None)
        assert len(taken) > len(awkward) - 3
        assert set(taken) <= set(names(fs, fs.root))
        for name in taken:
            assert content(fs, fs.lookup(fs.root, name)) == name


def check_longest_names(subject: Subject) -> None:
    """255 bytes, or 255 units of UTF-16 where names are characters, as space() says; one more is too long."""
    with mounted(subject) as fs:
        character = "\u65e5".encode()  # one unit, three bytes
        in_units = fs.space().longest_name == LONGEST_UTF16_NAME
        longest = character * (255 if in_units else 85)
        new_file(fs, longest, b"content")
        attempt({errno.ENAMETOOLONG}, new_file, fs, longest + b"x")
        attempt({errno.ENAMETOOLONG}, new_file, fs, longest + character)
        assert longest in names(fs, fs.root)
        assert content(fs, fs.lookup(fs.root, longest)) == b"content"
        fs.rename(fs.root, longest, fs.root, character)
        fs.rename(fs.root, character, fs.root, longest)
        fs.unlink(fs.root, longest)


def check_inode_numbers(subject: Subject) -> None:
    """A number stays a file's own through renames, and is not given to another before it is forgotten."""
    with mounted(subject) as fs:
        inode, place = new_file(fs, b"old", b"old"), fs.make_directory(fs.root, b"place", 0o755, 0, 0)
        fs.rename(fs.root, b"old", place, b"new")
        others = [new_file(fs, b"other%d" % i) for i in range(5)]
        for number in others:
            fs.unlink(fs.root, b"other%d" % others.index(number))
        later = [new_file(fs, b"later%d" % i) for i in range(5)]
        assert len({fs.root, place, inode, *others, *later}) == 13
        assert fs.lookup(place, b"new") == inode
        assert [entry.inode for entry in fs.entries(place)] == [inode]
        fs.rename(fs.root, b"place", fs.root, b"moved")
        fs.write(inode, 3, b"er")
        assert content(fs, fs.lookup(fs.lookup(fs.root, b"moved"), b"new")) == b"older"


def check_listing(subject: Subject) -> None:
    """A large directory read piece by piece, while entries go and come: what stays is shown exactly once."""
    with mounted(subject) as fs:
        directory = fs.make_directory(fs.root, b"dir", 0o755, 0, 0)
        count = 300
        for i in range(count):
            fs.forget(new_file(fs, b"file number %03d" % i, directory=directory))
        whole = list(fs.entries(directory))
        assert sorted(entry.name for entry in whole) == [b"file number %03d" % i for i in range(count)]
        assert all(entry.position > 0 for entry in whole)
        gone = {entry.name for entry in (*whole[20:40:2], *whole[200:220])}
        seen: list[Entry] = []
        while piece := [
            e for e, _ in zip(fs.entries(directory, seen[-1].position if seen else 0), range(37), strict=False)
        ]:
            seen += piece
            for name in sorted(gone & set(names(fs, directory))) if len(seen) > 37 else []:
                fs.unlink(directory, name)
                new_file(fs, b"new instead of " + name, directory=directory)
        shown = [entry.name for entry in seen]
        assert all(shown.count(entry.name) == 1 for entry in whole if entry.name not in gone)
        for name in names(fs, directory):
            fs.unlink(directory, name)
        assert names(fs, directory) == []
        fs.remove_directory(fs.root, b"dir")


def check_moving_directories(subject: Subject) -> None:
    """Directories move with all below them, over empty ones, and never into themselves."""
    with mounted(subject) as fs:
        a = fs.make_directory(fs.root, b"a", 0o755, 0, 0)
        b = fs.make_directory(a, b"b", 0o755, 0, 0)
        c = fs.make_directory(b, b"c", 0o755, 0, 0)
        new_file(fs, b"leaf", b"leaf", directory=c)
        for into in (a, b, c):
            attempt({errno.EINVAL}, fs.rename, fs.root, b"a", into, b"new")
        fs.make_directory(fs.root, b"empty", 0o755, 0, 0)
        fs.rename(b, b"c", fs.root, b"empty")
        assert fs.lookup(fs.root, b"empty") == c
        fs.rename(fs.root, b"a", c, b"below")
        assert fs.lookup(fs.lookup(c, b"below"), b"b") == b
        attempt({errno.EINVAL}, fs.rename, fs.root, b"empty", b, b"new")
        attempt({errno.EEXIST}, fs.rename, c, b"leaf", c, b"below", replace=False)
        assert sorted(names(fs, c)) == [b"below", b"leaf"] and names(fs, b) == []


CHECKS = (
    check_refusals,
    check_names,
    check_longest_names,
    check_inode_numbers,
    check_listing,
    check_moving_directories,
)
