"""Verifying one RRset with the keys of one zone (RFC 4034 §3.1.8, RFC 4035 §5.3, RFC 6840).

Clock skew: an expired signature is expired. A signature whose inception lies up to `MAX_CLOCK_LAG` seconds
ahead is accepted, since a host whose clock runs a little late would else lose every freshly signed zone.
"""

from __future__ import annotations

import datetime
import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass

import dns.dnssecalgs
import dns.exception
import dns.name
import dns.rdata
import dns.rdataclass
import dns.rdtypes.ANY.DNSKEY
import dns.rdtypes.ANY.DS
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from dns.dnssecalgs.base import GenericPublicKey

from oepy.dns.limits import MAX_KEYS_PER_ZONE, MAX_SIGNATURES_PER_SET, Budget
from oepy.dns.message import NameKey, RRset, Signature, labels_wire, name_key
from oepy.errors import KeyFormatError, ParseError
from oepy.keys import parse_rsa

Dnskey = dns.rdtypes.ANY.DNSKEY.DNSKEY
Ds = dns.rdtypes.ANY.DS.DS

MAX_CLOCK_LAG = 300
RSA_ALGORITHMS = frozenset({5, 7, 8, 10})
DIGESTS = {1: hashlib.sha1, 2: hashlib.sha256, 4: hashlib.sha384}
ALGORITHM_NAMES = {
    5: "RSASHA1",
    7: "RSASHA1NSEC3SHA1",
    8: "RSASHA256",
    10: "RSASHA512",
    13: "ECDSAP256SHA256",
    14: "ECDSAP384SHA384",
    15: "ED25519",
    16: "ED448",
}
_FLAG_ZONE = 0x0100
REVOKE = 0x0080  # RFC 5011 §2.1: good for nothing any more
_SERIAL_HALF = 1 << 31
_IN = int(dns.rdataclass.IN)
_RECORD_HEAD = struct.Struct("!HHI")  # type, class, TTL


@dataclass(frozen=True, slots=True)
class Policy:
    """The algorithms and DS digests that protect. A zone that has nothing else is insecure."""

    algorithms: frozenset[int]
    digests: frozenset[int]


# RFC 9905: SHA-1, in signatures as in digests, counts as no protection. The same goes for MD5, DSA and GOST.
STRICT = Policy(frozenset({8, 10, 13, 14, 15, 16}), frozenset({2, 4}))
WITH_SHA1 = Policy(STRICT.algorithms | {5, 7}, STRICT.digests | {1})


class SignatureFailure(Exception):
    """No signature of the RRset holds. The text names the RRset and why."""


@dataclass(frozen=True, slots=True)
class ZoneKey:
    """A DNSKEY that may sign data, with the library's key object made once."""

    dnskey: Dnskey
    tag: int
    public: GenericPublicKey


@dataclass(frozen=True, slots=True)
class Verified:
    """`ttl` is capped by the original TTL and the expiry (RFC 4035 §5.3.3). `closest_encloser` is set where
    the RRset was made from a wildcard: whoever uses it must demand the proof that no closer name exists."""

    signer: dns.name.Name
    ttl: int
    tag: int
    closest_encloser: dns.name.Name | None = None


def is_supported(ds: Ds, policy: Policy) -> bool:
    return int(ds.algorithm) in policy.algorithms and int(ds.digest_type) in policy.digests


def strongest(digests: Iterable[Ds], policy: Policy) -> tuple[Ds, ...]:
    """The supported ones, and of each key's only those with its strongest digest: RFC 4509 §3 for SHA-1, and
    for SHA-256 beside SHA-384 by the same reasoning, or a broken digest would take the better one's place."""
    supported = [ds for ds in digests if is_supported(ds, policy)]
    best: dict[tuple[int, int], int] = {}
    for ds in supported:
        key = (ds.key_tag, int(ds.algorithm))
        best[key] = max(best.get(key, 0), int(ds.digest_type))
    return tuple(ds for ds in supported if int(ds.digest_type) == best[ds.key_tag, int(ds.algorithm)])


def usable_keys(
    rdatas: Iterable[dns.rdata.Rdata], policy: Policy, *, revoked: bool = False
) -> tuple[ZoneKey, ...]:
    """The keys that may sign zone data: ZONE flag, protocol 3, not revoked, an algorithm that the policy trusts.
    `revoked`: those that are revoked, and may sign nothing but their revocation."""
    found = []
    for rdata in list(rdatas)[:MAX_KEYS_PER_ZONE]:
        if not isinstance(rdata, Dnskey) or int(rdata.algorithm) not in policy.algorithms:
            continue
        flags = int(rdata.flags)
        if not flags & _FLAG_ZONE or bool(flags & REVOKE) is not revoked or rdata.protocol != 3:
            continue
        public = _public(rdata)
        if public is not None:
            found.append(ZoneKey(rdata, rdata.key_id(), public))
    return tuple(found)


def _public(key: Dnskey) -> GenericPublicKey | None:
    try:
        if int(key.algorithm) in RSA_ALGORITHMS:
            parse_rsa(key.key)  # a giant exponent would make each check dear
        return dns.dnssecalgs.get_algorithm_cls_from_dnskey(key).public_cls.from_dnskey(key)
    except (ValueError, ParseError, KeyFormatError, UnsupportedAlgorithm, dns.exception.DNSException):
        return None


