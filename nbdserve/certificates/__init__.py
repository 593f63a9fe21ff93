"""Certificates for TLS: a small authority and what it signs, in the layout of QEMU, libvirt, nbdkit and libnbd.

    ca-cert.pem, ca-key.pem           the authority: whom to trust, and the key that signs
    server-cert.pem, server-key.pem   for the server
    client-cert.pem, client-key.pem   for one client
    keys.psk                          a secret for each client instead of certificates, in lines of user:hex
    NAME/                             what a further client needs, and nothing else

Invariants: what exists is never written over, so that calling again adds what is missing; and what is secret is
readable by its owner only, from the moment its file exists.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from nbdserve.errors import NbdserveError

if TYPE_CHECKING:
    from nbdserve.certificates.authority import Certificate, Key

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
FIRST_CLIENT = "client"
"""The name of the client whose files lie in the directory itself, for want of a better one."""

_PSK_BYTES = 32
_CLIENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class CertificateError(NbdserveError):
    """Certificates cannot be made."""


def make_certificates(
    directory: Path, hosts: Sequence[str] = (), clients: Sequence[str] = (), *, since: datetime | None = None
) -> list[Path]:
    """Write an authority, and certificates and keys that it signs for a server and for clients.

    Args:
        directory: made if it is missing, for its owner only.
        hosts: the names and addresses by which clients reach the server; none: LOCAL_NAMES, or what the server's
            certificate says if there is one.
        clients: names, each of which gets a subdirectory that can be handed over.
        since: when the validity of what is made begins; default: now.

    Returns:
        The files that were written; what had been there is as it was.

    Raises:
        CertificateError: a name cannot be one, something in the directory does not fit, or a library is missing.
        OSError: the directory cannot be read or written.
    """
    try:
        from nbdserve.certificates.authority import Authority, check_host
    except ImportError:
        raise CertificateError(
            "certificates are made with the library cryptography: pip install 'nbdserve[certs]'"
        ) from None
    for host in hosts:
        check_host(host)
    for name in clients:
        if not _CLIENT_NAME.fullmatch(name):
            raise CertificateError(f"--client {name}: not a name; use up to 64 letters, digits, dots and dashes")
    begin = since or datetime.now(UTC)
    folder = _Folder(directory)
    authority = Authority(*folder.pair("ca", lambda key: Authority.certify_itself(key, begin)))
    _, server = folder.pair("server", lambda key: authority.certify_server(key, hosts or LOCAL_NAMES, begin))
    if hosts:
        authority.check_server(server, hosts, folder.path / "server-cert.pem")
    folder.pair("client", lambda key: authority.certify_client(key, FIRST_CLIENT, begin))
    made = [*folder.made]
    shared = _Secrets(folder.path / "keys.psk")
    shared.of(FIRST_CLIENT)
    for name in clients:
        own = _Folder(directory / name)
        own.write("ca-cert.pem", authority.pem(), secret=False)
        own.pair("client", lambda key, name=name: authority.certify_client(key, name, begin))  # type: ignore[misc]
        own.write("keys.psk", f"{name}:{shared.of(name)}\n".encode(), secret=True)
        made += own.made
    return made + ([shared.path] if shared.has_changed else [])


class _Folder:
    """A directory in which files are only added.

    Attributes:
        made: the files that were.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = path
        self.made: list[Path] = []

    def pair(self, role: str, certify: Callable[[Key], Certificate]) -> tuple[Key, Certificate]:
        """The key and the certificate of a role, made where they are missing; a key without one gets a certificate."""
        from nbdserve.certificates import authority

        key_file, file = self.path / f"{role}-key.pem", self.path / f"{role}-cert.pem"
        if key_file.exists():
            key = authority.load_key(key_file)
        elif file.exists():
            raise CertificateError(f"{key_file}: missing, while {file.name} is there; bring it back, or move that away")
        else:
            key = authority.new_key()
            self.write(key_file.name, authority.key_pem(key), secret=True)
        if not file.exists():
            self.write(file.name, authority.pem(certify(key)), secret=False)
        return key, authority.load_certificate(file, key)

    def write(self, name: str, content: bytes, *, secret: bool) -> None:
        """Write a file unless there is one of that name."""
        file = self.path / name
        if file.exists():
            return
        # Complete under another name first: a file that was cut short would never be written over, nor be of use.
        draft = self.path / f".{name}.{secrets.token_hex(8)}"
        try:
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644), "wb") as stream:
                stream.write(content)
                os.fsync(stream.fileno())
            os.link(draft, file)
        finally:
            draft.unlink(missing_ok=True)
        self.made.append(file)


class _Secrets:
    """A file of pre-shared keys, to which lines are only added."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.has_changed = False
        self._lines = path.read_text().splitlines() if path.exists() else []

    def of(self, user: str) -> str:
        """The secret of a user, in hexadecimal digits; a new one if there is none."""
        for line in self._lines:
            name, _, known = line.partition(":")
            if name == user:
                return known.strip()
        line = f"{user}:{secrets.token_hex(_PSK_BYTES)}"
        with open(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w") as stream:
            stream.write(line + "\n")
        self._lines.append(line)
        self.has_changed = True
        return line.partition(":")[2]
