"""Which keys does this peer publish? From validated records to the five classes of `model.KeyAnswer`.

TXT is asked while the resolver still searches for IPSECKEY, so that a peer with neither costs one wait and
not two; the TXT counts only where IPSECKEY is proven absent. The weakest link decides: a key whose gateway
name stands in an unsigned zone is insecure. A malformed record beside a good one is a note; alone it makes
the answer bogus (RFC 4322: deny and log), while records that are merely not for us leave the peer without
a key.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, ip_address

import dns.exception
import dns.name
import dns.rdata
import dns.rdatatype
import dns.rdtypes.ANY.TXT
import dns.rdtypes.IN.A
import dns.rdtypes.IN.AAAA

from oepy.dns.records import (
    Gateway,
    UnsupportedRecord,
    gateway_text,
    gateway_type_of,
    is_oe_text,
    is_old_oe_text,
    parse_ipseckey,
    parse_oe_text,
)
from oepy.dns.validator import Early, Outcome, Validator
from oepy.dns.zonemap import reverse_name
from oepy.errors import ParseError
from oepy.model import (
    Absent,
    Bogus,
    Insecure,
    IpAddress,
    KeyAnswer,
    PeerKey,
    PublicKey,
    Secure,
    Security,
    Unreachable,
)
from oepy.resolvers import ResolverState

MAX_RECORDS = 16  # key records of one peer that are looked at
MAX_GATEWAY_NAMES = 4
MAX_GATEWAYS = 8  # addresses of one gateway name
MAX_NOTES = 16
MIN_TTL = 5  # seconds: a record with TTL 0 would have each packet ask again
FAILURE_TTL = 60  # seconds for which a bogus or missing answer is relied on
PEER_SECONDS = 10.0
# A resolver that has not answered for IPSECKEY by then is busy finding out: TXT is asked beside it. A nearer
# one is spared the second question, which nearly always would be in vain.
TEXT_DELAY = 0.003

_IPSECKEY = int(dns.rdatatype.IPSECKEY)
_TXT = int(dns.rdatatype.TXT)
_A = int(dns.rdatatype.A)
_AAAA = int(dns.rdatatype.AAAA)

Name = dns.name.Name


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A key record that parsed; `key` is None for a TXT whose key stands at the gateway's name."""

    record: str
    precedence: int
    gateway: Gateway
    key: PublicKey | None
    owner: Name
    ttl: int
    label: str  # names the record in notes


@dataclass(slots=True)
class _Found:
    """What was gathered for one subject. `broken`: malformed records; `failed`: links that failed."""

    candidates: list[_Candidate] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    failed: list[Outcome] = field(default_factory=list)

    def note(self, text: str) -> None:
        if len(self.notes) < MAX_NOTES:
            self.notes.append(text)


class DnsKeySource:
    """`interfaces.KeySource` over DNSSEC. `shuffle` puts records of equal precedence in random order."""

    def __init__(self, validator: Validator, shuffle: Callable[[list[PeerKey]], None]) -> None:
        self._validator = validator
        self._shuffle = shuffle

    def forget(self, subject: IpAddress | str | None) -> None:
        """Of one peer its key records, for None everything that was learned."""
        if subject is None:
            self._validator.flush()
            return
        address = _as_address(subject)
        owner = reverse_name(address) if address else dns.name.from_text(str(subject), dns.name.root)
        self._validator.forget(owner, (_IPSECKEY, _TXT))

    def resolver_states(self) -> tuple[ResolverState, ...]:
        return self._validator.resolver_states()

    async def peer_keys(self, subject: IpAddress | str) -> KeyAnswer:
        """By address (its reverse name) or FQDN. Never raises for what DNS does; ends within PEER_SECONDS."""
        begun = self._validator.monotonic()
        address = _as_address(subject)
        try:
            owner = reverse_name(address) if address else dns.name.from_text(str(subject), dns.name.root)
        except (dns.exception.DNSException, ValueError):
            text = f"{str(subject)[:80]!r} is no domain name"
            return Absent(str(subject), str(subject), FAILURE_TTL, text)
        search = _Search(self._validator, str(subject), owner, address, self._shuffle)
        try:
            async with asyncio.timeout(PEER_SECONDS):
                answer = await search.run()
        except TimeoutError:
            answer = search.unreachable(f"not finished within {PEER_SECONDS:g} s")
        elapsed = self._validator.monotonic() - begun
        return replace(answer, elapsed=elapsed, questions=search.questions)


