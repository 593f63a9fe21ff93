"""A whole file system in memory, through /dev/fuse, used by an ordinary user with ordinary programs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fusemount.mounted import CountingMount, is_mounted, needs_fuse, open_folder, prefix, tear_down

pytestmark = needs_fuse


@pytest.fixture
def folder() -> Iterator[Path]:
    with open_folder() as path:
        yield path


@pytest.fixture
def mountpoint(folder: Path) -> Path:
    return folder / "mnt"


def test_reading(mountpoint: Path) -> None:
    with CountingMount(mountpoint, read_only=True) as mount:
        assert mount.sh("cat mine/text") == "some text\n" * 1000
        assert mount.sh("stat -c '%s %a %u %F' mine/text roots/secret mine").splitlines() == [
            "10000 644 65534 regular file",
            "6 600 0 regular file",
            "0 755 65534 directory",
        ]
        assert len(mount.sh("ls many").split()) == 500
        assert mount.sh("find . | wc -l").strip() == "508"
        assert mount.sh("cat mine/none 2>&1 || true; cat mine/none 2>&1 || true").count("No such file") == 2
        assert "Permission denied" in mount.sh("cat roots/secret 2>&1 || true")
        assert "Read-only" in mount.sh("touch mine/new 2>&1 || true")
    assert mount.end["held"] == 0


def test_names_longer_than_255_bytes(mountpoint: Path) -> None:
    name = "\u65e5" * 255
    with CountingMount(mountpoint) as mount:
        assert (
            mount.do(
                f"""
os.chdir({str(mountpoint / "mine")!r})
for name in ({name!r}, "x" * 766):
    open(name, "w").write("content")
assert sorted(each for each in os.listdir(".") if len(each) > 99) == ["x" * 766, {name!r}]
assert os.stat({name!r}).st_size == 7
try:
    os.stat("x" * 5000)
except OSError as error:
    print(errno.errorcode[error.errno])
"""
            )
            == "ENAMETOOLONG\n"
        )
        assert (
            mount.sh("find . -name '\u65e5*' | wc -c; tar c mine | tar t | grep -c '\u65e5'")
            == f"{2 + 5 + 765 + 1}\n1\n"
        )


def test_a_missing_name_appears_when_something_gets_it(mountpoint: Path) -> None:
    with CountingMount(mountpoint) as mount:
        assert (
            mount.sh(
                """
                cd mine
                fails cat a; fails cat b; fails cat c/d; fails stat e; fails cat f
                echo 1 > a; cat a; mv a b; cat b; fails cat a
                mkdir c; echo 2 > c/d; cat c/d; ln -s b e; cat e; ln c/d f; cat f
                rm b; fails cat e; fails cat b; echo 3 > b; cat e
                """
            )
            == "1\n1\n2\n1\n2\n3\n"
        )


def test_what_may_wait_is_answered_by_the_worker(mountpoint: Path) -> None:
    with CountingMount(mountpoint, slow=True) as mount:
        assert len(mount.sh("ls -l many").splitlines()) == 501
        assert mount.sh("cat many/9") == "xxxxxxxxx"
        mount.sh("echo new > mine/new; cat mine/new; rm mine/new")


def test_writing(mountpoint: Path) -> None:
    with CountingMount(mountpoint) as mount:
        mount.sh(
            """
            echo one > mine/one; echo two >> mine/one
            test "$(cat mine/one)" = "$(printf 'one\\ntwo')"
            dd if=/dev/zero of=mine/sparse bs=1 count=1 seek=1000000 status=none
            test "$(stat -c %s mine/sparse)" = 1000001
            truncate -s 5 mine/text; test "$(cat mine/text)" = "some "
            truncate -s 8 mine/text; test "$(tr '\\0' x < mine/text)" = "some xxx"
            printf abc > mine/text; test "$(cat mine/text)" = abc
            mkdir -p mine/d/e; mv mine/one mine/d/e/uno; test ! -e mine/one; test "$(wc -l < mine/d/e/uno)" = 2
            printf new > mine/n; mv mine/n mine/text; test "$(cat mine/text)" = new
            fails mv -T mine/d mine/text
            fails rmdir mine/d
            ln mine/text mine/hard; test "$(stat -c %h mine/text)" = 2
            rm mine/hard; test "$(stat -c %h mine/text)" = 1
            ln -s d/e mine/soft; test "$(readlink mine/soft)" = d/e; ls mine/soft/uno
            chmod 640 mine/text; test "$(stat -c %a mine/text)" = 640
            touch -d '2001-02-03 04:05:06.123456789 UTC' mine/text
            test "$(stat -c %.9Y mine/text)" = 981173106.123456789
            mkfifo mine/fifo; test -p mine/fifo
            rm -r mine/d mine/sparse mine/fifo mine/soft
            """
        )
        assert (
            mount.do(
                f"""
