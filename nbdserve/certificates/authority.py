"""The authority itself: keys, and X.509 certificates with the extensions that all of the field insists on.

RFC 5280: an authority may sign certificates (4.2.1.3, 4.2.1.9), a leaf states its purpose (4.2.1.12). Names are subject
alternative names: clients look at nothing else (RFC 9525). Keys are on the curve P-256, which every TLS library has.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeAlias

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nbdserve.certificates import CertificateError

Key: TypeAlias = ec.EllipticCurvePrivateKey
Certificate: TypeAlias = x509.Certificate

_AUTHORITY_LASTS = timedelta(days=3650)
_LEAF_LASTS = timedelta(days=825)
_LONGEST_COMMON_NAME = 64  # characters (RFC 5280, appendix A: ub-common-name)
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST_NAME = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*")


def check_host(host: str) -> None:
    """Raise CertificateError unless it is an address or the name of a host, in the letters that DNS knows."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if not _HOST_NAME.fullmatch(host):
            raise CertificateError(
                f"--host {host}: neither a host name nor an address; give it without a port"
            ) from None


def new_key() -> Key:
    """A key that nobody else has."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: Key) -> bytes:
    """A key as it is stored, without a passphrase."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def load_key(file: Path) -> Key:
    """A key that was stored; raises CertificateError if it is none of ours."""
    try:
        key = serialization.load_pem_private_key(file.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise CertificateError(
            f"{file}: not a private key without a passphrase; move it away to have one made"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateError(f"{file}: not a key of the kind made here (EC); move it away to have one made")
    return key


def pem(certificate: Certificate) -> bytes:
    """A certificate as it is stored."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def load_certificate(file: Path, key: Key) -> Certificate:
    """The certificate of a key; raises CertificateError if it is damaged or that of another one."""
    try:
        certificate = x509.load_pem_x509_certificate(file.read_bytes())
    except ValueError:
        raise CertificateError(f"{file}: not a certificate; move it away to have it made") from None
    if certificate.public_key() != key.public_key():
        raise CertificateError(f"{file}: does not belong to the key beside it; move both away to have them made")
    return certificate


class Authority:
    """Who signs."""

    def __init__(self, key: Key, certificate: Certificate) -> None:
        self._key = key
        self._certificate = certificate

    def pem(self) -> bytes:
        """The authority's certificate as it is stored."""
        return pem(self._certificate)

    @staticmethod
    def certify_itself(key: Key, begin: datetime) -> Certificate:
        """The certificate with which trust begins."""
        # Two authorities must not have one name: who looks for the signer of a certificate would try the wrong one.
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        name = _name(f"nbdserve authority {identifier.digest.hex()[:16]}")
        return (
            _builder(name, name, key, begin, _AUTHORITY_LASTS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
            .sign(key, hashes.SHA256())
        )

    def certify_server(self, key: Key, hosts: Sequence[str], begin: datetime) -> Certificate:
        """The certificate of a server that is reached by these names and addresses."""
        names = x509.SubjectAlternativeName([_alternative_name(host) for host in hosts])
        builder = self._leaf(key, hosts[0][:_LONGEST_COMMON_NAME], ExtendedKeyUsageOID.SERVER_AUTH, begin)
        return builder.add_extension(names, critical=False).sign(self._key, hashes.SHA256())

    def certify_client(self, key: Key, name: str, begin: datetime) -> Certificate:
        """The certificate of a client."""
        return self._leaf(key, name, ExtendedKeyUsageOID.CLIENT_AUTH, begin).sign(self._key, hashes.SHA256())

    @staticmethod
    def check_server(certificate: Certificate, hosts: Sequence[str], file: Path) -> None:
        """Raise CertificateError if a server's certificate, which may be an older one, lacks one of the hosts."""
        try:
            names = list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
        except x509.ExtensionNotFound:
            names = []
        if missing := [host for host in hosts if _alternative_name(host) not in names]:
            raise CertificateError(
                f"{file}: exists, and is not for {missing[0]}; move it away (not the key) to have a new one made"
            )

    def _leaf(self, key: Key, name: str, purpose: x509.ObjectIdentifier, begin: datetime) -> x509.CertificateBuilder:
        signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            _builder(self._certificate.subject, _name(name), key, begin, _LEAF_LASTS)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(signer, critical=False)
        )


def _builder(
    issuer: x509.Name, subject: x509.Name, key: Key, begin: datetime, lasts: timedelta
) -> x509.CertificateBuilder:
    public_key = key.public_key()
    return (
        x509.CertificateBuilder(issuer, subject, public_key, x509.random_serial_number())
        .not_valid_before(begin - timedelta(hours=1))  # clocks of other machines may be slow
        .not_valid_after(begin + lasts)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _alternative_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
