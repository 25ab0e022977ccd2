"""What a small site's CA signs (RFC 5280, profile of RFC 4945): certificates, its own and those of hosts, requests
(RFC 2986), lists. Without IO: time and serial numbers are given. Times in seconds since 1970."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID

from oepy import dn
from oepy.errors import UsageError
from oepy.keys import HostKey
from oepy.model import IdType, PeerIdentity
from oepy.x509.certificates import Certificate, is_ca
from oepy.x509.identity import of_general_name
from oepy.x509.path import IPSEC_IKE

BACKDATED = timedelta(minutes=5)  # for peers whose clocks are behind
SERIAL_BYTES = 16  # of chance; RFC 5280 §4.1.2.2 allows 20
_USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)
REASONS = ("unspecified", "keyCompromise", "affiliationChanged", "superseded", "cessationOfOperation")


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom a certificate is for; `name` is DER and may be empty, `names` go into subjectAltName."""

    name: bytes
    names: tuple[PeerIdentity, ...]
    key: CertificatePublicKeyTypes


@dataclass(frozen=True, slots=True)
class Places:
    """Where peers learn whether a certificate is revoked."""

    crl_uris: tuple[str, ...] = ()
    ocsp_uris: tuple[str, ...] = ()


def to_name(der: bytes) -> x509.Name:
    """Raises UsageError where a value is out of its bounds."""
    try:
        return x509.Name(
            [
                x509.RelativeDistinguishedName(
                    [x509.NameAttribute(x509.ObjectIdentifier(oid), value) for oid, value in relative]
                )
                for relative in dn.read(der)
            ]
        )
    except ValueError as error:
        raise UsageError(f"{dn.to_text(der)}: {error}") from None


def subject(name: str, names: Iterable[str], key: Any) -> Subject:
    """From text. Raises UsageError."""
    try:
        der = dn.parse(name) if name else b"\x30\x00"
        identities = tuple(PeerIdentity.parse(text) for text in names)
    except (ValueError, UnicodeEncodeError) as error:
        raise UsageError(str(error)) from None
    if not name and not identities:
        raise UsageError("a certificate needs a name", "give --dn, --san or both")
    if any(one.type is IdType.DER_ASN1_DN for one in identities):
        raise UsageError("a distinguished name is the subject", "give it with --dn")
    return Subject(der, identities, key)


def _general(identity: PeerIdentity) -> x509.GeneralName:
    address = identity.as_address()
    if address is not None:
        return x509.IPAddress(address)
    kind = x509.RFC822Name if identity.type is IdType.RFC822_ADDR else x509.DNSName
    return kind(str(identity))


def _alternatives(wanted: Subject) -> list[tuple[x509.ExtensionType, bool]]:
    if not wanted.names:
        return []
    names = x509.SubjectAlternativeName([_general(identity) for identity in wanted.names])
    return [(names, not dn.read(wanted.name))]  # RFC 5280 §4.2.1.6: critical where there is no subject


def _algorithm(key: HostKey) -> Any:
    private = key.private
    if isinstance(private, ec.EllipticCurvePrivateKey):
        return hashes.SHA384() if private.key_size > 256 else hashes.SHA256()
    return hashes.SHA256() if hasattr(private, "decrypt") else None  # EdDSA hashes by itself


def _usage(*allowed: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{name: name in allowed for name in _USAGES})


def _places(places: Places) -> list[tuple[x509.ExtensionType, bool]]:
    found: list[tuple[x509.ExtensionType, bool]] = []
    if places.crl_uris:
        names = [x509.UniformResourceIdentifier(url) for url in places.crl_uris]
        found.append((x509.CRLDistributionPoints([x509.DistributionPoint(names, None, None, None)]), False))
    if places.ocsp_uris:
        method = AuthorityInformationAccessOID.OCSP
        entries = [
            x509.AccessDescription(method, x509.UniformResourceIdentifier(url)) for url in places.ocsp_uris
        ]
        found.append((x509.AuthorityInformationAccess(entries), False))
    return found


def _signed(
    wanted: Subject,
    issuer: x509.Name,
    issuer_key: HostKey,
    serial: int,
    now: float,
    end: datetime,
    extensions: Sequence[tuple[x509.ExtensionType, bool]],
) -> Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(to_name(wanted.name))
        .issuer_name(issuer)
        .public_key(wanted.key)
        .serial_number(serial)
        .not_valid_before((datetime.fromtimestamp(now, UTC) - BACKDATED).replace(microsecond=0))
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(wanted.key), critical=False)
    )
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.private.public_key())
    builder = builder.add_extension(authority, critical=False)
    for extension, critical in (*extensions, *_alternatives(wanted)):
        builder = builder.add_extension(extension, critical)
    return builder.sign(issuer_key.private, _algorithm(issuer_key))


