"""NBD URIs, as doc/uri.md of the protocol describes them."""

from __future__ import annotations

import pytest

from nbdserve.client import NbdUri, is_uri
from nbdserve.errors import OpenError


@pytest.mark.parametrize(
    ("text", "host", "port", "socket", "export", "tls"),
    [
        ("nbd://example.org", "example.org", 10809, None, "", False),
        ("nbd://example.org:1234/", "example.org", 1234, None, "", False),
        ("nbd://[::1]:1234/disk", "::1", 1234, None, "disk", False),
        ("nbd:///disk", "localhost", 10809, None, "disk", False),
        ("nbds://example.org/a%20b/c", "example.org", 10809, None, "a b/c", True),
        ("nbd+unix:///?socket=/run/nbd.sock", "localhost", 10809, "/run/nbd.sock", "", False),
        ("nbds+unix:///x?socket=a%2Fb&tls-hostname=h", "localhost", 10809, "a/b", "x", True),
    ],
)
def test_what_uris_mean(text: str, host: str, port: int, socket: str | None, export: str, tls: bool) -> None:
    assert is_uri(text)
    uri = NbdUri.parse(text)
    assert (uri.host, uri.port, uri.socket, uri.export, uri.tls) == (host, port, socket, export, tls)


@pytest.mark.parametrize(
    "text",
    [
        "nbd+vsock://2/x",
        "nbd://host:port/",
        "nbd://host/?socket=/x",
        "nbd+unix:///x",
        "nbd+unix:///?socket=",
        "nbd://me@host/",
        "nbd://host/?certificates=x",
        "nbd://[::1/",
    ],
)
def test_uris_that_are_wrong(text: str) -> None:
    with pytest.raises(OpenError, match=r"^nbd"):
        NbdUri.parse(text)


@pytest.mark.parametrize("name", ["disk.qcow2", "/a/nbd.raw", "http://x", "nbd:localhost:10809", "nbd"])
def test_names_that_are_no_uris(name: str) -> None:
    assert not is_uri(name)
