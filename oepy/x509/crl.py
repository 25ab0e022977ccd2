"""Revocation lists (RFC 5280 §5, 6.3), read once and kept small: what is asked of them afterwards takes
microseconds, however long they are.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509
from cryptography.x509.oid import ExtensionOID

from oepy.x509.certificates import Certificate, find_extension, is_ca, subject_of
from oepy.x509.revocation import SKEW, Standing, Status, Unusable, is_signed_by, reading

MAX_CRL = 20 * 1024 * 1024  # bytes; the largest of public CAs have some 10 MB
_HASH = 12  # bytes of the fingerprint of a serial number
_RECORD = _HASH + 4  # and when it was revoked, in seconds since 1970


@dataclass(frozen=True, slots=True)
class Crl:
    """One that its issuer signed. `until` in seconds since 1970; `records` are sorted."""

    issuer: Certificate
    until: float
    only_users: bool
    only_cas: bool
    points: tuple[str, ...]  # names of its distribution point, where it says one
    records: bytes

    def status(self, certificate: Certificate, now: float) -> Status:
        """Raises Unusable."""
        if certificate.issuer != self.issuer.subject:
            raise Unusable("it is another CA's list")
        if now > self.until:
            raise Unusable("it is out of date")
        authority = is_ca(certificate)
        if (self.only_users and authority) or (self.only_cas and not authority):
            raise Unusable("it is a list of other kinds of certificates")
        if self.points and not _points_of(certificate) & frozenset(self.points):
            raise Unusable("it is the list of another distribution point")
        revoked = self._revoked_at(certificate.serial_number)
        if revoked is None:
            return Status(Standing.GOOD, until=self.until)
        moment = datetime.fromtimestamp(revoked, UTC)
        text = f"{subject_of(certificate)} was revoked {moment:%Y-%m-%d %H:%M} UTC"
        return Status(Standing.REVOKED, text, self.until)

    def _revoked_at(self, serial: int) -> int | None:
        wanted, count = _fingerprint(serial), len(self.records) // _RECORD
        at = bisect.bisect_left(
            range(count), wanted, key=lambda index: self.records[index * _RECORD : index * _RECORD + _HASH]
        )
        record = self.records[at * _RECORD : (at + 1) * _RECORD]
        return int.from_bytes(record[_HASH:], "big") if record[:_HASH] == wanted else None

    def pack(self) -> bytes:
        """All but the issuer."""
        head = json.dumps([self.until, self.only_users, self.only_cas, self.points]).encode()
        return len(head).to_bytes(4, "big") + head + self.records

    @classmethod
    def unpack(cls, data: bytes, issuer: Certificate) -> Crl:
        size = int.from_bytes(data[:4], "big")
        until, only_users, only_cas, points = json.loads(data[4 : 4 + size])
        return cls(issuer, until, only_users, only_cas, tuple(points), data[4 + size :])


def _fingerprint(serial: int) -> bytes:
    return hashlib.blake2b(serial.to_bytes(32, "big", signed=True), digest_size=_HASH).digest()


def read_crl(data: bytes, issuer: Certificate, now: float) -> Crl:
    """DER or PEM. Time grows with the list: 2 µs an entry. Raises Unusable."""
    if len(data) > MAX_CRL:
        raise Unusable(f"a CRL of {len(data)} bytes is over the limit of {MAX_CRL}")
    with reading("a CRL"):
        return _read(data, issuer, now)


def _read(data: bytes, issuer: Certificate, now: float) -> Crl:
    is_pem = data.lstrip()[:5] == b"-----"
    crl = x509.load_pem_x509_crl(data) if is_pem else x509.load_der_x509_crl(data)
    last, following = crl.last_update_utc, crl.next_update_utc
    moment = datetime.fromtimestamp(now, UTC)
    if crl.issuer != issuer.subject:
        raise Unusable("it is another CA's list")
    if last > moment + SKEW:
        raise Unusable("it is from the future")
    if following is None or following < moment:
        raise Unusable("it is out of date" if following else "it does not say until when it holds")
    point: x509.IssuingDistributionPoint | None = None
    for extension in crl.extensions:
        if extension.oid == ExtensionOID.ISSUING_DISTRIBUTION_POINT:
            point = extension.value
        elif extension.critical:  # a delta CRL, for one
            raise Unusable(f"its critical extension {extension.oid.dotted_string} is not understood")
    if point is not None and (
        point.indirect_crl or point.only_some_reasons or point.only_contains_attribute_certs
    ):
        raise Unusable("it is a list of some reasons, or of other issuers' certificates")
    usage = find_extension(issuer, x509.KeyUsage)
    if usage is not None and not usage.crl_sign:
        raise Unusable(f"{subject_of(issuer)} may not sign lists (key usage)")
    if not is_signed_by(
        issuer.public_key(), crl.signature, crl.tbs_certlist_bytes, crl.signature_hash_algorithm
    ):
        raise Unusable(f"it is not signed by {subject_of(issuer)}")
    names = () if point is None else _names(point.full_name, point.relative_name, crl.issuer)
    return Crl(
        issuer,
        following.timestamp(),
        only_users=point is not None and point.only_contains_user_certs,
        only_cas=point is not None and point.only_contains_ca_certs,
        points=tuple(names),
        records=_records(crl),
    )


def _names(
    full: Iterable[x509.GeneralName] | None,
    relative: x509.RelativeDistinguishedName | None,
    issuer: x509.Name,
) -> list[str]:
    """A distribution point's, comparable: URLs as they are, all else with its kind."""
    found = []
    for name in full or ():
        if isinstance(name, x509.UniformResourceIdentifier):
            found.append(name.value)
        elif isinstance(name, x509.DirectoryName):
            found.append(f"dn:{name.value.public_bytes().hex()}")
        else:
            found.append(f"{type(name).__name__}:{name.value}")
    if relative is not None:
        found.append(f"dn:{x509.Name([*issuer.rdns, relative]).public_bytes().hex()}")
    return found


def _points_of(certificate: Certificate) -> frozenset[str]:
    """RFC 5280 §6.3.3 (b) (2) (i): of one that names none, the issuer's name."""
    points = find_extension(certificate, x509.CRLDistributionPoints)
    if points is None:
        return frozenset((f"dn:{certificate.issuer.public_bytes().hex()}",))
    return frozenset(
        name
        for point in points
        if not point.crl_issuer and not point.reasons
        for name in _names(point.full_name, point.relative_name, certificate.issuer)
    )


def _records(crl: x509.CertificateRevocationList) -> bytes:
    """All that are named, whatever the reason: a certificate on hold is none to rely on."""
    found = [
        _fingerprint(entry.serial_number)
        + max(0, min(int(entry.revocation_date_utc.timestamp()), 0xFFFFFFFF)).to_bytes(4, "big")
        for entry in crl
    ]
    return b"".join(sorted(found))
