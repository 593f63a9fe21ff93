"""What is asked of the kernel for a mount."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.fusemount.disks import ext, make_ext4, tree
from tests.fusemount.mounted import SECONDS, mounted, needs_fuse

pytestmark = needs_fuse


@ext
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may set how far the kernel reads ahead")
def test_the_kernel_reads_further_ahead_for_root(folder: Path, mnt: Path) -> None:
    image = make_ext4(folder / "disk.raw", source=tree(folder))
    with mounted(image, mnt):
        device = mnt.stat().st_dev
        setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
        deadline = time.monotonic() + SECONDS
        while int(setting.read_text()) <= 128:
            assert time.monotonic() < deadline, "the mount is served already, so it should not take long"
            time.sleep(0.01)
