"""VMDK disks against qemu-img: content, zeros, conversion, what is on the disk."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdserve.block import BlockDevice, Data, MemoryDevice, Zero
from nbdserve.errors import Locked, OpenError, Unsupported
from nbdserve.formats.vmdk.create import Subformat, create_image
from nbdserve.formats.vmdk.stream import write_stream_optimized
from nbdserve.opening import open_image
from tests.conformance import check_block_device
from tests.formats import vmdk_images as vmdk
from tests.formats.usage import scribble, scribble_in_threads
from tests.formats.vmdk_images import cid_of, content_of, refused
from tests.formats.zero_ranges import our_zeros, qemu_zeros
from tests.reference import needs, qemu_content, qemu_img_create, qemu_info, qemu_io, run
from tests.serving import Served

MIB = 1 << 20
GIB = 1 << 30
SPARSE = [Subformat.MONOLITHIC_SPARSE, Subformat.SPLIT_SPARSE]


def judged_good(image: Path, model: bytes) -> None:
    """qemu-img finds no error, and this content."""
    run("qemu-img", "check", "-q", "-f", "vmdk", image)
    assert qemu_content(image, "vmdk") == model


def same_as_qemu(image: Path) -> None:
    """Content and zeros are what qemu-img says."""
    with open_image(image, read_only=True) as device:
        assert device.size == qemu_info(image, "vmdk")["virtual-size"]
        assert our_zeros(device) == qemu_zeros(image, "vmdk")
        if device.size < 100 * MIB:
            assert device.read(0, device.size) == qemu_content(image, "vmdk")


# What QEMU writes


@needs("qemu-img", "qemu-io")
@pytest.mark.parametrize("subformat", list(Subformat))
def test_reads_what_qemu_wrote(tmp_path: Path, subformat: str) -> None:
    image = qemu_img_create(tmp_path / "a.vmdk", "12M", "vmdk", subformat=subformat)
    qemu_io(image, "write -P 1 100k 3k", "write -P 2 5M 3M", "write -P 3 1023k 2k", "write -z 6M 64k", format="vmdk")
    same_as_qemu(image)


@needs("qemu-img", "qemu-io")
@pytest.mark.parametrize("subformat", [Subformat.SPLIT_SPARSE, Subformat.SPLIT_FLAT])
def test_reads_what_qemu_split(tmp_path: Path, subformat: str) -> None:
    image = qemu_img_create(tmp_path / "a.vmdk", "5G", "vmdk", subformat=subformat)
    qemu_io(image, "write -P 1 2147483000 2k", "write -P 2 4294967000 10M", format="vmdk")
    same_as_qemu(image)
    with open_image(image, read_only=True) as device:
        assert device.read(2147482999, 2050) == b"\0" + b"\1" * 2048 + b"\0"
        assert device.read(4294967000 + 10 * MIB - 1, 2) == b"\2\0"


@needs("qemu-img", "qemu-io")
@pytest.mark.parametrize("subformat", SPARSE)
def test_reads_zeroed_grains(tmp_path: Path, subformat: str) -> None:
    image = qemu_img_create(tmp_path / "a.vmdk", "4M", "vmdk", subformat=subformat, zeroed_grain="on")
    qemu_io(image, "write -P 1 0 1M", "write -z 128k 128k", "write -z 2M 64k", format="vmdk")
    same_as_qemu(image)
    with open_image(image) as device:
        device.write(128 * 1024 + 7, b"x")
        model = device.read(0, device.size)
    judged_good(image, model)
    assert model[128 * 1024 : 128 * 1024 + 9] == bytes(7) + b"x\0"


@needs("qemu-img")
@pytest.mark.parametrize("size", [3 * MIB, 3 * MIB + 512, 40 * MIB + 70_144])
def test_reads_streams_that_qemu_wrote(tmp_path: Path, size: int) -> None:
    raw, image = tmp_path / "a.raw", tmp_path / "a.vmdk"
    with raw.open("wb") as file:
        file.write(b"text " * 100_000)
        file.seek(MIB + 4096)
        file.write(random.Random(1).randbytes(200_000))
        file.truncate(size)
        file.seek(size - 100)
        file.write(b"the end")
    run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, image)
    same_as_qemu(image)
    assert content_of(image) == raw.read_bytes()
    with open_image(image, read_only=True) as device:
        assert device.read(1000, 10) == raw.read_bytes()[1000:1010]
        assert device.locate(0, 512) is None
    with pytest.raises(Unsupported, match="read-only"):
        open_image(image)


# What QEMU reads


@needs("qemu-img", "qemu-io")
@pytest.mark.parametrize("maker", ["qemu", "we"])
@pytest.mark.parametrize("subformat", list(Subformat))
def test_qemu_reads_what_was_written_here(tmp_path: Path, subformat: Subformat, maker: str) -> None:
    image = tmp_path / "a.vmdk"
    if maker == "qemu":
        qemu_img_create(image, "12M", "vmdk", subformat=subformat)
    else:
        create_image(image, 12 * MIB, subformat=subformat)
        judged_good(image, bytes(12 * MIB))
        assert qemu_info(image, "vmdk")["format-specific"]["data"]["create-type"] == subformat
    qemu_io(image, "write -P 1 1M 2M", format="vmdk")
    with open_image(image) as device:
        model = scribble(device, random.Random(2))
    judged_good(image, model)
    qemu_io(image, "write -P 7 11M 512", format="vmdk")  # QEMU can go on where we left
    model[11 * MIB : 11 * MIB + 512] = b"\7" * 512
    judged_good(image, model)
    assert content_of(image) == model


@needs("qemu-img")
@pytest.mark.parametrize("subformat", list(Subformat))
def test_conversion_both_ways(tmp_path: Path, subformat: Subformat) -> None:
    raw, image, back = tmp_path / "a.raw", tmp_path / "a.vmdk", tmp_path / "b.raw"
    raw.write_bytes(random.Random(1).randbytes(MIB) + bytes(2 * MIB) + b"x" * 1000 + bytes(1048))
    run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={subformat}", raw, image)
    assert content_of(image) == raw.read_bytes()
    with open_image(image) as device:
        device.write(5, b"changed")
    run("qemu-img", "convert", "-f", "vmdk", "-O", "raw", image, back)
    assert back.read_bytes() == content_of(image)
    run("qemu-img", "compare", "-q", "-f", "vmdk", "-F", "raw", image, back)


@needs("qemu-img")
@pytest.mark.parametrize("subformat", [Subformat.SPLIT_SPARSE, Subformat.SPLIT_FLAT])
def test_writes_across_the_files_of_a_split_disk(tmp_path: Path, subformat: Subformat) -> None:
    image = tmp_path / "a.vmdk"
    create_image(image, 5 * GIB, subformat=subformat)
    with open_image(image) as device:
        device.write(2 * GIB - 1000, b"x" * 2000)
        device.zero(4 * GIB - 100_000, 200_000)
        assert device.locate(2 * GIB - 1000, 2000) is None
        assert sum(extent.length for extent in device.extents(0, device.size)) == device.size
    run("qemu-img", "check", "-q", "-f", "vmdk", image)
    assert "0x0000" not in qemu_io(image, f"read -P 120 {2 * GIB - 1000} 2000", format="vmdk")
    assert len(list(tmp_path.iterdir())) == 4


@needs("qemu-img")
@pytest.mark.parametrize("grain_size", [4096, 1 * MIB])
def test_other_grain_sizes(tmp_path: Path, grain_size: int) -> None:
    image = tmp_path / "a.vmdk"
    create_image(image, 20 * MIB + 512, grain_size=grain_size)
    with open_image(image) as device:
        model = scribble(device, random.Random(4))
    judged_good(image, model)


def conforms(image: Path, create: Callable[[], None], *, examples: int, judged: bool = True) -> None:
    def make() -> BlockDevice:
        for path in image.parent.glob("a*.vmdk"):
            path.unlink()
        create()
        return open_image(image)

    def reopen(device: BlockDevice) -> BlockDevice:
        device.close()
        return open_image(image)

    check_block_device(make, reopen, (lambda model: judged_good(image, model)) if judged else None, examples=examples)


@needs("qemu-img")
@pytest.mark.parametrize("subformat", list(Subformat))
@pytest.mark.parametrize("grain_size", [4096, 65536])
def test_conforms(tmp_path: Path, subformat: Subformat, grain_size: int) -> None:
    image = tmp_path / "a.vmdk"
    size = 150 * 1024 + 512
    conforms(image, lambda: create_image(image, size, subformat=subformat, grain_size=grain_size), examples=5)


@needs("qemu-img")
@pytest.mark.parametrize("zeroed", [False, True])
@pytest.mark.parametrize("subformat", SPARSE)
def test_conforms_over_a_parent(tmp_path: Path, subformat: Subformat, zeroed: bool) -> None:
    base, image = tmp_path / "base.vmdk", tmp_path / "a.vmdk"
    create_image(base, 100 * 1024)
    with open_image(base) as device:
        device.write(0, random.Random(3).randbytes(70_000))
    parent = (cid_of(base), "base.vmdk")

    def create() -> None:
        create_image(image, 150 * 1024, subformat=subformat, grain_size=4096, zeroed_grains=zeroed, parent=parent)

    conforms(image, create, examples=5)


def test_threads_that_write_flush_and_zero_at_once(tmp_path: Path) -> None:
    image = tmp_path / "a.vmdk"
    share, threads = 64 * 4096 + 512, 4  # neighbours share a grain
    create_image(image, share * threads, grain_size=4096)
    with open_image(image) as device:
        model = scribble_in_threads(device, threads, steps=100, flush_every=50)
    assert content_of(image) == model


# Streams that we write


def sparse_content(size: int) -> bytearray:
    content = bytearray(size)
    content[5:100_000] = b"text that repeats " * 5555 + b"12345"
    content[MIB : MIB + 70_000] = random.Random(5).randbytes(70_000)
    content[size - 10 :] = b"at the end"
    return content


@needs("qemu-img")
@pytest.mark.parametrize("size", [512, 2 * MIB, 40 * MIB + 512, 100 * MIB])
def test_qemu_reads_our_streams(tmp_path: Path, size: int) -> None:
    content = bytearray(size) if size == 512 else sparse_content(size)
    image = tmp_path / "a.vmdk"
    done: list[int] = []
    write_stream_optimized(MemoryDevice(content), image, progress=done.append)
    judged_good(image, content)
    assert content_of(image) == content
    assert done == sorted(done) and done[-1] == size
    assert image.stat().st_size < 400_000
    info = qemu_info(image, "vmdk")["format-specific"]["data"]
    assert info["create-type"] == "streamOptimized" and info["extents"][0]["compressed"]
    run("qemu-img", "convert", "-f", "vmdk", "-O", "qcow2", image, tmp_path / "b.qcow2")
    run("qemu-img", "compare", "-q", "-f", "vmdk", "-F", "qcow2", image, tmp_path / "b.qcow2")


def test_a_stream_is_what_the_specification_says(tmp_path: Path) -> None:
    """Read from front to back by its markers alone, as a reader of a pipe would."""
    content = sparse_content(40 * MIB)
    image = tmp_path / "a.vmdk"
    write_stream_optimized(MemoryDevice(content), image)
    raw = image.read_bytes()
    assert len(raw) % 512 == 0
    assert struct.unpack_from("<Q", raw, vmdk.DIRECTORY) == ((1 << 64) - 1,)
    at, grains, kinds = 128, [], []
    tables: list[int] = []
    while True:
        value, length, kind = struct.unpack_from("<QII", raw, at * 512)
        at += 1
        if length:
            grains.append((value, at - 1))
            at += (length + 12 + 511) // 512 - 1
            continue
        kinds.append(kind)
        if kind == 0:
            break
        if kind == 1:
            tables.append(at)
        elif kind == 2:
            directory = at
        elif kind == 3:
            assert struct.unpack_from("<Q", raw, at * 512 + vmdk.DIRECTORY) == (directory,)
        at += value
    assert at * 512 == len(raw)
    assert kinds == [1, 1, 2, 3, 0]  # grains in the first and the second 32 MiB
    assert list(struct.unpack_from("<2I", raw, directory * 512)) == tables
    for sector, place in grains:
        index, slot = divmod(sector // 128, 512)
        assert struct.unpack_from("<I", raw, tables[index] * 512 + 4 * slot) == (place,)
    assert len(grains) == 2 + 2 + 1


def test_a_stream_of_many_devices(tmp_path: Path) -> None:
    """Zeros that begin and end inside a grain, and extents shorter than a grain."""
    create_image(tmp_path / "a.vmdk", MIB, grain_size=4096)
    with open_image(tmp_path / "a.vmdk") as device:
        for offset in (4096, 70_000, 130_000, 200_000, 500_000, MIB - 1):
            device.write(offset, b"x")
        write_stream_optimized(device, tmp_path / "b.vmdk", workers=1)
        assert content_of(tmp_path / "b.vmdk") == device.read(0, MIB)


def test_a_stream_that_fails_leaves_nothing(tmp_path: Path) -> None:
    class Broken(MemoryDevice):
        def read(self, offset: int, length: int) -> bytearray:
            raise OSError(5, "broken")

    with pytest.raises(OSError, match="broken"):
        write_stream_optimized(Broken(bytearray(b"x" * MIB)), tmp_path / "a.vmdk")
    with pytest.raises(OpenError, match="whole sectors"):
        write_stream_optimized(MemoryDevice(bytearray(513)), tmp_path / "a.vmdk")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.vmdk").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        write_stream_optimized(MemoryDevice(bytearray(512)), tmp_path / "a.vmdk")
    assert (tmp_path / "a.vmdk").read_bytes() == b"precious"


# Parents


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A parent full of 'p', and a larger disk on it, made by qemu-img."""
    base, top = tmp_path / "base.vmdk", tmp_path / "top.vmdk"
    create_image(base, 3 * MIB)
    with open_image(base) as device:
        device.write(0, b"p" * (3 * MIB))
    run("qemu-img", "create", "-q", "-f", "vmdk", "-F", "vmdk", "-b", "base.vmdk", top, "4M", timeout=20)
    return base, top


