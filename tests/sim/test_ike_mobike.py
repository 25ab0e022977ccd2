"""MOBIKE (RFC 4555) between two endpoints in memory: who moves, what follows when, and what an attacker gets."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address

import pytest

from oepy.ike import mobike
from oepy.ike.events import ChildUp, DownReason, PathLost, PeerMoved, SessionDown
from oepy.ike.flow import Send
from oepy.ike.header import Exchange, parse_header
from oepy.ike.notify import NotifyType
from oepy.ike.payloads import notify
from oepy.ike.session import Session
from oepy.ike.settings import IkeSettings
from oepy.model import Endpoint, IpAddress
from tests.sim.ike_net import Host, Net, assert_one_tunnel, request, two_hosts

MOBILE = IkeSettings(liveness_interval=0.0, mobike=True)
PLAIN = replace(MOBILE, force_encap=False)
NEW, NEWER, OTHER = (ip_address(f"192.0.2.{number}") for number in (11, 12, 22))


class Homes(Net):
    """Hosts may have several addresses, and lose them."""

    def also(self, host: Host, *addresses: IpAddress) -> None:
        for address in addresses:
            self.hosts[address] = host

    def gone(self, address: IpAddress) -> None:
        del self.hosts[address]


def joined(
    settings: IkeSettings = MOBILE, theirs: IkeSettings | None = None, **net: float
) -> tuple[Host, Host, Homes]:
    a, b = two_hosts(settings)
    if theirs is not None:
        b.settings = theirs
        b.__post_init__()
    homes = Homes([a, b], **net)  # type: ignore[arg-type]
    a.ike.initiate(request(a, b), homes.now)
    homes.run(10)
    assert_one_tunnel(a, b)
    return a, b, homes


def session_of(host: Host) -> Session:
    [info] = host.ike.sessions()
    return host.ike._context.by_number[info.session]


def move(host: Host, net: Homes, local: IpAddress | None = None, remote: IpAddress | None = None) -> bool:
    [info] = host.ike.sessions()
    done = host.ike.move(
        info.session,
        Endpoint(local or info.local.address, info.local.port),
        Endpoint(remote or info.remote.address, info.remote.port),
        net.now,
    )
    net.flush(host)
    return done


def ends(host: Host) -> tuple[str, str]:
    """Where the last PeerMoved has ESP go."""
    moved = host.of(PeerMoved)[-1]
    assert isinstance(moved, PeerMoved)
    return str(moved.local.address), str(moved.remote.address)


def test_the_initiator_moves_and_both_follow() -> None:
    """Our SAs at once, the peer's when it has checked that we receive at the new place; the IKE SA goes on."""
    a, b, net = joined()
    assert [info.mobike for host in (a, b) for info in host.ike.sessions()] == ["decides", "follows"]
    net.also(a, NEW)
    net.gone(ip_address(a.address))
    assert move(a, net, NEW)
    assert ends(a) == (str(NEW), b.address)
    assert not b.of(PeerMoved)
    net.run(5)
    assert ends(b) == (b.address, str(NEW))
    assert len(b.of(PeerMoved)) == 1
    assert b.ike.counters["mobike_checked"] == 1
    for host in (a, b):
        [info] = host.ike.sessions()
        host.ike.rekey_child(info.children[0].spi_in, net.now)
        net.run(5)
        host.ike.rekey_ike(info.session, net.now)
        net.run(5)
    one, two = assert_one_tunnel(a, b)
    assert (one.local, one.remote) == (two.remote, two.local)
    assert one.local.address == NEW


def test_without_mobike_nobody_moves() -> None:
    """Either side may leave it out, and a peer without proof does not get it: `move` says no."""
    for ours, theirs in ((False, True), (True, False)):
        a, b, net = joined(replace(MOBILE, mobike=ours), replace(MOBILE, mobike=theirs))
        assert [info.mobike for host in (a, b) for info in host.ike.sessions()] == ["", ""]
        assert not move(a, net, NEW)
    a, b = two_hosts(MOBILE)
    net = Homes([a, b])
    a.ike.initiate(request(a, b, own_auth="null"), net.now)
    net.run(5)
    [info] = b.ike.sessions()
    assert info.mobike == ""


def test_only_who_began_may_update() -> None:
    """A responder's UPDATE_SA_ADDRESSES is refused, also when it has rekeyed the IKE SA: nothing moves."""
    a, b, net = joined()
    net.also(b, OTHER)
    assert not move(b, net, remote=NEW)
    [info] = b.ike.sessions()
    b.ike.rekey_ike(info.session, net.now)
    net.run(5)
    session = session_of(b)
    assert session.initiator
    session.start("forged", lambda _: _ask(notify(NotifyType.UPDATE_SA_ADDRESSES)))
    session.local = Endpoint(OTHER, 4500)
    net.run(5)
    assert a.ike.counters["mobike_refused"] == 1
    assert not a.of(PeerMoved)
    assert str(a.ike.sessions()[0].remote.address) == b.address


