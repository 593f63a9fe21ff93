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
            only = "; the pre-shared keys in keys.psk are not served" if (folder / "keys.psk").exists() else ""
            raise TlsError(
                f"--tls-certs {directory}: {name} is missing; the directory must hold {', '.join(_NEEDED)}{only}"
            )
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


# X509_V_ERR_* of OpenSSL's x509_vfy.h. Its own words for the last three say what it did, not what is wrong.
_REFUSALS = {
    9: "it is not valid yet; look at both clocks",
    10: "it has expired",
    18: "another authority has signed it than the one in ca-cert.pem",
    19: "another authority has signed it than the one in ca-cert.pem",
    20: "another authority has signed it than the one in ca-cert.pem",
}
_ALERTS = {
    "CERTIFICATE_EXPIRED": "it has expired",
    "CERTIFICATE_REVOKED": "it has been revoked",
    "UNKNOWN_CA": "another authority has signed it than the one that is trusted there",
    "CERTIFICATE_REQUIRED": "there is none; it wants client-cert.pem and client-key.pem",
    "BAD_CERTIFICATE": "it does not fit",
}


def why_tls_failed(error: ssl.SSLError, peer: str) -> str:
    """What went wrong between us and the peer ("server" or "client"), in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        why = _REFUSALS.get(error.verify_code, error.verify_message.rstrip("."))
        return f"the {peer}'s certificate is not trusted: {why}"
    if isinstance(error, ssl.SSLEOFError):
        return f"the {peer} hung up without a word, as some do that refuse a certificate"
    reason = error.reason or str(error)
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return f"the {peer} shows no certificate"
    for alert, why in _ALERTS.items():
        if reason.endswith(f"ALERT_{alert}"):
            return f"the {peer} refuses our certificate: {why}"
    return reason


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
