"""The image in the middle of a chain taken out, into either neighbour, as the tutorials do it; judged by QEMU."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdserve.errors import OpenError
from nbdserve.imagetools.middle import Into, delete_middle
from nbdserve.opening import ReferencePolicy
from tests.imagetools.chains import KIB, MIB, contents, killed_at_random, make_chain
from tests.reference import needs, qemu_check, qemu_content, qemu_img_create, qemu_info, qemu_io

pytestmark = needs("qemu-img", "qemu-io")


@pytest.mark.parametrize("into", Into)
@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), (2, 3, 4, 5), (5, 4, 3, 4)], ids=str)
def test_both_ways(tmp_path: Path, into: Into, sizes: tuple[int, ...]) -> None:
    base, sn1, sn2, sn3 = make_chain(tmp_path, *(size * MIB for size in sizes))
    before = contents([base, sn1, sn2, sn3])
    delete_middle(str(sn2), [str(sn3)], into)
    assert not sn2.exists()
    assert qemu_info(sn3)["backing-filename"] == "sn1"
    assert bytes(qemu_content(sn3, "qcow2")) == before[3]
    assert bytes(qemu_content(base, "qcow2")) == before[0]
    if into is Into.ABOVE:
        assert bytes(qemu_content(sn1, "qcow2")) == before[1]
    for path in (base, sn1, sn3):
        qemu_check(path)


@pytest.mark.parametrize("into", Into)
def test_several_overlays(tmp_path: Path, into: Into) -> None:
    base, middle, one = make_chain(tmp_path, MIB, MIB, MIB)
    folder = tmp_path / "folder"
    folder.mkdir()
    two = qemu_img_create(folder / "two", None, backing_file="../sn1", backing_fmt="qcow2")
    qemu_io(two, "write -P 77 100k 100k")
    before = contents([base, middle, one, two])
    with pytest.raises(OpenError, match=f"{two}: stands on {middle}, too"):
        delete_middle(str(middle), [str(one)], into, folders=[str(folder)])
    assert contents([base, middle, one, two]) == before
    delete_middle(str(middle), [str(one), str(two)], into, policy=ReferencePolicy((tmp_path,)))
    assert not middle.exists()
    assert [bytes(qemu_content(path, "qcow2")) for path in (one, two)] == before[2:]
    assert qemu_info(two)["backing-filename"] == "../base"


def test_who_stands_on_the_image_below_is_named(tmp_path: Path) -> None:
    base, middle, top = make_chain(tmp_path, MIB, MIB, MIB)
    other = qemu_img_create(tmp_path / "other", None, backing_file="base", backing_fmt="qcow2")
    qemu_io(other, "write -P 77 100k 100k")
    before = contents([base, middle, top, other])
    with pytest.raises(OpenError, match=f"{other}: stands on {base}"):
        delete_middle(str(middle), [str(top)], Into.BELOW)
    with pytest.raises(OpenError, match="stands on"):
        delete_middle(str(middle), [str(top), str(other)], Into.BELOW)
    assert contents([base, middle, top, other]) == before
    delete_middle(str(middle), [str(top)], Into.ABOVE)
    assert contents([base, top, other]) == [before[0], before[2], before[3]]


def test_only_what_is_in_the_middle(tmp_path: Path) -> None:
    base, middle, top = make_chain(tmp_path, MIB, MIB, MIB)
    with pytest.raises(OpenError, match="not in the middle"):
        delete_middle(str(base), [str(middle)], Into.ABOVE)
    with pytest.raises(OpenError, match="stands neither on"):
        delete_middle(str(top), [str(base)], Into.ABOVE)
    other = qemu_img_create(tmp_path / "other", None, backing_file="sn1", backing_fmt="qcow2")
    with pytest.raises(OpenError, match="does not show the same"):
        delete_middle(str(top), [str(other)], Into.BELOW)


@pytest.mark.parametrize("into", Into)
def test_killed_at_any_time(tmp_path: Path, into: Into) -> None:
    base = qemu_img_create(tmp_path / "base", 64 * MIB)
    middle = qemu_img_create(tmp_path / "middle", None, backing_file="base", backing_fmt="qcow2")
    qemu_io(middle, *(f"write -P {number + 2} {number * 640 * KIB} 300k" for number in range(100)))
    top = qemu_img_create(tmp_path / "top", None, backing_file="middle", backing_fmt="qcow2")
    qemu_io(top, "write -P 9 1M 1M")
    before = qemu_content(top, "qcow2")

    def check() -> None:
        assert qemu_content(top, "qcow2") == before
        for path in (base, top):
            qemu_check(path, leaks_allowed=True)

    def work() -> None:
        if middle.exists():  # a process that was killed after it had removed that has nothing left to do
            delete_middle(str(middle), [str(top)], into)

    assert killed_at_random(work, check, times=4) > 0
    assert not middle.exists()
