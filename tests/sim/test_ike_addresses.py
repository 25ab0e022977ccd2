"""Addresses for clients by configuration payloads (RFC 7296 §2.19), over the in-memory router."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from oepy.ike.events import (
    AddressesAssigned,
    ChildUp,
    Lease,
    NeedLease,
    NeedNarrowing,
    Question,
    Refused,
    SessionDown,
    SessionFailed,
)
from oepy.ike.payload_cp import CfgType, Configuration, build_cp, parse_cp
from oepy.leases import Pool
from oepy.model import TrafficSelector
from oepy.wire import Reader
from tests.sim.ike_net import Host, Net, assert_one_tunnel, request, two_hosts

EVERYTHING = (TrafficSelector.of(ip_network("0.0.0.0/0")), TrafficSelector.of(ip_network("::/0")))


class Gateway(Host):
    """Leases out of two pools, and narrows to what it leased."""

    def serve(self) -> None:
        self.pools = {4: Pool.of("10.3.0.0/24"), 6: Pool.of("2001:db8:3::/120")}

    def reply(self, question: Question) -> object:
        if isinstance(question, NeedLease):
            got = [self.pools[v].acquire(str(question.identity), question.session) for v in question.families]
            return Lease(
                tuple(address for address in got if address is not None),
                (ip_address("10.0.0.53"),),
                (ip_network("10.0.0.0/8"),),
                ("corp.example",),
            )
        answer = super().reply(question)
        if isinstance(question, NeedNarrowing) and question.leased and not isinstance(answer, Refused):
            return replace(answer, remote_ts=tuple(map(TrafficSelector.of, question.leased)))  # type: ignore[type-var]
        return answer


def client_and_gateway() -> tuple[Host, Gateway, Net]:
    a, b = two_hosts()
    gateway = Gateway("b", b.address, b.key, b.settings, 2, b.keys)
    gateway.serve()
    return a, gateway, Net([a, gateway])


@pytest.mark.parametrize("families", [(4,), (6,), (4, 6)])
def test_a_client_gets_its_addresses(families: tuple[int, ...]) -> None:
    """They are its side of the child on both ends, and the event before it has servers, subnets, domains."""
    a, b, net = client_and_gateway()
    a.ike.initiate(request(a, b, local_ts=(), remote_ts=EVERYTHING, want_addresses=families), net.now)
    net.run(3)
    one, _ = assert_one_tunnel(a, b)
    addresses = tuple(ip_address({4: "10.3.0.1", 6: "2001:db8:3::1"}[version]) for version in families)
    assert one.local_ts == tuple(map(TrafficSelector.of, addresses))
    assert one.remote_ts == EVERYTHING
    [assigned] = a.of(AddressesAssigned)
    assert isinstance(assigned, AddressesAssigned)
    assert assigned.addresses == addresses
    assert assigned.domains == ("corp.example",)
    kinds = [type(event).__name__ for event in a.events]
    assert kinds.index("AddressesAssigned") < kinds.index("ChildUp")
    a.ike.rekey_child(one.spi_in, net.now)
    net.run(3)
    one, _ = assert_one_tunnel(a, b)
    assert one.local_ts == tuple(map(TrafficSelector.of, addresses))
    b.ike.terminate(b.ike.sessions()[0].session, net.now)
    net.run(3)
    [down] = b.of(SessionDown)
    for pool in b.pools.values():
        pool.release(down.session)
        assert not pool.holders()


def test_a_server_without_addresses_says_so() -> None:
    """INTERNAL_ADDRESS_FAILURE: the client gives up, and nothing is left on either side."""
    a, b = two_hosts()
    net = Net([a, b])
    a.ike.initiate(request(a, b, local_ts=(), want_addresses=(4,)), net.now)
    net.run(30)
    [failed] = a.of(SessionFailed)
    assert isinstance(failed, SessionFailed)
    assert failed.notify == "INTERNAL_ADDRESS_FAILURE"
    assert not b.pairs
    assert not a.ike.sessions()
    assert not b.ike.sessions()


def test_a_server_that_narrows_to_another_address_gets_no_tunnel() -> None:
    """`dynamic` is what was given, and nothing besides."""
    a, b, net = client_and_gateway()
    other = (TrafficSelector.of(ip_address("10.9.9.9")),)
    narrowed = b.reply
    b.reply = lambda question: (  # type: ignore[method-assign]
        replace(answer, remote_ts=other) if hasattr(answer := narrowed(question), "remote_ts") else answer
    )
    a.ike.initiate(request(a, b, local_ts=(), want_addresses=(4,)), net.now)
    net.run(30)
    [failed] = a.of(SessionFailed)
    assert isinstance(failed, SessionFailed)
    assert "address that we got" in failed.text
    assert not a.pairs
    assert not b.pairs


def test_a_client_may_want_its_old_address_and_a_fixed_side() -> None:
    """`had_addresses` are named in the request; with selectors of its own the client keeps those."""
    a, b, net = client_and_gateway()
    had = (ip_address("10.3.0.1"),)
    a.ike.initiate(request(a, b, want_addresses=(4,), had_addresses=had, local_ts=EVERYTHING), net.now)
    net.run(3)
    [question] = b.of(NeedLease)
    assert isinstance(question, NeedLease)
    assert question.wanted == had
    one, _ = assert_one_tunnel(a, b)
    assert one.local_ts == (TrafficSelector.of(had[0]),)


UNSPECIFIED = (TrafficSelector.of(ip_address("0.0.0.0")), TrafficSelector.of(ip_address("::")))


def test_a_client_may_propose_the_unspecified_address() -> None:
    """OpenIKED's `dynamic`: it means the address of that family which it is given."""
    a, b, net = client_and_gateway()
    a.ike.initiate(request(a, b, want_addresses=(4,), local_ts=UNSPECIFIED), net.now)
    net.run(3)
    [asked] = b.of(NeedNarrowing)
    assert isinstance(asked, NeedNarrowing)
    leased = TrafficSelector.of(ip_address("10.3.0.1"))
    assert asked.remote_ts == (leased, UNSPECIFIED[1])
    [up] = b.of(ChildUp)
    assert isinstance(up, ChildUp)
    assert up.pair.remote_ts == (leased,)


def test_so_it_may_in_a_rekey() -> None:
    """There it means what the old child has."""
    a, b, net = client_and_gateway()
    a.ike.initiate(request(a, b, local_ts=(), remote_ts=EVERYTHING, want_addresses=(4,)), net.now)
    net.run(3)
    one, _ = assert_one_tunnel(a, b)
    [session] = a.ike._context.by_number.values()
    session.children[one.spi_in].local_ts = UNSPECIFIED[:1]
    a.ike.rekey_child(one.spi_in, net.now)
    net.run(3)
    [_, asked] = b.of(NeedNarrowing)
    assert isinstance(asked, NeedNarrowing)
    assert asked.remote_ts == (TrafficSelector.of(ip_address("10.3.0.1")),)


def test_the_codec_both_ways() -> None:
    """Every attribute that we know; unknown ones and those of a wrong form."""
    whole = Configuration(
        CfgType.REPLY,
        (ip_address("10.0.0.1"), ip_address("2001:db8::1")),
        (ip_address("10.0.0.53"), ip_address("2001:db8::53")),
        (ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")),
        ("corp.example",),
        frozenset((1, 8)),
    )
    assert parse_cp(Reader(build_cp(whole))) == whole
    unknown = b"\x01\0\0\0" + b"\x40\x00\x00\x02ab" + b"\x80\x01\x00\x00"
    assert parse_cp(Reader(unknown)) == Configuration(CfgType.REQUEST, asked=frozenset((1,)))
