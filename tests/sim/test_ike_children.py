"""Further child SAs of an IKE SA, and transport mode with and without a NAT, over the in-memory router."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from oepy.ike.algorithms import parse_ah_proposal, parse_esp_proposal
from oepy.ike.events import (
    ChildDown,
    ChildFailed,
    ChildUp,
    FailureKind,
    NeedNarrowing,
    Question,
    SessionFailed,
)
from oepy.ike.header import Exchange, parse_header
from oepy.ike.session import MAX_QUEUED
from oepy.ike.settings import ChildRequest, IkeSettings, Lifetimes
from oepy.model import SaPair, TrafficSelector
from tests.sim.ike_net import Host, Net, assert_mirror, assert_one_tunnel, request, two_hosts
from tests.sim.test_ike_lifecycle import QUIET, connected, only_session
from tests.sim.test_ike_network import HONEST, NatNet

NET_A = (TrafficSelector.of(ip_network("10.1.0.0/16")),)
NET_B = (TrafficSelector.of(ip_network("10.2.0.0/16")),)
SUBNETS = ChildRequest(NET_A, NET_B, connection="office", label="office/net")


def accept_transport(host: Host) -> None:
    """The daemon's stand-in takes transport mode where it is asked for."""
    before = host.reply

    def reply(question: Question) -> object:
        answer = before(question)
        if isinstance(question, NeedNarrowing) and not isinstance(answer, (type(None), type(host.refuse))):
            return replace(answer, mode="transport")  # type: ignore[type-var]
        return answer

    host.reply = reply  # type: ignore[method-assign]


def pair_of(host: Host, selectors: tuple[TrafficSelector, ...]) -> SaPair:
    [pair] = [pair for pair in host.pairs.values() if pair.local_ts == selectors]
    return pair


@pytest.mark.parametrize("by_initiator", [True, False])
@pytest.mark.parametrize("offer", ["aes256gcm16", "aes128gcm16-x25519", "aes256-sha256-ecp384-ecp256"])
def test_a_further_child_beside_the_first(by_initiator: bool, offer: str) -> None:
    """Either side may ask, with a key exchange of its own or none; rekeys and Deletes touch only the one."""
    offers = (parse_esp_proposal(offer),)
    a, b, net = connected(replace(QUIET, esp_offers=(*QUIET.esp_offers, *offers)))
    host, peer = (a, b) if by_initiator else (b, a)
    [first] = host.pairs
    host.ike.create_child(only_session(host), replace(SUBNETS, offers=offers), net.now)
    net.run(3)
    mine, theirs = pair_of(host, NET_A), pair_of(peer, NET_B)
    assert_mirror(mine, theirs)
    assert mine.connection == "office"
    assert [up.label for up in host.of(ChildUp)] == [host.of(ChildUp)[0].label, "office/net"]  # type: ignore[attr-defined]
    for side, spi in ((peer, theirs.spi_in), (host, mine.spi_in)):
        side.ike.rekey_child(spi, net.now)
        net.run(3)
        theirs, mine = pair_of(peer, NET_B), pair_of(host, NET_A)
        assert_mirror(mine, theirs)
    assert mine.connection == "office"
    assert first in host.pairs
    host.ike.delete_child(mine.spi_in, net.now)
    net.run(3)
    assert_one_tunnel(a, b)


@pytest.mark.parametrize("seed", range(12))
def test_many_children_at_once_on_a_lossy_network(seed: int) -> None:
    """What is asked for at once waits in line, each comes up once; the peer may ask for its own meanwhile."""
    patient = replace(QUIET, established=replace(QUIET.established, total=60.0))
    a, b, net = connected(patient, seed, loss=0.3)
    for number in range(8):
        for host in (a, b):
            mine = (TrafficSelector.of(ip_network(f"10.{number + 1}.0.0/16")),)
            host.ike.create_child(only_session(host), replace(SUBNETS, local_ts=mine), net.now)
    net.run(400)
    assert len(a.pairs) == len(b.pairs) == 17
    for pair in a.pairs.values():
        assert_mirror(pair, b.pairs[pair.spi_out])


