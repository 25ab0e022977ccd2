"""What NSEC (RFC 4034 §4, RFC 4035 §5.4) and NSEC3 (RFC 5155 §8) records of one zone prove to be absent.

The records given here have verified signatures of that zone and are no wildcard expansions themselves.
Everything follows RFC 6840 §4: a record from the parent's side of a cut proves nothing about the child, and
one from the child's side nothing about the DS.
"""

from __future__ import annotations

import base64
import binascii
import enum
import hashlib
from collections.abc import Iterator, Sequence

import dns.name
import dns.rdata
import dns.rdatatype
import dns.rdtypes.ANY.NSEC
import dns.rdtypes.ANY.NSEC3

from oepy.dns.limits import MAX_DENIAL_RECORDS, MAX_NSEC3_ITERATIONS, Budget

Nsec = dns.rdtypes.ANY.NSEC.NSEC
Nsec3 = dns.rdtypes.ANY.NSEC3.NSEC3
Name = dns.name.Name

_NS = int(dns.rdatatype.NS)
_SOA = int(dns.rdatatype.SOA)
_DS = int(dns.rdatatype.DS)
_CNAME = int(dns.rdatatype.CNAME)
_DNAME = int(dns.rdatatype.DNAME)
_SHA1 = 1
_OPT_OUT = 1


class Proof(enum.Enum):
    """The outcome of looking for a proof. The last two are proofs of insecurity, not of absence."""

    NONE = "not proven"
    PROVEN = "proven"
    OPT_OUT = "an opt-out range (RFC 5155 §6)"
    ITERATIONS = f"NSEC3 with more than {MAX_NSEC3_ITERATIONS} iterations (RFC 9276)"

    @property
    def is_insecure(self) -> bool:
        return self in (Proof.OPT_OUT, Proof.ITERATIONS)


class Cut(enum.Enum):
    """What the denial of a DS says about the name."""

    UNKNOWN = "not proven"
    UNSIGNED = "a delegation without DS"
    NO_CUT = "no delegation"
    ABSENT = "no such name"
    OPT_OUT = "an opt-out range"
    ITERATIONS = "NSEC3 with too many iterations"


