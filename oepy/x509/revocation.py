"""Who may know whether a certificate is revoked, and what an OCSP response (RFC 6960) says of it; `crl` has lists.
What is not signed by the issuer or by whom it names, is out of its time, or has critical parts that are not
understood, says nothing.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa
from cryptography.x509 import ocsp
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID

from oepy.x509.certificates import Certificate, find_extension, subject_of
from oepy.x509.path import out_of_time

MAX_OCSP = 64 * 1024
MAX_URLS = 4  # of one kind that are looked at in a certificate
MAX_URL = 1024
MAX_RESPONDERS = 4  # certificates in a response that are tried
SKEW = timedelta(minutes=5)
WITHOUT_END = timedelta(hours=1)  # how old a response without nextUpdate may be (RFC 6960 §4.2.2.1)


class Standing(enum.Enum):
    GOOD = "good"
    REVOKED = "revoked"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Status:
    """`until`: for how long it may be repeated, in seconds since 1970."""

    standing: Standing
    text: str = ""
    until: float = 0.0


class Unusable(Exception):
    """This says nothing about the certificate; the text says why."""


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever the library finds wrong, it finds when a field is asked for, and has no end of classes for it."""
    try:
        yield
    except Unusable:
        raise
    except Exception as error:  # noqa: BLE001
        raise Unusable(f"it cannot be read as {what} ({' '.join(str(error).split())[:120]})") from None


# ---- where to ask ------------------------------------------------------------------------------------------


def crl_urls(certificate: Certificate) -> tuple[str, ...]:
    """RFC 5280 §4.2.1.13. Only points that are whole: of all reasons and by the issuer itself."""
    names = (
        name.value
        for point in find_extension(certificate, x509.CRLDistributionPoints) or ()
        if point.full_name and not point.reasons and not point.crl_issuer
        for name in point.full_name
        if isinstance(name, x509.UniformResourceIdentifier)
    )
    return _fetchable(names, ("http", "ldap"))


def ocsp_urls(certificate: Certificate) -> tuple[str, ...]:
    """RFC 5280 §4.2.2.1."""
    names = (
        entry.access_location.value
        for entry in find_extension(certificate, x509.AuthorityInformationAccess) or ()
        if entry.access_method == AuthorityInformationAccessOID.OCSP
        and isinstance(entry.access_location, x509.UniformResourceIdentifier)
    )
    return _fetchable(names, ("http",))


def _fetchable(urls: Iterable[str], schemes: tuple[str, ...]) -> tuple[str, ...]:
    """What a certificate names is never read from this host's files, and never fetched by https: whether that
    server's certificate is revoked would be asked first (RFC 5280 §8)."""
    found = []
    for url in urls:
        try:
            parts = urlsplit(url)
            usable = parts.scheme.lower() in schemes and parts.hostname and len(url) <= MAX_URL
        except ValueError:
            continue
        if usable and url.isascii() and url.isprintable():
            found.append(url)
    return tuple(dict.fromkeys(found))[:MAX_URLS]


# ---- signatures --------------------------------------------------------------------------------------------


def is_signed_by(key: object, signature: bytes, data: bytes, algorithm: hashes.HashAlgorithm | None) -> bool:
    if algorithm is not None and algorithm.name in ("md5", "sha1"):
        raise Unusable(f"it is signed over {algorithm.name.upper()}, which can be forged")
    try:
        if isinstance(key, rsa.RSAPublicKey) and algorithm is not None:
            key.verify(signature, data, padding.PKCS1v15(), algorithm)
        elif isinstance(key, ec.EllipticCurvePublicKey) and algorithm is not None:
            key.verify(signature, data, ec.ECDSA(algorithm))
        elif isinstance(key, ed25519.Ed25519PublicKey | ed448.Ed448PublicKey):
            key.verify(signature, data)
        else:
            return False
    except InvalidSignature:
        return False
    return True


# ---- OCSP --------------------------------------------------------------------------------------------------


def ocsp_request(certificate: Certificate, issuer: Certificate) -> bytes:
    """Without a nonce, so that responders may answer from what they have signed before (RFC 5019)."""
    builder = ocsp.OCSPRequestBuilder().add_certificate(
        certificate,
        issuer,
        hashes.SHA1(),  # noqa: S303 - names the issuer, and protects nothing (RFC 5019 §2.1.1)
    )
    return builder.build().public_bytes(serialization.Encoding.DER)


def read_ocsp(data: bytes, certificate: Certificate, issuer: Certificate, now: float) -> Status:
    """Raises Unusable."""
    if len(data) > MAX_OCSP:
        raise Unusable(f"an OCSP response of {len(data)} bytes is over the limit of {MAX_OCSP}")
    with reading("an OCSP response"):
        return _read_ocsp(data, certificate, issuer, now)