def _as_address(subject: IpAddress | str) -> IpAddress | None:
    if not isinstance(subject, str):
        return subject
    try:
        return ip_address(subject)
    except ValueError:
        return None


class _Search:
    """One peer. Results of lookups come in as `Outcome`s; nothing here speaks to the network."""

    def __init__(
        self,
        validator: Validator,
        subject: str,
        owner: Name,
        address: IpAddress | None,
        shuffle: Callable[[list[PeerKey]], None],
    ) -> None:
        self._validator = validator
        self._subject = subject
        self._owner = owner
        self._address = address
        self._shuffle = shuffle
        self._found = _Found()
        self.questions = 0

    async def _lookup(self, name: Name, rdtype: int, early: Early | None = None) -> Outcome:
        outcome = await self._validator.lookup(name, rdtype, early)
        self.questions += outcome.questions
        return outcome

    async def run(self) -> KeyAnswer:
        key_lookup = asyncio.ensure_future(self._lookup(self._owner, _IPSECKEY))
        early_text = None
        done, _ = await asyncio.wait({key_lookup}, timeout=TEXT_DELAY)
        if not done and not self._validator.is_known(self._owner, _TXT):
            early_text = self._validator.ask_early(self._owner, _TXT)
            self.questions += 1
        outcome = await key_lookup
        self._gather(outcome)
        if outcome.is_usable and not outcome.rdatas and outcome.rcode == "NOERROR":
            outcome = _weaker(outcome, await self._lookup(self._owner, _TXT, early_text))
            self._gather(outcome)
        if not outcome.is_usable:
            return self._failure(outcome)
        keys = await self._resolve()
        return self._answer(outcome, keys)

    # ---- records -----------------------------------------------------------------------------------------

    def _gather(self, outcome: Outcome) -> None:
        for number, rdata in enumerate(outcome.rdatas[:MAX_RECORDS], 1):
            kind = "IPSECKEY" if outcome.question.type == _IPSECKEY else "TXT"
            label = f"{kind} record {number} of {outcome.canonical_name}"
            try:
                candidate = self._candidate(kind, rdata, outcome, label)
            except UnsupportedRecord as error:
                self._found.note(f"{label}: {error}")
            except ParseError as error:
                self._found.note(f"{label}: {error}")
                self._found.broken.append(f"{label} is malformed: {error}")
            else:
                if candidate is not None:
                    self._found.candidates.append(candidate)
        if len(outcome.rdatas) > MAX_RECORDS:
            self._found.note(f"{self._owner} has more than {MAX_RECORDS} records; the rest is ignored")

    def _candidate(
        self, kind: str, rdata: dns.rdata.Rdata, outcome: Outcome, label: str
    ) -> _Candidate | None:
        """None for a TXT that is none of ours. Raises UnsupportedRecord or ParseError."""
        owner, ttl = outcome.canonical_name, outcome.ttl
        if kind == "IPSECKEY":
            record = parse_ipseckey(_raw(rdata))
            key = record.public_key()
            _check_gateway(record.gateway)
            return _Candidate(kind, record.precedence, record.gateway, key, owner, ttl, label)
        if not isinstance(rdata, dns.rdtypes.ANY.TXT.TXT):
            return None
        joined = b"".join(rdata.strings)
        if is_old_oe_text(joined):
            self._found.note(f"{label}: X-IPsec-Gateway is an old form; write X-IPsec-Server")
        if not is_oe_text(joined):
            return None
        text = parse_oe_text(rdata.strings)
        _check_gateway(text.gateway)
        return _Candidate(kind, text.precedence, text.gateway, text.key, owner, ttl, label)

    # ---- gateways ----------------------------------------------------------------------------------------

    async def _resolve(self) -> list[tuple[PeerKey, Security]]:
        """Keys with their gateways' addresses, each with the security of its weakest link."""
        names = [c.gateway for c in self._found.candidates if isinstance(c.gateway, Name)]
        allowed = set(list(dict.fromkeys(names))[:MAX_GATEWAY_NAMES])
        if self._address is None and any(c.gateway is None for c in self._found.candidates):
            allowed.add(self._owner)
        resolved = await asyncio.gather(
            *(self._resolve_one(candidate, allowed) for candidate in self._found.candidates)
        )
        return [pair for pairs in resolved for pair in pairs]

    async def _resolve_one(self, candidate: _Candidate, allowed: set[Name]) -> list[tuple[PeerKey, Security]]:
        keys, security, ttl = await self._keys_of(candidate)
        if not keys:
            return []
        addresses: tuple[IpAddress, ...] = ()
        gateway = candidate.gateway
        if gateway is None and self._address is not None:
            addresses = (self._address,)
        elif isinstance(gateway, Name | None):
            # RFC 4322: `@fqdn` only authorises an initiator of that name; it is never initiated to.
            if candidate.record != "TXT":
                name = gateway or self._owner
                addresses, link, gateway_ttl = await self._addresses(name, name in allowed, candidate.label)
                if not addresses:
                    return []
                security, ttl = _weakest(security, link), min(ttl, gateway_ttl)
        else:
            addresses = (gateway,)
        at_sign = "@" if candidate.record == "TXT" and isinstance(gateway, Name) else ""
        return [
            (
                PeerKey(
                    key,
                    addresses,
                    gateway_type_of(gateway),
                    at_sign + gateway_text(gateway),
                    candidate.precedence,
                    candidate.record,
                    str(candidate.owner),
                    max(ttl, MIN_TTL),
                ),
                security,
            )
            for key in keys
        ]

    async def _addresses(
        self, name: Name, is_allowed: bool, label: str
    ) -> tuple[tuple[IpAddress, ...], Security, int]:
        if not is_allowed:
            self._found.note(f"{label}: more than {MAX_GATEWAY_NAMES} gateway names; {name} is not resolved")
            return (), Security.SECURE, 0
        outcomes = await asyncio.gather(self._lookup(name, _A), self._lookup(name, _AAAA))
        usable = [outcome for outcome in outcomes if outcome.is_usable]
        for outcome in outcomes:
            if not outcome.is_usable:
                self._found.failed.append(outcome)
                self._found.note(f"{label}: gateway {name}: {outcome.reason}")
        holding = [outcome for outcome in usable if outcome.rdatas]
        addresses = tuple(addresses_in(holding))[:MAX_GATEWAYS]
        if not addresses:
            if len(usable) == len(outcomes):
                self._found.note(f"{label}: gateway {name} has no usable address")
            return (), Security.SECURE, 0
        security = _weakest(*(outcome.status for outcome in holding))
        if security is not Security.SECURE:
            self._found.note(f"{label}: the address of gateway {name} is not secure: {holding[0].reason}")
        return addresses, security, min(outcome.ttl for outcome in holding)

    async def _keys_of(self, candidate: _Candidate) -> tuple[list[PublicKey], Security, int]:
        """The record's key, or for a TXT without one those at the gateway's own name (RFC 4322 §5.2)."""
        if candidate.key is not None:
            return [candidate.key], Security.SECURE, candidate.ttl
        gateway = candidate.gateway
        assert gateway is not None  # a TXT always names one
        name = gateway if isinstance(gateway, Name) else reverse_name(gateway)
        keys: list[PublicKey] = []
        links, ttl = [Security.SECURE], candidate.ttl
        for rdtype, kind in ((_IPSECKEY, "IPSECKEY"), (_TXT, "TXT")):
            outcome = await self._lookup(name, rdtype)
            if not outcome.is_usable:
                self._found.failed.append(outcome)
                self._found.note(f"{candidate.label}: key at {name}: {outcome.reason}")
                return [], Security.SECURE, 0
            keys += self._own_keys(kind, outcome, gateway)
            links.append(outcome.status)
            ttl = min(ttl, outcome.ttl)
            if keys:
                break
        if not keys:
            self._found.note(f"{candidate.label}: no key in it, and none at {name}")
        return keys, _weakest(*links), ttl

    def _own_keys(self, kind: str, outcome: Outcome, gateway: Gateway) -> Iterable[PublicKey]:
        """The keys that a gateway publishes for itself."""
        for number, rdata in enumerate(outcome.rdatas[:MAX_RECORDS], 1):
            label = f"{kind} record {number} of {outcome.canonical_name}"
            try:
                candidate = self._candidate(kind, rdata, outcome, label)
            except ParseError as error:
                self._found.note(f"{label}: {error}")
                continue
            if candidate is not None and candidate.key and candidate.gateway in (None, gateway):
                yield candidate.key

    # ---- the answer --------------------------------------------------------------------------------------

    def _answer(self, outcome: Outcome, keys: Sequence[tuple[PeerKey, Security]]) -> KeyAnswer:
        if outcome.status is Security.INSECURE:
            found = self._order(key for key, _ in keys)
            return self._insecure(outcome.reason, found, outcome.ttl)
        secure = self._order(key for key, security in keys if security is Security.SECURE)
        if secure:
            ttl = min(key.ttl for key in secure)
            return Secure(self._subject, str(self._owner), ttl, notes=self._notes, keys=secure)
        if keys:
            reason = "; ".join(self._notes) or "a gateway's name is not secure"
            return self._insecure(reason, self._order(key for key, _ in keys), outcome.ttl)
        if self._found.failed:
            return self._failure(self._worst_failure())
        if self._found.broken:
            ttl = max(outcome.ttl, MIN_TTL)
            return Bogus(self._subject, str(self._owner), ttl, self._found.broken[0], notes=self._notes)
        reason = "; ".join(self._notes) or f"{self._owner} has no key record"
        ttl = max(outcome.ttl, MIN_TTL)
        return Absent(self._subject, str(self._owner), ttl, reason, notes=self._notes)

    @property
    def _notes(self) -> tuple[str, ...]:
        return tuple(self._found.notes)

    def _worst_failure(self) -> Outcome:
        return min(self._found.failed, key=lambda outcome: outcome.status is not Security.BOGUS)

    def _order(self, keys: Iterable[PeerKey]) -> tuple[PeerKey, ...]:
        """Lower precedence first, ties in random order (RFC 4025 §2.2), each key and gateway once."""
        unique: dict[tuple[PublicKey, tuple[IpAddress, ...], str], PeerKey] = {}
        shuffled = list(keys)
        self._shuffle(shuffled)
        for key in sorted(shuffled, key=lambda key: key.precedence):
            unique.setdefault((key.key, key.gateways, key.gateway_text), key)
        return tuple(unique.values())

    def _insecure(self, reason: str, keys: tuple[PeerKey, ...], ttl: int) -> KeyAnswer:
        ttl = max(min([ttl, *(key.ttl for key in keys)]), MIN_TTL)
        return Insecure(self._subject, str(self._owner), ttl, reason, notes=self._notes, keys=keys)

    def _failure(self, outcome: Outcome) -> KeyAnswer:
        if outcome.status is Security.BOGUS:
            return Bogus(
                self._subject,
                str(self._owner),
                FAILURE_TTL,
                outcome.reason,
                notes=self._notes,
                stripped=outcome.stripped,
            )
        return self.unreachable(outcome.reason)

    def unreachable(self, reason: str) -> KeyAnswer:
        return Unreachable(self._subject, str(self._owner), FAILURE_TTL, reason, notes=self._notes)


