"""FAT volumes against mkfs.fat, fsck.vfat and mtools."""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusemount.filesystems.base import Changes, FileSystem, Inode
from fusemount.filesystems.fat import examine, open_filesystem
from nbdserve.block import HostFile, MemoryDevice
from nbdserve.formats.raw import RawImage
from tests.fusemount.conformance import check_filesystem
from tests.fusemount.fat_images import FAT12, FAT16, FAT32, SHAPES, TRAITS, Shape, check_clean, judge
from tests.reference import needs, run

pytestmark = needs("mkfs.fat", "fsck.vfat", "mcopy")

NAMES = (
    "README.TXT",
    "readme.lower",
    "lower.txt",
    "Mixed.Txt",
    "UPPER.low",
    "no extension, but long",
    "many.dots.in.a.name.tar.gz",
    ".hidden",
    "+,;=[] are fine in long names",
    "Gr\u00f6\u00dfe \u00fcber alles.txt",
    "\u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac",
    "\u65e5\u672c\u8a9e\u306e\u30d5\u30a1\u30a4\u30eb\u540d.txt",
    "x" * 200 + ".end",
    "exactly thirteen units".replace(" ", "")[:13],
    "twenty-six units, no less.",
)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What mtools goes by."""
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setenv("MTOOLS_SKIP_CHECK", "1")


def mount(image: Path, *, writable: bool = False) -> FileSystem:
    return open_filesystem(RawImage(HostFile.open(image, writable=writable), read_only=not writable), writable=writable)


def tree(fs: FileSystem, inode: Inode, path: str = "") -> Iterator[tuple[str, bytes | None]]:
    """All paths below a directory, with the content of files."""
    for entry in fs.entries(inode):
        child, here = fs.lookup(inode, entry.name), f"{path}/{entry.name.decode()}"
        if entry.type == stat.S_IFDIR:
            yield here, None
            yield from tree(fs, child, here)
        else:
            yield here, bytes(fs.read(child, 0, fs.attributes(child).size))


def host_tree(root: Path) -> dict[str, bytes | None]:
    paths = sorted(root.rglob("*"))
    return {f"/{path.relative_to(root)}": None if path.is_dir() else path.read_bytes() for path in paths}


def some_content(seed: int) -> bytes:
    chosen = random.Random(seed)
    return chosen.randbytes(chosen.choice([0, 1, 511, 512, 513, 4096, 20_000, 70_000]))


@pytest.mark.parametrize("shape", [FAT12, FAT16, FAT32], ids=str)
def test_conformance(tmp_path: Path, shape: Shape) -> None:
    empty = shape.make(tmp_path).read_bytes()
    check_filesystem(lambda: MemoryDevice(bytearray(empty)), open_filesystem, judge, traits=TRAITS, examples=8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reads_what_mtools_wrote(tmp_path: Path, shape: Shape) -> None:
    source = tmp_path / "source"
    (source / "sub directory" / "deeper").mkdir(parents=True)
    for i, name in enumerate(NAMES):
        place = source if i % 3 == 0 else source / "sub directory"
        (place / name.rstrip(".")).write_bytes(some_content(i))
    (source / "many").mkdir()
    for i in range(120):
        (source / "many" / f"file with a long name {i:04}.text").write_bytes(b"%d" % i)
        os.utime(source / "many" / f"file with a long name {i:04}.text", (i * 10**7, i * 10**7))
    image = shape.make(tmp_path, "-n", "A LABEL")
    run("mcopy", "-s", "-m", "-i", image, *source.iterdir(), "::")
    run("mattrib", "-i", image, "+r", "::README.TXT")

    fs = mount(image)
    assert dict(tree(fs, fs.root)) == host_tree(source)
    assert fs.attributes(fs.lookup(fs.root, b"readme.txt")).mode == stat.S_IFREG | 0o555
    many = fs.lookup(fs.root, b"MANY")
    for i in range(40, 120, 7):  # from 1982 on
        inode = fs.lookup(many, b"FILE with a LONG name %04d.text" % i)
        assert fs.attributes(inode).mtime_ns == i * 10**16
    fs.close()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mtools_reads_what_was_written(tmp_path: Path, shape: Shape) -> None:
    image = shape.make(tmp_path)
    fs = mount(image, writable=True)
    expected: dict[str, bytes | None] = {"/sub directory": None}
    sub = fs.make_directory(fs.root, b"sub directory", 0o755, 0, 0)
    for i, name in enumerate(NAMES):
        place, path = (sub, "/sub directory/") if i % 2 else (fs.root, "/")
        inode = fs.create(place, name.encode(), stat.S_IFREG | 0o644, 0, 0)
        content = some_content(i + 100)
        fs.write(inode, 0, content)
        expected[path + name.rstrip(".")] = content
    many = fs.make_directory(sub, b"many", 0o755, 0, 0)
    expected["/sub directory/many"] = None
    for i in range(150):
        name = b"file with a long name %d" % i
        fs.write(fs.create(many, name, stat.S_IFREG | 0o644, 0, 0), 0, name)
        expected["/sub directory/many/" + name.decode()] = name
    old = fs.lookup(fs.root, b"README.TXT")
    fs.change(old, Changes(mode=0o444, mtime_ns=1_234_567_890 * 10**9))
    assert dict(tree(fs, fs.root)) == expected
    fs.close()

    check_clean(image)
    out = tmp_path / "out"
    out.mkdir()
    run("mcopy", "-s", "-m", "-i", image, "::*", out)
    assert host_tree(out) == expected
    assert (out / "README.TXT").stat().st_mtime == 1_234_567_890
    assert " R " in run("mattrib", "-i", image, "::README.TXT")


@pytest.mark.parametrize("name", ["lower.txt", "UPPER.TXT", "base.EXT", "BASE.ext", "12345678", "a$~!{}.b_c"])
def test_names_of_eight_and_three_take_one_entry(tmp_path: Path, name: str) -> None:
    """The case is noted as Windows NT does it, and mtools understands it."""
    image = FAT12.make(tmp_path)
    fs = mount(image, writable=True)
    fs.create(fs.root, name.encode(), stat.S_IFREG | 0o644, 0, 0)
    assert [(entry.name, entry.position) for entry in fs.entries(fs.root)] == [(name.encode(), 1)]
    fs.close()
    assert run("mdir", "-b", "-i", image) == f"::/{name}\n"
    check_clean(image)


def test_aliases_are_found_but_not_shown(tmp_path: Path) -> None:
    image = FAT16.make(tmp_path)
    fs = mount(image, writable=True)
    for i in range(1, 120):
        inode = fs.create(fs.root, b"a long name %d.text" % i, stat.S_IFREG | 0o644, 0, 0)
        assert fs.lookup(fs.root, b"%b~%d.TEX" % (b"alongn"[: 7 - len(str(i))], i)) == inode
    with pytest.raises(FileExistsError):
        fs.create(fs.root, b"ALONGN~1.TEX", stat.S_IFREG | 0o644, 0, 0)
    assert all(entry.name.startswith(b"a long name") for entry in fs.entries(fs.root))
    fs.close()
    check_clean(image)


def test_names_that_windows_could_not_read_are_refused(tmp_path: Path) -> None:
    fs = mount(FAT12.make(tmp_path), writable=True)
    for name in (
        b"a:b",
        b"a\\b",
        b"what?",
        b"*",
        b"<",
        b'"',
        b"|",
        b"tab\t",
        b"blank ",
        b"...",
        b"\xff",
        b"\xed\xa0\x80",
    ):
        with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
            fs.create(fs.root, name, stat.S_IFREG | 0o644, 0, 0)
    inode = fs.create(fs.root, b"dots...", stat.S_IFREG | 0o644, 0, 0)
    assert fs.lookup(fs.root, b"DOTS") == fs.lookup(fs.root, b"dots.") == inode
    fs.close()


def test_short_names_in_the_code_page(tmp_path: Path) -> None:
    image = FAT12.make(tmp_path)
    run("mcopy", "-i", image, os.devnull, "::XXX.TXT")
    content = image.read_bytes()
    assert content.count(b"XXX     TXT") == 1
    for short, shown in (
        (b"\x81BER    TXT", "\u00fcBER.TXT"),
        (b"\x05NE     TXT", "\u00d5NE.TXT"),  # E5 would mean deleted
        (b"A B     C D", "A B.C D"),
        (b"NOEXT      ", "NOEXT"),
    ):
        image.write_bytes(content.replace(b"XXX     TXT", short))
        fs = mount(image)
        assert [entry.name.decode() for entry in fs.entries(fs.root)] == [shown]
        assert fs.lookup(fs.root, shown.lower().encode()) > 0


@pytest.mark.parametrize("short", [b"A/B     TXT", b"A\0B     TXT", b"           "])
def test_names_that_break_the_rules_are_not_shown(tmp_path: Path, short: bytes) -> None:
    image = FAT12.make(tmp_path)
    run("mcopy", "-i", image, os.devnull, "::XXX.TXT")
    image.write_bytes(image.read_bytes().replace(b"XXX     TXT", short))
    fs = mount(image)
    assert list(fs.entries(fs.root)) == []


def test_a_long_name_that_must_not_be_shown_gives_way_to_the_short_one(tmp_path: Path) -> None:
    image = FAT12.make(tmp_path)
    (tmp_path / ("\u540d" * 100)[:80]).write_bytes(b"content")
    run("mcopy", "-i", image, tmp_path / ("\u540d" * 80), "::")
    name = ("\u540d" * 80).encode()
    fs = mount(image)
    assert [entry.name for entry in fs.entries(fs.root)] == [name]
    first = "\u540d" * 5
    for replacement in ("a/b/c", "\ud800\ud800\ud800xx"):
        old, new = first.encode("utf-16-le"), replacement.encode("utf-16-le", "surrogatepass")
        changed = tmp_path / "changed.img"
        changed.write_bytes(image.read_bytes().replace(b"\x01" + old, b"\x01" + new))
        fs = mount(changed)
        shown = [entry.name for entry in fs.entries(fs.root)]
        assert len(shown) == 1 and (b"~1" in shown[0] or shown[0].startswith(b"\xed\xa0\x80")) and shown[0] != name
        assert fs.read(fs.lookup(fs.root, shown[0]), 0, 100) == b"content"


def test_the_fixed_root_directory_fills_up(tmp_path: Path) -> None:
    image = FAT16.make(tmp_path, "-r", "64")
    fs = mount(image, writable=True)
    for i in range(64):
        fs.create(fs.root, b"F%d" % i, stat.S_IFREG | 0o644, 0, 0)
    for name in (b"F64", b"a long name"):
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            fs.create(fs.root, name, stat.S_IFREG | 0o644, 0, 0)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        fs.make_directory(fs.root, b"D", 0o755, 0, 0)
    fs.unlink(fs.root, b"F7")
    fs.rename(fs.root, b"F8", fs.root, b"F7")
    fs.close()
    check_clean(image)


def test_files_end_below_4_gib(tmp_path: Path) -> None:
    image = Shape(32, 512, 64, 5 << 30).make(tmp_path)
    fs = mount(image, writable=True)
    inode = fs.create(fs.root, b"large", stat.S_IFREG | 0o644, 0, 0)
    for size in ((1 << 32), (1 << 40)):
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            fs.truncate(inode, size)
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            fs.write(inode, size - 1, b"x")
    assert fs.attributes(inode).size == 0
    fs.write(inode, (1 << 32) - 3, b"en")
    assert fs.attributes(inode).size == (1 << 32) - 1
    assert fs.read(inode, (1 << 32) - 5, 10) == b"\0\0en"
    fs.close()
    assert image.stat().st_blocks * 512 < 64 << 20  # zeros stay holes
    # fsck.fat 4.2 counts in 32 bits and takes a chain of 4 GiB, as the last 32 KiB need it, for one of 0 bytes.
    fs = mount(image, writable=True)
    fs.truncate(fs.lookup(fs.root, b"large"), (1 << 32) - 32768)
    fs.close()
    check_clean(image)


@pytest.mark.parametrize("shape", [FAT12, FAT16, FAT32], ids=str)
def test_marks_say_that_it_is_in_use(tmp_path: Path, shape: Shape) -> None:
    image = shape.make(tmp_path)
    assert not examine(MemoryDevice(bytearray(image.read_bytes()))).dirty
    fs = mount(image, writable=True)
    fs.create(fs.root, b"file", stat.S_IFREG | 0o644, 0, 0)
    crashed = MemoryDevice(bytearray(image.read_bytes()))
    condition = examine(crashed)
    assert condition.dirty and condition.writable and "fsck.vfat" in condition.remark
    fs.close()
    assert not examine(MemoryDevice(bytearray(image.read_bytes()))).dirty
    # A volume that was dirty stays so.
    again = open_filesystem(crashed, writable=True)
    again.unlink(again.root, b"file")
    again.close()
    assert examine(crashed).dirty


def test_nothing_is_written_when_nothing_changes(tmp_path: Path) -> None:
    image = FAT32.make(tmp_path)
    before = image.read_bytes()
    fs = mount(image, writable=True)
    fs.space()
    fs.sync()
    fs.close()
    assert image.read_bytes() == before


def test_free_clusters_are_counted_in_fsinfo(tmp_path: Path) -> None:
    image = FAT32.make(tmp_path)
    fs = mount(image, writable=True)
    fs.write(fs.create(fs.root, b"file", stat.S_IFREG | 0o644, 0, 0), 0, bytes(10_000))
    fs.sync()
    told = int.from_bytes(image.read_bytes()[512 + 488 : 512 + 492], "little")
    assert told == fs.space().free_blocks == fs.space().blocks - 10 - 1
    fs.close()


def test_all_tables_are_kept_equal_unless_one_is_active(tmp_path: Path) -> None:
    image = FAT32.make(tmp_path, "-f", "3")
    content = bytearray(image.read_bytes())
    reserved, size = int.from_bytes(content[14:16], "little") * 512, int.from_bytes(content[36:40], "little") * 512

    def tables(device: MemoryDevice) -> list[bytes]:
        return [bytes(device.content[reserved + i * size : reserved + (i + 1) * size]) for i in range(3)]

    for flags, changed in ((0, [0, 1, 2]), (0x81, [1])):
        device = MemoryDevice(bytearray(content))
        device.content[40] = flags
        before = tables(device)
        fs = open_filesystem(device, writable=True)
        fs.write(fs.create(fs.root, b"file", stat.S_IFREG | 0o644, 0, 0), 0, bytes(10_000))
        fs.close()
        after = tables(device)
        assert [i for i in range(3) if before[i] != after[i]] == changed
        assert len({after[i] for i in changed}) == 1
        fs = open_filesystem(device, writable=False)
        assert fs.read(fs.lookup(fs.root, b"file"), 0, 10_000) == bytes(10_000)
