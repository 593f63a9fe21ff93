"""TLS on real connections: who gets in, who does not, and that the bytes are right."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random
from struct import pack
from urllib.parse import urlsplit

import pytest

from tests.interop.certificates import Certificates
from tests.reference import needs, run
from tests.server import wire
from tests.server.wire import Wire
from tests.serving import Served

MIB = 1 << 20


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image for all servers, which are readers for that: only one at a time could write."""
    path = tmp_path_factory.mktemp("tls") / "disk.raw"
    with path.open("wb") as file:
        file.write(Random(1).randbytes(5 * MIB + 512))
        file.truncate(40 * MIB)
    return path


@pytest.fixture(scope="module")
def strict(image: Path, certificates: Certificates) -> Iterator[Served]:
    """A server that requires TLS and a client's certificate."""
    options = ("-r", "-f", "raw", "-v", "--tls-certs", certificates.good, "--tls-verify-peer")
    with Served(image, *options) as server:
        yield server


@pytest.fixture(scope="module")
def open_to_all(image: Path, certificates: Certificates) -> Iterator[Served]:
    """A server that requires TLS, of whomever."""
    with Served(image, "-r", "-f", "raw", "-v", "--tls-certs", certificates.good) as server:
        yield server


def context(directory: Path, *, certificate: bool = True) -> ssl.SSLContext:
    """A client's context out of a certificate directory."""
    made = ssl.create_default_context(cafile=str(directory / "ca-cert.pem"))
    if certificate:
        made.load_cert_chain(directory / "client-cert.pem", directory / "client-key.pem")
    return made


def greeted(server: Served) -> Wire:
    client = Wire(server.connect())
    client.greet()
    return client


def is_served(server: Served, how: ssl.SSLContext) -> bool:
    """Whether a client with this context gets as far as reading."""
    with greeted(server) as client:
        try:
            client.start_tls(how)
            return len(client.go().read(0, 4096)) == 4096
        except (ssl.SSLError, ConnectionError, EOFError):
            return False


def names(uri: str, directory: Path) -> str:
    """The URI with the parameter by which libnbd finds certificates."""
    return f"{uri}/?tls-certificates={directory}"


# Who gets in


@needs("nbdinfo")
def test_nbdinfo_sees_an_encrypted_export(strict: Served, certificates: Certificates) -> None:
    assert strict.uri.startswith("nbds://localhost:")
    info = json.loads(run("nbdinfo", "--json", names(strict.uri, certificates.good)))
    assert info["TLS"] is True
    assert info["exports"][0]["export-size"] == 40 * MIB


@needs("nbdinfo")
def test_require_refuses_a_plain_client(open_to_all: Served) -> None:
    result = subprocess.run(
        ["nbdinfo", open_to_all.uri.replace("nbds", "nbd")], capture_output=True, text=True, timeout=20
    )
    assert result.returncode != 0
    assert "server replied with error" in result.stderr


@pytest.mark.parametrize(
    "option",
    [
        (wire.LIST, b""),
        (wire.INFO, pack(">IH", 0, 0)),
        (wire.GO, pack(">IH", 0, 0)),
        (wire.STRUCTURED_REPLY, b""),
        (wire.SET_META_CONTEXT, pack(">II", 0, 0)),
        (77, b"whatever"),
    ],
)
def test_require_tells_a_plain_client_nothing(open_to_all: Served, option: tuple[int, bytes]) -> None:
    with greeted(open_to_all) as client:
        assert [kind for kind, _ in client.option(*option)] == [wire.ERR_TLS_REQD]
        assert client.option(wire.ABORT) == [(wire.ACK, b"")]
        assert client.is_closed()


def test_require_hangs_up_on_a_plain_export_name(open_to_all: Served) -> None:
    with greeted(open_to_all) as client:
        client.send(b"IHAVEOPT" + pack(">II", wire.EXPORT_NAME, 0))
        assert client.is_closed()


