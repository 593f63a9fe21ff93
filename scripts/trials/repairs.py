"""Damaged qcow2 images that are checked and repaired: QEMU is content then, and no byte that could be read changed.

An image that we call repaired must pass `qemu-img check` without an error or a leak, and both must read the same. One
that neither has to repair must be sound to both.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from nbdserve.errors import OpenError
from nbdserve.imagetools.checking import check
from nbdserve.opening import open_image
from tests.formats.operations import assert_equal
from tests.formats.usage import mutate
from tests.reference import qemu_content
from trials import samples
from trials.rounds import Round

IMAGES = 30
ROUNDS = 40
_PIECE = 512


def play(this: Round) -> None:
    """Damage a sample again and again, and repair it."""
    sample = samples.make("qcow2", this.folder, this.chosen)
    before = {path: path.read_bytes() for path in this.folder.iterdir()}
    for number in range(IMAGES):
        content = bytearray(before[sample.part])
        mutate(content, sample.places, this.chosen)
        for path, sound in before.items():
            path.write_bytes(content if path == sample.part else sound)
        try:
            this.count(_repaired(sample.image))
        except BaseException as error:
            (this.folder / "damaged").write_bytes(content)
            error.add_note(f"image {number} of the round; as it was before: {this.folder / 'damaged'}")
            raise


def _repaired(image: Path) -> str:
    """Check and repair; how that went, for the report."""
    name = str(image)
    try:
        found = check(name, format="qcow2")
    except OpenError:
        return "refused"
    assert found is not None
    status = subprocess.run(["qemu-img", "check", "-f", "qcow2", image], capture_output=True).returncode
    if not found.corruptions and not found.leaks:
        assert status in (0, 1), f"we find nothing, QEMU says {status}"  # 1: it does not open the image
    readable = _readable(image)
    try:
        left = check(name, format="qcow2", repair="all")
    except OpenError:
        return "could not be repaired"
    assert left is not None
    if left.corruptions or left.leaks:
        return "repaired in part"
    result = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", image], capture_output=True, encoding="utf-8", errors="replace"
    )
    assert result.returncode in (0, 1), f"{found}\n{left}\n{result.stdout}{result.stderr}"
    if result.returncode:
        return "repaired; QEMU does not open it"
    after = _readable(image)
    assert all(piece is None or after[at] == piece for at, piece in enumerate(readable)), "repairing changed the disk"
    if None not in after:
        assert_equal(qemu_content(image, "qcow2"), b"".join(piece or b"" for piece in after), "QEMU reads")
    return "repaired" if found.corruptions or found.leaks else "sound"


def _readable(image: Path) -> list[bytes | None]:
    """The disk in pieces; None for each that cannot be read."""
    pieces: list[bytes | None] = []
    try:
        device = open_image(image, format="qcow2", read_only=True)
    except OpenError:
        return pieces
    with device:
        for offset in range(0, min(device.size, 1 << 20), _PIECE):
            try:
                pieces.append(bytes(device.read(offset, min(_PIECE, device.size - offset))))
            except OSError:
                pieces.append(None)
    return pieces