def test_a_refused_child_is_told_and_leaves_the_rest() -> None:
    """TS_UNACCEPTABLE, or no suite in common: ChildFailed names it, the first child goes on."""
    a, b, net = connected()
    session = only_session(a)
    offers = (parse_esp_proposal("null-sha256"),)
    a.ike.create_child(session, replace(SUBNETS, offers=offers), net.now)
    net.run(3)
    from oepy.ike.events import Refused

    b.refuse = Refused("not here")
    a.ike.create_child(session, SUBNETS, net.now)
    net.run(3)
    first, second = a.of(ChildFailed)
    assert isinstance(first, ChildFailed)
    assert isinstance(second, ChildFailed)
    assert (first.notify, second.notify) == ("NO_PROPOSAL_CHOSEN", "TS_UNACCEPTABLE")
    assert (first.kind, first.connection, first.label) == (FailureKind.REJECTED, "office", "office/net")
    assert_one_tunnel(a, b)


def test_a_child_of_no_session_fails_at_once() -> None:
    """Also where the session waits with more exchanges than it may."""
    a, _, net = connected()
    a.ike.create_child(99, SUBNETS, net.now)
    [failed] = [event for event in a.ike.events() if isinstance(event, ChildFailed)]
    assert (failed.session, failed.kind) == (99, FailureKind.LOCAL)
    net.filter = lambda *_: False
    for _ in range(MAX_QUEUED + 2):
        a.ike.create_child(only_session(a), SUBNETS, net.now)
    net.run(0.1)
    [failed] = a.of(ChildFailed)  # type: ignore[list-item]
    assert "waiting" in failed.text


def test_a_widened_answer_is_deleted_again() -> None:
    """The peer has the child already when we see that it is not what we asked for: it is told to drop it."""
    a, b, net = connected()
    wide = (TrafficSelector.of(ip_network("10.0.0.0/8")),)
    original = b.ike._context.by_number[only_session(b)].build

    def widened(exchange: int, number: int, payloads: list, *, response: bool) -> list[bytes]:  # type: ignore[type-arg]
        from oepy.ike.header import PayloadType
        from oepy.ike.payload_ts import build_ts

        if exchange == Exchange.CREATE_CHILD_SA and response:
            payloads = [(k, build_ts(wide) if k == PayloadType.TSR else body) for k, body in payloads]
        return original(exchange, number, payloads, response=response)

    class Wide(type(b.ike._context.by_number[only_session(b)])):  # type: ignore[misc]
        __slots__ = ()
        build = staticmethod(widened)

    b.ike._context.by_number[only_session(b)].__class__ = Wide
    a.ike.create_child(only_session(a), SUBNETS, net.now)
    net.run(3)
    [failed] = a.of(ChildFailed)
    assert isinstance(failed, ChildFailed)
    assert failed.notify == "TS_UNACCEPTABLE"
    assert len(b.of(ChildUp)) == 2
    assert_one_tunnel(a, b)


def test_settings_of_a_connection_count_for_its_session() -> None:
    """By addresses for the responder, in the request for the initiator, and anew with the daemon's word."""
    slow = replace(QUIET, lifetimes=Lifetimes(child_rekey=50.0, child_hard=60.0))
    a, b = two_hosts()
    b.ike.__init__(b.settings, b.random.randbytes, lambda local, remote: slow)  # type: ignore[misc]
    net = Net([a, b])
    a.ike.initiate(request(a, b, settings=replace(QUIET, lifetimes=Lifetimes(child_hard=70.0))), net.now)
    net.run(3)
    one, two = assert_one_tunnel(a, b)
    assert (one.lifetime.hard_seconds, two.lifetime.hard_seconds) == (70.0, 60.0)
    before = b.reply
    other = replace(QUIET, lifetimes=Lifetimes(child_hard=80.0))
    b.reply = lambda question: (  # type: ignore[method-assign]
        replace(answer, settings=other) if hasattr(answer := before(question), "settings") else answer
    )
    a.ike.create_child(only_session(a), SUBNETS, net.now)
    net.run(3)
    assert pair_of(b, NET_B).lifetime.hard_seconds == 80.0


