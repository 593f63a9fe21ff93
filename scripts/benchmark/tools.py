"""nbdimg beside qemu-img: seconds that a command takes, its start included, with all that it reads in the page cache.

Targets are new files, and what an earlier command has left for the disk to write is written before the next begins.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark.cases import Sample
from benchmark.images import Images
from benchmark.report import Row

OURS = "nbdimg"
_COMMANDS = {
    OURS: (sys.executable, "-c", "from nbdserve.cli.img.main import main; main()"),
    "qemu-img": ("qemu-img",),
}


@dataclass(frozen=True)
class ToolCase:
    """One row of the table.

    Attributes:
        image: the kind of the one that is read (see images.Images).
        arguments: of both commands, before the names of files.
        writes: whether the last argument is a new file.
    """

    name: str
    image: str
    arguments: tuple[str, ...]
    writes: bool = True
    unit: str = "s"
    less_is_better: bool = True


def _convert(name: str, image: str, target: str, *options: str) -> ToolCase:
    source = "raw" if image == "mixed" else "qcow2"
    return ToolCase(f"convert {name}", image, ("convert", "-f", source, "-O", target, *options))


TOOL_CASES = (
    _convert("raw to qcow2", "mixed", "qcow2"),
    _convert("qcow2 to raw", "mixed-qcow2", "raw"),
    _convert("raw to raw", "mixed", "raw"),
    _convert("raw to qcow2, flushed", "mixed", "qcow2", "-t", "writeback"),
    _convert("qcow2 to compressed qcow2", "mixed-qcow2", "qcow2", "-c"),
    _convert("qcow2 to zstd-compressed qcow2", "mixed-qcow2", "qcow2", "-c", "-o", "compression_type=zstd"),
    _convert("compressed qcow2 to raw", "mixed-compressed", "raw"),
    _convert("qcow2 to streamOptimized VMDK", "mixed-qcow2", "vmdk", "-o", "subformat=streamOptimized"),
    ToolCase("nbdimg info of a qcow2", "mixed-qcow2", ("info", "-f", "qcow2"), writes=False),
    ToolCase("nbdimg check of a qcow2", "mixed-qcow2", ("check", "-f", "qcow2"), writes=False),
)


def measured(cases: Sequence[ToolCase], images: Images, rounds: int) -> Iterator[Row]:
    """The rows of some cases, each when it is complete; the commands take turns."""
    for case in cases:
        row = Row(case, OURS)
        source = images.get(case.image).path
        for number in range(rounds):
            for tool in list(_COMMANDS)[:: 1 if number % 2 else -1]:
                source.read_bytes()
                row.samples.setdefault(tool, []).append(_sample(tool, case, source, images.folder / "target"))
        yield row


def _sample(tool: str, case: ToolCase, source: Path, target: Path) -> Sample:
    target.unlink(missing_ok=True)
    os.sync()
    command = [*_COMMANDS[tool], *case.arguments, source, *([target] if case.writes else [])]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return Sample(time.perf_counter() - started)
