"""Reading certificates: PEM files of one or many, DER from a peer. Bounded; being readable proves nothing."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.utils import CryptographyDeprecationWarning

from oepy import dn
from oepy.errors import KeyFormatError, ParseError

MAX_CERTIFICATE = 16 * 1024  # bytes of one from a peer; real ones have 1 to 3 kB
MAX_FROM_PEER = 8  # certificates of one peer that are looked at
MAX_BUNDLE = 4 * 1024 * 1024  # bytes of a file of trust anchors; Debian's whole bundle has 220 kB

Certificate = x509.Certificate
_Kind = TypeVar("_Kind", bound=x509.ExtensionType)
_UNREADABLE = (ValueError, UnsupportedAlgorithm, x509.InvalidVersion, x509.DuplicateExtension)


def from_der(data: bytes) -> Certificate:
    """One that a peer sent. Raises ParseError."""
    if len(data) > MAX_CERTIFICATE:
        raise ParseError(f"a certificate of {len(data)} bytes is over the limit of {MAX_CERTIFICATE}")
    try:
        # What RFC 5280 forbids and the library only warns of is refused as well
        with warnings.catch_warnings(action="error", category=CryptographyDeprecationWarning):
            certificate = x509.load_der_x509_certificate(data)
            # Each is parsed when it is asked for: here, once, so that the rest need not expect that it fails
            certificate.extensions, certificate.subject, certificate.issuer, certificate.serial_number  # noqa: B018
            certificate.not_valid_before_utc, certificate.not_valid_after_utc  # noqa: B018
            certificate.public_key()
    except Exception as error:  # noqa: BLE001 - the library has no end of classes for what strangers make up
        raise ParseError(f"a certificate cannot be read: {_text_of(error)}") from None
    return certificate


def from_pem(data: bytes, source: str) -> list[Certificate]:
    """All of a PEM file, in its order; text between them is passed over. Raises KeyFormatError."""
    if len(data) > MAX_BUNDLE:
        raise KeyFormatError(f"{source} is over {MAX_BUNDLE} bytes", "is it a file of certificates?")
    try:
        return x509.load_pem_x509_certificates(data)
    except _UNREADABLE as error:
        raise KeyFormatError(
            f"{source} holds no certificate in PEM form ({_text_of(error)})",
            "it must have BEGIN CERTIFICATE lines; `openssl x509 -in FILE -noout -text` shows one",
        ) from None


def load(path: str) -> tuple[Certificate, ...]:
    """All of a file. Raises KeyFormatError."""
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_BUNDLE + 1)
    except OSError as error:
        raise KeyFormatError(
            f"{path}: {error.strerror}", "name a PEM file with one or more certificates"
        ) from None
    return tuple(from_pem(data, path))


def to_der(certificate: Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def key_hash(certificate: Certificate) -> bytes:
    """SHA-1 of the SubjectPublicKeyInfo, by which CERTREQ names a CA (RFC 7296 §3.7)."""
    spki = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha1(spki, usedforsecurity=False).digest()


def subject_of(certificate: Certificate) -> str:
    """For people: the subject as an IKE identity is written, else the first alternative name."""
    if certificate.subject.rdns:
        return dn.to_text(certificate.subject.public_bytes())
    names = alternative_names(certificate)
    return next((dn.printable(str(value)) for value in _values(names)), "(no subject)")


def find_extension(certificate: Certificate, kind: type[_Kind]) -> _Kind | None:
    """None where it has none."""
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def alternative_names(certificate: Certificate) -> x509.SubjectAlternativeName | None:
    return find_extension(certificate, x509.SubjectAlternativeName)


def is_ca(certificate: Certificate) -> bool:
    """By its basic constraints."""
    constraints = find_extension(certificate, x509.BasicConstraints)
    return constraints is not None and constraints.ca


def _values(names: x509.SubjectAlternativeName | None) -> Iterable[object]:
    for name in names or ():
        yield getattr(name, "value", name)


def _text_of(error: BaseException) -> str:
    return dn.printable(" ".join(str(error).split())[:160]) or type(error).__name__
