"""Damaged images do no harm: no crash, no hang, no other error than those of the contract."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fusemount.filesystems import ext
from nbdserve.block import MemoryDevice
from tests.fusemount.ext_images import TOOLS, mkfs, mounted, needs_kernel
from tests.reference import run


@needs_kernel
@pytest.mark.needs(*TOOLS)
def test_maps_that_never_end(tmp_path: Path) -> None:
    """A file of 8 EiB is read in no time; one whose map leads into itself is not freed, and nothing else suffers."""
    image = mkfs(tmp_path / "image", "4M", "-t", "ext2", "-b", "1024")
    with mounted(image) as top:
        Path(os.fsdecode(top), "endless").write_bytes(b"e" * 5000)
        Path(os.fsdecode(top), "circle").write_bytes(b"c" * 20_000)
        Path(os.fsdecode(top), "sound").write_bytes(b"s" * 5000)
    run("debugfs", "-w", "-R", "set_inode_field /endless size 0x7fffffffffffffff", image)
    block = int(run("debugfs", "-R", "bmap /circle 0", image).split()[-1])
    run("debugfs", "-w", "-R", f"set_inode_field /circle block[TIND] {block}", image)
    run("debugfs", "-w", "-R", "set_inode_field /circle size 0x3ffffffff", image)
    content = bytearray(image.read_bytes())
    content[block * 1024 : (block + 1) * 1024] = block.to_bytes(4, "little") * 256
    fs = ext.open_filesystem(MemoryDevice(content), writable=True)
    endless, circle = fs.lookup(fs.root, b"endless"), fs.lookup(fs.root, b"circle")
    assert fs.read(endless, 0, 6000) == b"e" * 5000 + bytes(1000)
    for offset in (1 << 40, 1 << 60, (1 << 63) - 11):
        assert fs.read(endless, offset, 10) == bytes(10)
    assert len(fs.read(circle, 1 << 33, 100)) == 100
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        fs.truncate(circle, 0)
    fs.unlink(fs.root, b"circle")
    fs.forget(circle)
    assert fs.read(fs.lookup(fs.root, b"sound"), 0, 5000) == b"s" * 5000
    fs.close()
    assert "e2fsck" in ext.examine(MemoryDevice(content)).remark
