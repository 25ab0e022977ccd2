"""NAT, ports, groups of rekeys, and what the daemon may tell of traffic, over the in-memory router."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address

import pytest

from oepy.ike.algorithms import parse_esp_proposal, parse_ike_proposal
from oepy.ike.events import ChildUp, ChildUsable, Datagram, IkeEstablished, PeerMoved
from oepy.ike.header import Exchange, parse_header
from oepy.ike.settings import IkeSettings, Lifetimes
from oepy.model import Endpoint
from tests.sim.ike_net import Host, Net, assert_one_tunnel, request, two_hosts

QUIET = IkeSettings(liveness_interval=0.0)
HONEST = replace(QUIET, force_encap=False)


class NatNet(Net):
    """`inside` is seen by the others as `outside`, with ports moved by `shift`."""

    def __init__(self, inside: Host, other: Host, outside: str) -> None:
        super().__init__([inside, other])
        self.inside, self.other = inside, other
        self.outside = ip_address(outside)
        self.shift = 10_000

    def _carry(self, source: Endpoint, target: Endpoint, data: bytes) -> None:
        if source.address == self.inside.at.address:
            source = Endpoint(self.outside, source.port + self.shift)
            self._deliver(self.other, source, target, data)
        elif target.address == self.outside and target.port >= self.shift:
            self._deliver(
                self.inside, source, Endpoint(self.inside.at.address, target.port - self.shift), data
            )

    def _deliver(self, host: Host, source: Endpoint, target: Endpoint, data: bytes) -> None:
        self.carried.append((self.now, source, target, data))

        def action() -> None:
            host.ike.receive(data, target, source, self.now)
            self.flush(host)

        self.at(self.now + self.delay, action)


def behind_nat() -> tuple[Host, Host, NatNet]:
    a, b = two_hosts(HONEST)
    net = NatNet(a, b, "198.51.100.7")
    a.ike.initiate(request(a, b), net.now)
    net.run(3)
    return a, b, net


def test_a_real_nat_is_found_and_kept_open() -> None:
    """Both sides encapsulate, the responder answers to the mapped port, and keepalives go every 20 s."""
    a, b, net = behind_nat()
    assert len(a.pairs) == len(b.pairs) == 1
    [pair] = b.pairs.values()
    assert pair.encap
    assert pair.remote == Endpoint(net.outside, 14500)
    before = b.ike.counters.get("keepalives", 0)
    net.run(100)
    assert b.ike.counters["keepalives"] - before in (4, 5)


def test_a_nat_that_changes_its_mapping_is_followed() -> None:
    """An authenticated message from the new port moves the peer, and the daemon hears of it."""
    a, b, net = behind_nat()
    net.shift = 20_000
    [session] = a.ike.sessions()
    a.ike.check_liveness(session.session, net.now)
    net.run(3)
    [moved] = b.of(PeerMoved)
    assert isinstance(moved, PeerMoved)
    assert moved.remote == Endpoint(net.outside, 24500)
    [info] = b.ike.sessions()
    b.ike.check_liveness(info.session, net.now)
    net.run(30)
    assert len(a.pairs) == len(b.pairs) == 1


def test_without_nat_and_without_force_all_stays_on_port_500() -> None:
    """force_encap False between hosts that see each other: no encapsulation, no keepalives."""
    a, b = two_hosts(HONEST)
    net = Net([a, b])
    a.ike.initiate(request(a, b), net.now)
    net.run(60)
    one, _ = assert_one_tunnel(a, b)
    assert not one.encap
    assert {target.port for _, _, target, _ in net.carried} == {500}
    assert b.ike.counters.get("keepalives", 0) == 0


def test_one_side_may_force_encapsulation() -> None:
    """It is enough that one of the two pretends a NAT; the one without a NAT sends no keepalives for it."""
    a, b = two_hosts(HONEST)
    b.settings = QUIET
    b.__post_init__()
    net = Net([a, b])
    a.ike.initiate(request(a, b), net.now)
    net.run(60)
    one, two = assert_one_tunnel(a, b)
    assert one.encap
    assert two.encap
    assert b.ike.counters.get("keepalives", 0) == 0


def _with_offers(**changes: object) -> tuple[Host, Host, Net]:
    a, b = two_hosts(QUIET)
    b.settings = replace(QUIET, **changes)  # type: ignore[arg-type]
    b.__post_init__()
    net = Net([a, b])
    a.ike.initiate(request(a, b), net.now)
    net.run(3)
    assert_one_tunnel(a, b)
    return a, b, net


def _rekeys(net: Net) -> int:
    return sum(
        parse_header(data).exchange == Exchange.CREATE_CHILD_SA for *_, data in net.carried if len(data) > 1
    )


def test_a_child_rekey_in_the_wrong_group_first() -> None:
    """INVALID_KE_PAYLOAD in CREATE_CHILD_SA costs one round trip."""
    a, b, net = _with_offers(esp_offers=(parse_esp_proposal("aes128gcm16-ecp384"),))
    a.ike.rekey_child(next(iter(a.pairs)), net.now)
    net.run(3)
    assert_one_tunnel(a, b)
    assert len(a.of(ChildUp)) == 2
    assert _rekeys(net) == 4


def test_a_peer_without_forward_secrecy_is_rekeyed_all_the_same() -> None:
    """NO_PROPOSAL_CHOSEN for the offer with a key exchange: once more without, in both directions."""
    a, b, net = _with_offers(esp_offers=(parse_esp_proposal("aes128gcm16"),))
    for host in (a, b):
        host.ike.rekey_child(next(iter(host.pairs)), net.now)
        net.run(3)
        assert_one_tunnel(a, b)
    assert len(a.of(ChildUp)) == 3


def test_an_ike_rekey_that_the_peer_refuses_keeps_the_old_one() -> None:
    """No proposal in common any more: the IKE SA stays, the reason is there to read, and it tries later."""
    a, b, net = _with_offers()
    object.__setattr__(b.ike._context.settings, "ike_offers", (parse_ike_proposal("aes128-sha256-ecp256"),))
    [before] = a.ike.sessions()
    object.__setattr__(
        a.ike._context.settings, "ike_offers", (parse_ike_proposal("aes256gcm16-prfsha256-x25519"),)
    )
    a.ike.rekey_ike(before.session, net.now)
    net.run(3)
    [after] = a.ike.sessions()
    assert after.spi_i == before.spi_i
    assert "NO_PROPOSAL_CHOSEN" in after.last_error
    assert net.now < after.rekey_at < net.now + 20
    assert_one_tunnel(a, b)


def test_traffic_shows_that_the_peer_has_the_new_sa() -> None:
    """While the initiator's Delete of the old SA is lost, a packet on the new one lets the responder send."""
    a, b, net = _with_offers()
    drop_deletes: Callable[[Endpoint, Endpoint, bytes], bool] = lambda *talk: (  # noqa: E731
        parse_header(talk[2]).exchange != Exchange.INFORMATIONAL
    )
    net.filter = drop_deletes
    a.ike.rekey_child(next(iter(a.pairs)), net.now)
    net.run(3)
    [new] = set(b.pairs) - b.sendable
    assert not b.of(ChildUsable)
    b.ike.traffic_seen(new, net.now)
    net.flush(b)
    assert new in b.sendable
    net.filter = lambda *_: True
    net.run(30)
    assert_one_tunnel(a, b)


