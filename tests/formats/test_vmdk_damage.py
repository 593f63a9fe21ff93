"""VMDK extents that are damaged, crafted, or of ESX's kinds."""

from __future__ import annotations

import errno
import random
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import pytest

from nbdserve.block import MemoryDevice
from nbdserve.errors import FormatError, OpenError, Unsupported
from nbdserve.formats.vmdk.create import Subformat, create_image
from nbdserve.formats.vmdk.stream import write_stream_optimized
from nbdserve.opening import open_image
from tests.formats import vmdk_images as vmdk
from tests.formats.usage import patch, use_damaged
from tests.formats.zero_ranges import our_zeros, qemu_zeros
from tests.reference import needs, qemu_content

MIB = 1 << 20
GRAIN = 4096


def content_of(image: Path) -> bytes:
    with open_image(image, format="vmdk", read_only=True) as device:
        return bytes(device.read(0, device.size))


def refused(image: Path, words: str, error: type[OpenError] = OpenError, *, read_only: bool = True) -> None:
    before = image.read_bytes()
    with pytest.raises(error, match=words) as caught:
        open_image(image, format="vmdk", read_only=read_only).close()
    assert "\n" not in str(caught.value)
    assert str(image.parent) in str(caught.value)
    assert image.read_bytes() == before


def places(image: Path) -> tuple[int, int]:
    """Where an image's first grain table and its redundant one begin."""
    raw = image.read_bytes()
    directories = (struct.unpack_from("<Q", raw, field)[0] * 512 for field in (vmdk.DIRECTORY, vmdk.REDUNDANT))
    first, second = (struct.unpack_from("<I", raw, directory)[0] * 512 for directory in directories)
    return first, second


# Headers


@pytest.mark.parametrize(
    ("field", "value", "error", "words"),
    [
        (0, b"XDMV", FormatError, "no createType|neither an extent nor a descriptor"),
        (0, b"COWD", Unsupported, "open the disk's descriptor"),
        (vmdk.VERSION, b"\0\0\0\0", Unsupported, "version 0"),
        (vmdk.VERSION, b"\4\0\0\0", Unsupported, "version 4"),
        (vmdk.CAPACITY + 5, b"\1", Unsupported, "grain tables"),
        (vmdk.CAPACITY + 7, b"\1", FormatError, "sectors"),
        (vmdk.GRAIN_SIZE, b"\0", FormatError, "powers of two"),
        (vmdk.GRAIN_SIZE, b"\7", FormatError, "powers of two"),
        (vmdk.GRAIN_SIZE, b"\0\0\1", Unsupported, "grains of"),
        (vmdk.SLOTS, b"\0\0", FormatError, "powers of two"),
        (vmdk.SLOTS, b"\0\4", FormatError, "1024 entries"),
        (vmdk.DESCRIPTOR, b"\0", FormatError, "open the disk's descriptor"),
        (vmdk.DESCRIPTOR + 3, b"\1", FormatError, "does not fit"),
        (vmdk.DESCRIPTOR_SIZE + 2, b"\1", FormatError, "does not fit"),
        (vmdk.DIRECTORY, b"\0", FormatError, "grain directory"),
        (vmdk.DIRECTORY + 4, b"\1", FormatError, "grain directory"),
        (vmdk.DIRECTORY, b"\xff" * 8, FormatError, "footer"),
        (vmdk.REDUNDANT + 4, b"\1", FormatError, "redundant grain directory"),
        (vmdk.OVERHEAD + 3, b"\1", FormatError, "truncated"),
        (vmdk.LINE_ENDS + 2, b"\n\n", FormatError, "took it for text"),
        (vmdk.COMPRESSION, b"\2", Unsupported, "compression 2"),
    ],
)
def test_headers_refused_in_one_line(
    tmp_path: Path, field: int, value: bytes, error: type[OpenError], words: str
) -> None:
    image = tmp_path / "a.vmdk"
    create_image(image, 8 * MIB)
    patch(image, field, value)
    refused(image, words, error)


@pytest.mark.parametrize("length", [0, 4, 511, 5000, 20_000])
def test_truncated_images_are_refused(tmp_path: Path, length: int) -> None:
    image = tmp_path / "a.vmdk"
    create_image(image, 8 * MIB)
    image.write_bytes(image.read_bytes()[:length])
    refused(image, "no createType|truncated|does not fit")


