"""What is measured, and how one measurement is made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmark.images import MIB
from benchmark.servers import Running, greeted


@dataclass(frozen=True)
class Sample:
    """One measurement.

    Attributes:
        value: in the case's unit.
        processor: seconds of the server's processor time for each GiB that it moved; 0 where that means nothing.
    """

    value: float
    processor: float = 0.0


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        image: its kind (see images.Images).
        measure: takes a running server and how many seconds it may take.
        unit: of the value.
        less_is_better: for seconds and bytes.
        transport: "unix", "tcp" or "tls".
        fills: the image has to be made anew for every measurement.
    """

    name: str
    image: str
    measure: Callable[[Running, float], Sample]
    unit: str
    less_is_better: bool = False
    transport: str = "unix"
    fills: bool = False


def fio(
    pattern: str, block: str, depth: int, connections: int = 1, size: int = 256 * MIB
) -> Callable[[Running, float], Sample]:
    """A measurement with fio's nbd engine: requests of one size, so many under way at a time on each connection."""

    def measure(server: Running, seconds: float) -> Sample:
        before = server.processor_seconds()
        result = _fio(server, pattern, block, depth, connections, size, seconds)
        used = server.processor_seconds() - before
        moved = sum(job[side]["io_bytes"] for job in result for side in ("read", "write"))
        per_second = sum(job[side]["iops"] for job in result for side in ("read", "write"))
        return Sample(per_second, used / (moved / (1 << 30)) if moved else 0.0)

    return measure


def _fio(
    server: Running, pattern: str, block: str, depth: int, connections: int, size: int, seconds: float
) -> list[dict[str, dict[str, float]]]:
    command = [
        *("fio", "--name=job", "--ioengine=nbd", f"--uri={server.place.plain_uri}", "--output-format=json"),
        *(f"--rw={pattern}", f"--bs={block}", f"--iodepth={depth}", f"--numjobs={connections}", f"--size={size}"),
    ]
    # What fills an image ends when it is full: written once more, its clusters would no longer be fresh.
    command += [] if seconds == 0 else ["--time_based", f"--runtime={seconds:g}"]
    with _trusting(server.place.certificates) as (prefix, environment):
        answer = subprocess.run([*prefix, *command], capture_output=True, text=True, check=True, env=environment).stdout
    jobs: list[dict[str, dict[str, float]]] = json.loads(answer[answer.index("{") :])["jobs"]
    return jobs


@contextmanager
def _trusting(certificates: Path | None) -> Iterator[tuple[list[str], dict[str, str]]]:
    """What to put before a command, and its environment, so that libnbd trusts our authority.

    fio lets no URI name a directory of certificates, and libnbd looks into the home directory of ordinary users only.
    """
    if certificates is None:
        yield [], dict(os.environ)
        return
    with tempfile.TemporaryDirectory(prefix="home-") as home:
        trusted = Path(home) / ".pki" / "libnbd"
        trusted.mkdir(parents=True)
        Path(home).chmod(0o755)
        shutil.copy(certificates / "ca-cert.pem", trusted)
        prefix = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
        yield prefix, {**os.environ, "HOME": home}


def filling(pattern: str, block: str, depth: int, size: int) -> Callable[[Running, float], Sample]:
    """Like fio(), but every byte of the image is written once."""
    measure = fio(pattern, block, depth, size=size)
    return lambda server, _: measure(server, 0)


def nbdcopy(server: Running, _: float) -> Sample:
    """Seconds to copy the export to nowhere."""
    started = time.perf_counter()
    subprocess.run(["nbdcopy", server.place.uri, "null:"], check=True)
    return Sample(time.perf_counter() - started)


def start(server: Running, _: float) -> Sample:
    """Seconds from the start of the server to its first byte."""
    return Sample(server.seconds_to_ready)


def memory(connections: int) -> Callable[[Running, float], Sample]:
    """Resident MiB with so many idle connections."""

    def measure(server: Running, _: float) -> Sample:
        with _connected(server, connections):
            time.sleep(0.2)
            return Sample(server.memory() / MIB)

    return measure