def test_on_serves_both(image: Path, certificates: Certificates) -> None:
    with Served(image, "-r", "-f", "raw", "--tls", "on", "--tls-certs", certificates.good) as server:
        assert server.uri.startswith("nbd://")
        assert is_served(server, context(certificates.good, certificate=False))
        with greeted(server) as client:
            assert client.go().read(0, 4096) == image.read_bytes()[:4096]


def test_off_refuses_starttls(image: Path, certificates: Certificates) -> None:
    options = ("-r", "-f", "raw", "--tls", "off", "--tls-certs", certificates.good)
    with Served(image, *options) as server, greeted(server) as client:
        assert [kind for kind, _ in client.option(wire.STARTTLS)] == [wire.ERR_POLICY]
        assert client.go().read(0, 10) == image.read_bytes()[:10]


def test_without_verification_any_client_gets_in(open_to_all: Served, certificates: Certificates) -> None:
    assert is_served(open_to_all, context(certificates.good, certificate=False))
    assert is_served(open_to_all, context(certificates.stranger))


def test_verification_wants_a_certificate_of_our_ca(strict: Served, certificates: Certificates) -> None:
    assert is_served(strict, context(certificates.good))
    assert not is_served(strict, context(certificates.good, certificate=False))
    assert not is_served(strict, context(certificates.stranger))
    assert not is_served(strict, context(certificates.expired))
    assert is_served(strict, context(certificates.good)), "and serves on"
    strict.wait_for_line("TLS failed", count=3)


def test_revoked_clients_are_refused(image: Path, certificates: Certificates) -> None:
    options = ("-r", "-f", "raw", "--tls-certs", certificates.revoked, "--tls-verify-peer")
    with Served(image, *options) as server:
        assert not is_served(server, context(certificates.revoked))
        assert is_served(server, context(certificates.good))


@needs("nbdinfo")
def test_a_client_refuses_the_wrong_server(image: Path, certificates: Certificates) -> None:
    """The server's own certificates are what the directory says: a client that looks at them does not go on."""
    with Served(image, "-r", "-f", "raw", "--tls-certs", certificates.wrong_host) as server:
        uri = names(server.uri, certificates.good)
        result = subprocess.run(["nbdinfo", uri], capture_output=True, text=True, timeout=20)
        assert result.returncode != 0
        assert not is_served(server, context(certificates.good))


@pytest.mark.parametrize(("version", "served"), [("TLSv1", False), ("TLSv1_1", False), ("TLSv1_2", True)])
def test_old_versions_are_refused(strict: Served, certificates: Certificates, version: str, served: bool) -> None:
    old = context(certificates.good)
    old.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        old.minimum_version = old.maximum_version = ssl.TLSVersion[version]
    assert is_served(strict, old) == served


# Nothing from before TLS survives it


@pytest.mark.parametrize("injected", [b"IHAVEOPT\0\0\0\3\0\0\0\0", b"x", bytes(5000)])
def test_what_is_injected_behind_starttls_ends_the_connection(open_to_all: Served, injected: bytes) -> None:
    with greeted(open_to_all) as client:
        client.send(b"IHAVEOPT" + pack(">II", wire.STARTTLS, 0) + injected)
        assert client.is_closed()


def test_what_was_agreed_in_plaintext_is_forgotten(image: Path, certificates: Certificates) -> None:
    options = ("-r", "-f", "raw", "--tls", "on", "--tls-certs", certificates.good)
    with Served(image, *options) as server, greeted(server) as client:
        assert client.option(wire.STRUCTURED_REPLY) == [(wire.ACK, b"")]
        client.start_tls(context(certificates.good))
        query = pack(">III", 0, 1, 15) + b"base:allocation"
        assert client.option(wire.SET_META_CONTEXT, query)[-1][0] == wire.ERR_INVALID
        client.go(structured=False)
        assert not client.flags & 1 << 7, "no DF without structured replies"
        assert client.read(0, 4096) == image.read_bytes()[:4096]