_STRENGTH = {Security.SECURE: 2, Security.INSECURE: 1}


def _weakest(*links: Security) -> Security:
    return min(links, key=lambda link: _STRENGTH.get(link, 0))


def _weaker(first: Outcome, second: Outcome) -> Outcome:
    """The second outcome, which rests on the first one's proof of absence."""
    if second.is_usable and first.status is Security.INSECURE and second.status is Security.SECURE:
        return replace(second, status=Security.INSECURE, reason=first.reason, ttl=min(first.ttl, second.ttl))
    return replace(second, ttl=min(first.ttl, second.ttl)) if second.is_usable else second


def _raw(rdata: dns.rdata.Rdata) -> bytes:
    return rdata.to_wire() or b""


def _check_gateway(gateway: Gateway) -> None:
    """Raises ParseError for an address that is nobody's, or only ours."""
    if gateway is None or isinstance(gateway, Name):
        return
    if not _is_reachable(gateway):
        raise ParseError(f"{gateway} cannot be a gateway")


def _is_reachable(address: IpAddress) -> bool:
    if address.is_unspecified or address.is_multicast or address.is_loopback:
        return False
    return address != IPv4Address("255.255.255.255")


def addresses_in(outcomes: Iterable[Outcome]) -> Iterable[IpAddress]:
    for outcome in outcomes:
        for rdata in outcome.rdatas:
            if isinstance(rdata, dns.rdtypes.IN.A.A | dns.rdtypes.IN.AAAA.AAAA):
                address = ip_address(rdata.address)
                if _is_reachable(address):
                    yield address


__all__ = ["DnsKeySource"]