def test_version_3_is_for_reading(tmp_path: Path) -> None:
    image = tmp_path / "a.vmdk"
    create_image(image, MIB)
    patch(image, vmdk.VERSION, b"\3")
    assert content_of(image) == bytes(MIB)
    refused(image, "version 3 .* read-only", Unsupported, read_only=False)


def test_an_extent_of_a_split_disk_is_no_disk(tmp_path: Path) -> None:
    create_image(tmp_path / "a.vmdk", MIB, subformat=Subformat.SPLIT_SPARSE)
    refused(tmp_path / "a-s001.vmdk", "open the disk's descriptor")


# Tables


def two_grains(image: Path) -> Path:
    """An image of 16 grains, the first two of which are written, one behind the other."""
    create_image(image, 16 * GRAIN, grain_size=GRAIN)
    with open_image(image) as device:
        device.write(0, b"a" * (2 * GRAIN))
    return image


def is_eio(act: object) -> None:
    with pytest.raises(OSError, match="qemu-img check") as caught:
        act()  # type: ignore[operator]
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("entry", [0xFFFFFFFF, 10_000])
def test_a_grain_past_the_end(tmp_path: Path, entry: int) -> None:
    image = two_grains(tmp_path / "a.vmdk")
    for place in places(image):
        patch(image, place + 4 * 5, struct.pack("<I", entry))
    with open_image(image) as device:
        is_eio(lambda: device.read(5 * GRAIN, 1))
        is_eio(lambda: device.write(5 * GRAIN, b"x"))
        is_eio(lambda: device.zero(5 * GRAIN, GRAIN))
        assert device.locate(5 * GRAIN, 1) is None
        if entry == 0xFFFFFFFF:
            with pytest.raises(OSError, match="2 TiB"):  # whatever follows the last grain named
                device.write(7 * GRAIN, b"new")
            return
        device.write(7 * GRAIN, b"new")
    with open_image(image, read_only=True) as device:  # not in the place that the damaged entry names
        assert device.read(7 * GRAIN, 4) == b"new\0"
        assert device.read(5 * GRAIN, GRAIN) == bytes(GRAIN)  # which the file reaches to by now
        assert device.read(0, 2 * GRAIN) == b"a" * (2 * GRAIN)


@pytest.mark.parametrize("where", ["header", "descriptor", "table", "directory"])
def test_grains_on_tables_are_never_written(tmp_path: Path, where: str) -> None:
    image = two_grains(tmp_path / "a.vmdk")
    first, second = places(image)
    raw = image.read_bytes()
    sector = {
        "header": 0,
        "descriptor": 2,
        "table": second // 512,
        "directory": struct.unpack_from("<Q", raw, vmdk.DIRECTORY)[0],
    }[where]
    if not sector:
        sector = 1  # reaches from behind the header into the tables
    for place in (first, second):
        patch(image, place + 4 * 5, struct.pack("<I", sector))
    before = image.read_bytes()
    with open_image(image) as device:
        device.read(5 * GRAIN, GRAIN)
        is_eio(lambda: device.write(5 * GRAIN, b"x" * GRAIN))
        is_eio(lambda: device.zero(5 * GRAIN, GRAIN))
        is_eio(lambda: device.discard(5 * GRAIN, GRAIN))
        assert device.locate_writable(5 * GRAIN, 512) is None
    after = image.read_bytes()
    assert [at for at in range(len(after)) if after[at] != before[at] and not 512 <= at < 1024] == []


def test_a_lost_table_is_read_from_its_copy(tmp_path: Path) -> None:
    image = two_grains(tmp_path / "a.vmdk")
    directory = struct.unpack_from("<Q", image.read_bytes(), vmdk.DIRECTORY)[0] * 512
    patch(image, directory, b"\xff\xff\xff\xff")
    assert content_of(image) == b"a" * (2 * GRAIN) + bytes(14 * GRAIN)
    with open_image(image) as device:
        device.write(5 * GRAIN, b"new")
    assert content_of(image)[5 * GRAIN :][:4] == b"new\0"
    redundant = struct.unpack_from("<Q", image.read_bytes(), vmdk.REDUNDANT)[0] * 512
    patch(image, redundant, b"\xff\xff\xff\xff")
    with open_image(image, read_only=True) as device, pytest.raises(OSError, match="grain directory is damaged"):
        device.read(0, 1)


