"""VDI images against qemu-img, against VirtualBox's way with parents, and against those who damage them."""

from __future__ import annotations

import errno
import random
import struct
import uuid
from contextlib import closing, suppress
from pathlib import Path

import pytest

from nbdserve.block import BlockDevice, HostFile, Zero
from nbdserve.errors import FormatError, OpenError, Unsupported
from nbdserve.formats import probe
from nbdserve.formats.vdi.create import create_image
from nbdserve.formats.vdi.header import Header, read_header
from nbdserve.opening import ReferencePolicy, open_image
from tests.conformance import check_block_device
from tests.formats.usage import scribble, use_damaged
from tests.formats.zero_ranges import our_zeros, qemu_zeros
from tests.reference import needs, qemu_content, qemu_img_create, qemu_info, qemu_io, run

MIB = 1 << 20

# Offsets of fields of the header.
VERSION, HEADER_SIZE, TYPE, MAP, DATA, SECTOR_SIZE, DISK_SIZE = 68, 72, 76, 340, 344, 360, 368
BLOCK_SIZE, EXTRA, BLOCKS, ALLOCATED, IMAGE, MODIFICATION, PARENT = 376, 380, 384, 388, 392, 408, 424


def header_of(image: Path) -> Header:
    with closing(HostFile.open(image, writable=False)) as file:
        return read_header(file)


def content_of(image: Path, **options: object) -> bytes:
    with open_image(image, read_only=True, **options) as device:  # type: ignore[arg-type]
        return bytes(device.read(0, device.size))


def judged_good(image: Path, model: bytes) -> None:
    """qemu-img finds no error, and this content."""
    run("qemu-img", "check", "-q", "-f", "vdi", image)
    assert qemu_content(image, "vdi") == model


# Content


@needs("qemu-img", "qemu-io")
@pytest.mark.parametrize("static", ["on", "off"])
def test_reads_what_qemu_wrote(tmp_path: Path, static: str) -> None:
    image = qemu_img_create(tmp_path / "a.vdi", "12M", "vdi", static=static)
    qemu_io(image, "write -P 1 100k 3k", "write -P 2 5M 3M", "write -P 3 1023k 2k", "write -z 6M 64k", format="vdi")
    with open_image(image, read_only=True) as device:
        assert device.read(0, device.size) == qemu_content(image, "vdi")
        assert our_zeros(device) == qemu_zeros(image, "vdi")


@needs("qemu-img", "qemu-io")
@pytest.mark.parametrize("maker", ["qemu", "we"])
@pytest.mark.parametrize("static", [False, True])
def test_qemu_reads_what_was_written_here(tmp_path: Path, static: bool, maker: str) -> None:
    image = tmp_path / "a.vdi"
    if maker == "qemu":
        qemu_img_create(image, "12M", "vdi", static="on" if static else "off")
    else:
        create_image(image, 12 * MIB, static=static)
        judged_good(image, bytes(12 * MIB))
    qemu_io(image, "write -P 1 1M 2M", format="vdi")
    with open_image(image) as device:
        model = scribble(device, random.Random(2))
    judged_good(image, model)
    qemu_io(image, "write -P 7 11M 512", format="vdi")  # QEMU can go on where we left
    model[11 * MIB : 11 * MIB + 512] = b"\7" * 512
    judged_good(image, model)
    assert content_of(image) == model


@needs("qemu-img")
def test_conversion_both_ways(tmp_path: Path) -> None:
    raw, image, back = tmp_path / "a.raw", tmp_path / "a.vdi", tmp_path / "b.raw"
    raw.write_bytes(random.Random(1).randbytes(MIB) + bytes(2 * MIB) + b"x" * 1000 + bytes(1048))
    run("qemu-img", "convert", "-f", "raw", "-O", "vdi", raw, image)
    assert content_of(image) == raw.read_bytes()
    with open_image(image) as device:
        device.write(5, b"changed")
    run("qemu-img", "convert", "-f", "vdi", "-O", "raw", image, back)
    assert back.read_bytes() == content_of(image)
    run("qemu-img", "compare", "-q", "-f", "vdi", "-F", "raw", image, back)