# ---- transport mode ------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_transport_mode_where_both_want_it(first: bool) -> None:
    """In IKE_AUTH or in a further child: both pairs say transport, and rekeys by either side keep it."""
    a, b = two_hosts()
    accept_transport(b)
    accept_transport(a)
    net = Net([a, b])
    a.ike.initiate(request(a, b, mode="transport" if first else "tunnel"), net.now)
    net.run(3)
    one, two = assert_one_tunnel(a, b)
    if not first:
        assert one.mode == two.mode == "tunnel"
        wanted = ChildRequest(a.selector, b.selector, mode="transport")
        a.ike.create_child(only_session(a), wanted, net.now)
        net.run(3)
        a.ike.delete_child(one.spi_in, net.now)
        net.run(3)
    for host in (a, b):
        one, two = assert_one_tunnel(a, b)
        assert one.mode == two.mode == "transport"
        host.ike.rekey_child(next(iter(host.pairs)), net.now)
        net.run(3)
    one, two = assert_one_tunnel(a, b)
    assert one.mode == two.mode == "transport"


def test_transport_mode_that_the_peer_does_not_want() -> None:
    """It falls back to a tunnel, or fails where it is required, and nothing is left of it."""
    a, b = two_hosts()
    net = Net([a, b])
    a.ike.initiate(request(a, b, mode="transport"), net.now)
    net.run(3)
    one, two = assert_one_tunnel(a, b)
    assert one.mode == two.mode == "tunnel"
    wanted = ChildRequest(NET_A, NET_B, mode="transport", transport_required=True)
    a.ike.create_child(only_session(a), wanted, net.now)
    net.run(3)
    [failed] = a.of(ChildFailed)
    assert isinstance(failed, ChildFailed)
    assert "transport" in failed.text
    assert_one_tunnel(a, b)
    c, d = two_hosts()
    net = Net([c, d])
    c.ike.initiate(request(c, d, mode="transport", transport_required=True), net.now)
    net.run(30)
    assert c.of(SessionFailed)
    assert not c.pairs
    assert not d.pairs
    assert not d.ike.sessions()


def test_a_narrowing_to_transport_mode_counts_only_where_it_is_asked_for() -> None:
    """A peer that proposes a tunnel gets one, whatever the daemon says."""
    a, b = two_hosts()
    accept_transport(b)
    net = Net([a, b])
    a.ike.initiate(request(a, b), net.now)
    net.run(3)
    one, two = assert_one_tunnel(a, b)
    assert one.mode == two.mode == "tunnel"


@pytest.mark.parametrize("wanted", ["transport", "tunnel"])
def test_transport_mode_through_a_nat(wanted: str) -> None:
    """RFC 7296 §2.23.1: each side has the addresses that packets carry at its place; rekeys by either side keep
    it. Where the daemon wants a tunnel, it is asked again with the selectors as proposed."""
    a, b = two_hosts(HONEST)
    if wanted == "transport":
        accept_transport(a)
        accept_transport(b)
    net = NatNet(a, b, "198.51.100.7")
    a.ike.initiate(request(a, b, mode="transport"), net.now)
    net.run(3)
    outside = (TrafficSelector.of(net.outside),)
    asked = [event for event in b.of(NeedNarrowing) if isinstance(event, NeedNarrowing)]
    assert asked[0].remote_ts == outside
    for host in (None, a, b):
        if host is not None:
            host.ike.rekey_child(next(iter(host.pairs)), net.now)
            net.run(3)
        [one], [two] = a.pairs.values(), b.pairs.values()
        assert one.mode == two.mode == wanted
        assert one.natted == two.natted == (wanted == "transport")
        assert (one.local_ts, one.remote_ts) == (a.selector, b.selector)
        assert (two.local_ts, two.remote_ts) == (b.selector, outside if wanted == "transport" else a.selector)
        assert one.keys_in == two.keys_out
    assert not a.of(ChildFailed)
    assert len(a.of(ChildDown)) == 2
    if wanted == "tunnel":
        assert (asked[1].mode, asked[1].remote_ts) == ("tunnel", a.selector)


