"""A DNS tree in memory that signs itself and answers like a recursive resolver, until a test makes it lie."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import dns.dnssec
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdataset
import dns.rdatatype
import dns.rdtypes.ANY.NSEC
import dns.rdtypes.ANY.NSEC3
import dns.rdtypes.util
import dns.rrset
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

from oepy.dns.anchors import TrustAnchors
from oepy.dns.message import Question, Reply, build_query, parse_reply
from oepy.dns.transport import NoReply
from oepy.dns.validator import Validator
from oepy.resolvers import ResolverState

NOW = 1_800_000_000
IN = dns.rdataclass.IN
T = dns.rdatatype
Name = dns.name.Name


def name(text: str) -> Name:
    return dns.name.from_text(text)


def make_dnskey(private: Any, algorithm: int, flags: int = 257) -> Any:
    return dns.dnssec.make_dnskey(private.public_key(), algorithm, flags=flags)


def make_ds(origin: Name, dnskey: Any, digest: int) -> Any:
    kind = {1: "SHA1", 2: "SHA256", 4: "SHA384"}[digest]
    return dns.dnssec.make_ds(origin, dnskey, kind, policy=dns.dnssec.allow_all_policy)


def make_private(algorithm: int) -> Any:
    """A key for the DNSSEC algorithm; RSA of 1024 bits, since the tests make many."""
    if algorithm in (13, 14):
        return ec.generate_private_key(ec.SECP256R1() if algorithm == 13 else ec.SECP384R1())
    if algorithm in (15, 16):
        kinds = (ed25519.Ed25519PrivateKey, ed448.Ed448PrivateKey)
        return kinds[algorithm - 15].generate()
    return rsa.generate_private_key(65537, 1024)


@dataclass
class Zone:
    """One zone. `nsec3`: (iterations, salt, opt-out); `ds` overrides what the parent publishes, `private` the
    key, `flags` its flags, `digests` the digest types of the DS."""

    origin: Name
    signed: bool = True
    nsec3: tuple[int, bytes, bool] | None = None
    ttl: int = 300
    inception: int = NOW - 3600
    expiration: int = NOW + 86400
    algorithm: int = 15
    private: Any = None
    flags: int = 257
    digests: tuple[int, ...] = (2,)
    ds: list[dns.rdata.Rdata] | None = None
    records: dict[tuple[Name, int], list[dns.rdata.Rdata]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.private = self.private or make_private(self.algorithm)
        self.dnskey = make_dnskey(self.private, self.algorithm, self.flags)
        self.entry = (self.private, self.dnskey)  # what the DS names and the DNSKEY set is signed with
        self.add("@", "SOA", "ns.invalid. host.invalid. 1 7200 900 1209600 120")
        self.add("@", "NS", "ns.invalid.")
        if self.signed:
            self.add("@", "DNSKEY", str(self.dnskey))

    def owner(self, text: str) -> Name:
        return dns.name.from_text(text, self.origin)

    def add(self, owner: str, kind: str, text: str) -> None:
        rdata = dns.rdata.from_text("IN", kind, text, origin=self.origin, relativize=False)
        self.add_rdata(owner, rdata)

    def add_rdata(self, owner: str, rdata: dns.rdata.Rdata) -> None:
        self.records.setdefault((self.owner(owner), int(rdata.rdtype)), []).append(rdata)

    def make_ds(self) -> list[dns.rdata.Rdata]:
        if self.ds is not None:
            return self.ds
        if not self.signed:
            return []
        return [make_ds(self.origin, self.entry[1], digest) for digest in self.digests]

    def names(self) -> list[Name]:
        return sorted({owner for owner, _ in self.records})

    def exists(self, owner: Name) -> bool:
        """Also as an empty non-terminal."""
        return any(known.is_subdomain(owner) for known in self.names())

    def types(self, owner: Name) -> set[int]:
        return {kind for known, kind in self.records if known == owner}

    def rrset(self, owner: Name, kind: int) -> dns.rrset.RRset:
        rrset = dns.rrset.RRset(owner, IN, T.RdataType.make(kind))
        rrset.ttl = self.ttl
        for rdata in self.records[owner, kind]:
            rrset.add(rdata)
        return rrset

    def sign(self, rrset: dns.rrset.RRset) -> dns.rrset.RRset:
        signatures = dns.rrset.RRset(rrset.name, IN, T.RRSIG, covers=rrset.rdtype)
        signatures.ttl = rrset.ttl
        signatures.add(self.signature(rrset))
        return signatures

    def signature(self, rrset: dns.rrset.RRset, **changes: Any) -> Any:
        """One signature; `changes` are other values of `inception`, `expiration`, `signer`, `key` (private
        and DNSKEY)."""
        key = self.entry if rrset.rdtype == T.DNSKEY else (self.private, self.dnskey)
        private, dnskey = changes.pop("key", key)
        times = {"inception": self.inception, "expiration": self.expiration} | changes
        signer = times.pop("signer", self.origin)
        return dns.dnssec.sign(rrset, private, signer, dnskey, policy=dns.dnssec.allow_all_policy, **times)

    def add_entry_key(self, algorithm: int, private: Any = None, flags: int = 257) -> None:
        """A key-signing key beside the zone's own."""
        private = private or make_private(algorithm)
        self.entry = (private, make_dnskey(private, algorithm, flags))
        self.add_rdata("@", self.entry[1])

    # ---- denial ------------------------------------------------------------------------------------------

    def denial(self, *owners: Name) -> list[dns.rrset.RRset]:
        """The NSEC or NSEC3 records that match or cover each of the names."""
        chosen: dict[Name, dns.rrset.RRset] = {}
        for owner in owners:
            rrset = self._nsec3_for(owner) if self.nsec3 else self._nsec_for(owner)
            if rrset is not None:
                chosen[rrset.name] = rrset
        return [each for rrset in chosen.values() for each in (rrset, self.sign(rrset))]

    def _bitmap(self, owner: Name, extra: set[int]) -> list[tuple[int, bytes]]:
        kinds = self.types(owner)
        if kinds and not (T.NS in kinds and T.SOA not in kinds and T.DS not in kinds and self.nsec3):
            kinds = kinds | {int(T.RRSIG)}
        kinds = {T.RdataType.make(kind) for kind in kinds | extra}
        return dns.rdtypes.util.Bitmap.from_rdtypes(list(kinds)).windows if kinds else []

    def _nsec_for(self, owner: Name) -> dns.rrset.RRset | None:
        names = self.names()
        index = max((i for i, known in enumerate(names) if known <= owner), default=len(names) - 1)
        known, follower = names[index], names[(index + 1) % len(names)]
        rdata = dns.rdtypes.ANY.NSEC.NSEC(IN, T.NSEC, follower, self._bitmap(known, {int(T.NSEC)}))
        return dns.rrset.from_rdata(known, 120, rdata)

    def nsec3_hash(self, owner: Name) -> str:
        assert self.nsec3 is not None
        return dns.dnssec.nsec3_hash(owner, self.nsec3[1] or None, self.nsec3[0], 1).lower()

    def nsec3_names(self) -> list[Name]:
        found = set()
        for owner in self.names():
            kinds = self.types(owner)
            if self.nsec3 and self.nsec3[2] and T.NS in kinds and not kinds & {T.SOA, T.DS}:
                continue  # opt-out leaves unsigned delegations away
            depths = range(len(self.origin.labels), len(owner.labels) + 1)
            found |= {Name(owner.labels[-depth:]) for depth in depths}
        return list(found)

    def _nsec3_for(self, owner: Name) -> dns.rrset.RRset | None:
        assert self.nsec3 is not None
        hashes = sorted((self.nsec3_hash(known), known) for known in self.nsec3_names())
        wanted = self.nsec3_hash(owner)
        index = max((i for i, (digest, _) in enumerate(hashes) if digest <= wanted), default=len(hashes) - 1)
        digest, known = hashes[index]
        follower = hashes[(index + 1) % len(hashes)][0]
        iterations, salt, opt_out = self.nsec3
        text = f"1 {int(opt_out)} {iterations} {salt.hex() or '-'} {follower}"
        base = dns.rdata.from_text("IN", "NSEC3", text)
        rdata = base.replace(windows=self._bitmap(known, set()))
        return dns.rrset.from_rdata(dns.name.from_text(digest, self.origin), 120, rdata)


