"""Connections: what their configuration is to IKE and to the trap. Pure functions."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from oepy.connections.model import Child, Connection, Life, Place, Selector
from oepy.errors import OepyError
from oepy.ike.algorithms import DEFAULT_ESP, Offer, parse_ah_proposal, parse_esp_proposal, parse_ike_proposal
from oepy.ike.settings import Lifetimes
from oepy.interfaces import ConfiguredRule, Way
from oepy.model import MAX_PRIORITY, IpAddress, IpNetwork, Marks, PeerIdentity, TrafficSelector, Verdict


class Same:
    """An offer as a key: it is a dictionary."""

    def __init__(self, offer: Offer) -> None:
        self.offer = offer
        self._key = tuple(offer.items())

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self._key == other._key


def child_offers(esp: tuple[str, ...], ah: tuple[str, ...]) -> tuple[Offer, ...] | None:
    """None: oepy's own list."""
    named = [parse_esp_proposal(text) for text in esp if text] or [
        parse_esp_proposal(text) for text in DEFAULT_ESP if esp
    ]
    return (*named, *map(parse_ah_proposal, ah)) or None


@functools.lru_cache(maxsize=4096)
def offers(proposals: tuple[str, ...]) -> tuple[Offer, ...] | None:
    return tuple(parse_ike_proposal(text) for text in proposals if text) or None


def ike_offers(connection: Connection) -> tuple[Offer, ...] | None:
    return offers(connection.proposals)


@functools.lru_cache(maxsize=4096)
def is_of(suite: str, proposals: tuple[str, ...]) -> bool:
    """Whether each algorithm of an IKE SA is in one of the proposals."""
    try:
        chosen = parse_ike_proposal(suite)
    except OepyError:
        return False
    return any(
        set(chosen) <= set(offer) and all(set(chosen[kind]) <= set(offer[kind]) for kind in chosen)
        for offer in offers(proposals) or ()
    )


def lifetimes_of_child(child: Child) -> Lifetimes:
    return lifetimes_of(child.life)


@functools.lru_cache(maxsize=4096)
def lifetimes_of(life: Life) -> Lifetimes:
    return Lifetimes(
        child_rekey=life.rekey_time,
        child_hard=life.life_time,
        child_soft_bytes=life.rekey_bytes,
        child_hard_bytes=life.life_bytes,
        child_soft_packets=life.rekey_packets,
        child_hard_packets=life.life_packets,
        child_jitter=min(life.rand_time / life.rekey_time, 0.9) if life.rekey_time else 0.0,
    )


def selectors(configured: Iterable[Selector], dynamic: tuple[IpAddress, ...]) -> tuple[TrafficSelector, ...]:
    """`dynamic`: the addresses that the side has, inside where it was given some, else outside."""
    found = [
        selector.at(address)
        for selector in configured
        for address in (dynamic if selector.network is None else (None,))
    ]
    return tuple(selector for selector in found if selector is not None)


def in_common(
    proposed: Iterable[TrafficSelector], allowed: Iterable[TrafficSelector]
) -> tuple[TrafficSelector, ...]:
    """What both have, without what lies in others of it."""
    allowed = tuple(allowed)
    found = dict.fromkeys(
        common for one in proposed for other in allowed if (common := one.intersect(other)) is not None
    )
    return tuple(one for one in found if not any(other != one and other.covers(one) for other in found))


def names_of(identity: PeerIdentity | None, places: Iterable[Place]) -> list[PeerIdentity]:
    named = [identity] if identity is not None else []
    return named + [PeerIdentity.address(place.address) for place in places if place.address is not None]


def listed(items: Iterable[object]) -> str:
    return ", ".join(sorted(str(item) for item in items if item is not None)[:16])


def both_ways(
    ours: IpNetwork,
    theirs: IpNetwork,
    protocol: int,
    our_port: int,
    their_port: int,
    *,
    number: int,
    required: bool,
    transport: bool,
    marks: Marks,
    first: int = 0,
    stands: tuple[Any, ...] = (),
) -> Iterable[ConfiguredRule]:
    """`first`: of the child, as of `first_of`. `stands`: where the selectors stand in the configuration."""
    common: dict[str, Any] = {
        "protocol": protocol,
        "required": required,
        "number": number,
        "transport": transport,
    }

    def rank(marked: bool) -> tuple[Any, ...]:
        said = _rank(theirs, ours, bool(our_port or their_port), bool(protocol), marked)
        return (1, first, *said, *stands)  # behind manual policies

    yield ConfiguredRule(
        *(Way.OUT, ours, theirs, Verdict.PRIVATE),
        source_port=our_port,
        destination_port=their_port,
        mark=marks.outward,
        rank=rank(marks.outward is not None),
        **common,
    )
    inward = rank(marks.inward is not None)
    for way in (Way.IN, Way.FORWARD):
        yield ConfiguredRule(
            *(way, theirs, ours, Verdict.BLOCK),
            source_port=their_port,
            destination_port=our_port,
            mark=marks.inward,
            rank=inward,
            **common,
        )


def past_the_trap(rule: ConfiguredRule) -> ConfiguredRule:
    """As it goes by an interface of the administrator's: no group asks for it, and no tunnel of ours takes it."""
    return replace(rule, verdict=Verdict.CLEAR, number=0, required=False)


def first_of(child: Child) -> int:
    """Of two children's rules for one packet those of the lower number come first, whatever their selectors."""
    return child.priority or MAX_PRIORITY + 1


def order_of(child: Child, local: Selector, remote: Selector) -> tuple[int, ...]:
    """As rules have it, for what is configured: `dynamic` is a host."""
    ported, protocol = bool(local.port or remote.port), bool(local.protocol or remote.protocol)
    marked = child.marks.outward is not None
    return (first_of(child), *_rank(remote.network, local.network, ported, protocol, marked))


def _rank(
    remote: IpNetwork | None, local: IpNetwork | None, ported: bool, protocol: bool, marked: bool
) -> tuple[int, ...]:
    """The one order: narrower networks first, and what says more before what says less."""
    return _width(remote), _width(local), not ported, not protocol, not marked


def _width(network: IpNetwork | None) -> int:
    """Bits of addresses."""
    return 0 if network is None else network.max_prefixlen - network.prefixlen