@needs("qemu-img")
@pytest.mark.parametrize("odd", [1, 511, 512, 513])
def test_size_is_what_qemu_says(tmp_path: Path, odd: int) -> None:
    image = tmp_path / "a.vdi"
    create_image(image, 2 * MIB)
    raw = bytearray(image.read_bytes())
    struct.pack_into("<Q", raw, DISK_SIZE, MIB + odd)
    image.write_bytes(raw)
    with open_image(image, read_only=True) as device:
        assert device.size == qemu_info(image, "vdi")["virtual-size"]


def conforms(image: Path, size: int, *, examples: int, judged: bool = False, **options: object) -> None:
    def make() -> BlockDevice:
        image.unlink(missing_ok=True)
        create_image(image, size, **options)  # type: ignore[arg-type]
        return open_image(image)

    def reopen(device: BlockDevice) -> BlockDevice:
        device.close()
        return open_image(image)

    check_block_device(make, reopen, (lambda model: judged_good(image, model)) if judged else None, examples=examples)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("block_size", [4096, 65536])
def test_conforms(tmp_path: Path, block_size: int, static: bool) -> None:
    conforms(tmp_path / "a.vdi", 150 * 1024 + 512, examples=8, block_size=block_size, static=static)


@needs("qemu-img")
def test_conforms_in_the_usual_blocks(tmp_path: Path) -> None:
    conforms(tmp_path / "a.vdi", 2 * MIB + 512, examples=6, judged=True)


def test_differencing_conforms(tmp_path: Path) -> None:
    base = tmp_path / "base.vdi"
    create_image(base, 150 * 1024, block_size=4096)
    with open_image(base) as device:
        device.write(0, random.Random(3).randbytes(70_000))
        device.write(100_000, b"p" * 30_000)
    conforms(tmp_path / "a.vdi", 200 * 1024 + 512, examples=12, block_size=4096, parent=header_of(base))


