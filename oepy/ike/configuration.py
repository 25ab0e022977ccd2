"""An address for the client, from the server's pool (RFC 7296 §2.19), inside of IKE_AUTH.

The client proposes everything as its side of the child, and the server narrows that to the address it gave. What is
not within the addresses that were given is no selector of ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from ipaddress import ip_network
from typing import TYPE_CHECKING

from oepy.ike.events import AddressesAssigned, Lease, NeedLease
from oepy.ike.flow import ChildRefused, Questions
from oepy.ike.header import PayloadType
from oepy.ike.notify import NotifyType
from oepy.ike.payload_cp import Attribute, CfgType, Configuration, build_cp
from oepy.model import TrafficSelector

if TYPE_CHECKING:
    from oepy.ike.message import Message
    from oepy.ike.payloads import Payload
    from oepy.ike.session import Session
    from oepy.ike.settings import Initiate
    from oepy.model import IpAddress

    Selectors = tuple[TrafficSelector, ...]

_ALL = {version: TrafficSelector.of(ip_network(text)) for version, text in ((4, "0.0.0.0/0"), (6, "::/0"))}
_OF_FAMILY = {
    4: (Attribute.INTERNAL_IP4_ADDRESS, Attribute.INTERNAL_IP4_DNS, Attribute.INTERNAL_IP4_SUBNET),
    6: (Attribute.INTERNAL_IP6_ADDRESS, Attribute.INTERNAL_IP6_DNS, Attribute.INTERNAL_IP6_SUBNET),
}
_ADDRESS = {Attribute.INTERNAL_IP4_ADDRESS: 4, Attribute.INTERNAL_IP6_ADDRESS: 6}


# ---- the client ----------------------------------------------------------------------------------------


def request_payloads(request: Initiate) -> list[Payload]:
    if not request.want_addresses:
        return []
    given = {address.version for address in request.had_addresses}
    asked = {Attribute.INTERNAL_DNS_DOMAIN}
    for version in request.want_addresses:
        address, *others = _OF_FAMILY[version]
        asked |= {*others} if version in given else {address, *others}
    body = Configuration(CfgType.REQUEST, request.had_addresses, asked=frozenset(asked))
    return [(PayloadType.CP, build_cp(body))]


def proposed_selectors(request: Initiate) -> Selectors:
    """Our side of the child: `dynamic` where there is none."""
    return request.local_ts or tuple(_ALL[version] for version in request.want_addresses)


def read_reply(session: Session, request: Initiate, answer: Message) -> tuple[IpAddress, ...]:
    """The addresses that we got; the daemon hears of them. Raises ChildRefused where there is none."""
    if not request.want_addresses:
        return ()
    reply = answer.get(PayloadType.CP, Configuration)
    if reply is None or reply.kind != CfgType.REPLY or not reply.addresses:
        failed = answer.notify(NotifyType.INTERNAL_ADDRESS_FAILURE) is not None
        text = "has no address for us" if failed else "gives no addresses"
        raise ChildRefused(NotifyType.INTERNAL_ADDRESS_FAILURE, f"the peer {text}")
    found = tuple(_usable(reply.addresses, request.want_addresses))
    if not found:
        raise ChildRefused(
            NotifyType.INTERNAL_ADDRESS_FAILURE, "the peer gives addresses that nobody can use"
        )
    if session.request is not None:  # a reauthentication asks for the same again
        session.request = replace(session.request, had_addresses=found)
    session.context.emit(AddressesAssigned(session.number, found, reply.dns, reply.subnets, reply.domains))
    return found


def _usable(addresses: tuple[IpAddress, ...], wanted: tuple[int, ...]) -> Iterator[IpAddress]:
    """One of each family that was asked for, and no address that has a meaning of its own on every host."""
    for version in wanted:
        good = (
            address
            for address in addresses
            if address.version == version
            and not (address.is_loopback or address.is_multicast or address.is_unspecified)
            and not address.is_link_local
        )
        yield from itertools.islice(good, 1)


def within_addresses(selectors: Selectors, addresses: tuple[IpAddress, ...]) -> Selectors:
    """Of `dynamic` selectors those that are ours. Raises ChildRefused where nothing is left."""
    ours = [TrafficSelector.of(address) for address in addresses]
    found = tuple(common for one in selectors for own in ours if (common := one.intersect(own)) is not None)
    if not found:
        raise ChildRefused(NotifyType.TS_UNACCEPTABLE, "the selectors are not of the address that we got")
    return found


# ---- the server ----------------------------------------------------------------------------------------


def serve(session: Session, message: Message) -> Questions[tuple[list[Payload], tuple[IpAddress, ...]]]:
    """What to answer, and the addresses that the peer has now. Raises ChildRefused(INTERNAL_ADDRESS_FAILURE)."""
    request = message.get(PayloadType.CP, Configuration)
    if request is None or request.kind != CfgType.REQUEST:
        return [], ()
    families = {_ADDRESS[Attribute(what)] for what in request.asked if what in _ADDRESS}
    families |= {address.version for address in request.addresses}
    if not families:
        return [], ()
    assert session.identity is not None
    assert session.authenticated is not None
    lease = yield NeedLease(
        *(session.number, 0, session.identity, session.authenticated, session.remote, session.local),
        tuple(sorted(families)),
        request.addresses,
    )
    if not isinstance(lease, Lease) or not lease.addresses:
        raise ChildRefused(NotifyType.INTERNAL_ADDRESS_FAILURE, f"there is no address for {session.identity}")
    reply = Configuration(CfgType.REPLY, lease.addresses, lease.dns, lease.subnets, lease.domains)
    return [(PayloadType.CP, build_cp(reply))], lease.addresses


def with_addresses(selectors: Selectors, addresses: Iterable[IpAddress]) -> Selectors:
    """The unspecified address alone (OpenIKED's `dynamic`) is the one of its family that the client was given."""
    given = {address.version: address for address in addresses}
    found = []
    for one in selectors:
        own = given.get(one.start.version) if one.start == one.end and one.start.is_unspecified else None
        found.append(one if own is None else replace(one, start=own, end=own))
    return tuple(found)