Mutation = Callable[[Question, dns.message.Message], dns.message.Message | None]


class SignedTree:
    """Zones by name. `lies` change a reply, or return None for silence. Counts the questions."""

    def __init__(self) -> None:
        self.zones: dict[Name, Zone] = {}
        self.asked: list[Question] = []
        self.lies: list[Mutation] = []
        self.delay = 0.0
        self.add(".")

    def add(self, origin: str, **options: object) -> Zone:
        zone = self.zones[name(origin)] = Zone(name(origin), **options)  # type: ignore[arg-type]
        return zone

    def delegate(self) -> None:
        """Put NS and DS of each zone into the zone above."""
        for origin, zone in self.zones.items():
            if origin == dns.name.root:
                continue
            parent = self.zone_of(origin.parent())
            parent.records[origin, int(T.NS)] = [dns.rdata.from_text("IN", "NS", "ns.invalid.")]
            parent.records.pop((origin, int(T.DS)), None)
            if digests := zone.make_ds():
                parent.records[origin, int(T.DS)] = digests

    def zone_of(self, owner: Name) -> Zone:
        while owner not in self.zones:
            owner = owner.parent()
        return self.zones[owner]

    def anchors(self) -> TrustAnchors:
        return TrustAnchors.of({dns.name.root: self.zones[dns.name.root].make_ds()})

    def validator(self, now: float = NOW, monotonic: Callable[[], float] = lambda: 1000.0) -> Validator:
        self.delegate()
        return Validator(self, self.anchors(), lambda: now, monotonic)

    def states(self) -> tuple[ResolverState, ...]:
        return ()

    async def ask(self, question: Question) -> Reply | NoReply:
        self.asked.append(question)
        await asyncio.sleep(self.delay)
        query = dns.message.from_wire(build_query(question, 7))
        reply = self.answer(question, query)
        if reply is None:
            return NoReply(question, "silence")
        return parse_reply(reply.to_wire(max_size=65535), question, 7)

    def answer(self, question: Question, query: dns.message.Message) -> dns.message.Message | None:
        """The reply after all lies; None for silence."""
        reply = dns.message.make_response(query)
        self._resolve(reply, question.name, question.type)
        for lie in self.lies:
            changed = lie(question, reply)
            if changed is None:
                return None
            reply = changed
        return reply

    # ---- answers -----------------------------------------------------------------------------------------

    def _resolve(self, reply: dns.message.Message, owner: Name, kind: int) -> None:
        for _ in range(20):
            zone = self.zone_of(owner.parent() if kind == T.DS and owner != dns.name.root else owner)
            target = self._answer(reply, zone, owner, kind)
            if target is None:
                return
            owner = target

    def _answer(self, reply: dns.message.Message, zone: Zone, owner: Name, kind: int) -> Name | None:
        """Fills the reply; returns where an alias goes on."""
        if (owner, kind) in zone.records:
            self._put(reply.answer, zone, zone.rrset(owner, kind))
            return None
        if (owner, int(T.CNAME)) in zone.records:
            rrset = zone.rrset(owner, int(T.CNAME))
            self._put(reply.answer, zone, rrset)
            return rrset[0].target
        for known, known_kind in zone.records:
            if known_kind == T.DNAME and owner.is_subdomain(known) and owner != known:
                rrset = zone.rrset(known, known_kind)
                self._put(reply.answer, zone, rrset)
                target = owner.relativize(known).concatenate(rrset[0].target)
                reply.answer.append(dns.rrset.from_text(owner, zone.ttl, "IN", "CNAME", str(target)))
                return target
        return self._missing(reply, zone, owner, kind)

    def _missing(self, reply: dns.message.Message, zone: Zone, owner: Name, kind: int) -> Name | None:
        exists = zone.exists(owner)
        encloser = owner
        next_closer = owner
        while not zone.exists(encloser):
            next_closer, encloser = encloser, encloser.parent()
        wildcard = Name((b"*", *encloser.labels))
        if not exists and zone.types(wildcard):
            for served in (kind, int(T.CNAME)):
                if (wildcard, served) in zone.records:
                    self._expand(reply, zone, zone.rrset(wildcard, served), owner)
                    self._deny(reply, zone, next_closer)
                    return reply.answer[-2].items and self._alias(reply, served)
        reply.set_rcode(dns.rcode.NOERROR if exists or zone.exists(wildcard) else dns.rcode.NXDOMAIN)
        self._put(reply.authority, zone, zone.rrset(zone.origin, int(T.SOA)))
        if exists and zone.nsec3 and owner not in zone.nsec3_names():
            self._deny(reply, zone, owner, owner.parent())  # RFC 5155 §7.2.4, opt-out
        else:
            self._deny(reply, zone, *((owner,) if exists else (owner, encloser, next_closer, wildcard)))
        return None

    @staticmethod
    def _alias(reply: dns.message.Message, kind: int) -> Name | None:
        rrset = next(r for r in reversed(reply.answer) if r.rdtype == kind)
        return rrset[0].target if kind == T.CNAME else None

    @staticmethod
    def _put(section: list[dns.rrset.RRset], zone: Zone, rrset: dns.rrset.RRset) -> None:
        section.append(rrset)
        if zone.signed:
            section.append(zone.sign(rrset))

    @staticmethod
    def _expand(reply: dns.message.Message, zone: Zone, rrset: dns.rrset.RRset, owner: Name) -> None:
        for each in (rrset, zone.sign(rrset)):
            each.name = owner
            reply.answer.append(each)

    @staticmethod
    def _deny(reply: dns.message.Message, zone: Zone, *owners: Name) -> None:
        if zone.signed:
            reply.authority += zone.denial(*owners)


