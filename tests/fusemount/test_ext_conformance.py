"""The ext adapter keeps the contract of guest file systems; e2fsck and the kernel judge what it leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusemount.filesystems import ext
from nbdserve.block import BlockDevice, MemoryDevice
from tests.fusemount.conformance import Traits, check_filesystem
from tests.fusemount.ext_images import TOOLS, adapter_tree, assert_clean, assert_same, kernel_tree, mkfs, needs_kernel

MIXES = {
    "ext2": (("-t", "ext2", "-b", "1024", "-I", "128"), Traits(mtime_granularity_ns=10**9, atime_granularity_ns=10**9)),
    "ext4": (("-b", "1024"), Traits()),
    "inline": (("-b", "4096", "-O", "inline_data,ea_inode"), Traits()),
    "bigalloc": (("-b", "1024", "-O", "bigalloc", "-C", "8192"), Traits()),
}


@needs_kernel
@pytest.mark.needs(*TOOLS)
@pytest.mark.parametrize("mix", MIXES)
def test_the_contract(tmp_path: Path, mix: str) -> None:
    options, traits = MIXES[mix]
    empty = mkfs(tmp_path / "empty", "24M", *options).read_bytes()
    judged = 0

    def make() -> BlockDevice:
        return MemoryDevice(bytearray(empty))

    def judge(device: BlockDevice) -> None:
        nonlocal judged
        image = tmp_path / "judged"
        image.write_bytes(device.read(0, device.size))
        assert_clean(image)
        judged += 1
        if judged % 8 == 1:  # a mount takes far longer than a check
            assert_same(adapter_tree(ext.open_filesystem(device, writable=False)), kernel_tree(image))

    check_filesystem(make, ext.open_filesystem, judge, traits=traits, examples=4)
    assert judged > 8