def _ask(*payloads: tuple[int, bytes]):  # type: ignore[no-untyped-def]
    yield Send(Exchange.INFORMATIONAL, list(payloads))


def test_esp_does_not_follow_to_where_nobody_answers() -> None:
    """An authenticated peer names a third party's address: the third party gets one small request and its repeats,
    and ESP stays where it was; also the SAs that come up meanwhile."""
    a, b, net = joined()
    victim = ip_address("203.0.113.5")
    move(a, net, victim)  # a's datagrams carry the victim's source; what goes there is lost
    net.run(3)
    assert not b.of(PeerMoved)
    assert b.ike.counters["mobike_checks"] == 1
    session = session_of(b)
    assert session.remote.address == victim
    assert session.esp_ends[1].address == ip_address(a.address)
    child = session.children[next(iter(session.children))]
    mobike_ends = session.esp_ends
    assert child.spi_in in b.pairs
    net.run(120)
    assert not b.of(PeerMoved)
    [down] = b.of(SessionDown)
    assert isinstance(down, SessionDown)
    assert down.reason is DownReason.LIVENESS
    assert mobike_ends[1].address == ip_address(a.address)


def test_children_made_during_a_check_are_at_the_old_place() -> None:
    """What is installed before the new place is certain goes to the old one, and follows with the others."""
    a, b, net = joined()
    session = session_of(b)
    session.remote = Endpoint(NEW, 4500)  # as after an UPDATE whose check is under way
    a.ike.rekey_child(next(iter(a.pairs)), net.now)
    net.run(5)
    up = b.of(ChildUp)[-1]
    assert isinstance(up, ChildUp)
    assert up.pair.remote.address == ip_address(a.address)


def test_a_forged_move_changes_nothing() -> None:
    """Whoever sends a recorded UPDATE from elsewhere, first or again, gets no traffic: the check goes there, and an
    outsider cannot answer it."""
    a, b, net = joined()
    thief = ip_address("203.0.113.66")
    caught: list[bytes] = []

    def catch(source: Endpoint, target: Endpoint, data: bytes) -> bool:
        mine = (
            source.address == NEW and len(data) > 28 and parse_header(data).exchange == Exchange.INFORMATIONAL
        )
        if mine and not caught:
            caught.append(data)
            return False
        return source.address != thief or data in caught

    net.filter = catch
    net.also(a, NEW)
    move(a, net, NEW)
    assert caught
    b.ike.receive(caught[0], Endpoint(ip_address(b.address), 4500), Endpoint(thief, 4500), net.now)
    net.run(1)
    assert not b.of(PeerMoved)
    net.run(30)
    assert thief not in {moved.remote.address for moved in b.of(PeerMoved) if isinstance(moved, PeerMoved)}
    # a's own request, sent again from NEW, is answered from the cache; its liveness finds nobody, or it moves again
    assert a.ike.sessions() or a.of(SessionDown)


def test_another_cookie_ends_the_ike_sa() -> None:
    """RFC 4555 §3.7: a COOKIE2 that is not the one that was sent closes the IKE SA."""
    a, b, net = joined()
    session_of(a)
    served = mobike.serve

    def spoil(session: Session, message):  # type: ignore[no-untyped-def]
        answer = served(session, message)
        return [
            (kind, body[:-1] + bytes((body[-1] ^ 1,))) if b"\x40\x11" in body[:4] else (kind, body)
            for kind, body in answer
        ]

    net.also(a, NEW)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mobike, "serve", spoil)
        move(a, net, NEW)
        net.run(10)
    assert b.ike.counters["mobike_failed"] == 1
    assert not a.ike.sessions()
    assert not b.ike.sessions()
    assert not b.of(PeerMoved)


def test_a_peer_that_returns_cookies_beside_nat_detection_only() -> None:
    """As libreswan 4.10 does: it passes the check, and ESP follows."""
    a, b, net = joined()
    served = mobike.serve

    def scanty(session: Session, message):  # type: ignore[no-untyped-def]
        answer = served(session, message)
        return answer if message.notify(NotifyType.NAT_DETECTION_SOURCE_IP) is not None else []

    net.also(a, NEW)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mobike, "serve", scanty)
        move(a, net, NEW)
        net.run(10)
    assert ends(b) == (b.address, str(NEW))
    assert_one_tunnel(a, b)


