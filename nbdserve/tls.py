"""Certificate directories -> ssl.SSLContext, in the layout that QEMU, libvirt, nbdkit and libnbd share.

ca-cert.pem       whom we trust
ca-crl.pem        certificates that are trusted no more (optional)
server-cert.pem   who we are
server-key.pem    and the key that proves it
client-cert.pem, client-key.pem   the same for a client, where the server wants to know it
"""

from __future__ import annotations

import ssl
from pathlib import Path

from nbdserve.errors import NbdserveError

_NEEDED = ("ca-cert.pem", "server-cert.pem", "server-key.pem")


class TlsError(NbdserveError):
    """Certificates are missing or unusable."""


def server_context(directory: str, *, verify_peer: bool) -> ssl.SSLContext:
    """The context of a server whose certificates lie in the directory.

    Args:
        verify_peer: clients must show a certificate that the CA has signed (and the CRL, if any, does not revoke).

    Raises:
        TlsError: something is missing or does not fit together; the message names the file.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise TlsError(f"--tls-certs {directory}: no such directory; it must hold {', '.join(_NEEDED)}")
    for name in _NEEDED:
        if not (folder / name).is_file():
            raise TlsError(f"--tls-certs {directory}: {name} is missing; the directory must hold {', '.join(_NEEDED)}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    certificate, key = folder / "server-cert.pem", folder / "server-key.pem"
    _prove_identity(context, certificate, key)
    _trust(context, folder / "ca-cert.pem")
    if verify_peer:
        context.verify_mode = ssl.CERT_REQUIRED
        revoked = folder / "ca-crl.pem"
        if revoked.exists():
            _trust(context, revoked)
            context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    return context


def client_context(directory: str | None) -> ssl.SSLContext:
    """The context of a client that checks the server's certificate and name.

    Args:
        directory: holds whom to trust and, if the server asks, who we are; None trusts what this system trusts.

    Raises:
        TlsError: something is missing or does not fit together; the message names the file.
    """
    if directory is None:
        return ssl.create_default_context()
    folder = Path(directory)
    if not (folder / "ca-cert.pem").is_file():
        raise TlsError(f"tls-certificates={directory}: there is no ca-cert.pem in it; it says which servers to trust")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _trust(context, folder / "ca-cert.pem")
    certificate, key = folder / "client-cert.pem", folder / "client-key.pem"
    if certificate.exists():
        _prove_identity(context, certificate, key)
    return context


def _prove_identity(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    try:
        # An encrypted key would make OpenSSL ask for its passphrase on the terminal.
        context.load_cert_chain(certificate, key, password=_no_passphrase)
    except (ssl.SSLError, OSError) as error:
        raise TlsError(f"{key}: does not fit {certificate.name}, or is damaged or encrypted: {_why(error)}") from None


def _trust(context: ssl.SSLContext, file: Path) -> None:
    try:
        context.load_verify_locations(file)
    except (ssl.SSLError, OSError) as error:
        raise TlsError(f"{file}: cannot be used: {_why(error)}") from None


def _no_passphrase() -> str:
    raise OSError("the key is encrypted; store it without a passphrase")


def _why(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