def test_traffic_spares_liveness_questions() -> None:
    """As long as the daemon sees packets from the peer, nobody asks whether it lives."""
    a, b = two_hosts(replace(QUIET, liveness_interval=10.0, lifetimes=Lifetimes()))
    net = Net([a, b])
    a.ike.initiate(request(a, b), net.now)
    net.run(1)
    for _ in range(20):
        for host in (a, b):
            host.ike.traffic_seen(next(iter(host.pairs)), net.now)
        net.run(5)
    assert "liveness_checks" not in a.ike.counters
    net.run(15)
    assert a.ike.counters["liveness_checks"] >= 1


@pytest.mark.parametrize("number", [50])
def test_many_peers_at_once(number: int) -> None:
    """One responder, many initiators on a lossy net: each gets its tunnel, SPIs are all different."""
    _, b = two_hosts()
    hosts = [Host(f"h{n}", f"198.18.{n}.1", b.key, QUIET, 100 + n) for n in range(number)]
    for host in hosts:
        b.keys[host.address] = list(host.public)
    net = Net([b, *hosts], seed=5, loss=0.1)
    for host in hosts:
        host.ike.initiate(request(host, b), net.now)
    net.run(60)
    assert len(b.pairs) == len(b.of(IkeEstablished)) == number
    assert all(len(host.pairs) == 1 for host in hosts)
    assert not any(isinstance(event, Datagram) for event in b.events)


@pytest.mark.parametrize("proven", [True, False])
def test_a_nat_with_another_address_is_followed_where_the_peer_has_proved_a_key(proven: bool) -> None:
    """RFC 7296 §2.23 without MOBIKE: the whole mapping changes. Whoever proved nothing but that it receives at its
    address stays there; and nobody is followed who was not behind a NAT."""
    a, b = two_hosts(HONEST)
    net = NatNet(a, b, "198.51.100.7")
    a.ike.initiate(request(a, b, own_auth="pubkey" if proven else "null"), net.now)
    net.run(3)
    [session] = a.ike.sessions()
    net.outside = ip_address("198.51.100.99")
    a.ike.check_liveness(session.session, net.now)
    net.run(3)
    moved = [str(event.remote.address) for event in b.of(PeerMoved) if isinstance(event, PeerMoved)]
    assert moved == (["198.51.100.99"] if proven else [])
    assert (b.ike.counters.get("moves_refused", 0) > 0) is not proven
    if proven:
        [info] = b.ike.sessions()
        b.ike.rekey_child(info.children[0].spi_in, net.now)
        net.run(5)
        [pair] = b.pairs.values()
        assert pair.remote.address == net.outside


def test_without_a_nat_nobody_is_followed() -> None:
    """A message of the peer's from another address changes nothing where no NAT was seen."""
    a, b = two_hosts(HONEST)
    net = Net([a, b])
    a.ike.initiate(request(a, b), net.now)
    net.run(3)
    elsewhere = ip_address("192.0.2.77")
    net.hosts[elsewhere] = a
    [info] = a.ike.sessions()
    a.ike._context.by_number[info.session].local = Endpoint(elsewhere, 500)
    a.ike.check_liveness(info.session, net.now)
    net.run(3)
    assert not b.of(PeerMoved)
    assert str(b.ike.sessions()[0].remote.address) == a.address
