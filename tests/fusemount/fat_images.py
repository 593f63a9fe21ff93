"""FAT images for tests: made by mkfs.fat, judged by fsck.vfat."""

from __future__ import annotations

import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from nbdserve.block import BlockDevice, MemoryDevice
from tests.fusemount.conformance import DAY_NS, Traits
from tests.reference import run

MIB = 1 << 20

TRAITS = Traits(
    owners=False,
    links=False,
    symlinks=False,
    xattrs=False,
    devices=False,
    case_sensitive=False,
    mtime_granularity_ns=2 * 10**9,
    atime_granularity_ns=DAY_NS,
    shown_mode=lambda mode: stat.S_IFMT(mode) | (0o755 if mode & 0o200 or stat.S_ISDIR(mode) else 0o555),
)


@dataclass(frozen=True)
class Shape:
    """A kind of volume: what mkfs.fat is told."""

    bits: int
    sector: int
    sectors_per_cluster: int
    size: int

    def __str__(self) -> str:
        return f"fat{self.bits}-{self.sector}x{self.sectors_per_cluster}"

    def make(self, directory: Path, *options: str) -> Path:
        """A new image file."""
        image = directory / f"{self}.img"
        image.unlink(missing_ok=True)
        with image.open("wb") as file:
            file.truncate(self.size)
        shape = ["-F", str(self.bits), "-S", str(self.sector), "-s", str(self.sectors_per_cluster)]
        run("mkfs.fat", *shape, "--invariant", *options, str(image))
        return image


FAT12 = Shape(12, 512, 8, 11 * MIB)
FAT16 = Shape(16, 512, 4, 16 * MIB)
FAT32 = Shape(32, 512, 2, 16 * MIB)
SHAPES = (  # mtools wants as many clusters for FAT32 as the specification says
    FAT12,
    FAT16,
    Shape(32, 512, 1, 36 * MIB),
    Shape(16, 4096, 1, 24 * MIB),
    Shape(32, 2048, 2, 270 * MIB),
    Shape(12, 512, 128, 48 * MIB),
)


def fsck(image: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["fsck.vfat", *options, image], capture_output=True, text=True, timeout=60)


def check_clean(image: Path) -> None:
    """fsck.vfat finds nothing."""
    result = fsck(image, "-n", "-v")
    assert result.returncode == 0, result.stdout + result.stderr


def judge(device: BlockDevice) -> None:
    """What check_filesystem() wants for a device in memory."""
    assert isinstance(device, MemoryDevice)
    with tempfile.NamedTemporaryFile() as file:
        file.write(device.content)
        file.flush()
        check_clean(Path(file.name))