os.chdir({str(mountpoint)!r})
os.setxattr("mine/text", "user.a", b"1")
for flags, wanted in ((os.XATTR_CREATE, errno.EEXIST), (os.XATTR_REPLACE, None)):
    try:
        os.setxattr("mine/text", "user.a", b"2", flags)
    except OSError as error:
        assert error.errno == wanted
    else:
        assert wanted is None
print(os.listxattr("mine/text"), os.getxattr("mine/text", "user.a"))
os.removexattr("mine/text", "user.a")
try:
    os.getxattr("mine/text", "user.a")
except OSError as error:
    assert error.errno == errno.ENODATA
"""
            )
            == "['user.a'] b'2'\n"
        )
    assert mount.end["held"] == 0


def test_a_file_lives_on_while_it_is_open(mountpoint: Path) -> None:
    with CountingMount(mountpoint) as mount:
        mount.do(
            f"""
os.chdir({str(mountpoint)!r})
file = os.open("mine/gone", os.O_RDWR | os.O_CREAT)
os.write(file, b"still here")
os.unlink("mine/gone")
assert not os.path.exists("mine/gone")
os.fsync(file)
assert os.pread(file, 99, 0) == b"still here"
os.ftruncate(file, 5)
assert os.fstat(file).st_size == 5 and os.fstat(file).st_nlink == 0
other = os.open("mine/other", os.O_RDWR | os.O_CREAT)
os.write(other, b"new")
os.rename("mine/other", "mine/text")
assert os.pread(other, 9, 0) == b"new"
assert open("mine/text").read() == "new"
"""
        )
    assert mount.end["syncs"] >= 1
    assert mount.end["held"] == 0
    assert mount.end["inodes"] == 508, "the unlinked file and the one that was replaced are gone"


def test_renaming_with_flags(mountpoint: Path) -> None:
    with CountingMount(mountpoint) as mount:
        assert (
            mount.do(
                f"""
import ctypes
os.chdir({str(mountpoint / "mine")!r})
libc = ctypes.CDLL(None, use_errno=True)
open("a", "w").write("a")
def rename(old, new, flags):
    failed = libc.renameat2(-100, old, -100, new, flags)
    print(errno.errorcode[ctypes.get_errno()] if failed else "done")
rename(b"a", b"text", 1)
rename(b"a", b"text", 2)
rename(b"a", b"b", 1)
print(os.path.exists("a"), open("b").read())
"""
            )
            == "EEXIST\nEINVAL\ndone\nFalse a\n"
        )


def test_a_mapped_file_is_written(mountpoint: Path) -> None:
    with CountingMount(mountpoint) as mount:
        mount.do(
            f"""
file = os.open({str(mountpoint / "top")!r}, os.O_RDWR | os.O_CREAT)
os.ftruncate(file, 1 << 20)
with mmap.mmap(file, 1 << 20) as map:
    map[:] = b"m" * (1 << 20)
    map.flush()
