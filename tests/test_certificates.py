"""Certificates that --make-certs makes, in the hands of everyone: who is served, who is refused, and in which words."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from urllib.parse import urlsplit

import pytest

from nbdserve.certificates import CertificateError, make_certificates
from nbdserve.client import connect
from nbdserve.errors import OpenError
from tests.reference import needs, run
from tests.serving import Served, refusal, run_nbdserve

MIB = 1 << 20
LONG_AGO = datetime.now(UTC) - timedelta(days=2000)  # the authority lasts longer than what it has signed


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made on the command line, for this machine and one more client."""
    directory = tmp_path_factory.mktemp("certificates") / "pki"
    result = run_nbdserve("--make-certs", directory, "--client", "alice")
    assert result.returncode == 0, result.stderr
    return directory


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("foreign") / "pki"
    make_certificates(directory)
    return directory


def sibling(pki: Path, directory: Path, *hosts: str, since: datetime | None = None) -> Path:
    """Other certificates of the same authority."""
    directory.mkdir()
    for name in ("ca-cert.pem", "ca-key.pem"):
        (directory / name).write_bytes((pki / name).read_bytes())
    make_certificates(directory, hosts, since=since)
    return directory


def stranger(pki: Path, foreign: Path, tmp_path: Path) -> Path:
    """A client that trusts our authority, and was certified by another one."""
    directory = tmp_path / "stranger"
    directory.mkdir()
    for name in ("client-cert.pem", "client-key.pem"):
        (directory / name).write_bytes((foreign / name).read_bytes())
    (directory / "ca-cert.pem").write_bytes((pki / "ca-cert.pem").read_bytes())
    return directory


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "disk.raw"
    path.write_bytes(Random(1).randbytes(MIB))
    return path


@pytest.fixture(scope="module")
def server(pki: Path, image: Path) -> Iterator[Served]:
    options = ("-r", "-f", "raw", "-v", "--tls-certs", pki, "--tls-verify-peer")
    with Served(image, *options) as started:
        yield started


def named(uri: str, directory: Path) -> str:
    return f"{uri}/?tls-certificates={directory}"


def failure(*command: str | os.PathLike[str]) -> str:
    """What a tool says when it is refused."""
    result = subprocess.run(command, input="quit\n", capture_output=True, text=True, timeout=60)
    assert result.returncode != 0, result.stdout
    return result.stderr


# How others look at an export: a command, and what it prints when it is served.


def qemu_img(uri: str, directory: Path) -> tuple[str, ...]:
    return (
        *("qemu-img", "info", "--object", f"tls-creds-x509,id=tls0,dir={directory},endpoint=client", "--image-opts"),
        f"driver=nbd,host=localhost,port={urlsplit(uri).port},tls-creds=tls0",
    )


def qemu_system(uri: str, directory: Path) -> tuple[str, ...]:
    return (
        *("qemu-system-x86_64", "-machine", "none", "-display", "none", "-monitor", "stdio"),
        *("-object", f"tls-creds-x509,id=tls0,dir={directory},endpoint=client", "-drive"),
        f"driver=nbd,host=localhost,port={urlsplit(uri).port},tls-creds=tls0,if=none,read-only=on",
    )


def nbdinfo(uri: str, directory: Path) -> tuple[str, ...]:
    return ("nbdinfo", "--size", named(uri, directory))


def nbdkit(uri: str, directory: Path) -> tuple[str, ...]:
    """It passes the export on, without encryption."""
    where = ("hostname=localhost", f"port={urlsplit(uri).port}", "tls=require", f"tls-certificates={directory}")
    return ("nbdkit", "-r", "-U", "-", "nbd", *where, "--run", "nbdinfo --size $uri")


PEERS: dict[Callable[[str, Path], tuple[str, ...]], str] = {
    qemu_img: "virtual size: 1 MiB",
    qemu_system: "nbd://localhost",
    nbdinfo: f"{MIB}\n",
    nbdkit: f"{MIB}\n",
}
PROGRAMS = ("qemu-img", "qemu-system-x86_64", "nbdinfo", "nbdkit")