def serial_from(random: bytes) -> int:
    """Of SERIAL_BYTES random bytes; never 0."""
    return int.from_bytes(random[:SERIAL_BYTES], "big") | 1


def _end(now: float, days: int, issuer: Certificate | None) -> datetime:
    end = (datetime.fromtimestamp(now, UTC) + timedelta(days=days)).replace(microsecond=0)
    return end if issuer is None else min(end, issuer.not_valid_after_utc)


def make_ca(
    name: str,
    key: HostKey,
    *,
    serial: int,
    now: float,
    days: int,
    path_length: int | None = None,
    issuer: tuple[Certificate, HostKey] | None = None,
    places: Places = Places(),
) -> Certificate:
    """A root, or a CA below `issuer`. Raises UsageError."""
    wanted = subject(name, (), key.private.public_key())
    if issuer is not None:
        _must_be_ca(issuer[0])
    extensions = [
        (x509.BasicConstraints(ca=True, path_length=path_length), True),
        (_usage("key_cert_sign", "crl_sign"), True),
        *(_places(places) if issuer is not None else ()),
    ]
    above = to_name(wanted.name) if issuer is None else issuer[0].subject
    end = _end(now, days, None if issuer is None else issuer[0])
    return _signed(wanted, above, key if issuer is None else issuer[1], serial, now, end, extensions)


def _must_be_ca(certificate: Certificate) -> None:
    if not is_ca(certificate):
        raise UsageError(f"{dn.to_text(certificate.subject.public_bytes())} is no CA")


def issue(
    wanted: Subject,
    ca: Certificate,
    ca_key: HostKey,
    *,
    serial: int,
    now: float,
    days: int,
    places: Places = Places(),
) -> Certificate:
    """For a host: good for IKE with oepy, strongSwan, libreswan and OpenIKED. It never outlives its CA."""
    if now > ca.not_valid_after_utc.timestamp():
        raise UsageError("the CA has expired", "make a new one with `oepy pki ca`")
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH, IPSEC_IKE]
    extensions = [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage("digital_signature"), True),
        (x509.ExtendedKeyUsage(purposes), False),
        *_places(places),
    ]
    return _signed(wanted, ca.subject, ca_key, serial, now, _end(now, days, ca), extensions)


def make_request(name: str, names: Iterable[str], key: HostKey) -> x509.CertificateSigningRequest:
    """Raises UsageError."""
    wanted = subject(name, names, key.private.public_key())
    builder = x509.CertificateSigningRequestBuilder().subject_name(to_name(wanted.name))
    for extension, critical in _alternatives(wanted):
        builder = builder.add_extension(extension, critical)
    return builder.sign(key.private, _algorithm(key))


def read_request(pem: bytes, source: str) -> Subject:
    """Of a request that is signed by the key that it is for. What it asks for beside names is left out: the CA says
    what its certificates are good for. Raises UsageError."""
    try:
        request = x509.load_pem_x509_csr(pem)
        proven = request.is_signature_valid
        names: list[PeerIdentity] = []
        for extension in request.extensions:
            if isinstance(extension.value, x509.SubjectAlternativeName):
                names += [_identity(name) for name in extension.value]
        found = Subject(request.subject.public_bytes(), tuple(names), request.public_key())
    except UsageError:
        raise
    except Exception as error:  # noqa: BLE001 - the library has no end of classes for what strangers make up
        text = " ".join(str(error).split())[:160]
        raise UsageError(f"{source} holds no certificate request in PEM form ({text})") from None
    if not proven:
        raise UsageError(f"{source} is not signed by its own key", "make it again with `oepy pki request`")
    return found


def _identity(name: x509.GeneralName) -> PeerIdentity:
    identity = of_general_name(name)
    if identity is None:
        raise UsageError(f"alternative names of the kind {type(name).__name__} are not issued")
    return identity


def make_crl(
    ca: Certificate,
    ca_key: HostKey,
    revoked: Iterable[tuple[int, float, str]],
    *,
    number: int,
    now: float,
    days: int,
) -> x509.CertificateRevocationList:
    """`revoked`: serial number, when, and why (one of REASONS)."""
    moment = datetime.fromtimestamp(now, UTC).replace(microsecond=0)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(ca.subject)
        .last_update(moment - BACKDATED)
        .next_update(moment + timedelta(days=days))
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.private.public_key()), critical=False
        )
    )
    for serial, when, reason in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial)
        entry = entry.revocation_date(datetime.fromtimestamp(when, UTC).replace(microsecond=0))
        if reason != "unspecified":  # RFC 5280 §5.3.1: then the extension is left out
            entry = entry.add_extension(x509.CRLReason(x509.ReasonFlags(reason)), critical=False)
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(ca_key.private, _algorithm(ca_key))


__all__ = [
    "REASONS",
    "Places",
    "Subject",
    "issue",
    "make_ca",
    "make_crl",
    "make_request",
    "read_request",
    "serial_from",
    "subject",
]
