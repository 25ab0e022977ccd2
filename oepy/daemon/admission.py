"""Whom we answer, and for which traffic: the responder's side of opportunistic encryption.

A peer gets a SA for addresses that the DNS gives it: its own outer address when the key it proved stands at
that address's reverse name, or an address whose record names it as gateway (delegation, RFC 4322 §3.2), by
its outer address or (TXT with `@fqdn`, for gateways without a fixed address) by the name that it proved.
A NULL peer gets its own outer address and nothing else, and that only where the DNS publishes no key for it:
whoever can send from an address could otherwise stand in for the host that has a key there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from oepy.daemon.addresses import is_own
from oepy.engine import Engine
from oepy.interfaces import KeySource
from oepy.model import (
    IKE_PORT,
    NAT_T_PORT,
    Authenticated,
    Bogus,
    IdType,
    Insecure,
    IpAddress,
    KeyAnswer,
    PeerIdentity,
    PeerKey,
    PublicKey,
    Secure,
    TrafficSelector,
)

MAX_SELECTORS = 16  # of an offer that are looked at


@dataclass(frozen=True, slots=True)
class Offer:
    """What a peer asks for, after it has proved `key` (None for AUTH NULL)."""

    peer: IpAddress
    local: IpAddress
    authenticated: Authenticated
    key: PublicKey | None
    tsi: tuple[TrafficSelector, ...]  # the peer's side
    tsr: tuple[TrafficSelector, ...]  # ours
    identity: PeerIdentity | None = None  # whose key that is
    peer_port: int = NAT_T_PORT  # the outer one
    vouched: IpAddress | None = None  # the address that its certificate speaks for


@dataclass(frozen=True, slots=True)
class Admission:
    """`refusal` empty: the narrowed selectors may be used."""

    local_ts: tuple[TrafficSelector, ...] = ()
    remote_ts: tuple[TrafficSelector, ...] = ()
    refusal: str = ""
    by_name: bool = False  # only a name says that the proven key may speak for the address


def usable_keys(answer: KeyAnswer, use_insecure: bool) -> tuple[PeerKey, ...]:
    if isinstance(answer, Secure) or (use_insecure and isinstance(answer, Insecure)):
        return answer.keys
    return ()


class Admissions:
    """Decides offers; asks the DNS only where the answer can matter."""

    def __init__(
        self,
        source: KeySource,
        engine: Engine,
        is_own: Callable[[IpAddress], bool] = is_own,
    ) -> None:
        self._source = source
        self._engine = engine
        self.is_own = is_own

    async def keys_of(self, identity: PeerIdentity) -> tuple[tuple[PublicKey, ...], str]:
        """The keys that this identity may prove, and why there are none. RFC 4322 §3.2: an FQDN is looked up
        forward, an address at its reverse name."""
        address = identity.as_address()
        subject: IpAddress | str = address if address is not None else str(identity)
        answer = await self._source.peer_keys(subject)
        keys = usable_keys(answer, self._engine.settings.use_insecure_keys)
        reason = "" if keys else f"{type(answer).__name__.lower()} {answer.owner} {answer.reason}".strip()
        return tuple(record.key for record in keys), reason

    async def decide(self, offer: Offer) -> Admission:
        local_ts = await self._ours(offer)
        if not local_ts:
            return Admission(refusal=f"{_text(offer.tsr)} is not ours to protect")
        remote_ts: list[TrafficSelector] = []
        refusals: list[str] = []
        by_name = False
        for address in _hosts(offer.tsi, offer.peer):
            refusal, named = await self._judge(offer, address)
            by_name = by_name or named
            if refusal:
                refusals.append(f"{address}: {refusal}")
            else:
                remote_ts.append(_narrow(offer.tsi, address))
        if not remote_ts:
            return Admission(refusal="; ".join(refusals) or f"{_text(offer.tsi)} names no host address")
        return Admission(local_ts, tuple(remote_ts), by_name=by_name)

    async def _judge(self, offer: Offer, address: IpAddress) -> tuple[str, bool]:
        """Why the address is refused (empty: it is not), and whether a name alone speaks for it."""
        policy = self._engine.refuses_responder(address, offer.authenticated)
        if policy:
            return policy, False
        if offer.authenticated is Authenticated.NULL:
            return await self._refuses_null(offer, address), False
        answer = await self._source.peer_keys(address, _names_of(offer, address))
        usable = usable_keys(answer, self._engine.settings.use_insecure_keys)
        if address == offer.vouched and not usable and not isinstance(answer, Bogus):
            return "", offer.authenticated is Authenticated.NAME
        for record in usable:
            if record.key == offer.key and (offer.peer in record.gateways or _names(record, offer.identity)):
                return "", False
        if any(record.key == offer.key for record in answer.claims):
            return self._engine.refuses_responder(address, Authenticated.NAME), True
        return f"{answer.owner} does not name {offer.peer} with the proven key", False

    async def _refuses_null(self, offer: Offer, address: IpAddress) -> str:
        if address != offer.peer:
            return "a NULL peer speaks for its own outer address only"
        if offer.peer_port not in (IKE_PORT, NAT_T_PORT):
            return "a NULL peer behind a NAT shares its outer address with others"
        answer = await self._source.peer_keys(address)
        if isinstance(answer, Bogus):
            return f"{answer.owner} is bogus: {answer.reason}"
        if usable_keys(answer, self._engine.settings.use_insecure_keys):
            return f"{answer.owner} publishes a key, which the peer must prove; AUTH NULL does not count"
        return ""

    async def _ours(self, offer: Offer) -> tuple[TrafficSelector, ...]:
        """Our side: own addresses, and hosts whose records name this host as their gateway."""
        found = []
        for address in _hosts(offer.tsr, offer.local):
            if self.is_own(address):
                found.append(_narrow(offer.tsr, address))
                continue
            answer = await self._source.peer_keys(address)
            keys = usable_keys(answer, self._engine.settings.use_insecure_keys)
            if any(self.is_own(gateway) for record in keys for gateway in record.gateways):
                found.append(_narrow(offer.tsr, address))
        return tuple(found)


def _names_of(offer: Offer, address: IpAddress) -> tuple[str, ...]:
    """The name that the peer proved a key of: it may lead to the peer's own outer address."""
    identity = offer.identity
    if address != offer.peer or identity is None or identity.type is not IdType.FQDN:
        return ()
    return (str(identity),)