def latency_beside_stalled_client(server: Running, seconds: float) -> Sample:
    """99th percentile of small cached reads, in milliseconds, while another client takes none of what it asked for."""
    from benchmark.stalling import stalled_client

    with stalled_client(server.place):
        jobs = _fio(server, "randread", "4k", 1, 1, 64 * MIB, seconds)
    return Sample(jobs[0]["read"]["clat_ns"]["percentile"]["99.000000"] / 1e6)  # type: ignore[index]


@contextmanager
def _connected(server: Running, count: int) -> Iterator[None]:
    sockets = [greeted(server.place) for _ in range(count)]
    try:
        yield
    finally:
        for connection in sockets:
            connection.close()


def all_cases(size: int) -> list[Case]:
    """Every row, for images of so many bytes."""
    small_read, small_write = fio("randread", "4k", 32), fio("randwrite", "4k", 32)
    large_read, large_write = fio("read", "2M", 8), fio("write", "256k", 8)
    cases = [
        Case("raw, 4 KiB random read, depth 1", "raw", fio("randread", "4k", 1), "IOPS"),
        Case("raw, 4 KiB random read, depth 1, TCP", "raw", fio("randread", "4k", 1), "IOPS", transport="tcp"),
        Case("raw, 4 KiB random read, depth 32", "raw", small_read, "IOPS"),
        Case("raw, 4 KiB random read, depth 32, TCP", "raw", small_read, "IOPS", transport="tcp"),
        Case("raw, 4 KiB random write, depth 32", "raw", small_write, "IOPS"),
        Case("raw, 64 KiB random read, depth 16", "raw", fio("randread", "64k", 16), "IOPS"),
        Case("raw, 2 MiB sequential read, depth 8", "raw", large_read, "IOPS"),
        Case("raw, 256 KiB sequential read, TLS", "raw", fio("read", "256k", 8), "IOPS", transport="tls"),
        Case("raw, 256 KiB sequential write, depth 8", "raw", large_write, "IOPS"),
        Case("raw, 4 KiB random read, depth 32, 4 connections", "raw", fio("randread", "4k", 32, 4), "IOPS"),
    ]
    for kind in ("qcow2", "overlay", "vpc", "vhdx"):
        cases += [
            Case(f"{kind}, 4 KiB random read, depth 32", kind, small_read, "IOPS"),
            Case(f"{kind}, 2 MiB sequential read, depth 8", kind, large_read, "IOPS"),
        ]
    return [
        *cases,
        Case("qcow2, 4 KiB random read, depth 1", "qcow2", fio("randread", "4k", 1), "IOPS"),
        Case("qcow2, 64 KiB random read, depth 16", "qcow2", fio("randread", "64k", 16), "IOPS"),
        Case("qcow2, 4 KiB random write, depth 32", "qcow2", small_write, "IOPS"),
        Case("qcow2, 256 KiB sequential write, depth 8", "qcow2", large_write, "IOPS"),
        Case("fresh qcow2, 4 KiB random write", "fresh", filling("randwrite", "4k", 32, size // 4), "IOPS", fills=True),
        Case("fresh qcow2, 256 KiB write", "fresh", filling("write", "256k", 8, size), "IOPS", fills=True),
        Case("overlay, 4 KiB random write", "overlay", filling("randwrite", "4k", 32, size // 16), "IOPS", fills=True),
        Case("compressed qcow2, 1 MiB read, 4 connections", "compressed", fio("read", "1M", 4, 4), "IOPS"),
        Case("nbdcopy of a full raw image", "raw", nbdcopy, "s", less_is_better=True),
        Case("nbdcopy of a 90 % sparse raw image", "sparse", nbdcopy, "s", less_is_better=True),
        Case("start to first byte", "qcow2", start, "s", less_is_better=True),
        Case("memory, 1 connection", "qcow2", memory(1), "MiB", less_is_better=True),
        Case("memory, 100 connections", "qcow2", memory(100), "MiB", less_is_better=True),
        Case("99 % of reads beside a stalled client", "raw", latency_beside_stalled_client, "ms", less_is_better=True),
    ]
