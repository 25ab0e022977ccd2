"""Certificates of a site that exists in tests only, valid around NOW."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

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
    ) -> None:
        self.key = key or ec.generate_private_key(ec.SECP256R1())
        self.name = name(subject)
        signer = issuer or self
        builder = (
            x509.CertificateBuilder()
            .subject_name(self.name)
            .issuer_name(signer.name if issuer_name is None else name(issuer_name))
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
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