def test_a_second_move_outdates_the_first() -> None:
    """Two changes before the first is answered: one more UPDATE, and both ends settle at the last place."""
    a, b, net = joined()
    net.also(a, NEW, NEWER)
    move(a, net, NEW)
    move(a, net, NEWER)
    net.gone(NEW)
    net.run(20)
    assert ends(a) == (str(NEWER), b.address)
    assert ends(b) == (b.address, str(NEWER))
    assert {str(m.remote.address) for m in b.of(PeerMoved) if isinstance(m, PeerMoved)} == {str(NEWER)}
    assert_one_tunnel(a, b)


def test_the_peers_other_address_is_checked_before_use() -> None:
    """The responder names a second address (§3.4). Where the first is silent we go on with the second, ESP only
    when the cookie has come back from there; the responder follows."""
    theirs = replace(MOBILE, additional_addresses=(ip_address("192.0.2.2"), OTHER))
    a, b, net = joined(replace(MOBILE, liveness_interval=30.0), theirs)
    [info] = a.ike.sessions()
    assert info.peer_addresses == (OTHER,)
    net.also(b, OTHER)
    net.gone(ip_address(b.address))
    net.run(60)
    assert a.of(PathLost)
    assert not a.of(PeerMoved)
    assert move(a, net, remote=OTHER)
    assert not a.of(PeerMoved)
    net.run(10)
    assert ends(a) == (a.address, str(OTHER))
    assert ends(b) == (str(OTHER), a.address)
    assert_one_tunnel(a, b)


def test_a_path_that_nobody_mends_ends_the_session() -> None:
    """PathLost is an offer: without a move the silent peer counts as dead, after a bounded number of tries."""
    theirs = replace(MOBILE, additional_addresses=(OTHER,))
    a, b, net = joined(replace(MOBILE, liveness_interval=30.0), theirs)
    net.gone(ip_address(b.address))
    net.run(300)
    assert 1 <= len(a.of(PathLost)) <= mobike.MAX_TRIES
    [down] = a.of(SessionDown)
    assert isinstance(down, SessionDown)
    assert down.reason is DownReason.LIVENESS


def test_a_responder_that_moves_says_so() -> None:
    """It tells its new addresses from its new place; who decides hears that the old one is gone, and moves."""
    theirs = replace(MOBILE, additional_addresses=(ip_address("192.0.2.2"), OTHER))
    a, b, net = joined(theirs=theirs)
    net.also(b, OTHER)
    assert move(b, net, local=OTHER)
    net.run(3)
    assert not a.of(PathLost)  # the old address is still named
    session_of(b).settings = replace(theirs, additional_addresses=(OTHER,))
    assert move(b, net, local=ip_address("192.0.2.2"))
    assert move(b, net, local=OTHER)
    net.gone(ip_address("192.0.2.2"))
    net.run(3)
    assert a.of(PathLost)
    [info] = a.ike.sessions()
    assert OTHER in info.peer_addresses
    move(a, net, remote=OTHER)
    net.run(5)
    assert ends(a) == (a.address, str(OTHER))
    assert ends(b) == (str(OTHER), a.address)


def test_a_nat_comes_in_between_and_goes() -> None:
    """The UPDATE finds it (§3.5): ESP goes into UDP on both sides, and out of it again."""
    a, b, net = joined(PLAIN)
    assert not next(iter(a.pairs.values())).encap
    assert session_of(a).remote.port == 4500  # §3.3: there from IKE_AUTH on
    outside = ip_address("192.0.2.99")
    net.also(a, NEW)
    carry = net._carry

    def translate(source: Endpoint, target: Endpoint, data: bytes) -> None:
        if source.address == NEW:
            source = Endpoint(outside, 40000)
        elif target == Endpoint(outside, 40000):
            target = Endpoint(NEW, 4500)
        carry(source, target, data)

    net._carry = translate  # type: ignore[method-assign]
    move(a, net, NEW)
    net.run(5)
    for host in (a, b):
        moved = host.of(PeerMoved)[-1]
        assert isinstance(moved, PeerMoved)
        assert moved.encap
    moved = b.of(PeerMoved)[-1]
    assert isinstance(moved, PeerMoved)
    assert moved.remote == Endpoint(outside, 40000)
    before = b.ike.counters.get("keepalives", 0)
    net.run(50)
    assert b.ike.counters["keepalives"] > before
    net.also(a, ip_address(a.address))
    move(a, net, ip_address(a.address))
    net.run(5)
    for host in (a, b):
        moved = host.of(PeerMoved)[-1]
        assert isinstance(moved, PeerMoved)
        assert not moved.encap
    assert_one_tunnel(a, b)


