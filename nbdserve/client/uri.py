"""NBD URIs (NetworkBlockDevice/nbd, doc/uri.md): nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH, and nbds...

For TLS, tls-certificates=DIR (as libnbd spells it) names the directory with ca-cert.pem and, if the server wants one,
client-cert.pem and client-key.pem; tls-hostname=NAME is what the server's certificate must say instead of HOST.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qs, unquote, urlsplit

from nbdserve.errors import OpenError

DEFAULT_PORT = 10809

_SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix")
_KNOWN = frozenset({"socket", "tls-certificates", "tls-hostname"})


def is_uri(name: str) -> bool:
    """Whether a name is meant as an NBD URI rather than a path."""
    return name.partition("://")[0].lower() in (*_SCHEMES, "nbd+vsock", "nbds+vsock") and "://" in name


@dataclass(frozen=True, slots=True)
class NbdUri:
    """One export of one server.

    Attributes:
        text: the URI as it was given, for messages.
        host, port: where the server listens on TCP; socket: its unix socket, which counts if it is set.
        export: the name of the export, "" for the default one.
        tls: whether the connection must be encrypted.
        certificates: directory, or None for the certificate authorities of this system.
        hostname: what the server's certificate must say.
    """

    text: str
    host: str
    port: int
    socket: str | None
    export: str
    tls: bool
    certificates: str | None
    hostname: str

    @classmethod
    def parse(cls, text: str) -> NbdUri:
        """Take a URI apart.

        Raises:
            OpenError: it is none, or asks for what is not known here.
        """
        try:
            parts = urlsplit(text)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise OpenError(f"{text}: not a valid NBD URI: {error}") from None
        if parts.scheme not in _SCHEMES:
            raise OpenError(f"{text}: unknown scheme {parts.scheme!r}; known are {', '.join(_SCHEMES)}")
        query = {key: values[-1] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        if "tls-psk-file" in query:
            raise OpenError(
                f"{text}: pre-shared keys cannot be used here, Python has none before 3.13; use tls-certificates=DIR"
            )
        if unknown := sorted(query.keys() - _KNOWN):
            raise OpenError(f"{text}: unknown parameter {unknown[0]!r}; known are {', '.join(sorted(_KNOWN))}")
        if parts.username is not None:
            raise OpenError(f"{text}: a user name is of no use here; leave it out")
        on_unix = parts.scheme.endswith("+unix")
        socket = query.get("socket")
        if on_unix != bool(socket):
            raise OpenError(f"{text}: socket=PATH and the schemes with +unix belong together")
        return cls(
            text,
            host or "localhost",
            DEFAULT_PORT if port is None else port,
            socket if on_unix else None,
            unquote(parts.path.removeprefix("/")),
            parts.scheme.startswith("nbds"),
            query.get("tls-certificates"),
            query.get("tls-hostname") or host or "localhost",
        )
