"""Transport mode: USE_TRANSPORT_MODE (RFC 7296 §1.3.1), and its selectors where a NAT is between (§2.23.1).

Each side names the addresses as its own host has them. Behind a NAT the other side sees others, which its packets
carry: so each puts the addresses of the IKE messages in the place of those that it reads, whether they are proposed
or agreed upon. An address that a peer merely claims never comes into a selector that way.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from oepy.ike.flow import ChildRefused
from oepy.ike.notify import NotifyType
from oepy.ike.payloads import Payload, notify

if TYPE_CHECKING:
    from oepy.ike.message import Message
    from oepy.ike.session import Session
    from oepy.model import IpAddress, TrafficSelector

    Selectors = tuple[TrafficSelector, ...]

TUNNEL, TRANSPORT = "tunnel", "transport"


def payloads(mode: str) -> list[Payload]:
    return [notify(NotifyType.USE_TRANSPORT_MODE)] if mode == TRANSPORT else []


def asked_for(message: Message) -> str:
    return TUNNEL if message.notify(NotifyType.USE_TRANSPORT_MODE) is None else TRANSPORT


def agreed_on(message: Message, wanted: str, *, required: bool) -> str:
    """By the peer's answer: it may refuse transport mode by saying nothing of it. Raises ChildRefused."""
    mode = asked_for(message)
    if mode == TRANSPORT != wanted:
        raise ChildRefused(
            NotifyType.NO_PROPOSAL_CHOSEN, "the peer wants transport mode, which nobody asked for"
        )
    if mode != wanted and required:
        raise ChildRefused(NotifyType.NO_PROPOSAL_CHOSEN, "the peer does not want transport mode")
    return mode


def as_seen(session: Session, ours: Selectors, theirs: Selectors) -> tuple[Selectors, Selectors]:
    """What the peer has sent, with the addresses that packets have here. Our side is TSi where we have asked, TSr
    where the peer has."""
    if session.nat_local:
        ours = _at(ours, session.local.address)
    if session.nat_remote:
        theirs = _at(theirs, session.remote.address)
    return ours, theirs


def _at(selectors: Selectors, address: IpAddress) -> Selectors:
    """Only where all of them are one and the same address (§2.23.1)."""
    first = selectors[0].start
    if first.version != address.version or any(not one.start == one.end == first for one in selectors):
        return selectors
    return tuple(replace(one, start=address, end=address) for one in selectors)
