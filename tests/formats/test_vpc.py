"""VHD images against qemu-img, and against those who damage them."""

from __future__ import annotations

import errno
import os
import random
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from nbdserve.block import BlockDevice, Data, HostFile, Zero
from nbdserve.errors import FormatError, OpenError, Unsupported
from nbdserve.formats import OpenOptions
from nbdserve.formats.vpc import is_footer, open_image
from tests.conformance import check_block_device
from tests.formats import vhd_images as vhd
from tests.formats.usage import scribble, scribble_in_threads, use_damaged
from tests.reference import needs, qemu_content, qemu_img_create, qemu_info, qemu_io

MIB = 1 << 20

# The size QEMU shows


@needs("qemu-img")
@pytest.mark.parametrize("size", ["512", "1M", "8M", "100M", "200G", "2040G"])
@pytest.mark.parametrize("force_size", ["on", "off"])
@pytest.mark.parametrize("subformat", ["fixed", "dynamic"])
def test_size_is_what_qemu_says(tmp_path: Path, subformat: str, force_size: str, size: str) -> None:
    image = qemu_img_create(tmp_path / "a.vhd", size, "vpc", subformat=subformat, force_size=force_size)
    with vhd.open_vhd(image) as device:
        assert device.size == qemu_info(image, "vpc")["virtual-size"]


@needs("qemu-img")
@pytest.mark.parametrize("geometry", [(20, 4, 17), (65535, 16, 255), (0, 0, 0)])
@pytest.mark.parametrize(
    "creator", [b"vpc ", b"qemu", b"qem2", b"win ", b"d2v ", b"tap\0", b"tapx", b"CTXS", b"vbox", b"win\0"]
)
def test_creator_decides_between_geometry_and_size(
    tmp_path: Path, creator: bytes, geometry: tuple[int, int, int]
) -> None:
    size = 3 * MIB + 1000  # not whole sectors either
    ends = vhd.footer(size, creator=creator, geometry=geometry)
    image = tmp_path / "a.vhd"
    image.write_bytes(ends + vhd.header(4, MIB) + b"\xff" * 512 + ends)
    with vhd.open_vhd(image, read_only=True) as device:
        assert device.size == qemu_info(image, "vpc")["virtual-size"]


# Content


@needs("qemu-img", "qemu-io")
@pytest.mark.parametrize("subformat", ["fixed", "dynamic"])
def test_reads_what_qemu_wrote(tmp_path: Path, subformat: str) -> None:
    image = qemu_img_create(tmp_path / "a.vhd", "12M", "vpc", subformat=subformat)
    qemu_io(image, "write -P 1 100k 3k", "write -P 2 5M 3M", "write -P 3 2047k 2k", "write -z 6M 64k", format="vpc")
    with vhd.open_vhd(image, read_only=True) as device:
        assert device.read(0, device.size) == qemu_content(image, "vpc")


@needs("qemu-img", "qemu-io")
@pytest.mark.parametrize("subformat", ["fixed", "dynamic"])
def test_qemu_reads_what_was_written_here(tmp_path: Path, subformat: str) -> None:
    image = qemu_img_create(tmp_path / "a.vhd", "12M", "vpc", subformat=subformat)
    qemu_io(image, "write -P 1 1M 2M", format="vpc")
    with vhd.open_vhd(image) as device:
        model = scribble(device, random.Random(2), steps=60)
    assert qemu_content(image, "vpc") == model
    assert qemu_info(image)["format"] == ("vpc" if subformat == "dynamic" else "raw")
    qemu_io(image, "write -P 7 11M 512", format="vpc")  # QEMU can go on where we left
    model[11 * MIB : 11 * MIB + 512] = b"\7" * 512
    with vhd.open_vhd(image) as device:
        assert device.read(0, device.size) == model