def has_type(rdata: Nsec | Nsec3, rdtype: int) -> bool:
    """Whether the type bitmap names the type."""
    wanted, offset = divmod(rdtype, 256)
    for window, bitmap in rdata.windows:
        if window == wanted and offset // 8 < len(bitmap):
            return bool(bitmap[offset // 8] & (0x80 >> (offset % 8)))
    return False


def _is_above_cut(rdata: Nsec | Nsec3) -> bool:
    """The parent's record at a delegation."""
    return has_type(rdata, _NS) and not has_type(rdata, _SOA)


def _denies_type(rdata: Nsec | Nsec3, name: Name, rdtype: int) -> bool:
    """Whether a record that matches the name proves that it has no such type (and is no alias)."""
    if has_type(rdata, rdtype) or has_type(rdata, _CNAME):
        return False
    if rdtype == _DS:
        return not has_type(rdata, _SOA) or name == dns.name.root
    return not _is_above_cut(rdata)


def is_usable_nsec3(rdata: Nsec3) -> bool:
    """RFC 5155 §8.1: other hash algorithms and flags are unknown."""
    return rdata.algorithm == _SHA1 and not rdata.flags & ~_OPT_OUT and len(rdata.next) == 20


def nsec3_digest(owner: Name, zone: Name) -> bytes | None:
    """The hash that the owner's name spells; None where it is not one of the zone."""
    if owner == dns.name.root or owner.parent() != zone:
        return None
    label = owner.labels[0].upper()
    try:
        digest = base64.b32hexdecode(label + b"=" * (-len(label) % 8))
    except binascii.Error:
        return None
    return digest if len(digest) == 20 else None


def nsec3_hash(name: Name, iterations: int, salt: bytes) -> bytes:
    """RFC 5155 §5."""
    digest = name.canonicalize().to_wire() or b""
    for _ in range(iterations + 1):
        digest = hashlib.sha1(digest + salt, usedforsecurity=False).digest()
    return digest


class Denial:
    """The proofs in one reply, all of zone `zone`."""

    def __init__(self, zone: Name, records: Sequence[tuple[Name, dns.rdata.Rdata]], budget: Budget) -> None:
        self.zone = zone
        self._budget = budget
        records = records[:MAX_DENIAL_RECORDS]
        self._nsec = [(owner, rdata) for owner, rdata in records if isinstance(rdata, Nsec)]
        self._nsec3: dict[bytes, Nsec3] = {}
        self._parameters: tuple[int, bytes] | None = None
        self._hashes: dict[Name, bytes] = {}
        for owner, rdata in records:
            if isinstance(rdata, Nsec3):
                self._add_nsec3(owner, rdata)

    def _add_nsec3(self, owner: Name, rdata: Nsec3) -> None:
        """RFC 5155 §8.1 and §8.2: unknown algorithms and flags are ignored, mixed parameters too."""
        parameters = (rdata.iterations, rdata.salt)
        if not is_usable_nsec3(rdata) or self._parameters not in (None, parameters):
            return
        digest = nsec3_digest(owner, self.zone)
        if digest is not None:
            self._parameters = parameters
            self._nsec3[digest] = rdata

    def __bool__(self) -> bool:
        return bool(self._nsec or self._nsec3)

    @property
    def is_nsec(self) -> bool:
        return bool(self._nsec)

    @property
    def _too_many_iterations(self) -> bool:
        return self._parameters is not None and self._parameters[0] > MAX_NSEC3_ITERATIONS

    # ---- the questions -----------------------------------------------------------------------------------

    def no_data(self, name: Name, rdtype: int) -> Proof:
        """That the name exists (or a wildcard would serve it) without this type."""
        if self._nsec:
            return Proof.PROVEN if self._nsec_no_data(name, rdtype) else Proof.NONE
        if self._too_many_iterations:
            return Proof.ITERATIONS
        match = self._match(name)
        if match is not None:
            return Proof.PROVEN if _denies_type(match, name, rdtype) else Proof.NONE
        encloser, cover = self._closest_encloser(name)
        if encloser is None or cover is None:
            return Proof.NONE
        wildcard = self._match(_wildcard(encloser))
        if wildcard is not None and _denies_type(wildcard, _wildcard(encloser), rdtype):
            return Proof.OPT_OUT if cover.flags & _OPT_OUT else Proof.PROVEN
        return Proof.OPT_OUT if rdtype == _DS and cover.flags & _OPT_OUT else Proof.NONE

    def no_name(self, name: Name) -> Proof:
        """That neither the name nor a wildcard for it exists."""
        if self._nsec:
            cover = self._nsec_cover(name)
            if cover is None or cover[1].next.is_subdomain(name):
                return Proof.NONE
            wildcard = _wildcard(self._nsec_encloser(name, cover))
            covered = self._nsec_cover(wildcard)
            return Proof.PROVEN if covered and not covered[1].next.is_subdomain(wildcard) else Proof.NONE
        if self._too_many_iterations:
            return Proof.ITERATIONS
        encloser, nsec3 = self._closest_encloser(name)
        if encloser is None or nsec3 is None:
            return Proof.NONE
        if nsec3.flags & _OPT_OUT:
            return Proof.OPT_OUT
        return Proof.PROVEN if self._cover(_wildcard(encloser)) is not None else Proof.NONE

    def no_closer_name(self, name: Name, encloser: Name) -> Proof:
        """For an answer made from `*.encloser`: that nothing nearer to the name exists."""
        if self._nsec:
            cover = self._nsec_cover(name)
            if cover is None or cover[1].next.is_subdomain(name):
                return Proof.NONE
            found = self._nsec_encloser(name, cover)
            return Proof.PROVEN if len(found.labels) <= len(encloser.labels) else Proof.NONE
        if self._too_many_iterations:
            return Proof.ITERATIONS
        nsec3 = self._cover(Name(name.labels[-(len(encloser.labels) + 1) :]))
        if nsec3 is None:
            return Proof.NONE
        return Proof.OPT_OUT if nsec3.flags & _OPT_OUT else Proof.PROVEN

    def no_ds(self, name: Name) -> Cut:
        """What the absence of a DS at `name` means, by the records of the zone above."""
        for owner, rdata in self._nsec:
            if owner == name:
                return _cut_of(rdata, name)
        match = None if self._too_many_iterations else self._match(name)
        if match is not None:
            return _cut_of(match, name)
        proof = self.no_data(name, _DS)
        if proof is Proof.PROVEN:
            return Cut.NO_CUT  # an empty non-terminal, or a wildcard: delegations have no wildcards
        if proof is Proof.NONE:
            proof = self.no_name(name)
        if proof is Proof.PROVEN:
            return Cut.ABSENT
        if proof is Proof.NONE:
            return Cut.UNKNOWN
        return Cut.OPT_OUT if proof is Proof.OPT_OUT else Cut.ITERATIONS

    # ---- NSEC --------------------------------------------------------------------------------------------

    def _nsec_no_data(self, name: Name, rdtype: int) -> bool:
        for owner, rdata in self._nsec:
            if owner == name:
                return _denies_type(rdata, name, rdtype)
        cover = self._nsec_cover(name)
        if cover is None:
            return False
        if cover[1].next.is_subdomain(name):
            return True  # an empty non-terminal: names below it exist
        wildcard = _wildcard(self._nsec_encloser(name, cover))
        if any(owner == wildcard and _denies_type(rdata, wildcard, rdtype) for owner, rdata in self._nsec):
            return True
        covered = self._nsec_cover(wildcard)  # it may be an empty non-terminal itself (RFC 4592 §2.2.2)
        return covered is not None and covered[1].next.is_subdomain(wildcard)

    def _nsec_cover(self, name: Name) -> tuple[Name, Nsec] | None:
        for owner, rdata in self._nsec:
            follower = rdata.next
            if not owner.is_subdomain(self.zone) or not follower.is_subdomain(self.zone):
                continue
            is_last = follower == self.zone
            if not owner < name or not (is_last or (owner < follower and name < follower)):
                continue
            # RFC 6840 §4.1: neither a delegation nor a DNAME above the name says anything below itself.
            if name.is_subdomain(owner) and (_is_above_cut(rdata) or has_type(rdata, _DNAME)):
                continue
            if name.is_subdomain(self.zone):
                return owner, rdata
        return None

    @staticmethod
    def _nsec_encloser(name: Name, cover: tuple[Name, Nsec]) -> Name:
        shared = max(name.fullcompare(cover[0])[2], name.fullcompare(cover[1].next)[2])
        return Name(name.labels[-shared:])

    # ---- NSEC3 -------------------------------------------------------------------------------------------

    def _hash(self, name: Name) -> bytes:
        """Counted against the lookup's budget."""
        assert self._parameters is not None
        digest = self._hashes.get(name)
        if digest is None:
            self._budget.spend_hash()
            digest = self._hashes[name] = nsec3_hash(name, *self._parameters)
        return digest

    def _match(self, name: Name) -> Nsec3 | None:
        return self._nsec3.get(self._hash(name)) if self._nsec3 else None

    def _cover(self, name: Name) -> Nsec3 | None:
        if not self._nsec3:
            return None
        digest = self._hash(name)
        for owner, rdata in self._nsec3.items():
            follower = rdata.next
            if owner < follower:
                covers = owner < digest < follower
            else:  # the last of the chain, or the only one
                covers = digest > owner or digest < follower
            if covers:
                return rdata
        return None

    def _closest_encloser(self, name: Name) -> tuple[Name | None, Nsec3 | None]:
        """RFC 5155 §8.3: the nearest existing ancestor, and the record that covers the next closer name."""
        if not name.is_subdomain(self.zone):
            return None, None
        next_closer = name
        for ancestor in self._ancestors(name):
            match = self._match(ancestor)
            if match is None:
                next_closer = ancestor
                continue
            if _is_above_cut(match) or has_type(match, _DNAME):
                return None, None
            return ancestor, self._cover(next_closer)
        return None, None

    def _ancestors(self, name: Name) -> Iterator[Name]:
        while len(name.labels) > len(self.zone.labels):
            name = name.parent()
            yield name


def _cut_of(rdata: Nsec | Nsec3, name: Name) -> Cut:
    if not _denies_type(rdata, name, _DS):
        return Cut.UNKNOWN
    return Cut.UNSIGNED if has_type(rdata, _NS) else Cut.NO_CUT


def _wildcard(encloser: Name) -> Name:
    return Name((b"*", *encloser.labels))
