"""Throw-away certificates, in the directory layout that QEMU, libvirt, libnbd and nbdkit share:

    ca-cert.pem   server-cert.pem  server-key.pem   client-cert.pem  client-key.pem   [ca-crl.pem]

One such directory serves both ends of a connection: a server reads server-*, a client reads client-*.
The extensions are those that GnuTLS insists on in QEMU's sanity check: a CA may sign certificates, a leaf states its
purpose, and names are subject alternative names (RFC 9525: the common name is not looked at).
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")

_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Certificates:
    """Directories of one test run. All but `foreign` trust one CA: a client of one may meet a server of another."""

    good: Path
    expired: Path
    """Both leaves ended yesterday."""
    foreign: Path
    """Sound, but of another CA, and trusting only that."""
    stranger: Path
    """Trusts the CA of the others, but was certified by the foreign one."""
    wrong_host: Path
    """The server is called elsewhere.example, and nothing else."""
    revoked: Path
    """Its ca-crl.pem revokes its own client, and none of the others."""


def make_certificates(root: Path) -> Certificates:
    """Write every directory of `Certificates` below `root`."""
    authority = Authority("Test CA")
    certificates = Certificates(*(root / name for name in Certificates.__slots__))

    authority.issue_pair(certificates.good)
    authority.issue_pair(certificates.expired, expired=True)
    authority.issue_pair(certificates.wrong_host, hosts=("elsewhere.example",))

    foreign = Authority("Foreign CA")
    foreign.issue_pair(certificates.foreign)
    foreign.issue_pair(certificates.stranger, trusting=authority)

    client = authority.issue_pair(certificates.revoked)
    authority.revoke(client, certificates.revoked / "ca-crl.pem")
    return certificates


class Authority:
    """A certificate authority that lives as long as the object; only its certificate is ever written."""

    def __init__(self, name: str) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        usage = _key_usage(key_cert_sign=True, crl_sign=True)
        self._certificate = (
            self._builder(self._name, self._key.public_key(), expired=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(self._key, hashes.SHA256())
        )

    def issue_pair(
        self,
        directory: Path,
        *,
        hosts: Sequence[str] = LOCAL_NAMES,
        expired: bool = False,
        trusting: Authority | None = None,
    ) -> x509.Certificate:
        """Write a server's and a client's certificate and key, and the certificate of the CA they trust (this one).

        Returns:
            The client's certificate, for `revoke`.
        """
        directory.mkdir(parents=True)
        _write_certificate(directory / "ca-cert.pem", (trusting or self)._certificate)
        self._issue(directory, "server", ExtendedKeyUsageOID.SERVER_AUTH, hosts, expired)
        return self._issue(directory, "client", ExtendedKeyUsageOID.CLIENT_AUTH, (), expired)

    def revoke(self, certificate: x509.Certificate, path: Path) -> None:
        """Write a revocation list that names `certificate` alone."""
        now = _now()
        entry = x509.RevokedCertificateBuilder(certificate.serial_number, now - _DAY).build()
        crl = (
            x509.CertificateRevocationListBuilder(self._name, now - _DAY, now + _DAY)
            .add_revoked_certificate(entry)
            .add_extension(x509.CRLNumber(1), critical=False)
            .add_extension(self._authority_identifier(), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        path.write_bytes(crl.public_bytes(serialization.Encoding.PEM))

    def _issue(
        self, directory: Path, role: str, purpose: x509.ObjectIdentifier, hosts: Sequence[str], expired: bool
    ) -> x509.Certificate:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            self._builder(_name(f"Test {role}"), key.public_key(), expired=expired)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(self._authority_identifier(), critical=False)
        )
        if hosts:
            names = x509.SubjectAlternativeName([_alternative_name(host) for host in hosts])
            builder = builder.add_extension(names, critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        _write_certificate(directory / f"{role}-cert.pem", certificate)
        _write_key(directory / f"{role}-key.pem", key)
        return certificate

    def _builder(
        self, subject: x509.Name, public_key: ec.EllipticCurvePublicKey, *, expired: bool
    ) -> x509.CertificateBuilder:
        now = _now()
        return (
            x509.CertificateBuilder(self._name, subject, public_key, x509.random_serial_number())
            .not_valid_before(now - 2 * _DAY)
            .not_valid_after(now - _DAY if expired else now + _DAY)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        )

    def _authority_identifier(self) -> x509.AuthorityKeyIdentifier:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _alternative_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
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


def _write_certificate(path: Path, certificate: x509.Certificate) -> None:
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    path.touch(mode=0o600)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