@needs("qemu-img")
def test_the_parent_shows_through(pair: tuple[Path, Path]) -> None:
    base, top = pair
    before = base.read_bytes()
    with open_image(top) as device:
        assert device.read(0, 4 * MIB) == b"p" * (3 * MIB) + bytes(MIB)
        assert device.map(0, MIB).depth == 1
        device.write(MIB + 1000, b"top")
        device.zero(2 * MIB, MIB // 2)
        device.write(3 * MIB - 1, b"yz")
        model = device.read(0, device.size)
    judged_good(top, model)
    assert base.read_bytes() == before


@needs("qemu-img")
def test_a_parent_that_was_written_to(pair: tuple[Path, Path]) -> None:
    with open_image(pair[0]) as device:
        device.write(0, b"p")
    refused(pair[1], "has been written to since")


@needs("qemu-img", "qemu-io")
def test_a_parent_that_qemu_wrote_to(pair: tuple[Path, Path]) -> None:
    qemu_io(pair[0], "write 0 512", format="vmdk")
    refused(pair[1], "has been written to since")


@needs("qemu-img")
def test_qemu_notices_when_we_wrote_to_a_parent(pair: tuple[Path, Path]) -> None:
    with open_image(pair[0]) as device:
        device.write(0, b"p")
    with pytest.raises(AssertionError, match="Invalid argument"):
        qemu_content(pair[1], "vmdk")


@needs("qemu-img")
def test_a_split_disk_over_a_parent(tmp_path: Path) -> None:
    base, top = tmp_path / "base.vmdk", tmp_path / "top.vmdk"
    create_image(base, 3 * GIB)
    with open_image(base) as device:
        device.write(2 * GIB - 65536, b"<" * 65531 + b"0123456789" + b">" * 65531)
    options = ("-o", "subformat=twoGbMaxExtentSparse", "-F", "vmdk", "-b", "base.vmdk")
    run("qemu-img", "create", "-q", "-f", "vmdk", *options, top, "5G", timeout=20)
    same_as_qemu(top)
    with open_image(top) as device:
        assert device.read(2 * GIB - 6, 12) == b"<0123456789>"
        device.write(2 * GIB - 1, b"ab")
        device.write(4 * GIB + 5, b"beyond the parent")
        assert device.read(2 * GIB - 6, 12) == b"<0123ab6789>"
    run("qemu-img", "check", "-q", "-f", "vmdk", top)
    qemu_io(top, f"read -P 0x61 {2 * GIB - 1} 1", f"read -P 0x62 {2 * GIB} 1", format="vmdk")


# What is on the disk


def test_the_content_id_changes_with_the_first_write(tmp_path: Path) -> None:
    for subformat in Subformat:
        image = tmp_path / subformat / "a.vmdk"
        image.parent.mkdir()
        create_image(image, MIB, subformat=subformat)
        text = image.read_bytes()
        cids = [cid_of(image)]
        with open_image(image) as device:
            device.read(0, MIB)
            cids.append(cid_of(image))
            for number in range(3):
                device.write(0, bytes([number]))
                cids.append(cid_of(image))
        open_image(image).close()
        cids.append(cid_of(image))
        assert cids[0] == cids[1] != cids[2] == cids[3] == cids[4] == cids[5]
        if subformat != Subformat.MONOLITHIC_SPARSE:
            assert len(image.read_bytes()) == len(text)


def test_the_header_says_while_tables_change(tmp_path: Path) -> None:
    image = tmp_path / "a.vmdk"
    create_image(image, MIB)
    with open_image(image) as device:
        assert image.read_bytes()[vmdk.UNCLEAN] == 0
        device.write(0, b"x")
        device.flush()
        assert image.read_bytes()[vmdk.UNCLEAN] == 1
    assert image.read_bytes()[vmdk.UNCLEAN] == 0


@needs("qemu-img")
def test_missing_tables_are_added(tmp_path: Path) -> None:
    image = tmp_path / "a.vmdk"
    create_image(image, 100 * MIB)
    vmdk.without_tables(image)
    with open_image(image) as device:
        assert device.map(0, 100 * MIB) == Zero(100 * MIB, allocated=False)
        for offset in (0, 33 * MIB, 34 * MIB, 99 * MIB):
            device.write(offset, b"here")
        model = device.read(0, device.size)
    judged_good(image, model)
    with open_image(image) as device:
        assert isinstance(device.map(33 * MIB, 4096), Data)


def test_holes_are_given_back(tmp_path: Path) -> None:
    image = tmp_path / "a.vmdk"
    create_image(image, 4 * MIB)
    with open_image(image) as device:
        device.write(0, b"x" * (4 * MIB))
        device.flush()
        full = image.stat().st_blocks
        device.discard(MIB, MIB + 8192)
        if image.stat().st_blocks == full:
            pytest.skip("this file system cannot punch holes")
        assert image.stat().st_blocks < full - 2000
        assert device.map(MIB, MIB) == Zero(MIB, allocated=False)
    assert content_of(image) == b"x" * MIB + bytes(MIB + 8192) + b"x" * (2 * MIB - 8192)


def test_creating_replaces_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.vmdk").write_bytes(b"precious")
    (tmp_path / "b-flat.vmdk").write_bytes(b"precious")
    (tmp_path / "c-s002.vmdk").write_bytes(b"precious")
    for name, subformat in (("a", "monolithicSparse"), ("b", "monolithicFlat"), ("c", "twoGbMaxExtentSparse")):
        with pytest.raises(FileExistsError):
            create_image(tmp_path / f"{name}.vmdk", 5 * GIB, subformat=Subformat(subformat))
    with pytest.raises(OpenError, match="too many"):
        create_image(tmp_path / "d.vmdk", 3 << 40)
    with pytest.raises(OpenError, match="another name"):
        create_image(tmp_path / 'd".vmdk', MIB)
    assert {path.name for path in tmp_path.iterdir()} == {"a.vmdk", "b-flat.vmdk", "c-s002.vmdk"}
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"precious"}