def test_a_nat_that_forgot_us_is_found_by_asking() -> None:
    """§3.8: nothing is followed by itself; the answer to our question says where the peer sees us, and we move."""
    a, b, net = joined(replace(MOBILE, liveness_interval=30.0), MOBILE)
    ports = {"now": 14500}
    outside = ip_address("192.0.2.99")
    carry = net._carry

    def translate(source: Endpoint, target: Endpoint, data: bytes) -> None:
        if source.address == ip_address(a.address):
            source = Endpoint(outside, ports["now"])
        elif target.address == outside:
            if target.port != ports["now"]:
                return
            target = a.ike.sessions()[0].local
        carry(source, target, data)

    net._carry = translate  # type: ignore[method-assign]
    [info] = a.ike.sessions()
    move(a, net, ip_address(a.address))
    a.ike.check_liveness(info.session, net.now)
    net.run(40)
    ports["now"] = 24500
    a.ike.check_liveness(info.session, net.now)
    net.run(2)
    a.ike.check_liveness(info.session, net.now)
    net.run(40)
    moved = b.of(PeerMoved)[-1]
    assert isinstance(moved, PeerMoved)
    assert moved.remote == Endpoint(outside, 24500)
    assert_one_tunnel(a, b)


def test_no_nats_allowed_is_obeyed() -> None:
    """§3.9: addresses and ports other than the peer has them are answered UNEXPECTED_NAT_DETECTED, and nothing
    moves; the right ones are no obstacle."""
    a, b, net = joined()
    net.also(a, NEW)
    there = ip_address(b.address).packed
    for named, refused in ((ip_address("10.0.0.1").packed, 1), (NEW.packed, 1)):
        session = session_of(a)
        session.local = Endpoint(NEW, 4500)
        claim = notify(NotifyType.NO_NATS_ALLOWED, named + there + (4500).to_bytes(2, "big") * 2)
        session.start(
            "claims",
            lambda _, claim=claim: _ask(notify(NotifyType.UPDATE_SA_ADDRESSES), claim),  # type: ignore[misc]
        )
        net.run(5)
        assert b.ike.counters["mobike_refused"] == refused
        assert bool(b.of(PeerMoved)) is (named == NEW.packed)


def test_transport_mode_stays_where_it_is() -> None:
    """Its addresses are the outer ones: neither side moves it."""
    a, b = two_hosts(MOBILE)
    narrow = b.reply
    b.reply = lambda q: (  # type: ignore[method-assign]
        replace(answer, mode="transport") if hasattr(answer := narrow(q), "remote_ts") else answer
    )
    net = Homes([a, b])
    a.ike.initiate(request(a, b, mode="transport"), net.now)
    net.run(5)
    net.also(a, NEW)
    assert not move(a, net, NEW)
    session_of(a).local = Endpoint(NEW, 4500)
    session_of(a).start("forged", lambda _: _ask(notify(NotifyType.UPDATE_SA_ADDRESSES)))
    net.run(5)
    assert b.ike.counters["mobike_refused"] == 1
    assert not b.of(PeerMoved)


COMMANDS: dict[str, Callable[[Host, Homes], None]] = {
    "rekey-ike": lambda host, net: host.ike.rekey_ike(host.ike.sessions()[0].session, net.now),
    "rekey-child": lambda host, net: host.ike.rekey_child(next(iter(host.pairs)), net.now),
    "liveness": lambda host, net: host.ike.check_liveness(host.ike.sessions()[0].session, net.now),
}


@pytest.mark.parametrize("seed", [*range(30), 48, 53, 228, 230, 458, 782])  # the last ones have found faults
def test_moves_collide_with_everything_and_end_well(seed: int) -> None:
    """Moves amid rekeys of both kinds by both ends, with loss, reordering and duplicates: one tunnel, where both
    say the same of each other, at the last place; and never without a tunnel between."""
    dice = random.Random(seed)
    a, b, net = joined(loss=0.0, copies=0.2)
    net.random = dice
    net.loss = dice.choice((0.0, 0.1, 0.3))
    net.also(a, NEW, NEWER)
    for host in (a, b):
        host.gaps.clear()
    places = [NEW, NEWER, ip_address(a.address)]
    last = ip_address(a.address)
    for _ in range(6):
        action = dice.choice(("move", *COMMANDS))
        if action == "move":
            last = dice.choice(places)
            move(a, net, last)
        else:
            host = dice.choice((a, b))
            if host.ike.sessions() and host.pairs:
                COMMANDS[action](host, net)
        net.run(dice.choice((0.0, 0.004, 0.02, 0.5)))
    net.loss = 0.0
    net.run(400)
    assert_one_tunnel(a, b)
    assert not a.gaps
    assert not b.gaps
    one, two = session_of(a), session_of(b)
    assert one.local.address == last
    assert one.esp_ends[:2] == (one.local, one.remote)
    assert two.esp_ends[:2] == (one.remote, one.local)
    assert len(a.ike.sessions()) == len(b.ike.sessions()) == 1
