"""Certificates of a site that exists in tests only, valid around NOW."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509 import ocsp
from cryptography.x509.oid import AuthorityInformationAccessOID, NameOID

NOW = 1_790_000_000
DAY = datetime.timedelta(days=1)
MOMENT = datetime.datetime.fromtimestamp(NOW, datetime.UTC)
DNS, MAIL, IP = x509.DNSName, x509.RFC822Name, x509.IPAddress


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)] if text else [])


class Holder:
    """A key with its certificate, around `moment`. `issuer` None makes a root."""

    def __init__(
        self,
        subject: str,
        issuer: Holder | None = None,
        *,
        ca: bool = True,
        alternatives: Sequence[x509.GeneralName] = (),
        extensions: Sequence[tuple[x509.ExtensionType, bool]] = (),
        path_length: int | None = None,
        start: int = -1,
        end: int = 30,
        key: Any = None,
        digest: hashes.HashAlgorithm | None = None,
        issuer_name: str | None = None,
        moment: datetime.datetime = MOMENT,
        serial: int = 0,
    ) -> None:
        self.key = key or ec.generate_private_key(ec.SECP256R1())
        self.name = name(subject)
        signer = issuer or self
        builder = (
            x509.CertificateBuilder()
            .subject_name(self.name)
            .issuer_name(signer.name if issuer_name is None else name(issuer_name))
            .public_key(self.key.public_key())
            .serial_number(serial or x509.random_serial_number())
            .not_valid_before(moment + start * DAY)
            .not_valid_after(moment + end * DAY)
        )
        if ca:
            builder = builder.add_extension(x509.BasicConstraints(True, path_length), critical=True)
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=not subject)
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        algorithm = None if isinstance(signer.key, ed25519.Ed25519PrivateKey) else digest or hashes.SHA256()
        self.certificate = builder.sign(signer.key, algorithm)


def usage(**allowed: bool) -> x509.KeyUsage:
    names = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
    )
    names += ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**dict.fromkeys(names, False) | allowed)


def pem(*holders: Holder) -> bytes:
    return b"".join(one.certificate.public_bytes(serialization.Encoding.PEM) for one in holders)


def points(*urls: str) -> tuple[x509.ExtensionType, bool]:
    """Where the CRL of a certificate is."""
    names = [x509.UniformResourceIdentifier(url) for url in urls]
    return x509.CRLDistributionPoints([x509.DistributionPoint(names, None, None, None)]), False


def responder(*urls: str) -> tuple[x509.ExtensionType, bool]:
    """Where OCSP is asked about a certificate."""
    return x509.AuthorityInformationAccess(
        [
            x509.AccessDescription(AuthorityInformationAccessOID.OCSP, x509.UniformResourceIdentifier(url))
            for url in urls
        ]
    ), False


def revocation_list(
    issuer: Holder,
    *revoked: Holder,
    start: int = -1,
    end: int = 1,
    extensions: Sequence[tuple[x509.ExtensionType, bool]] = (),
    key: Any = None,
    digest: hashes.HashAlgorithm | None = None,
    moment: datetime.datetime = MOMENT,
) -> bytes:
    """DER."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.name)
        .last_update(moment + start * DAY)
        .next_update(moment + end * DAY)
    )
    for one in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(one.certificate.serial_number)
        entry = entry.revocation_date(moment - DAY)
        builder = builder.add_revoked_certificate(
            entry.add_extension(x509.CRLReason(x509.ReasonFlags.key_compromise), False).build()
        )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    key = key or issuer.key
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else digest or hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.DER)


def ocsp_response(
    about: Holder,
    issuer: Holder,
    status: ocsp.OCSPCertStatus = ocsp.OCSPCertStatus.GOOD,
    *,
    signer: Holder | None = None,
    attach: bool = True,
    start: int = -1,
    end: int | None = 1,
    named: bool = True,
    digest: hashes.HashAlgorithm | None = hashes.SHA256(),  # noqa: B008 - immutable
) -> bytes:
    """DER. `signer`: a responder of its own, whose certificate goes along (`attach`); not `named`: by its key."""
    is_revoked = status is ocsp.OCSPCertStatus.REVOKED
    who = signer or issuer
    encoding = ocsp.OCSPResponderEncoding.NAME if named else ocsp.OCSPResponderEncoding.HASH
    builder = (
        ocsp.OCSPResponseBuilder()
        .add_response(
            cert=about.certificate,
            issuer=issuer.certificate,
            algorithm=hashes.SHA1(),
            cert_status=status,
            this_update=MOMENT + start * DAY,
            next_update=None if end is None else MOMENT + end * DAY,
            revocation_time=MOMENT - DAY if is_revoked else None,
            revocation_reason=None,
        )
        .responder_id(encoding, who.certificate)
    )
    if signer is not None and attach:
        builder = builder.certificates([signer.certificate])
    return builder.sign(who.key, digest).public_bytes(serialization.Encoding.DER)