def _names(record: PeerKey, identity: PeerIdentity | None) -> bool:
    """RFC 4322: a TXT record whose gateway is `@fqdn` authorises whoever proves its key under that name."""
    if identity is None or identity.type is not IdType.FQDN or record.record != "TXT":
        return False
    name = record.gateway_text.removeprefix("@").rstrip(".").lower()
    return record.gateway_text.startswith("@") and name == str(identity).rstrip(".").lower()


def _hosts(selectors: Iterable[TrafficSelector], preferred: IpAddress) -> list[IpAddress]:
    """The host addresses that an offer is about: single ones, and the peer's own where a range holds it."""
    found: list[IpAddress] = []
    for selector in list(selectors)[:MAX_SELECTORS]:
        if selector.start == selector.end:
            address = selector.start
        elif selector.contains_address(preferred):
            address = preferred
        else:
            continue
        if address not in found:
            found.append(address)
    return found


def _narrow(selectors: Iterable[TrafficSelector], address: IpAddress) -> TrafficSelector:
    """The widest of the offered selectors, narrowed to one address (RFC 7296 §2.9)."""
    host = TrafficSelector.of(address)
    common = [found for selector in selectors if (found := selector.intersect(host)) is not None]
    return max(common, key=lambda ts: (ts.protocol == 0, ts.end_port - ts.start_port))


def _text(selectors: Iterable[TrafficSelector]) -> str:
    return ", ".join(str(selector) for selector in list(selectors)[:MAX_SELECTORS])