def _read_ocsp(data: bytes, certificate: Certificate, issuer: Certificate, now: float) -> Status:
    response = ocsp.load_der_ocsp_response(data)
    if response.response_status is not ocsp.OCSPResponseStatus.SUCCESSFUL:
        raise Unusable(f"the responder says {response.response_status.name}")
    signers = list(response.certificates)[:MAX_RESPONDERS]
    critical = [extension.oid.dotted_string for extension in response.extensions if extension.critical]
    if critical:
        raise Unusable(f"its critical extension {critical[0]} is not understood")
    answer = next((one for one in response.responses if _is_about(one, certificate, issuer)), None)
    if answer is None:
        raise Unusable("it is about another certificate")
    moment = datetime.fromtimestamp(now, UTC)
    named = response.responder_name, response.responder_key_hash
    responder = _responder([issuer, *signers], issuer, *named, moment)
    algorithm = response.signature_hash_algorithm
    if not is_signed_by(responder.public_key(), response.signature, response.tbs_response_bytes, algorithm):
        raise Unusable(f"it is not signed by {subject_of(responder)}")
    until = answer.next_update_utc or answer.this_update_utc + WITHOUT_END
    if answer.this_update_utc > moment + SKEW:
        raise Unusable("it is from the future")
    if until < moment:
        raise Unusable("it is out of date")
    if answer.certificate_status is ocsp.OCSPCertStatus.GOOD:
        return Status(Standing.GOOD, until=until.timestamp())
    if answer.certificate_status is ocsp.OCSPCertStatus.REVOKED:
        text = f"{subject_of(certificate)} was revoked"
        if answer.revocation_time_utc is not None:
            text += f" {answer.revocation_time_utc:%Y-%m-%d %H:%M} UTC"
        return Status(Standing.REVOKED, text, until.timestamp())
    raise Unusable("the responder does not know this certificate")


def _is_about(answer: ocsp.OCSPSingleResponse, certificate: Certificate, issuer: Certificate) -> bool:
    try:
        digest = answer.hash_algorithm
        if digest.name not in ("sha1", "sha256", "sha384", "sha512"):
            return False
        asked = ocsp.OCSPRequestBuilder().add_certificate(certificate, issuer, digest).build()
    except (UnsupportedAlgorithm, ValueError):
        return False
    return (answer.serial_number, answer.issuer_name_hash, answer.issuer_key_hash) == (
        asked.serial_number,
        asked.issuer_name_hash,
        asked.issuer_key_hash,
    )


def _key_hash(certificate: Certificate) -> bytes:
    """SHA-1 of the key's bits alone (RFC 6960 §4.2.2.3), which is also method 1 of RFC 5280 §4.2.1.2."""
    return x509.SubjectKeyIdentifier.from_public_key(certificate.public_key()).digest


def _responder(
    candidates: Sequence[Certificate],
    issuer: Certificate,
    named: x509.Name | None,
    hashed: bytes | None,
    moment: datetime,
) -> Certificate:
    """Who signed: the CA itself, or somebody with a certificate of the CA for just that (RFC 6960 §4.2.2.2)."""
    for candidate in candidates:
        if named is not None and candidate.subject != named:
            continue
        if hashed is not None and _key_hash(candidate) != hashed:
            continue
        if candidate == issuer:
            return issuer
        reason = _unfit_responder(candidate, issuer, moment)
        if reason:
            raise Unusable(f"{subject_of(candidate)}, who signs it, may not: {reason}")
        return candidate
    raise Unusable("nobody knows who signs it")


def _unfit_responder(candidate: Certificate, issuer: Certificate, moment: datetime) -> str:
    if ExtendedKeyUsageOID.OCSP_SIGNING not in (find_extension(candidate, x509.ExtendedKeyUsage) or ()):
        return "its certificate is not for OCSP"
    reason = out_of_time(candidate, moment)
    if reason:
        return reason
    try:
        candidate.verify_directly_issued_by(issuer)
    except (InvalidSignature, ValueError, TypeError, UnsupportedAlgorithm):
        return f"its certificate is not by {subject_of(issuer)}"
    return ""


def read_any(
    responses: Sequence[bytes], certificate: Certificate, issuer: Certificate, now: float
) -> Status | None:
    """The first of several OCSP responses, as a peer sends them, that says something."""
    for data in responses[:MAX_RESPONDERS]:
        try:
            return read_ocsp(data, certificate, issuer, now)
        except Unusable:
            continue
    return None


__all__ = [
    "MAX_OCSP",
    "SKEW",
    "Standing",
    "Status",
    "Unusable",
    "crl_urls",
    "is_signed_by",
    "ocsp_request",
    "ocsp_urls",
    "read_any",
    "read_ocsp",
    "reading",
]