@needs("qemu-io")
@pytest.mark.parametrize("subformat", [Subformat.SPLIT_SPARSE, Subformat.SPLIT_FLAT])
def test_every_file_of_a_disk_is_locked(tmp_path: Path, subformat: Subformat) -> None:
    image = tmp_path / "a.vmdk"
    create_image(image, MIB, subformat=subformat)
    (extent,) = tmp_path.glob("a-*.vmdk")
    with open_image(image):
        for path in (image, extent):
            with pytest.raises(AssertionError, match="lock"):
                qemu_io(path, "write 0 512", format="raw")
            with pytest.raises(Locked):
                open_image(path, format="raw")
    with open_image(image, read_only=True), open_image(image, read_only=True), pytest.raises(Locked):
        open_image(extent, format="raw")


# As a whole


@needs("qemu-img")
def test_tables_are_dropped_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for four tables only: entries that wait to be written are in none that was dropped."""
    monkeypatch.setattr("nbdserve.formats.vmdk.tables._CACHED_BYTES", 1)
    monkeypatch.setattr("nbdserve.formats.vmdk.tables._MOST_WAITING", 100)
    image = tmp_path / "a.vmdk"
    create_image(image, 40 * MIB, grain_size=4096)  # twenty tables
    vmdk.without_tables(image)
    chosen = random.Random(1)
    model = bytearray(40 * MIB)
    with open_image(image) as device:
        for step in range(400):
            offset = chosen.randrange(40 * MIB - 9000)
            model[offset : offset + 9000] = data = chosen.randbytes(9000)
            device.write(offset, data)
            if step % 60 == 0:
                device.flush()
        assert device.read(0, device.size) == model
    judged_good(image, model)


@needs("qemu-img")
def test_served(tmp_path: Path) -> None:
    """Over the wire, where large reads take other ways than small ones."""
    content = sparse_content(20 * MIB)
    (tmp_path / "a.raw").write_bytes(content)
    write_stream_optimized(MemoryDevice(content), tmp_path / "stream.vmdk")
    run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", tmp_path / "a.raw", tmp_path / "sparse.vmdk")
    for name, options in (("stream.vmdk", ("-r",)), ("sparse.vmdk", ())):
        with Served(tmp_path / name, "-k", tmp_path / "socket", *options):
            uri = f"nbd+unix:///?socket={tmp_path}/socket"
            run("qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", tmp_path / "a.raw", uri)