os.close(file)
"""
        )
        assert mount.sh("tr -d m < top | wc -c; stat -c %s top").split() == ["0", "1048576"]
    assert mount.end["files"]["top"] == 1 << 20


# Whose files


def test_set_id_bits_go_when_a_file_is_written(mountpoint: Path) -> None:
    with CountingMount(mountpoint) as mount:
        assert mount.sh("stat -c %a mine/set-id; echo x >> mine/set-id; stat -c %a mine/set-id") == "6755\n755\n"


def test_as_root_of_the_guest(mountpoint: Path) -> None:
    with CountingMount(mountpoint, root_of_guest=True) as mount:
        said = mount.sh(
            """
            cat roots/secret; echo
            echo new > roots/new; stat -c '%u %g' roots/new
            chown 7:8 roots/new; stat -c '%u %g' roots/new
            chmod 0 roots/new; cat roots/new
            readlink mine/link; cat mine/link; echo
            """
        )
    assert said.split() == ["secret", "0", "0", "7", "8", "new", "../roots/secret", "secret"]


def test_without_it_the_guests_permissions_count(mountpoint: Path) -> None:
    with CountingMount(mountpoint) as mount:
        said = mount.sh("cat roots/secret 2>&1 || touch roots/new 2>&1 || chown 0 mine/text 2>&1 || true")
        assert said.count("Permission denied") == 2
        assert said.count("not permitted") == 1


def test_mapped_owners(mountpoint: Path) -> None:
    with CountingMount(mountpoint, uid_map=["0:65534:1"]) as mount:
        assert mount.sh("cat roots/secret; stat -c ' %u' roots/secret") == "secret 65534\n", "root's files are ours"
        mount.sh("touch roots/new")


def test_other_users_see_nothing(mountpoint: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs a second user")
    with CountingMount(mountpoint), pytest.raises(PermissionError):
        os.listdir(mountpoint)


def test_neither_devices_nor_set_id_programs_work(mountpoint: Path) -> None:
    with CountingMount(mountpoint) as mount:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
        options = next(fields[3] for fields in mounts if fields[1] == str(mountpoint))
        assert {"nosuid", "nodev", "rw"} <= set(options.split(","))
        assert "allow_other" not in options
        mount.sh("true")


# Failures


def test_a_damaged_file_is_an_error_of_its_own(mountpoint: Path) -> None:
    with CountingMount(mountpoint, broken=["many/7"]) as mount:
        assert "Input/output error" in mount.sh("cat many/7 2>&1 || true")
        assert mount.sh("cat many/8") == "xxxxxxxx"
        assert mount.sh("ls many | wc -l").strip() == "500"


# The end


def test_sigterm_writes_what_the_kernel_holds(mountpoint: Path) -> None:
    with CountingMount(mountpoint) as mount:
        mount.sh("dd if=/dev/urandom of=big bs=64k count=32 status=none")
        mount.process.send_signal(signal.SIGTERM)
        mount.wait()
        assert not is_mounted(mountpoint)
    assert mount.end["files"]["big"] == 2 << 20


def test_sigterm_ends_a_mount_in_use_without_losing_what_was_written(mountpoint: Path) -> None:
    with CountingMount(mountpoint) as mount:
        source = f"""
import os, sys
file = open({str(mountpoint / "open")!r}, "wb", buffering=0)
for _ in range(64):
    file.write(b"x" * 16384)
print("written", flush=True)
sys.stdin.read()
try:
    file.write(b"more")
    os.fsync(file.fileno())
except OSError as error:
    print(error.errno)
"""
        writer = subprocess.Popen(
            [*prefix(True), sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "written\n"
            mount.process.send_signal(signal.SIGTERM)
            mount.wait(f"{mountpoint}: files in it are still in use; whoever uses them gets an error from now on\n")
            out, _ = writer.communicate("", timeout=20)
            assert out.strip() in ("107", "103"), "ENOTCONN or ECONNABORTED"
        finally:
            writer.kill()
            writer.communicate()
            tear_down(mountpoint)
    assert mount.end["files"]["open"] == 1 << 20
    assert mount.end["held"] == 0


def test_what_the_kernel_forgets_is_given_back(mountpoint: Path) -> None:
    """More would be noticed as well: the file system asserts that nothing is given back twice."""
    if os.geteuid() != 0:
        pytest.skip("only root can empty the kernel's caches")
    with CountingMount(mountpoint) as mount:
        mount.sh("ls -lR . > /dev/null; cat many/* > /dev/null; find . -newer mine > /dev/null; rm many/1*")
        Path("/proc/sys/vm/drop_caches").write_text("2")
        mount.sh("ls -l mine > /dev/null")
    assert mount.end["given"] < 20
    assert mount.end["held"] == 0
