"""Internal snapshots made and deleted in every order, judged by QEMU after each step."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from nbdserve.imagetools.snapshots import Change, change_snapshots, list_snapshots
from tests.imagetools.chains import killed_at_random
from tests.reference import needs, qemu_check, qemu_content, qemu_img_create, qemu_io

pytestmark = needs("qemu-img", "qemu-io")

MIB = 1 << 20


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_any_order_of_deletion(tmp_path: Path, order: tuple[int, ...]) -> None:
    image = qemu_img_create(tmp_path / "a.qcow2", 4 * MIB)
    contents = []
    for number in range(3):
        qemu_io(image, f"write -P {number + 1} {number}M 2M")
        change_snapshots(str(image), Change.CREATE, f"s{number}")
        contents.append(qemu_content(image, "qcow2"))
    qemu_io(image, "write -P 9 0 4M")
    left = set(range(3))
    for number in order:
        change_snapshots(str(image), Change.DELETE, f"s{number}")
        qemu_check(image)
        left.remove(number)
        for other in left:
            assert qemu_content(image, "qcow2", "-l", f"s{other}") == contents[other]
    assert qemu_content(image, "qcow2") == b"\11" * 4 * MIB


def test_killed_at_any_time(tmp_path: Path) -> None:
    """Deletion: the disk and the other snapshots are there at every moment, and a further call comes to the end."""
    image = qemu_img_create(tmp_path / "a.qcow2", 32 * MIB, cluster_size=2048)
    for number in range(3):
        qemu_io(image, f"write -P {number + 1} {number * 8}M 16M")
        change_snapshots(str(image), Change.CREATE, f"s{number}")
    qemu_io(image, "write -P 9 0 12M")
    present = qemu_content(image, "qcow2")
    kept = {name: qemu_content(image, "qcow2", "-l", name) for name in ("s0", "s2")}

    def work() -> None:
        if any(each["name"] == "s1" for each in list_snapshots(str(image))):
            change_snapshots(str(image), Change.DELETE, "s1")

    def check() -> None:
        assert qemu_content(image, "qcow2") == present
        for name, content in kept.items():
            assert qemu_content(image, "qcow2", "-l", name) == content

    assert killed_at_random(work, check, times=4) > 0
    assert [each["name"] for each in list_snapshots(str(image))] == ["s0", "s2"]
    qemu_check(image, leaks_allowed=True)