def _conforms(image: Path, content: bytes, *, examples: int, judged: bool) -> None:
    def make() -> BlockDevice:
        image.write_bytes(content)
        return vhd.open_vhd(image)

    def reopen(device: BlockDevice) -> BlockDevice:
        device.close()
        return vhd.open_vhd(image)

    def judge(model: bytearray) -> None:
        assert qemu_content(image, "vpc") == model

    check_block_device(make, reopen, judge if judged else None, examples=examples)


@needs("qemu-img")
@pytest.mark.parametrize("block_size", [4096, 65536])
def test_dynamic_conforms(tmp_path: Path, block_size: int) -> None:
    _conforms(tmp_path / "a.vhd", vhd.dynamic(150 * 1024 + 512, block_size), examples=15, judged=True)


@needs("qemu-img")
def test_fixed_conforms(tmp_path: Path) -> None:
    size = 150 * 1024 + 512
    _conforms(tmp_path / "a.vhd", bytes(size) + vhd.footer(size, disk_type=2), examples=15, judged=True)


def test_fixed_footer_is_out_of_reach(tmp_path: Path) -> None:
    image = tmp_path / "a.vhd"
    footer = vhd.footer(MIB, disk_type=2)
    image.write_bytes(bytes(MIB) + footer)
    with vhd.open_vhd(image) as device:
        device.write(0, b"x" * MIB)
        device.zero(MIB - 100, 100)
        device.discard(0, MIB)
    assert image.stat().st_size == MIB + 512
    assert image.read_bytes()[MIB:] == footer


def test_fixed_holes_are_zero(tmp_path: Path) -> None:
    image = tmp_path / "a.vhd"
    with image.open("wb") as file:
        os.pwrite(file.fileno(), b"x" * MIB, 3 * MIB)
        os.pwrite(file.fileno(), vhd.footer(8 * MIB, disk_type=2), 8 * MIB)
    with vhd.open_vhd(image) as device:
        kinds = [(type(extent), extent.length) for extent in device.extents(0, device.size)]
    assert kinds[:2] == [(Zero, 3 * MIB), (Data, MIB)]
    assert sum(length for _, length in kinds) == 8 * MIB


def test_a_guest_cannot_turn_its_fixed_disk_into_another(tmp_path: Path) -> None:
    image = tmp_path / "a.vhd"
    image.write_bytes(bytes(MIB) + vhd.footer(MIB, disk_type=2))
    forged = vhd.dynamic(9 * MIB, 65536)
    with vhd.open_vhd(image) as device:
        device.write(0, forged)
    with vhd.open_vhd(image) as device:
        assert device.size == MIB
        assert device.read(0, len(forged)) == forged


# How blocks are kept


def test_new_blocks_have_full_bitmaps_and_lie_on_pages(tmp_path: Path) -> None:
    image = tmp_path / "a.vhd"
    image.write_bytes(vhd.dynamic(4 * 65536, 65536))
    with vhd.open_vhd(image) as device:
        device.write(70_000, b"x")
        place = device.locate(65536, 65536)
    assert place is not None
    assert place[1] % 4096 == 0
    content = image.read_bytes()
    assert content[place[1] - 512 : place[1]] == b"\xff" * 512
    assert struct.unpack_from(">4I", content, vhd.TABLE_OFFSET) == (
        vhd.UNUSED,
        place[1] // 512 - 1,
        vhd.UNUSED,
        vhd.UNUSED,
    )
    assert content[-512:] == content[:512]


def test_bits_are_set_before_a_sparse_block_is_written(tmp_path: Path) -> None:
    image = tmp_path / "a.vhd"
    image.write_bytes(vhd.dynamic(65536, 65536, table=[4], space=512 + 65536))
    with vhd.open_vhd(image) as device:
        assert device.locate(0, 512) is not None
        assert device.locate_writable(0, 512) is None
        device.write(0, b"x")
        assert device.locate_writable(0, 512) is not None
    assert image.read_bytes()[2048:2560] == b"\xff" * 512