def test_two_tables_in_one_place(tmp_path: Path) -> None:
    image = two_grains(tmp_path / "a.vmdk")
    directory = struct.unpack_from("<Q", image.read_bytes(), vmdk.DIRECTORY)[0] * 512
    patch(image, directory, struct.pack("<I", places(image)[1] // 512))
    refused(image, "two tables claim", FormatError, read_only=False)
    assert content_of(image)[: 2 * GRAIN] == b"a" * (2 * GRAIN)


def test_tables_that_differ_after_a_crash_become_equal(tmp_path: Path) -> None:
    image = two_grains(tmp_path / "a.vmdk")
    first, second = places(image)
    patch(image, second + 4, bytes(4))
    patch(image, vmdk.UNCLEAN, b"\1")
    open_image(image).close()
    raw = image.read_bytes()
    assert raw[first : first + 2048] == raw[second : second + 2048]
    assert raw[vmdk.UNCLEAN] == 0


# Streams


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    image = tmp_path / "a.vmdk"
    write_stream_optimized(MemoryDevice(bytearray(random.Random(1).randbytes(3 * 65536))), image)
    return image


def test_a_stream_without_its_end(stream: Path) -> None:
    stream.write_bytes(stream.read_bytes()[:-512])
    refused(stream, "without its footer", FormatError)


@pytest.mark.parametrize(
    ("what", "data"),
    [
        ("length", struct.pack("<I", 0)),
        ("length", struct.pack("<I", 0xFFFFFFFF)),
        ("length", struct.pack("<I", 2 * 65536 + 1)),
        ("data", b"\xff" * 100),
        ("data", zlib.compress(bytes(60_000))),
        ("data", zlib.compress(bytes(1 << 30))[:60_000]),
        ("data", b""),
    ],
)
def test_damaged_grains_are_errors_of_their_reads(stream: Path, what: str, data: bytes) -> None:
    raw = stream.read_bytes()
    good = zlib.decompress(raw[65536 + 12 : 65536 + 12 + struct.unpack_from("<I", raw, 65536 + 8)[0]])
    if what == "length":
        patch(stream, 65536 + 8, data)
    else:
        patch(stream, 65536 + 8, struct.pack("<I", 60_000))
        patch(stream, 65536 + 12, data)
    with open_image(stream, read_only=True) as device:
        assert len(good) == 65536
        for _ in range(2):
            with pytest.raises(OSError, match="compressed grain") as caught:
                device.read(5, 100)
            assert caught.value.errno == errno.EIO
        assert any(device.read(65536, 65536))


@needs("qemu-img")
def test_grains_without_markers(stream: Path) -> None:
    """Compressed data may begin at once; nobody is known to write such extents, but QEMU reads them."""
    raw = bytearray(stream.read_bytes())
    flags = struct.unpack_from("<I", raw, vmdk.FLAGS)[0]
    for header in (0, len(raw) - 1024):
        struct.pack_into("<I", raw, header + vmdk.FLAGS, flags & ~0x20000)
    length = struct.unpack_from("<I", raw, 65536 + 8)[0]
    data = zlib.compress(bytes(65000) + b"x" * 536)
    raw[65536 : 65536 + 12 + length] = data.ljust(12 + length, b"\0")
    stream.write_bytes(raw)
    with open_image(stream, read_only=True) as device:
        assert device.read(0, 65536) == bytes(65000) + b"x" * 536


# ESX's kinds


def esx_disk(directory: Path, kind: str, raw: bytes, sectors: int) -> Path:
    (directory / "a-delta.vmdk").write_bytes(raw)
    image = directory / "a.vmdk"
    create_type = "vmfsSparse" if kind == "VMFSSPARSE" else "seSparse"
    image.write_text(vmdk.descriptor([f'RW {sectors} {kind} "a-delta.vmdk"'], create_type))
    return image


@needs("qemu-img")
@pytest.mark.parametrize("kind", ["VMFSSPARSE", "SESPARSE"])
def test_extents_of_esx(tmp_path: Path, kind: str) -> None:
    sectors = 9000 * 8  # three tables, the second of which is missing
    chosen = random.Random(1)
    grains = {number: chosen.randbytes(GRAIN) for number in (0, 1, 5, 4095, 8192, 8500, 8999)}
    made = {
        "VMFSSPARSE": lambda: vmdk.cowd(sectors, grains),
        "SESPARSE": lambda: vmdk.se_sparse(sectors, grains | {3: 1, 8300: 2}),
    }
    raw = made[kind]()
    image = esx_disk(tmp_path, kind, raw, sectors)
    assert content_of(image) == qemu_content(image, "vmdk")
    with open_image(image, read_only=True) as device:
        for number, grain in grains.items():
            assert device.read(number * GRAIN, GRAIN) == grain
        assert our_zeros(device) == qemu_zeros(image, "vmdk")
    refused(image, "read-only", Unsupported, read_only=False)


def test_a_journal_that_has_to_be_replayed(tmp_path: Path) -> None:
    raw = vmdk.se_sparse(4096 * 8, {0: b"x" * GRAIN}, replay=1)
    refused(esx_disk(tmp_path, "SESPARSE", raw, 4096 * 8), "journal", Unsupported)


# Mutations


def good_image(directory: Path, kind: str, chosen: random.Random) -> bytes:
    """The file of an image that is to be mutated."""
    image = directory / "good.vmdk"
    if kind == "stream":
        write_stream_optimized(MemoryDevice(bytearray(chosen.randbytes(5 * 65536))), image)
    else:
        create_image(image, 16 * GRAIN, grain_size=GRAIN, zeroed_grains=kind == "zeroed")
        with open_image(image) as device:
            device.write(0, chosen.randbytes(5 * GRAIN))
    content = image.read_bytes()
    image.unlink()
    return content


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["plain", "zeroed", "stream", "cowd", "sesparse"])
def test_mutations_are_refused_or_read(tmp_path: Path, kind: str, seed: int) -> None:
    chosen = random.Random(seed)
    image = part = tmp_path / "a.vmdk"
    if kind in ("cowd", "sesparse"):
        make = vmdk.cowd if kind == "cowd" else vmdk.se_sparse
        good = make(16 * 8, {0: b"x" * GRAIN, 7: b"y" * GRAIN})
        image = esx_disk(tmp_path, "VMFSSPARSE" if kind == "cowd" else "SESPARSE", good, 16 * 8)
        part = tmp_path / "a-delta.vmdk"
    else:
        good = good_image(tmp_path, kind, chosen)
    if kind in ("plain", "zeroed"):
        part.write_bytes(good)
        tables = places(part)
    else:
        tables = (chosen.randrange(len(good) - 2048), 4 * 512)
    opened = 0
    for _ in range(20):
        mutant = bytearray(good)
        for _ in range(chosen.randint(1, 3)):
            at = chosen.choice(
                (
                    chosen.randrange(4, 80),
                    chosen.choice(tables) + 4 * chosen.randrange(20),
                    512 + chosen.randrange(400),
                    len(good) - 1024 + chosen.randrange(80),
                )
            )
            value = chosen.choice((chosen.randbytes(4), chosen.randbytes(1) + bytes(3), b"\xff" * 4, bytes(4)))
            mutant[at : at + 4] = value
        if chosen.random() < 0.2:
            del mutant[chosen.randrange(len(mutant)) :]
        part.unlink(missing_ok=True)
        part.write_bytes(mutant)
        with suppress(OpenError), open_image(image, format="vmdk", read_only=kind not in ("plain", "zeroed")) as device:
            opened += 1
            assert device.size
            use_damaged(device, chosen, allowed=(errno.EIO, errno.EFBIG))
    assert opened


@pytest.mark.parametrize("seed", range(2))
def test_mutated_descriptors_are_refused_or_read(tmp_path: Path, seed: int) -> None:
    chosen = random.Random(seed)
    create_image(tmp_path / "good.vmdk", 3 * MIB, subformat=Subformat.SPLIT_FLAT)
    text = (tmp_path / "good.vmdk").read_bytes()
    image = tmp_path / "a.vmdk"
    for _ in range(50):
        mutant = bytearray(text)
        for _ in range(chosen.randint(1, 6)):
            at = chosen.randrange(len(mutant))
            mutant[at : at + chosen.randint(0, 9)] = chosen.choice((chosen.randbytes(3), b'"', b"\n", b"9" * 30, b"\0"))
        image.write_bytes(mutant)
        with suppress(OpenError), open_image(image, format="vmdk") as device:
            assert device.size
            use_damaged(device, chosen, allowed=(errno.EIO, errno.EFBIG))
