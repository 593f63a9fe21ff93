"""External data files: who may be one, and crashes that hit two files at once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nbdserve.block import HostFile
from nbdserve.errors import FormatError, OpenError
from nbdserve.formats import OpenOptions
from nbdserve.formats.qcow2.create import CreateOptions, create_image
from nbdserve.formats.qcow2.opening import open_qcow2
from nbdserve.opening import ReferencePolicy, open_image
from tests.formats.crashes import SECTOR, Change, Remains, pieces_of
from tests.formats.qcow2_crashes import Recorder, Witness
from tests.reference import needs, qemu_check, qemu_content, qemu_img_create

pytestmark = needs("qemu-img", "qemu-io")

KIB, MIB = 1 << 10, 1 << 20


def test_only_what_the_policy_allows(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    image = qemu_img_create(tmp_path / "images" / "a", MIB, data_file=str(tmp_path / "data"))
    with pytest.raises(OpenError, match="outside its own directory"):
        open_image(image)
    with open_image(image, policy=ReferencePolicy(allowed=(tmp_path,))) as device:
        device.write(0, b"x" * 512)
    assert qemu_content(image, "qcow2")[:512] == b"x" * 512
    before = (tmp_path / "data").read_bytes()
    with open_image(image, policy=ReferencePolicy(trust_all=True), read_only=True) as device:
        assert device.read(0, MIB) == before


def test_an_image_is_not_its_own_data_file(tmp_path: Path) -> None:
    image = tmp_path / "a"
    create_image(image, MIB, CreateOptions(data_file="b"))
    (tmp_path / "b").unlink()
    with pytest.raises(OpenError, match="no such file"):
        open_image(image)
    (tmp_path / "b").hardlink_to(image)
    before = image.read_bytes()
    for read_only in (True, False):
        with pytest.raises(FormatError, match="comes back to this file"):
            open_image(image, read_only=read_only)
    assert image.read_bytes() == before


def test_entries_that_lie_elsewhere_are_errors(tmp_path: Path) -> None:
    image = tmp_path / "a"
    create_image(image, MIB, CreateOptions(data_file="b"))
    with open_image(image) as device:
        device.write(0, b"x" * 200 * KIB)
    content = bytearray(image.read_bytes())
    l1 = int.from_bytes(content[40:48], "big")
    l2 = int.from_bytes(content[l1 : l1 + 8], "big") & (1 << 56) - 512
    content[l2 + 8 : l2 + 16] = (1 << 63 | 3 << 16).to_bytes(8, "big")
    image.write_bytes(content)
    with open_image(image) as device:
        assert device.locate(65536, 512) is None
        with pytest.raises(OSError, match="not at 65536"):
            device.read(65536, 512)
        with pytest.raises(OSError, match="not at 65536"):
            device.write(65536, b"y")
        assert device.read(0, 65536) == b"x" * 65536


class _Both(Recorder):
    """Two files that keep one log between them; an entry says whose it is."""

    def note(self, log: list[tuple[int, Change | None]], number: int) -> None:
        outer = self

        class Log(list[Change | None]):
            def append(self, entry: Change | None) -> None:
                log.append((number, entry))

        outer.log = Log()


@pytest.mark.parametrize(
    "options",
    [
        CreateOptions(cluster_size=4096, data_file="data"),
        CreateOptions(cluster_size=4096, data_file="data", data_file_raw=True),
        CreateOptions(cluster_size=16384, data_file="data", extended_l2=True),
    ],
)
def test_a_crash_hits_two_files(tmp_path: Path, options: CreateOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 96 * KIB
    create_image(tmp_path / "a", size, options)
    stable = [Remains.of(tmp_path / name) for name in ("a", "data")]
    log: list[tuple[int, Change | None]] = []

    def open_file(name: str, *, writable: bool) -> HostFile:
        data = _Both.open(tmp_path / "data", writable=writable)
        data.note(log, 1)
        return data

    file = _Both.open(tmp_path / "a", writable=True)
    file.note(log, 0)
    chosen = random.Random(5)
    with open_qcow2(file, OpenOptions(False, pytest.fail, open_file=open_file)) as device:  # type: ignore[arg-type]
        witness = Witness(device, log)  # type: ignore[arg-type]
        for number in range(1, 60):
            sector = chosen.randrange(size // SECTOR - 20)
            if number % 4 == 0:
                witness.zero(range(sector, sector + chosen.randrange(1, 20)), unmap=number % 8 == 0)
            else:
                witness.write(range(sector, sector + chosen.randrange(1, 20)), number)
            if number % 7 == 0:
                witness.flush()
        witness.flush()
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    monkeypatch.chdir(crashed)
    pending: list[tuple[int, Change]] = []
    for moment, (which, entry) in enumerate([*log, (0, None)]):
        share = chosen.choice((0, 0.5, 1))
        contents = [each.copy() for each in stable]
        for owner, change in pending:
            for piece in pieces_of(change):
                if chosen.random() < share:
                    contents[owner].apply(piece)
        for name, content in zip(("a", "data"), contents, strict=True):
            (crashed / name).write_bytes(content.content())
        with open_image(crashed / "a", read_only=True) as left:
            witness.check(left, moment)
            if options.data_file_raw and moment == len(log):
                assert left.read(0, size) == contents[1].content()
        if moment % 20 == 0:
            qemu_check(crashed / "a", leaks_allowed=True)
        if entry is not None:
            pending.append((which, entry))
            continue
        for owner, change in pending:
            if owner == which:
                stable[owner].apply(change)
        pending = [(owner, change) for owner, change in pending if owner != which]