# What is written


def test_secrets_are_their_owners_and_the_rest_can_be_read(pki: Path) -> None:
    modes = {path.relative_to(pki).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in pki.rglob("*")}
    secret = {name for name, mode in modes.items() if mode == 0o600}
    folders = {name for name, mode in modes.items() if mode == 0o700}
    assert secret == {
        *("ca-key.pem", "server-key.pem", "client-key.pem", "keys.psk"),
        *("alice/client-key.pem", "alice/keys.psk"),
    }
    assert folders == {"alice"}
    assert set(modes) - secret - folders == {
        *("ca-cert.pem", "server-cert.pem", "client-cert.pem"),
        *("alice/ca-cert.pem", "alice/client-cert.pem"),
    }
    assert stat.S_IMODE(pki.stat().st_mode) == 0o700


def test_nothing_is_written_over_and_what_is_missing_is_added(tmp_path: Path) -> None:
    make_certificates(tmp_path, ["one.example", "10.1.2.3"], ["alice"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert make_certificates(tmp_path) == []
    made = make_certificates(tmp_path, ["one.example"], ["alice", "bob"])
    assert {path.name for path in made} == {"ca-cert.pem", "client-key.pem", "client-cert.pem", "keys.psk"}
    assert {path.parent for path in made} == {tmp_path, tmp_path / "bob"}
    shared = before.pop(tmp_path / "keys.psk")
    assert (tmp_path / "keys.psk").read_bytes().startswith(shared)
    assert [line.split(":")[0] for line in (tmp_path / "keys.psk").read_text().split()] == ["client", "alice", "bob"]
    assert before == {path: path.read_bytes() for path in before}
    (tmp_path / "server-cert.pem").unlink()  # to be renewed, with its key
    assert make_certificates(tmp_path, ["two.example"]) == [tmp_path / "server-cert.pem"]
    assert (tmp_path / "server-key.pem").read_bytes() == before[tmp_path / "server-key.pem"]


def test_what_does_not_fit_is_told_and_left(tmp_path: Path, pki: Path) -> None:
    make_certificates(tmp_path)
    with pytest.raises(CertificateError, match=r"server-cert.pem: exists, and is not for other\.example"):
        make_certificates(tmp_path, ["other.example"])
    certificate = (tmp_path / "server-cert.pem").read_bytes()
    for damaged in (b"", (pki / "server-cert.pem").read_bytes()):
        (tmp_path / "server-cert.pem").write_bytes(damaged)
        with pytest.raises(CertificateError, match=r"server-cert.pem: (not a certificate|does not belong)"):
            make_certificates(tmp_path)
        assert (tmp_path / "server-cert.pem").read_bytes() == damaged
    (tmp_path / "server-cert.pem").write_bytes(certificate)
    (tmp_path / "ca-key.pem").unlink()
    with pytest.raises(CertificateError, match=r"ca-key.pem: missing, while ca-cert.pem is there"):
        make_certificates(tmp_path)
    (tmp_path / "ca-key.pem").write_text("nonsense")
    with pytest.raises(CertificateError, match=r"ca-key.pem: not a private key"):
        make_certificates(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--host", "with space"), "--host with space: neither a host name nor an address"),
        (("--host", "example.com:10809"), "give it without a port"),
        (("--client", "../up"), "--client ../up: not a name"),
        (("--client", "a:b"), "--client a:b: not a name"),
    ],
)
def test_a_name_that_is_none(options: tuple[str, str], said: str, tmp_path: Path) -> None:
    assert said in refusal("--make-certs", tmp_path / "pki", *options)
    assert not (tmp_path / "pki").exists()


def test_without_the_library(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['cryptography'] = None; sys.argv[0] = 'nbdserve'\n"
        "from nbdserve.cli.serve import main; main()"
    )
    command = [sys.executable, "-c", code, "--make-certs", tmp_path / "pki"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        "nbdserve: certificates are made with the library cryptography: pip install 'nbdserve[certs]'\n"
    )


# Who is served


@pytest.mark.parametrize("client", ["", "alice"])
def test_our_client_is_served(server: Served, pki: Path, image: Path, client: str) -> None:
    with connect(named(server.uri, pki / client), read_only=True) as device:
        assert device.read(0, MIB) == image.read_bytes()


@needs(*PROGRAMS, "nbdcopy")
def test_others_are_served(server: Served, pki: Path, image: Path, tmp_path: Path) -> None:
    for peer, printed in PEERS.items():
        assert printed in run(*peer(server.uri, pki / "alice"), stdin="info block\nquit\n")
    run("nbdcopy", named(server.uri, pki), tmp_path / "copy.raw")
    assert (tmp_path / "copy.raw").read_bytes() == image.read_bytes()


@contextmanager
def peer_server(tmp_path: Path, *command: str) -> Iterator[None]:
    """Another one's server, which writes a pid file when it is ready."""
    pid_file = tmp_path / "pid"
    with subprocess.Popen(command) as process:
        try:
            for _ in range(500):
                if pid_file.exists() and pid_file.read_text():
                    break
                assert process.poll() is None, f"{command} has ended"
                try:
                    process.wait(0.02)
                except subprocess.TimeoutExpired:
                    continue
            yield
        finally:
            process.terminate()


@needs("nbdkit", "nbdinfo")
def test_nbdkit_serves_with_them(pki: Path, foreign: Path, image: Path, tmp_path: Path) -> None:
    command = (
        "nbdkit",
        "-f",
        "-P",
        f"{tmp_path}/pid",
        "-U",
        f"{tmp_path}/s",
        "-r",
        "--tls=require",
        "--tls-verify-peer",
    )
    with peer_server(tmp_path, *command, f"--tls-certificates={pki}", "file", os.fspath(image)):
        uri = f"nbds+unix:///?socket={tmp_path}/s&tls-certificates={pki / 'alice'}"
        assert run("nbdinfo", "--size", uri) == f"{MIB}\n"
        with connect(uri, read_only=True) as device:
            assert device.read(0, MIB) == image.read_bytes()
        with pytest.raises(OpenError, match="TLS failed: the server hung up without a word"):
            connect(uri.replace(str(pki / "alice"), str(stranger(pki, foreign, tmp_path))))


def test_pre_shared_keys_are_not_ours(pki: Path, image: Path, tmp_path: Path) -> None:
    said = "pre-shared keys cannot be used here, Python has none before 3.13; use tls-certificates=DIR"
    with pytest.raises(OpenError, match=said):
        connect(f"nbds://alice@localhost/?tls-psk-file={pki}/keys.psk")
    (tmp_path / "keys.psk").write_bytes((pki / "keys.psk").read_bytes())
    assert "pre-shared keys in keys.psk are not served" in refusal("--tls-certs", tmp_path, image)


@needs("nbdkit", "nbdinfo", "qemu-nbd")
def test_the_secrets_are_what_others_expect(pki: Path, image: Path, tmp_path: Path) -> None:
    serving = ("nbdkit", "-f", "-P", f"{tmp_path}/pid", "-U", f"{tmp_path}/s", "-r", "--tls=require")
    with peer_server(tmp_path, *serving, f"--tls-psk={pki}/keys.psk", "file", os.fspath(image)):
        uri = f"nbds+unix://alice@/?socket={tmp_path}/s&tls-psk-file={pki / 'alice' / 'keys.psk'}"
        assert run("nbdinfo", "--size", uri) == f"{MIB}\n"
    (tmp_path / "pid").unlink()
    serving = ("qemu-nbd", "-t", "-r", "-f", "raw", "-k", f"{tmp_path}/q", "--pid-file", f"{tmp_path}/pid")
    credentials = ("--object", f"tls-creds-psk,id=tls0,endpoint=server,dir={pki}", "--tls-creds", "tls0")
    with peer_server(tmp_path, *serving, *credentials, os.fspath(image)):
        credentials = ("--object", f"tls-creds-psk,id=tls0,endpoint=client,dir={pki / 'alice'},username=alice")
        where = f"driver=nbd,server.type=unix,server.path={tmp_path}/q,tls-creds=tls0"
        assert "virtual size: 1 MiB" in run("qemu-img", "info", *credentials, "--image-opts", where)


# Who is refused. The server here is ours; its certificate is wrong, or the client's is.


@needs(*PROGRAMS)
@pytest.mark.parametrize(
    ("kind", "ours", "qemu"),
    [
        ("wrong host", "not valid for 'localhost'", "does not match the hostname"),
        ("expired", "it has expired", "certificate is not trusted"),
        ("foreign", "another authority has signed it", "hasn't got a known issuer"),
    ],
)
def test_a_server_that_is_not_to_be_trusted(
    pki: Path, foreign: Path, image: Path, tmp_path: Path, kind: str, ours: str, qemu: str
) -> None:
    match kind:
        case "wrong host":
            identity = sibling(pki, tmp_path / "pki", "elsewhere.example", "192.0.2.1")
        case "expired":
            identity = sibling(pki, tmp_path / "pki", since=LONG_AGO)
        case _:
            identity = foreign
    with Served(image, "-r", "-f", "raw", "--tls-certs", identity) as server:
        with pytest.raises(OpenError, match=f"TLS failed: the server's certificate is not trusted: .*{ours}"):
            connect(named(server.uri, pki))
        for peer in PEERS:
            said = failure(*peer(server.uri, pki))
            assert (qemu if peer in (qemu_img, qemu_system) else "Error in the certificate verification") in said


@needs(*PROGRAMS)
@pytest.mark.parametrize(
    ("kind", "client_hears", "server_says", "qemu"),
    [
        ("expired", "it has expired", "it has expired", "client-cert.pem has expired"),
        ("foreign", "another authority has signed it", "another authority has signed it", "failed validation against"),
        ("none", "there is none; it wants client-cert.pem", "the client shows no certificate", "TLS channel"),
    ],
)
def test_a_client_that_is_not_to_be_trusted(
    server: Served, pki: Path, foreign: Path, tmp_path: Path, kind: str, client_hears: str, server_says: str, qemu: str
) -> None:
    match kind:
        case "expired":
            identity = sibling(pki, tmp_path / "pki", since=LONG_AGO)
        case "foreign":
            identity = stranger(pki, foreign, tmp_path)
        case _:
            identity = tmp_path / "nobody"
            identity.mkdir()
            (identity / "ca-cert.pem").write_bytes((pki / "ca-cert.pem").read_bytes())
    with pytest.raises(OpenError, match=f"the server refuses our certificate: {client_hears}"):
        connect(named(server.uri, identity))
    server.wait_for_line(server_says)
    for peer in PEERS:
        said = failure(*peer(server.uri, identity))
        assert (qemu if peer in (qemu_img, qemu_system) else "A TLS fatal alert has been received") in said
    # QEMU itself shows neither an expired certificate nor one that ca-cert.pem does not vouch for.
    server.wait_for_line(server_says, count=5 if kind == "none" else 3)
    assert run("nbdinfo", "--size", named(server.uri, pki)) == f"{MIB}\n", "and serves on"


@needs("nbdkit", "qemu-img")
def test_our_client_refuses_nbdkit(pki: Path, image: Path, tmp_path: Path) -> None:
    identity = sibling(pki, tmp_path / "pki", "elsewhere.example")
    command = ("nbdkit", "-f", "-P", f"{tmp_path}/pid", "-U", f"{tmp_path}/s", "-r", "--tls=require")
    with peer_server(tmp_path, *command, f"--tls-certificates={identity}", "file", os.fspath(image)):
        uri = f"nbds+unix:///?socket={tmp_path}/s&tls-certificates={pki}"
        with pytest.raises(OpenError, match="not valid for 'localhost'"):
            connect(uri)
        with connect(f"{uri}&tls-hostname=elsewhere.example", read_only=True) as device:
            assert device.read(0, MIB) == image.read_bytes()