# Differencing images


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A parent full of 'p', and an image on it."""
    base, top = tmp_path / "base.vdi", tmp_path / "top.vdi"
    create_image(base, 4 * MIB)
    with open_image(base) as device:
        device.write(0, b"p" * (4 * MIB))
    create_image(top, 4 * MIB, parent=header_of(base))
    (tmp_path / "another.vdi").write_bytes(b"no VDI")
    create_image(tmp_path / "unrelated.vdi", MIB)
    return base, top


def test_the_parent_shows_through(pair: tuple[Path, Path]) -> None:
    base, top = pair
    before = base.read_bytes()
    with open_image(top) as device:
        assert device.read(0, 4 * MIB) == b"p" * (4 * MIB)
        assert device.map(0, MIB).depth == 1
        assert device.locate(4096, 4096) is not None
        assert device.locate_writable(4096, 4096) is None
        device.write(MIB + 1000, b"top")
        device.zero(2 * MIB, MIB)
        device.zero(3 * MIB, 10)
    with open_image(top, read_only=True) as device:
        assert device.map(2 * MIB, 2 * MIB) == Zero(MIB, allocated=False)
        expected = b"p" * (MIB + 1000) + b"top" + b"p" * (MIB - 1003) + bytes(MIB + 10) + b"p" * (MIB - 10)
        assert device.read(0, 4 * MIB) == expected
    assert base.read_bytes() == before


def test_a_zeroed_block_stays_so_when_written_in_part(pair: tuple[Path, Path]) -> None:
    with open_image(pair[1]) as device:
        device.zero(MIB, MIB)
        device.write(MIB + 5, b"x")
        assert device.read(MIB, 10) == b"\0\0\0\0\0x\0\0\0\0"


def test_a_chain(pair: tuple[Path, Path], tmp_path: Path) -> None:
    create_image(tmp_path / "third.vdi", 5 * MIB, parent=header_of(pair[1]))
    with open_image(tmp_path / "third.vdi", read_only=True) as device:
        assert device.read(0, 5 * MIB) == b"p" * (4 * MIB) + bytes(MIB)
        assert device.map(0, MIB).depth == 2


def refused(image: Path, words: str, **options: object) -> None:
    with pytest.raises(OpenError, match=words) as caught:
        content_of(image, **options)
    assert "\n" not in str(caught.value)


def test_a_parent_that_is_not_there(pair: tuple[Path, Path]) -> None:
    pair[0].unlink()
    refused(pair[1], "no .vdi beside it has its parent's UUID")


def test_a_parent_that_was_written_to(pair: tuple[Path, Path]) -> None:
    with open_image(pair[0]) as device:
        device.write(0, b"p")
    refused(pair[1], "has been written to since")


def test_an_image_that_is_its_own_parent(pair: tuple[Path, Path]) -> None:
    raw = bytearray(pair[1].read_bytes())
    raw[PARENT : PARENT + 16] = raw[IMAGE : IMAGE + 16]
    pair[1].write_bytes(raw)
    refused(pair[1], "no .vdi beside it")


def test_parents_in_a_circle(pair: tuple[Path, Path]) -> None:
    base, top = (bytearray(image.read_bytes()) for image in pair)
    base[PARENT : PARENT + 32] = top[IMAGE : IMAGE + 32]
    struct.pack_into("<I", base, TYPE, 4)
    pair[0].write_bytes(base)
    refused(pair[1], "no .vdi beside it")


def test_as_virtualbox_lays_out_its_snapshots(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "Snapshots").mkdir()
    top = pair[1].rename(tmp_path / "Snapshots" / "{0123}.vdi")
    refused(top, f"outside its own directory; allow that with --allow-path {tmp_path} ")
    assert content_of(top, policy=ReferencePolicy(allowed=(tmp_path,))) == b"p" * (4 * MIB)


def test_a_parent_behind_a_symlink_out_of_the_directory(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    pair[0].symlink_to(pair[0].rename(tmp_path / "elsewhere" / "base.vdi"))
    (tmp_path / "home").mkdir()
    top = pair[1].rename(tmp_path / "home" / "top.vdi")
    pair[0].rename(tmp_path / "home" / "base.vdi")
    refused(top, "outside its own directory")


# What is on the disk


def test_the_modification_uuid_changes_with_the_first_write(tmp_path: Path) -> None:
    image = tmp_path / "a.vdi"
    create_image(image, MIB)
    uuids = [header_of(image).modification_uuid]
    with open_image(image) as device:
        device.read(0, MIB)
        uuids.append(header_of(image).modification_uuid)
        for number in range(3):
            device.write(0, bytes([number]))
            uuids.append(header_of(image).modification_uuid)
    open_image(image).close()
    uuids.append(header_of(image).modification_uuid)
    assert uuids[0] == uuids[1] != uuids[2] == uuids[3] == uuids[4] == uuids[5]
    assert uuids[2].version == 4


def test_blocks_that_a_crash_leaked_are_used_first(tmp_path: Path) -> None:
    image = tmp_path / "a.vdi"
    create_image(image, 8 * 4096, block_size=4096)
    with open_image(image) as device:
        device.write(0, b"a" * (4 * 4096))
    raw = bytearray(image.read_bytes())
    header = header_of(image)
    struct.pack_into("<I", raw, header.map_offset + 4, 0xFFFFFFFF)  # block 1 was never linked
    struct.pack_into("<I", raw, ALLOCATED, 7)
    image.write_bytes(raw)
    length = image.stat().st_size
    with open_image(image) as device:
        device.write(6 * 4096 + 5, b"b")
        assert device.read(6 * 4096, 4096) == bytes(5) + b"b" + bytes(4090)
    assert image.stat().st_size == length
    assert header_of(image).blocks_allocated == 4
    assert struct.unpack_from("<I", image.read_bytes(), header.map_offset + 4 * 6) == (1,)


def test_the_file_holds_whole_blocks(tmp_path: Path) -> None:
    image = tmp_path / "a.vdi"
    create_image(image, 3 * MIB)
    with open_image(image) as device:
        device.write(MIB, b"x")
    assert image.stat().st_size == header_of(image).data_offset + MIB


def test_creating_replaces_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    image = tmp_path / "a.vdi"
    image.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        create_image(image, MIB)
    with pytest.raises(OpenError, match="too many"):
        create_image(tmp_path / "b.vdi", 1 << 60)
    assert [path.name for path in tmp_path.iterdir()] == ["a.vdi"]
    assert image.read_bytes() == b"precious"


# Damage


def test_probing(tmp_path: Path) -> None:
    create_image(tmp_path / "a", MIB)
    with closing(HostFile.open(tmp_path / "a", writable=False)) as file:
        assert probe(file) == "vdi"


@pytest.mark.parametrize(
    ("field", "value", "error", "words"),
    [
        (64, 0x12345678, FormatError, "not a VDI"),
        (VERSION, 0x00010002, Unsupported, "version 1.2"),
        (HEADER_SIZE, 100, FormatError, "header of 100"),
        (TYPE, 0, FormatError, "type 0"),
        (TYPE, 3, Unsupported, "undo"),
        (TYPE, 4, FormatError, "names no parent"),
        (TYPE, 5, FormatError, "type 5"),
        (MAP, 513, FormatError, "not on sectors"),
        (MAP, 0, FormatError, "between the header and the data"),
        (MAP, 1 << 20, FormatError, "between the header and the data"),
        (DATA, 4097, FormatError, "not on sectors"),
        (DATA, 512, FormatError, "between the header and the data"),
        (DATA, 1 << 31, FormatError, "truncated"),
        (SECTOR_SIZE, 4096, FormatError, "sectors of 4096"),
        (DISK_SIZE, 9 * MIB, FormatError, "only 8 blocks"),
        (DISK_SIZE + 4, 0xFFFFFFFF, FormatError, "only 8 blocks"),
        (BLOCK_SIZE, 0, FormatError, "power of two"),
        (BLOCK_SIZE, 3 * MIB, FormatError, "power of two"),
        (BLOCK_SIZE, 512, Unsupported, "blocks of 512"),
        (BLOCK_SIZE, 1 << 31, Unsupported, "blocks of"),
        (EXTRA, 8, Unsupported, "extra bytes"),
        (BLOCKS, 0xFFFFFFFF, Unsupported, "more than"),
        (BLOCKS, 1 << 20, FormatError, "between the header and the data"),
        (PARENT, 1, FormatError, "names a parent although"),
    ],
)
def test_headers_refused_in_one_line(
    tmp_path: Path, field: int, value: int, error: type[OpenError], words: str
) -> None:
    image = tmp_path / "a.vdi"
    create_image(image, 8 * MIB)
    raw = bytearray(image.read_bytes())
    struct.pack_into("<I", raw, field, value)
    image.write_bytes(raw)
    with pytest.raises(error, match=words) as caught:
        open_image(image, format="vdi")
    assert "\n" not in str(caught.value)
    assert str(image) in str(caught.value)
    assert image.read_bytes() == raw


@pytest.mark.parametrize("length", [0, 60, 500, 4000, 8000])
def test_truncated_images_are_refused(tmp_path: Path, length: int) -> None:
    image = tmp_path / "a.vdi"
    create_image(image, 1024 * MIB)
    image.write_bytes(image.read_bytes()[:length])
    refused(image, "not a VDI|truncated", format="vdi")


def test_snapshots_are_refused(tmp_path: Path) -> None:
    create_image(tmp_path / "a.vdi", MIB)
    refused(tmp_path / "a.vdi", "snapshot", snapshot="x")


@pytest.mark.parametrize(
    ("entry", "why"), [(1, "twice"), (2, "past the end"), (7, "past the end"), (8, "too large"), (0xFFFFFFFD, "far")]
)
def test_damaged_entries_reach_nothing(tmp_path: Path, entry: int, why: str) -> None:
    """Guest blocks 0 and 1 rightly lie in blocks 0 and 1; the entry of block 2 is what the test wants."""
    image = tmp_path / "a.vdi"
    create_image(image, 8 * 4096, block_size=4096)
    with open_image(image) as device:
        device.write(0, b"a" * 8192)
    raw = bytearray(image.read_bytes())
    at = header_of(image).map_offset + 4 * 2
    struct.pack_into("<I", raw, at, entry)
    image.write_bytes(raw)
    with open_image(image) as device:
        for act in (
            lambda: device.read(2 * 4096, 1),
            lambda: device.write(2 * 4096 + 7, b"x" * 4000),
            lambda: device.zero(2 * 4096, 4096),
            lambda: device.discard(2 * 4096, 4096),
        ):
            with pytest.raises(OSError, match="damaged") as caught:
                act()
            assert caught.value.errno == errno.EIO
        assert device.locate(2 * 4096, 512) is None
        assert device.locate_writable(2 * 4096, 512) is None
        for block in range(3, 7):
            device.write(block * 4096, b"new")
    assert struct.unpack_from("<I", image.read_bytes(), at) == (entry,)
    with open_image(image, read_only=True) as device:  # what was written lies in nobody else's place
        for block in range(3, 7):
            assert device.read(block * 4096, 4) == b"new\0"
        assert device.read(0, 4096 if why == "twice" else 8192).strip(b"a") == b""


@pytest.mark.parametrize("seed", range(4))
def test_mutations_are_refused_or_read(tmp_path: Path, seed: int) -> None:
    chosen = random.Random(seed)
    create_image(tmp_path / "good.vdi", 16 * 4096, block_size=4096)
    with open_image(tmp_path / "good.vdi") as device:
        device.write(0, chosen.randbytes(5 * 4096))
    good = (tmp_path / "good.vdi").read_bytes()
    fields = (VERSION, HEADER_SIZE, TYPE, MAP, DATA, DISK_SIZE, BLOCK_SIZE, EXTRA, BLOCKS, ALLOCATED, PARENT)
    opened = 0
    for number in range(25):
        mutant = bytearray(good)
        for _ in range(chosen.randint(1, 3)):
            at = chosen.choice((chosen.choice(fields), 512 + 4 * chosen.randrange(16)))
            value = chosen.choice((chosen.randbytes(4), chosen.randbytes(1) + bytes(3), b"\xff" * 4, bytes(4)))
            mutant[at : at + 4] = value
        if chosen.random() < 0.2:
            del mutant[chosen.randrange(len(mutant)) :]
        image = tmp_path / f"{number}.vdi"
        image.write_bytes(mutant)
        with suppress(OpenError), open_image(image, format="vdi") as device:
            opened += 1
            assert not device.read_only
            use_damaged(device, chosen, allowed=(errno.EIO, errno.ENOSPC))
        with image.open("rb") as file:
            assert file.read(340) == mutant[:340]
    assert opened


def test_uuids_are_random(tmp_path: Path) -> None:
    create_image(tmp_path / "a.vdi", MIB)
    create_image(tmp_path / "b.vdi", MIB)
    first, second = header_of(tmp_path / "a.vdi"), header_of(tmp_path / "b.vdi")
    assert len({first.image_uuid, first.modification_uuid, second.image_uuid, second.modification_uuid}) == 4
    assert first.parent_uuid == uuid.UUID(int=0)
