"""The command as users type it, judged by libnbd's and qemu's tools."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.reference import needs, qemu_content, qemu_img_create, qemu_io, run
from tests.serving import COMMAND, Served, refusal, run_nbdserve

MIB = 1 << 20


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(Random(1).randbytes(3 * MIB) + bytes(5 * MIB))
    return path


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    path = qemu_img_create(tmp_path / "disk.qcow2", "16M")
    qemu_io(path, "write -P 1 0 2M", "write -P 2 9M 100k", "write -z 1M 64k")
    return path


def info(uri: str) -> dict[str, Any]:
    """The only export, as nbdinfo sees it."""
    (export,) = json.loads(run("nbdinfo", "--json", uri))["exports"]
    assert isinstance(export, dict)
    return export


# For the time of another command


@needs("nbdinfo")
def test_nbdinfo_starts_the_server_itself(raw: Path) -> None:
    printed = json.loads(run("nbdinfo", "--json", "--", "[", *COMMAND, raw, "-f", "raw", "]"))
    assert printed["exports"][0]["export-size"] == 8 * MIB


@needs("nbdcopy", "qemu-img", "qemu-io")
def test_nbdcopy_starts_the_server_itself(qcow2: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.raw"
    run("nbdcopy", "--", "[", *COMMAND, qcow2, "]", out)
    assert out.read_bytes() == qemu_content(qcow2, "qcow2")


@needs("nbdcopy", "qemu-img", "qemu-io")
def test_nbdcopy_between_two_servers(qcow2: Path, tmp_path: Path) -> None:
    target = qemu_img_create(tmp_path / "target.qcow2", "16M")
    run("nbdcopy", "--", "[", *COMMAND, qcow2, "]", "[", *COMMAND, target, "]")
    wait_until_written(target, qemu_content(qcow2, "qcow2"))


def wait_until_written(image: Path, content: bytes, seconds: float = 10) -> None:
    """nbdcopy does not wait for the servers it has started; they flush and close a moment later."""
    deadline = time.monotonic() + seconds
    while qemu_content(image, "qcow2") != content:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@needs("nbdinfo")
@pytest.mark.parametrize("option", [("--port", "0"), ("--socket", "s"), ("--bind", "localhost")])
def test_a_handed_over_socket_excludes_others(raw: Path, option: tuple[str, str]) -> None:
    command = ["nbdinfo", "--", "[", *COMMAND, str(raw), *option, "]"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert result.returncode != 0
    assert "nbdserve: the caller has opened the socket (LISTEN_FDS): leave" in result.stderr
    assert "Traceback" not in result.stderr


# Where it listens


def test_the_unix_socket_is_removed_at_the_end(raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with Served(raw, "-k", path) as server:
        assert path.is_socket()
        assert server.uri == f"nbd+unix:///?socket={path}"
    assert not path.exists()


def test_a_socket_left_by_a_killed_server_is_replaced(raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with Served(raw, "-k", path) as server:
        server.process.kill()
        server.process.wait()
    assert path.is_socket()
    with Served(raw, "-r", "-k", path) as server:
        server.connect().close()
        assert "another server is listening there" in refusal(raw, "-r", "-k", path)
        server.connect().close()
    assert not path.exists()


def test_a_file_is_never_replaced(raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    assert "choose another path" in refusal(raw, "-k", path)
    assert path.read_text() == "data"


def test_a_port_in_use(raw: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert refusal(raw, "-b", "127.0.0.1", "-p", str(port)).startswith(f"port {port} on 127.0.0.1 is in use")


def test_no_warning_without_need(raw: Path) -> None:
    with Served(raw, "-f", "raw") as server:
        pass
    assert server.stderr == []


def test_reachable_from_other_machines_without_tls_it_warns(raw: Path) -> None:
    with Served(raw, "-f", "raw", "--bind", "0.0.0.0") as server:
        pass
    assert [line for line in server.stderr if "warning" in line and "--tls-certs" in line]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_both_signals_end_it_well(raw: Path, number: signal.Signals) -> None:
    with Served(raw) as server:
        server.stop(number)


@needs("nbdinfo")
@pytest.mark.parametrize("name", ["a b", "50%", "ä/ö", "x?y#z&socket=q", "+", "日本"])
def test_uris_of_names_that_need_quoting(raw: Path, tmp_path: Path, name: str) -> None:
    with Served(raw, "-x", name, "-k", tmp_path / "an odd,100%&=#? socket") as server:
        assert info(server.uri)["export-name"] == name


# What it serves


@needs("nbdinfo")
def test_name_and_description(raw: Path) -> None:
    with Served(raw, "--export-name", "größe", "--description", "ein Bild, 8 MiB") as server:
        export = info(server.uri)
        assert (export["export-name"], export["description"]) == ("größe", "ein Bild, 8 MiB")
        listed = json.loads(run("nbdinfo", "--json", "--list", server.uri.rsplit("/", 1)[0]))
        assert [entry["export-name"] for entry in listed["exports"]] == ["größe"]
        other = subprocess.run(["nbdinfo", server.uri.rsplit("/", 1)[0] + "/none"], capture_output=True, timeout=20)
        assert other.returncode != 0


@needs("nbdinfo")
def test_what_is_announced(raw: Path) -> None:
    with Served(raw) as server:
        export = info(server.uri)
    can = ("can_cache", "can_df", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero")
    assert {name: export[name] for name in can} == dict.fromkeys(can, True)
    assert export["is_read_only"] is False
    assert export["is_rotational"] is False
    assert export["contexts"] == ["base:allocation"]
    assert [export[f"block_size_{kind}"] for kind in ("minimum", "preferred", "maximum")] == [1, 4096, 32 * MIB]


@needs("nbdinfo")
def test_read_only(raw: Path) -> None:
    raw.chmod(0o444)
    with Served(raw, "--read-only") as server:
        assert info(server.uri)["is_read_only"] is True
        assert server.stderr == [], "nothing can be written, so there is nothing to warn of"


@needs("nbdinfo", "nbdcopy")
@pytest.mark.parametrize(
    ("options", "start", "end"),
    [
        (("--offset", "1M"), MIB, 8 * MIB),
        (("--size", "512k"), 0, MIB // 2),
        (("--offset", "1000", "--size", "70001"), 1000, 71001),
        (("-o", "8M"), 8 * MIB, 8 * MIB),
        (("--size", "0"), 0, 0),
    ],
)
def test_a_range(raw: Path, tmp_path: Path, options: tuple[str, ...], start: int, end: int) -> None:
    with Served(raw, *options) as server:
        assert info(server.uri)["export-size"] == end - start
        if end > start:
            run("nbdcopy", server.uri, tmp_path / "out.raw")
            assert (tmp_path / "out.raw").read_bytes() == raw.read_bytes()[start:end]


@needs("sfdisk", "nbdinfo", "nbdcopy", "qemu-io")
def test_a_partition_and_nothing_besides(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    content = Random(2).randbytes(16 * MIB)
    disk.write_bytes(content)
    run("sfdisk", "-q", "--wipe", "never", disk, stdin="label: dos\nstart=2048, size=4096\nstart=8192, size=2048\n")
    with Served(disk, "-f", "raw", "--partition", "2") as server:
        assert info(server.uri)["export-size"] == MIB
        run("nbdcopy", server.uri, tmp_path / "out.raw")
        assert (tmp_path / "out.raw").read_bytes() == content[4 * MIB : 5 * MIB]
        qemu_io(server.uri, "write -P 7 0 1M", "flush", format="raw")
    written = disk.read_bytes()
    assert written[4 * MIB : 5 * MIB] == b"\x07" * MIB
    assert written[5 * MIB :] == content[5 * MIB :]
    assert written[MIB : 4 * MIB] == content[MIB : 4 * MIB]
    said = refusal(disk, "-f", "raw", "-P", "3")
    assert said.startswith(f"{disk}: ")
    assert "1" in said
    assert "2" in said


@needs("qemu-img", "qemu-io", "nbdcopy", "nbdinfo")
@pytest.mark.parametrize("spelling", ["before", "1", "snapshot.name=before", "snapshot.id=1"])
def test_a_snapshot_is_shown_read_only(qcow2: Path, tmp_path: Path, spelling: str) -> None:
    run("qemu-img", "snapshot", "-c", "before", qcow2)
    before = qemu_content(qcow2, "qcow2")
    qemu_io(qcow2, "write -P 9 0 8M", "write -z 9M 1M")
    unchanged = qcow2.read_bytes()
    with Served(qcow2, "--snapshot", spelling) as server:
        assert info(server.uri)["is_read_only"] is True
        run("nbdcopy", server.uri, tmp_path / "out.raw")
    assert (tmp_path / "out.raw").read_bytes() == before
    assert qcow2.read_bytes() == unchanged


@needs("nbdinfo", "qemu-img", "qemu-io")
def test_the_short_options_of_qemu_nbd(qcow2: Path, tmp_path: Path) -> None:
    run("qemu-img", "snapshot", "-c", "snap", qcow2)
    common = ("-f", "qcow2", "-r", "-x", "name", "-D", "text", "-o", "1M", "-e", "3", "-t", "-v", "-l", "snap")
    with Served(qcow2, *common, "-k", tmp_path / "s") as server:
        export = info(server.uri)
        assert (export["export-name"], export["description"], export["export-size"]) == ("name", "text", 15 * MIB)
        server.wait_for_line("connected")
    with Served(qcow2, *common, "-p", "0", "-b", "127.0.0.1") as server:
        assert info(server.uri)["export-name"] == "name"


def test_version_and_help() -> None:
    assert run_nbdserve("--version").stdout.startswith("nbdserve ")
    printed = run_nbdserve("--help").stdout
    assert "--tls-certs" in printed
    assert "nbdcopy [ nbdserve disk.qcow2 ]" in printed


@pytest.mark.parametrize("unit", ["8388608", "8192k", "8192K", "8M", "8MiB"])
def test_sizes_are_read_as_qemu_reads_them(raw: Path, unit: str) -> None:
    with Served(raw, "--size", unit):
        pass


def test_stdout_that_nobody_reads(raw: Path) -> None:
    """The URI cannot be printed: that ends the command in order, with one line."""
    process = subprocess.Popen([*COMMAND, raw, "-p", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(20) == 1
    assert "Traceback" not in said
    assert "Broken pipe" in said
