"""Internal snapshots made, applied and deleted by us, judged by QEMU; and crashes in the middle of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdserve.errors import OpenError
from nbdserve.formats.qcow2.create import CreateOptions, create_image
from nbdserve.formats.qcow2.resizing import resize
from nbdserve.formats.qcow2.snapshots import apply_snapshot, create_snapshot, delete_snapshot, list_snapshots
from nbdserve.formats.qcow2.writable import WritableQcow2Image
from tests.formats.qcow2_crashes import Recorder, remains
from tests.formats.qcow2_images import open_qcow2
from tests.reference import needs, qemu_check, qemu_content, qemu_img_create, qemu_info, qemu_io, run

pytestmark = needs("qemu-img", "qemu-io")

KIB, MIB = 1 << 10, 1 << 20
LAYOUTS = [
    CreateOptions(cluster_size=512),
    CreateOptions(cluster_size=512, refcount_bits=64),
    CreateOptions(cluster_size=4096, version=2),
    CreateOptions(cluster_size=65536, extended_l2=True),
    CreateOptions(cluster_size=4096, refcount_bits=8),
]


def _writable(image: Path, file_type: type = Recorder) -> WritableQcow2Image:
    device = open_qcow2(image, file_type=file_type)
    assert isinstance(device, WritableQcow2Image)
    return device


@pytest.mark.parametrize("options", LAYOUTS, ids=lambda options: f"{options.cluster_size}-{options.refcount_bits}")
def test_a_life_with_snapshots(tmp_path: Path, options: CreateOptions) -> None:
    image = tmp_path / "a.qcow2"
    size = MIB
    create_image(image, size, options)
    chosen = random.Random(1)
    model = bytearray(size)
    kept: dict[str, bytes] = {}
    device = _writable(image)
    for number in range(70):
        match chosen.choice(("write", "write", "write", "packed", "zero", "create", "apply", "delete", "reopen")):
            case "write":
                offset = chosen.randrange(size - 20000)
                data = bytes([number + 1]) * chosen.choice((100, 5000, 20000))
                device.write(offset, data)
                model[offset : offset + len(data)] = data
            case "packed":
                offset = chosen.randrange(size // 65536) * 65536
                device.write_compressed(offset, bytes([number]) * 65536)
                model[offset : offset + 65536] = bytes([number]) * 65536
            case "zero":
                offset = chosen.randrange(size - 70000)
                device.zero(offset, 70000)
                model[offset : offset + 70000] = bytes(70000)
            case "create" if len(kept) < 5:
                create_snapshot(device, f"s{number}")
                kept[f"s{number}"] = bytes(model)
            case "apply" if kept:
                name = chosen.choice(sorted(kept))
                apply_snapshot(device, name)
                model[:] = kept[name]
            case "delete" if kept:
                name = chosen.choice(sorted(kept))
                delete_snapshot(device, name)
                del kept[name]
            case "reopen":
                device.close()
                if number % 2:
                    qemu_check(image)
                device = _writable(image)
        assert device.read(0, size) == model, number
    assert {each.name for each in list_snapshots(device)} == set(kept)
    device.close()
    qemu_check(image)
    assert {each["name"] for each in qemu_info(image).get("snapshots", [])} == set(kept)
    assert qemu_content(image, "qcow2") == model
    for name, content in kept.items():
        assert qemu_content(image, "qcow2", "-l", name) == content
    for name in kept:  # QEMU can go on with what we have made
        run("qemu-img", "snapshot", "-a", name, image)
        assert qemu_content(image, "qcow2") == kept[name]
        run("qemu-img", "snapshot", "-d", name, image)
        qemu_check(image)


def test_qemus_snapshots(tmp_path: Path) -> None:
    image = qemu_img_create(tmp_path / "a.qcow2", 4 * MIB)
    qemu_io(image, "write -P 1 0 1M")
    run("qemu-img", "snapshot", "-c", "one", image)
    run("qemu-img", "resize", "-q", image, "6M")
    qemu_io(image, "write -P 2 512k 5M")
    with _writable(image) as device:
        assert [each.name for each in list_snapshots(device)] == ["one"]
        create_snapshot(device, "two")
        apply_snapshot(device, "one")
        assert device.size == 4 * MIB
        assert device.read(0, 4 * MIB) == b"\1" * MIB + bytes(3 * MIB)
        apply_snapshot(device, "2")
        assert device.size == 6 * MIB
        assert device.read(512 * KIB, 5 * MIB) == b"\2" * 5 * MIB
        delete_snapshot(device, "one")
    qemu_check(image)


def test_what_cannot_be_kept_says_so(tmp_path: Path) -> None:
    for name, options, said in (
        ("bit", CreateOptions(refcount_bits=1), "refcounts of one bit"),
        ("data", CreateOptions(data_file="d"), "external data file"),
    ):
        create_image(tmp_path / name, MIB, options)
        with _writable(tmp_path / name) as device, pytest.raises(OpenError, match=said):
            create_snapshot(device, "x")
    create_image(tmp_path / "plain", MIB)
    with _writable(tmp_path / "plain") as device:
        with pytest.raises(OpenError, match="no snapshot 'x'; it has: none"):
            delete_snapshot(device, "x")
        with pytest.raises(OpenError, match="no snapshot"):
            apply_snapshot(device, "x")
    qemu_check(tmp_path / "plain")


STEPS: dict[str, Callable[[WritableQcow2Image], object]] = {
    "create": lambda image: create_snapshot(image, "new"),
    "apply": lambda image: apply_snapshot(image, "one"),
    "delete": lambda image: delete_snapshot(image, "one"),
    "grow": lambda image: resize(image, 3 * MIB),
    "shrink": lambda image: resize(image, 100 * KIB + 512),
}


@pytest.mark.parametrize(
    ("step", "version"),
    [(step, version) for step in STEPS for version in (2, 3) if version == 3 or step not in ("grow", "shrink")],
)
def test_a_crash_in_between(tmp_path: Path, step: str, version: int) -> None:
    """After a crash the disk and its snapshots are as they were, or as they were to be."""
    image = tmp_path / "a.qcow2"
    create_image(image, 400 * KIB, CreateOptions(cluster_size=512 if version == 3 else 1024, version=version))
    with _writable(image) as device:
        device.write(0, b"a" * 200 * KIB)
        create_snapshot(device, "one")
        device.write(90 * KIB, b"b" * 30 * KIB)
        device.write(300 * KIB, b"c" * 1000)
        create_snapshot(device, "two")
        device.write(95 * KIB, b"d" * 10 * KIB)
    start, states = image.read_bytes(), [_state(image)]
    with _writable(image) as device:
        log = device.file.log  # type: ignore[attr-defined]
        STEPS[step](device)
    qemu_check(image)
    states.append(_state(image))
    assert states[0] != states[1]
    crashed = tmp_path / "crashed.qcow2"
    found = set()
    for number, (_, content) in enumerate(remains(start, log, random.Random(1), 1)):
        crashed.write_bytes(content)
        state = _state(crashed)
        assert state in states
        found.add(states.index(state))
        if number % 5:
            continue
        if version == 3:
            with open_qcow2(crashed):
                pass
            qemu_check(crashed, leaks_allowed=True)
        else:  # only flags and leaks are allowed to be wrong, which the repair finds harmless
            run("qemu-img", "check", "-q", "-r", "all", crashed)
        assert _state(crashed) == state
    assert found == {0, 1}


def _state(image: Path) -> tuple[tuple[str, bytes], ...]:
    with open_qcow2(image, read_only=True) as device:
        names = [snapshot for snapshot in ("one", "two", "new") if _has(image, snapshot)]
        now = bytes(device.read(0, device.size))
    shown = [("", now)]
    for name in names:
        with open_qcow2(image, read_only=True, snapshot=name) as device:
            shown.append((name, bytes(device.read(0, device.size))))
    return tuple(shown)


def _has(image: Path, name: str) -> bool:
    try:
        with open_qcow2(image, read_only=True, snapshot=name):
            return True
    except OpenError:
        return False


@pytest.mark.parametrize("options", [*LAYOUTS[:4], CreateOptions(cluster_size=4096, data_file="data")])
def test_resized(tmp_path: Path, options: CreateOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    image = tmp_path / "a.qcow2"
    create_image(image, MIB, options)
    model = bytearray(MIB)
    chosen = random.Random(2)
    for size in (3 * MIB + 512, 300 * KIB + 512, 300 * KIB + 1024, 40 * MIB, 512, 0, 5 * MIB):
        with _writable(image) as device:
            if device.size:
                data = bytes([chosen.randrange(1, 256)]) * min(device.size, 200 * KIB)
                for offset in (0, device.size - len(data)):
                    device.write(offset, data)
                    model[offset : offset + len(data)] = data
            resize(device, size)
            model = model[:size].ljust(size, b"\0")
            assert device.size == size
            assert device.read(0, size) == model
        qemu_check(image)
        assert qemu_info(image)["virtual-size"] == size
        assert qemu_content(image, "qcow2") == model


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_growing_over_a_longer_base_shows_nothing_of_it(tmp_path: Path, compat: str) -> None:
    base = qemu_img_create(tmp_path / "base", 2 * MIB, "raw")
    qemu_io(base, "write -P 7 0 2M", format="raw")
    image = qemu_img_create(tmp_path / "a", MIB - 512, backing_file="base", backing_fmt="raw", compat=compat)
    with _writable(image) as device:
        resize(device, 3 * MIB)
        assert device.read(0, 3 * MIB) == b"\7" * (MIB - 512) + bytes(2 * MIB + 512)
    qemu_check(image)
    assert qemu_content(image, "qcow2") == b"\7" * (MIB - 512) + bytes(2 * MIB + 512)