def test_discard_gives_host_space_back(tmp_path: Path) -> None:
    image = tmp_path / "a.vhd"
    image.write_bytes(vhd.dynamic(4 * MIB, MIB))
    with vhd.open_vhd(image) as device:
        device.write(0, b"x" * (4 * MIB))
        device.flush()
        full = image.stat().st_blocks
        device.discard(MIB, MIB + 8192)
        if image.stat().st_blocks == full:
            pytest.skip("this file system cannot punch holes")
        assert image.stat().st_blocks < full - 2000
        assert device.map(MIB, MIB) == Zero(MIB, allocated=False)
    with vhd.open_vhd(image) as device:
        assert device.read(0, 4 * MIB) == b"x" * MIB + bytes(MIB + 8192) + b"x" * (2 * MIB - 8192)


class FailingFile(HostFile):
    """A host file that has no room for data."""

    full = False

    def write_all(self, offset: int, pieces: object) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "no room")
        super().write_all(offset, pieces)  # type: ignore[arg-type]


def test_a_failed_write_leaves_the_image_as_it_was(tmp_path: Path) -> None:
    image = tmp_path / "a.vhd"
    image.write_bytes(vhd.dynamic(4 * 65536, 65536))
    with vhd.open_vhd(image, file_type=FailingFile) as device:
        device.write(0, b"a" * 1000)
        device.file.full = True  # type: ignore[attr-defined]
        for _ in range(20):
            with pytest.raises(OSError, match="no room"):
                device.write(65536, b"b" * 1000)
        assert not any(device.read(65536, 65536))
        device.file.full = False  # type: ignore[attr-defined]
        device.write(2 * 65536, b"c" * 1000)
    with vhd.open_vhd(image) as device:
        assert device.read(0, device.size) == b"".join(
            (b"a" * 1000, bytes(2 * 65536 - 1000), b"c" * 1000, bytes(2 * 65536 - 1000))
        )
    assert image.stat().st_size < 3 * (65536 + 4096)  # the place of the failed writes was used again


def test_the_copy_at_the_start_serves_when_the_end_is_lost(tmp_path: Path) -> None:
    image = tmp_path / "a.vhd"
    image.write_bytes(vhd.dynamic(65536, 4096)[:-512] + b"guest data that was on its way" * 100)
    with vhd.open_vhd(image) as device:
        device.write(5, b"hello")
    with vhd.open_vhd(image) as device:
        assert device.read(0, 65536) == bytes(5) + b"hello" + bytes(65526)
    assert is_footer(image.read_bytes()[-512:])


def test_a_lost_copy_at_the_start_is_written_again_before_it_is_needed(tmp_path: Path) -> None:
    image = tmp_path / "a.vhd"
    good = vhd.dynamic(65536, 4096)
    image.write_bytes(bytes(512) + good[512:])
    with vhd.open_vhd(image, read_only=True) as device:
        assert device.size == 65536
    assert not any(image.read_bytes()[:512])
    vhd.open_vhd(image).close()
    assert image.read_bytes() == good


@needs("qemu-img")
def test_threads_that_write_flush_and_zero_at_once(tmp_path: Path) -> None:
    image = tmp_path / "a.vhd"
    share, threads = 64 * 4096 + 512, 4  # neighbours share a block
    image.write_bytes(vhd.dynamic(share * threads, 4096))
    with vhd.open_vhd(image) as device:
        model = scribble_in_threads(device, threads, steps=150, flush_every=50)
    assert qemu_content(image, "vpc") == model


