"""What was measured, as a table, JSON and a picture of the ratios."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import median
from typing import Protocol

from benchmark.cases import Sample

OURS = "nbdserve"
_COLOURS = {
    "qemu-nbd": "#4878a8",
    "qemu-img": "#4878a8",
    "qemu-storage-daemon": "#4878a8",
    "nbdkit": "#e08840",
    "nbdfuse": "#e08840",
    "nbd-server": "#6a9a58",
    "fuse2fs": "#9068a8",
    "guestmount": "#a85858",
}


class Measured(Protocol):
    """What a row has to know of a case."""

    @property
    def name(self) -> str: ...

    @property
    def unit(self) -> str: ...

    @property
    def less_is_better(self) -> bool: ...


@dataclass
class Row:
    """A case with the samples of every program that took part, one of which is ours."""

    case: Measured
    ours: str = OURS
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def value(self, server: str) -> float:
        """The median."""
        return median(sample.value for sample in self.samples[server])

    def processor(self, server: str) -> float:
        """The median of the processor seconds for each GiB."""
        return median(sample.processor for sample in self.samples[server])

    def ratio(self, peer: str) -> float:
        """How many times better ours is."""
        ours, theirs = self.value(self.ours), self.value(peer)
        return theirs / ours if self.case.less_is_better else ours / theirs

    @property
    def peers(self) -> list[str]:
        """The others that took part."""
        return [name for name in self.samples if name != self.ours]


def line(row: Row) -> str:
    """A row of the table that people read."""
    ours = f"{row.value(row.ours):,.4g} {row.case.unit}"
    peers = "  ".join(f"{peer} {row.value(peer):,.4g} ({row.ratio(peer):.2f}x)" for peer in row.peers)
    return f"{row.case.name:<48} {ours:>14}   {peers}"


def as_json(rows: list[Row], rounds: int) -> str:
    """Everything, for programs."""
    return json.dumps(
        {
            "machine": machine(),
            "rounds": rounds,
            "cases": [
                {
                    "name": row.case.name,
                    "unit": row.case.unit,
                    "less_is_better": row.case.less_is_better,
                    "median": {name: row.value(name) for name in row.samples},
                    "processor_seconds_per_gib": {name: row.processor(name) for name in row.samples},
                    "samples": {name: [one.value for one in samples] for name, samples in row.samples.items()},
                    "ratio": {peer: row.ratio(peer) for peer in row.peers},
                }
                for row in rows
            ],
        },
        indent=2,
    )


def machine() -> str:
    """What it was measured on."""
    model = next(
        (text.split(":")[1].strip() for text in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in text),
        platform.machine(),
    )
    return f"{os.cpu_count()} x {model}, Linux {platform.release()}, Python {platform.python_version()}"


def picture(rows: list[Row]) -> str:
    """An SVG bar chart: how many times better ours is than each peer, on a scale where 1 is as good."""
    left, width, bar = 360, 420, 13
    most = max([2.0, *(row.ratio(peer) for row in rows for peer in row.peers)])
    scale = width / most
    parts: list[str] = []
    y = 34
    for row in rows:
        if not row.peers:
            continue
        parts.append(f'<text x="{left - 8}" y="{y + 11}" text-anchor="end">{escape(row.case.name)}</text>')
        for peer in row.peers:
            length = row.ratio(peer) * scale
            parts.append(f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{bar - 2}" fill="{_COLOURS[peer]}"/>')
            parts.append(f'<text x="{left + length + 4:.1f}" y="{y + 10}">{row.ratio(peer):.2f}x {peer}</text>')
            y += bar
        y += 6
    parts.append(f'<line x1="{left + scale:.1f}" y1="26" x2="{left + scale:.1f}" y2="{y}" stroke="#888"/>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 130}" height="{y + 10}" '
        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="12" y="18" font-size="13">nbdserve, how many times better than each peer (1: equal)</text>'
        + "".join(parts)
        + "</svg>\n"
    )