def test_a_claimed_address_never_becomes_a_transport_selector_behind_a_nat() -> None:
    """The peer names 192.0.2.99; what is installed is where it really is, and that is what it hears. (It ends that
    tunnel, which is not what it has asked for.)"""
    a, b = two_hosts(HONEST)
    accept_transport(b)
    net = NatNet(a, b, "198.51.100.7")
    claimed = (TrafficSelector.of(ip_address("192.0.2.99")),)
    a.ike.initiate(request(a, b, mode="transport", local_ts=claimed), net.now)
    net.run(3)
    [up] = b.of(ChildUp)
    assert isinstance(up, ChildUp)
    assert up.pair.remote_ts == (TrafficSelector.of(net.outside),)
    assert not a.pairs
    assert not b.pairs


def test_aggregation_is_for_tunnels() -> None:
    """RFC 9347: transport mode goes without, tunnels beside it with."""
    a, b = two_hosts(IkeSettings(liveness_interval=0.0, aggregation=True))
    accept_transport(b)
    net = Net([a, b])
    a.ike.initiate(request(a, b, mode="transport"), net.now)
    net.run(3)
    a.ike.create_child(only_session(a), SUBNETS, net.now)
    net.run(3)
    modes = {pair.mode: pair.aggregation for pair in a.pairs.values()}
    assert modes == {"transport": False, "tunnel": True}
    exchanges = {parse_header(data).exchange for *_, data in net.carried if len(data) > 1}
    assert Exchange.CREATE_CHILD_SA in exchanges


# ---- AH --------------------------------------------------------------------------------------------------

AH = (parse_ah_proposal("sha256-x25519-esn"),)
PLAIN = replace(HONEST, esp_offers=AH)


def test_ah_comes_up_is_rekeyed_and_deleted() -> None:
    """RFC 4302 by IKE: protocol 2 in every payload that names one, integrity keys alone, never in UDP."""
    a, b, net = connected(PLAIN)
    one, two = assert_one_tunnel(a, b)
    assert (one.protocol, two.protocol) == ("ah", "ah")
    assert (str(one.suite), one.encap) == ("sha256-esn", False)
    assert (len(one.keys_in.encryption), len(one.keys_in.integrity)) == (0, 32)
    for host in (a, b):
        before = set(host.pairs)
        host.ike.rekey_child(next(iter(host.pairs)), net.now)
        net.run(5)
        assert before.isdisjoint(host.pairs)
        one, two = assert_one_tunnel(a, b)
        assert one.protocol == "ah"
    a.ike.delete_child(one.spi_in, net.now)
    net.run(2)
    assert not a.pairs
    assert not b.pairs
    assert not b.of(ChildFailed)


def test_ah_beside_esp_and_as_the_second_choice() -> None:
    """A further child of another protocol has Deletes of its own; a peer without AH takes what else is offered."""
    esp = parse_esp_proposal("aes128gcm16")
    a, b, net = connected(replace(HONEST, esp_offers=(esp, *AH)))
    [first] = a.pairs
    a.ike.create_child(only_session(a), replace(SUBNETS, offers=AH), net.now)
    net.run(3)
    ah = pair_of(a, NET_A)
    assert (a.pairs[first].protocol, ah.protocol) == ("esp", "ah")
    b.ike.delete_child(pair_of(b, NET_B).spi_in, net.now)
    net.run(3)
    assert set(a.pairs) == {first}
    assert len(b.pairs) == 1
    a.ike.create_child(only_session(a), replace(SUBNETS, offers=(*AH, esp)), net.now)
    b.ike._context.by_number[only_session(b)].settings = replace(HONEST, esp_offers=(esp,))
    net.run(3)
    assert pair_of(a, NET_A).protocol == "esp"


def test_ah_does_not_pass_a_nat() -> None:
    """RFC 3948 §1: it is refused with a reason, and nothing is left on either side."""
    a, b = two_hosts(PLAIN)
    net = NatNet(a, b, "203.0.113.1")
    a.ike.initiate(request(a, b), net.now)
    net.run(30)
    assert not a.pairs
    assert not b.pairs
    [failed] = a.of(SessionFailed)
    assert isinstance(failed, SessionFailed)
    assert failed.notify == "NO_PROPOSAL_CHOSEN"