def test_flush_does_not_hold_writers_up(tmp_path: Path) -> None:
    image = tmp_path / "a.vhd"
    image.write_bytes(vhd.dynamic(4 * 4096, 4096))
    with vhd.open_vhd(image, file_type=SlowFile) as device:
        file = device.file  # type: ignore[attr-defined]
        device.write(0, b"first")
        with ThreadPoolExecutor(1) as pool:
            flush = pool.submit(device.flush)
            assert file.syncing.wait(10)
            device.write(4096, b"second")
            assert not flush.done()
            assert image.read_bytes()[vhd.TABLE_OFFSET :][:8] == b"\xff" * 8  # written only after the sync
            file.go_on.set()
            flush.result()
        after = image.read_bytes()[vhd.TABLE_OFFSET :][:8]
        assert after[:4] != b"\xff" * 4
        assert after[4:] == b"\xff" * 4  # came too late for this flush
    with vhd.open_vhd(image) as device:
        assert device.read(4096, 6) == b"second"


class SlowFile(HostFile):
    """A host file whose sync says that it has begun and waits to be let go on."""

    def __init__(self, fd: int, name: str, *, writable: bool) -> None:
        super().__init__(fd, name, writable=writable)
        self.syncing = threading.Event()
        self.go_on = threading.Event()

    def sync(self) -> None:
        self.syncing.set()
        assert self.go_on.wait(10)
        super().sync()


# Damage


def test_is_footer_wants_cookie_and_checksum() -> None:
    footer = vhd.footer(MIB)
    assert is_footer(footer)
    assert not is_footer(b"conectix" + bytes(504))
    assert not is_footer(footer[:-1])
    assert not is_footer(vhd.seal(b"x" + footer[1:], 64))


def _dynamic_with(**changes: bytes) -> bytes:
    """A good image with its footers or header replaced."""
    good = vhd.dynamic(8 * 4096, 4096)
    ends = changes.get("footer", good[:512])
    return ends + changes.get("header", good[512:1536]) + good[1536:-512] + ends


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (b"", FormatError, "not a VHD"),
        (bytes(5000), FormatError, "not a VHD"),
        (b"conectix" + bytes(5000), FormatError, "checksum"),
        (bytes(5000) + vhd.footer(5120, disk_type=2), FormatError, "truncated"),
        (_dynamic_with(footer=vhd.footer(2041 << 30)), FormatError, "2040 GiB"),
        (_dynamic_with(footer=vhd.footer(8 * 4096, disk_type=4)), FormatError, "names no parent"),
        (_dynamic_with(footer=vhd.footer(8 * 4096, disk_type=5)), Unsupported, "type 5"),
        (_dynamic_with(header=bytes(1024)), FormatError, "no dynamic disk header"),
        (_dynamic_with(header=vhd.header(8, 4096)[:-1] + b"x"), FormatError, "checksum"),
        (_dynamic_with(header=vhd.header(8, 4097)), FormatError, "power of two"),
        (_dynamic_with(header=vhd.header(8, 256)), FormatError, "power of two"),
        (_dynamic_with(header=vhd.header(64, 2048)), Unsupported, "4096 is the least"),
        (_dynamic_with(header=vhd.header(7, 4096)), FormatError, "7 entries"),
        (_dynamic_with(header=vhd.header(0xFFFFFFFF, 4096)), FormatError, "truncated"),
        (_dynamic_with(header=vhd.header(8, 4096, table_offset=100)), FormatError, "beside its headers"),
        (_dynamic_with(header=vhd.header(8, 4096, table_offset=1024)), FormatError, "beside its headers"),
        (_dynamic_with(header=vhd.header(8, 4096, table_offset=2040)), FormatError, "beside its headers"),
        (_dynamic_with(header=vhd.header(8, 4096, table_offset=1 << 63)), FormatError, "beside its headers"),
        (vhd.dynamic(8 * 4096, 4096)[:1000], FormatError, "outside"),
        (
            _dynamic_with(footer=vhd.footer(2040 << 30), header=vhd.header(0xFFFFFFFF, 4096)),
            Unsupported,
            "larger blocks",
        ),
    ],
)
def test_refused_in_one_line(tmp_path: Path, content: bytes, error: type[OpenError], words: str) -> None:
    image = tmp_path / "a.vhd"
    image.write_bytes(content)
    with pytest.raises(error, match=words) as caught:
        vhd.open_vhd(image)
    assert "\n" not in str(caught.value)
    assert str(image) in str(caught.value)
    assert image.read_bytes() == content