def standard_tree() -> SignedTree:
    """Root, `example.` (NSEC), `three.` (NSEC3), `opt.` (NSEC3 opt-out), an unsigned zone below each."""
    tree = SignedTree()
    tree.add("example.")
    tree.add("three.", nsec3=(0, b"", False))
    tree.add("opt.", nsec3=(5, b"\xab\xcd", True))
    for parent in ("example.", "three.", "opt."):
        zone = tree.zones[name(parent)]
        zone.add("www", "A", "192.0.2.1")
        zone.add("deep.empty", "A", "192.0.2.2")
        zone.add("alias", "CNAME", f"www.{parent}")
        zone.add("gone", "CNAME", f"nothing.{parent}")
        zone.add("*.wild", "A", "192.0.2.3")
        zone.add("sub.x.wild", "TXT", '"a closer name"')
        tree.add(f"unsigned.{parent}", signed=False).add("www", "A", "192.0.2.9")
        tree.add(f"child.{parent}").add("www", "A", "192.0.2.10")
    tree.zones[name("example.")].add("dn", "DNAME", "child.example.")
    tree.zones[name("example.")].add("to-unsigned", "CNAME", "www.unsigned.example.")
    tree.zones[name("unsigned.example.")].add("to-signed", "CNAME", "www.example.")
    return tree