def test_tls_begins_once(open_to_all: Served, certificates: Certificates) -> None:
    with greeted(open_to_all) as client:
        client.start_tls(context(certificates.good))
        assert client.option(wire.STARTTLS)[-1][0] == wire.ERR_INVALID


def test_no_tls_where_tls_should_be(open_to_all: Served) -> None:
    with greeted(open_to_all) as client:
        assert client.option(wire.STARTTLS) == [(wire.ACK, b"")]
        client.send(b"IHAVEOPT" + pack(">II", wire.LIST, 0))
        while client.sock.recv(100):  # an alert, if anything
            pass
    open_to_all.wait_for_line("TLS failed")


# The bytes


def test_requests_of_every_size(image: Path, certificates: Certificates, tmp_path: Path) -> None:
    content = bytearray(image.read_bytes())
    copy = tmp_path / "copy.raw"
    shutil.copy(image, copy)
    with Served(copy, "-f", "raw", "--tls-certs", certificates.good) as server, greeted(server) as client:
        client.start_tls(context(certificates.good))
        client.go()
        for offset, length in ((0, 1), (100, 16384), (7, 70_000), (0, 5 * MIB), (4 * MIB, 2 * MIB), (0, 32 * MIB)):
            assert client.read(offset, length) == content[offset : offset + length]
            data = Random(length).randbytes(length)
            assert client.write(offset, data) == 0
            content[offset : offset + length] = data
        pieces = [client.request(wire.READ, number * MIB, 100_000 * number)[1] for number in range(20)]
        client.send(b"".join(pieces))
        found = {(reply := client.reply()).cookie: reply.data for _ in pieces}
        expected = [bytes(content[number * MIB :][: 100_000 * number]) for number in range(20)]
        assert [found[cookie] for cookie in sorted(found)] == expected
        client.send(client.request(wire.DISC)[1])
    assert copy.read_bytes() == content


@needs("nbdcopy")
def test_nbdcopy_both_ways(image: Path, certificates: Certificates, tmp_path: Path) -> None:
    target = tmp_path / "target.raw"
    target.write_bytes(bytes(40 * MIB))
    with Served(target, "-f", "raw", "--tls-certs", certificates.good, "--tls-verify-peer") as server:
        run("nbdcopy", image, names(server.uri, certificates.good))
        run("nbdcopy", names(server.uri, certificates.good), tmp_path / "back.raw")
    assert target.read_bytes() == image.read_bytes()
    assert (tmp_path / "back.raw").read_bytes() == image.read_bytes()


@needs("qemu-img", "qemu-io")
def test_qemu_reads_and_writes(image: Path, certificates: Certificates, tmp_path: Path) -> None:
    copy = tmp_path / "copy.raw"
    shutil.copy(image, copy)
    credentials = f"tls-creds-x509,id=tls0,dir={certificates.good},endpoint=client"
    with Served(copy, "-f", "raw", "--tls-certs", certificates.good, "--tls-verify-peer") as server:
        where = f"driver=nbd,host=localhost,port={urlsplit(server.uri).port},tls-creds=tls0"
        compare = ("qemu-img", "compare", "--object", credentials, "--image-opts")
        run(*compare, f"driver=raw,file.driver=file,file.filename={image}", where)
        work = ("write -P 9 4M 20M", "write -z 6M 64k", "discard 8M 1M", "flush", "read -P 9 10M 5M")
        arguments = [part for command in work for part in ("-c", command)]
        printed = run("qemu-io", "--object", credentials, "--image-opts", *arguments, where)
        assert "failed" not in printed
        run(*compare, f"driver=raw,file.driver=file,file.filename={copy}", where)
    content = copy.read_bytes()
    assert content[4 * MIB : 6 * MIB] == b"\x09" * 2 * MIB
    assert content[6 * MIB : 6 * MIB + 65536] == bytes(65536)
