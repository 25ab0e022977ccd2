"""Keys at forward names: for hosts whose owners have no say in the reverse zone.

Whoever owns any zone can let a name of it lead to any address. So the address's own records come first: a key
there, or a bogus answer, settles it. Only without them do names count, and then a name must be secure, its A or
AAAA record too, and the gateway the address itself. What is found is a claim (`KeyAnswer.claims`), with which
the engine may do no harm; but names below `trusted` zones speak for their addresses as reverse records do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

import dns.exception
import dns.name
import dns.rdatatype

from oepy.dns.names import MAX_NAMES
from oepy.dns.peers import PEER_SECONDS, DnsKeySource, addresses_in
from oepy.dns.validator import Outcome, Validator
from oepy.model import Bogus, IpAddress, KeyAnswer, PeerKey, Secure, Security
from oepy.resolvers import ResolverState


@dataclass(frozen=True, slots=True)
class _Claim:
    """What one name says of the address; without keys `note` tells why."""

    name: dns.name.Name
    keys: tuple[PeerKey, ...] = ()
    note: str = ""
    questions: int = 0


class NamedKeySource:
    """`interfaces.KeySource`, by addresses and by names that led to them."""

    def __init__(
        self, source: DnsKeySource, validator: Validator, trusted: Sequence[dns.name.Name] = ()
    ) -> None:
        self._source = source
        self._validator = validator
        self._trusted = tuple(trusted)

    def forget(self, subject: IpAddress | str | None) -> None:
        self._source.forget(subject)

    def resolver_states(self) -> tuple[ResolverState, ...]:
        return self._source.resolver_states()

    async def peer_keys(self, subject: IpAddress | str, names: Sequence[str] = ()) -> KeyAnswer:
        if isinstance(subject, str) or not names:
            return await self._source.peer_keys(subject)
        # At the same time, for the first packet waits; what the names say is not looked at where it must not count
        claiming = asyncio.ensure_future(self._claims(subject, names))
        try:
            answer = await self._source.peer_keys(subject)
            if isinstance(answer, (Secure, Bogus)):
                return answer
            return self._joined(answer, await claiming)
        finally:
            claiming.cancel()

    def _joined(self, answer: KeyAnswer, claims: Sequence[_Claim]) -> KeyAnswer:
        questions = answer.questions + sum(claim.questions for claim in claims)
        notes = (*answer.notes, *(claim.note for claim in claims if claim.note))
        for claim in claims:
            if claim.keys and any(claim.name.is_subdomain(zone) for zone in self._trusted):
                ttl = min(key.ttl for key in claim.keys)
                return Secure(
                    answer.subject,
                    str(claim.name),
                    ttl,
                    elapsed=answer.elapsed,
                    questions=questions,
                    notes=notes,
                    keys=claim.keys,
                )
        keys = tuple(key for claim in claims for key in claim.keys)
        return replace(answer, questions=questions, notes=notes, claims=keys)

    async def _claims(self, address: IpAddress, names: Sequence[str]) -> list[_Claim]:
        try:
            async with asyncio.timeout(PEER_SECONDS):
                return await asyncio.gather(*(self._claim(address, name) for name in names[:MAX_NAMES]))
        except TimeoutError:
            return [_Claim(dns.name.root, note=f"the names {', '.join(names)} gave no answer in time")]

    async def doubts(self, name: str, address: IpAddress) -> str:
        known = _name(name)
        if known is None:
            return f"{name[:80]!r} is no domain name"
        try:
            async with asyncio.timeout(PEER_SECONDS):
                return _doubts(known, address, await self._place(known, address))
        except TimeoutError:
            return f"the name {known} gave no answer in time"

    async def _place(self, name: dns.name.Name, address: IpAddress) -> Outcome:
        rdtype = dns.rdatatype.A if address.version == 4 else dns.rdatatype.AAAA
        return await self._validator.lookup(name, int(rdtype))

    async def _claim(self, address: IpAddress, text: str) -> _Claim:
        name = _name(text)
        if name is None:
            return _Claim(dns.name.root, note=f"{text[:80]!r} is no domain name")
        answer, place = await asyncio.gather(self._source.peer_keys(text), self._place(name, address))
        questions = answer.questions + place.questions
        if not isinstance(answer, Secure):
            return _Claim(name, note=f"{name}: {answer.reason}", questions=questions)
        doubts = _doubts(name, address, place)
        if doubts:
            return _Claim(name, note=doubts, questions=questions)
        keys = tuple(
            replace(key, gateways=(address,), ttl=min(key.ttl, place.ttl) if place.ttl else key.ttl)
            for key in answer.keys
            if key.record == "IPSECKEY" and address in key.gateways
        )
        note = f"{name} leads to {address} and " + (
            "publishes a key" if keys else "names another gateway than that address"
        )
        return _Claim(name, keys, note, questions)


def _name(text: str) -> dns.name.Name | None:
    try:
        return dns.name.from_text(text, dns.name.root)
    except (dns.exception.DNSException, UnicodeError):
        return None


def _doubts(name: dns.name.Name, address: IpAddress, place: Outcome) -> str:
    if place.status is not Security.SECURE:
        return f"{name}: its address is not secure: {place.reason}"
    if address not in addresses_in([place]):
        return f"{name} does not lead to {address}"
    return ""


__all__ = ["NamedKeySource"]
