"""Damaged images do no harm: no crash, no hang, no other error than those of the contract."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fusemount.ext_images import TOOLS, fill_small, mkfs, mounted, needs_kernel

ROUNDS = int(os.environ.get("EXT_MUTATIONS", "15"))
MIXES = {
    "block-maps": ("-t", "ext2", "-b", "1024"),
    "extents": ("-b", "1024", "-O", "^metadata_csum,^64bit,^has_journal"),
    "inline": ("-b", "1024", "-O", "^metadata_csum,inline_data,ea_inode", "-J", "size=1"),
    "checksums": ("-b", "1024", "-J", "size=1"),
}


@needs_kernel
@pytest.mark.needs(*TOOLS)
@pytest.mark.parametrize("mix", MIXES)
def test_mutations(tmp_path: Path, mix: str) -> None:
    image = mkfs(tmp_path / "image", "4M", *MIXES[mix], "-N", "512")
    with mounted(image) as top:
        fill_small(top)
    command = [sys.executable, "-m", "tests.fusemount.ext_mutations", str(image), "1", str(ROUNDS)]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=30 + 10 * ROUNDS)
    assert result.returncode == 0 and result.stdout.endswith("done\n"), result.stdout[-200:] + result.stderr[-4000:]