def matches_ds(key: ZoneKey, zone: dns.name.Name, ds: Ds) -> bool:
    """Whether the DS names this key; its digest type must be supported."""
    return (
        key.tag == ds.key_tag and key.dnskey.algorithm == ds.algorithm and digest_fits(key.dnskey, zone, ds)
    )


def digest_fits(key: Dnskey, zone: dns.name.Name, ds: Ds) -> bool:
    """RFC 4034 §5.1.4: digest over the canonical owner name and the DNSKEY rdata."""
    data = zone.canonicalize().to_wire() or b""
    return DIGESTS[int(ds.digest_type)](data + (key.to_wire() or b"")).digest() == ds.digest


def check_time(signature: Signature, now: int) -> str:
    """Why the signature does not hold at `now` (seconds since 1970), or an empty text. The fields are
    serial numbers of 32 bits (RFC 4034 §3.1.5)."""
    if _serial_less(signature.expiration, now):
        return f"expired at {_date(signature.expiration)}"
    if _serial_less(now + MAX_CLOCK_LAG, signature.inception):
        return f"is not valid before {_date(signature.inception)}"
    if _serial_less(signature.expiration, signature.inception):
        return "expires before it begins"
    return ""


def _serial_less(left: int, right: int) -> bool:
    difference = (right - left) & 0xFFFFFFFF
    return 0 < difference < _SERIAL_HALF


def _date(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def verify(rrset: RRset, zone: dns.name.Name, keys: Iterable[ZoneKey], now: int, budget: Budget) -> Verified:
    """Verify with any signature by `zone` and any of `keys`.

    Raises SignatureFailure where none holds, LimitExceeded where that took too much.
    """
    reasons: list[str] = []
    keys = tuple(keys)
    wires: list[bytes] = []
    if not rrset.signatures:
        raise SignatureFailure(f"{rrset} has no signature, though {zone} is signed")
    for signature in rrset.signatures[:MAX_SIGNATURES_PER_SET]:
        reason = _check_form(rrset, signature, zone) or check_time(signature, now)
        candidates = [
            key
            for key in keys
            if key.tag == signature.key_tag and key.dnskey.algorithm == signature.algorithm
        ]
        if not reason and not candidates:
            reason = f"is by key {signature.key_tag}, which {zone} does not have"
        if not reason:
            wires = wires or canonical(rrset)
            data = signed_data(rrset, signature, wires)
            if any(_holds(key, signature, data, budget) for key in candidates):
                return _verified(rrset, signature, now)
            reason = "does not fit the records (they were changed, or signed with another key)"
        reasons.append(f"the signature by {signature.signer} key {signature.key_tag} {reason}")
    raise SignatureFailure(f"{rrset}: {'; '.join(dict.fromkeys(reasons))}")


def _check_form(rrset: RRset, signature: Signature, zone: dns.name.Name) -> str:
    if signature.signer != zone:
        return f"is not by {zone}"
    if not rrset.name.is_subdomain(zone):
        return "is by a zone that does not hold this name"
    if signature.labels > _label_count(rrset.name):
        return "counts more labels than the name has"
    if signature.labels < len(zone.labels) - 1:
        return "is of a wildcard above its own zone"
    return ""


def _label_count(name: dns.name.Name) -> int:
    """RFC 4034 §3.1.3: neither the root nor a leftmost asterisk counts."""
    return len(name.labels) - 1 - (1 if name.labels[0] == b"*" else 0)


def _holds(key: ZoneKey, signature: Signature, data: bytes, budget: Budget) -> bool:
    budget.spend_signature()
    try:
        key.public.verify(signature.signature, data)
    except (InvalidSignature, ValueError, UnsupportedAlgorithm):
        budget.spend_failure()
        return False
    return True


def _verified(rrset: RRset, signature: Signature, now: int) -> Verified:
    remaining = (signature.expiration - now) & 0xFFFFFFFF
    ttl = min(rrset.ttl, signature.original_ttl, remaining)
    encloser = None
    if signature.labels < _label_count(rrset.name):
        encloser = dns.name.Name(rrset.name.labels[-(signature.labels + 1) :])
    return Verified(signature.signer, ttl, signature.key_tag, encloser)


def canonical(rrset: RRset) -> list[bytes]:
    """The data of the records in canonical form (RFC 4034 §6.2) and order (§6.3)."""
    if len(rrset.rdatas) == 1:
        return [rrset.rdatas[0].to_digestable()]
    return sorted({rdata.to_digestable() for rdata in rrset.rdatas})


def signed_data(rrset: RRset, signature: Signature, wires: list[bytes]) -> bytes:
    """What was signed: RFC 4034 §3.1.8.1. `wires` are the set's canonical ones, dear enough to be made once."""
    owner: NameKey = rrset.key
    if signature.labels < len(owner) - 1:
        owner = (b"*", *owner[-(signature.labels + 1) :])
    head = labels_wire(owner) + _RECORD_HEAD.pack(rrset.type, _IN, signature.original_ttl)
    parts = [signature.head, labels_wire(name_key(signature.signer))]
    for wire in wires:
        parts += (head, len(wire).to_bytes(2, "big"), wire)
    return b"".join(parts)