def test_snapshots_are_refused(tmp_path: Path) -> None:
    image = tmp_path / "a.vhd"
    image.write_bytes(vhd.dynamic(65536, 4096))
    file = HostFile.open(image, writable=False)
    with pytest.raises(OpenError, match="snapshot"):
        open_image(file, OpenOptions(read_only=True, open_reference=vhd.neighbours(tmp_path), snapshot="a"))
    file.close()


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (0, "footer copy"),
        (1, "header"),
        (3, "table"),
        (12, "overlaps"),
        (4, "twice"),
        (32, "into the footer"),
        (0xFFFFFFFE, "far"),
    ],
)
def test_crafted_entries_reach_nothing(tmp_path: Path, entry: int, why: str) -> None:
    """Blocks of 4096 + 512 bytes; block 0 lies rightly at sector 4, block 1 at 13, block 2 where the test wants."""
    image = tmp_path / "a.vhd"
    content = vhd.dynamic(4 * 4096, 4096, table=[4, 13, entry, vhd.UNUSED], space=4 * 4608)
    image.write_bytes(content)
    with vhd.open_vhd(image) as device:
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
        if why not in ("overlaps", "twice"):
            device.write(0, b"good")
        device.write(3 * 4096, b"new")
    after = image.read_bytes()
    assert after[:1536] == content[:1536]
    assert after[1536:1548] == content[1536:1548]
    assert is_footer(after[-512:])


@pytest.mark.parametrize("behind", [0, 1, 30])
def test_what_a_lost_block_claims_past_the_end_is_not_given_to_another(tmp_path: Path, behind: int) -> None:
    """The entry of block 1, `behind` sectors past the end, reached the disk before the block did; then came a crash."""
    image = tmp_path / "a.vhd"
    end = vhd.TABLE_OFFSET // 512 + 1
    image.write_bytes(vhd.dynamic(8 * 4096, 4096, table=[vhd.UNUSED, end + behind, *[vhd.UNUSED] * 6]))
    with vhd.open_vhd(image) as device:
        for block in (0, *range(2, 8)):
            device.write(block * 4096, bytes([block + 1]) * 4096)
    for read_only in (False, True):
        with vhd.open_vhd(image, read_only=read_only) as device:
            for block in (0, *range(2, 8)):
                assert device.read(block * 4096, 4096) == bytes([block + 1]) * 4096
            if not read_only:
                assert not any(device.read(4096, 4096))
                device.write(4096, b"again")


def test_mutations_are_refused_or_read(tmp_path: Path) -> None:
    chosen = random.Random(7)
    blocks = 16
    good = vhd.dynamic(blocks * 4096, 4096, table=[4, 13, *[vhd.UNUSED] * 14], space=2 * 4608)
    image = tmp_path / "a.vhd"
    opened = 0
    for _ in range(300):
        mutant = bytearray(good)
        for _ in range(chosen.randint(1, 4)):
            start = chosen.choice(
                (chosen.randrange(90), 512 + chosen.randrange(40), 1536 + chosen.randrange(4 * blocks))
            )
            mutant[start : start + 4] = chosen.choice((chosen.randbytes(4), b"\0\0\0\xff", b"\xff" * 4, bytes(4)))
        mutant[512:1536] = vhd.seal(bytes(mutant[512:1536]), 36)
        mutant[:512] = vhd.seal(bytes(mutant[:512]), 64)
        mutant[-512:] = mutant[:512]
        if chosen.random() < 0.2:
            del mutant[chosen.randrange(len(mutant)) :]
        image.write_bytes(mutant)
        with suppress(OpenError), vhd.open_vhd(image) as device:
            opened += 1
            assert not device.read_only
            use_damaged(device, chosen)
        after = image.read_bytes()
        assert after == mutant or is_footer(after[:512])
    assert 50 < opened < 290
