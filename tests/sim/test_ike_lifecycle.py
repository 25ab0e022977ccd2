"""Rekeys, deletes, collisions, duplicates and restarts, over the in-memory router."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest

from oepy.ike.algorithms import to_proposals
from oepy.ike.events import (
    ChildDown,
    ChildUp,
    DownReason,
    FailureKind,
    IkeRekeyed,
    Refused,
    SessionDown,
    SessionFailed,
)
from oepy.ike.header import Exchange, PayloadType, parse_header
from oepy.ike.ike_rekey import MAX_PREDECESSORS
from oepy.ike.key_exchange import generate
from oepy.ike.payload_sa import SaPayload, build_sa
from oepy.ike.payloads import build_ke
from oepy.ike.settings import IkeSettings, Lifetimes, Retransmission
from oepy.model import Authenticated
from tests.sim.ike_net import Host, Net, assert_mirror, assert_one_tunnel, request, two_hosts

QUIET = IkeSettings(liveness_interval=0.0)
PATIENT = replace(QUIET, handshake=Retransmission(total=60.0), established=Retransmission(total=60.0))


def connected(settings: IkeSettings = QUIET, seed: int = 1, loss: float = 0.0) -> tuple[Host, Host, Net]:
    a, b = two_hosts(settings)
    net = Net([a, b], seed, delay=0.05 if loss else 0.01)
    a.ike.initiate(request(a, b), net.now)
    net.run(5)
    assert_one_tunnel(a, b)
    net.loss = net.copies = loss
    return a, b, net


def only_session(host: Host) -> int:
    [info] = host.ike.sessions()
    return info.session


def only_pair(host: Host) -> int:
    [spi] = host.pairs
    return spi


def assert_never_without_a_tunnel(*hosts: Host) -> None:
    for host in hosts:
        assert host.gaps == []


@pytest.mark.parametrize("by_initiator", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_a_child_rekey_replaces_the_pair_without_a_gap(by_initiator: bool, seed: int) -> None:
    """Either side rekeys: new keys, the old pair goes only after the new one can be used, also with loss."""
    a, b, net = connected(PATIENT, seed, loss=0.3 if seed else 0.0)
    old = next(iter(a.pairs.values()))
    host = a if by_initiator else b
    host.ike.rekey_child(only_pair(host), net.now)
    net.run(200)
    one, _ = assert_one_tunnel(a, b)
    assert one.spi_in != old.spi_in
    assert one.keys_in != old.keys_in
    assert_never_without_a_tunnel(a, b)
    for side in (a, b):
        [down] = side.of(ChildDown)
        assert isinstance(down, ChildDown)
        assert down.reason is DownReason.REKEYED
        assert down.remaining in side.pairs


@pytest.mark.parametrize("by_initiator", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_an_ike_rekey_keeps_session_and_children(by_initiator: bool, seed: int) -> None:
    """Number and children stay, SPIs change on both sides alike, and the new SA can do everything."""
    a, b, net = connected(PATIENT, seed, loss=0.3 if seed else 0.0)
    before = a.ike.sessions()[0]
    host = a if by_initiator else b
    host.ike.rekey_ike(only_session(host), net.now)
    net.run(200)
    assert_one_tunnel(a, b)
    [mine], [theirs] = a.ike.sessions(), b.ike.sessions()
    assert mine.session == before.session
    assert (mine.spi_i, mine.spi_r) == (theirs.spi_i, theirs.spi_r)
    assert mine.spi_i != before.spi_i
    assert not a.of(SessionDown, ChildDown)
    assert not b.of(SessionDown, ChildDown)
    host.ike.rekey_child(only_pair(host), net.now)
    net.run(200)
    assert_one_tunnel(a, b)
    b.ike.terminate(only_session(b), net.now)
    net.run(200)
    assert not a.ike.sessions()
    assert not a.pairs


@pytest.mark.parametrize("seed", range(30))
def test_simultaneous_child_rekeys_end_in_one_pair(seed: int) -> None:
    """Both sides rekey the same child at once (RFC 7296 §2.8.1), with and without loss."""
    a, b, net = connected(PATIENT, seed, loss=0.3 if seed >= 10 else 0.0)
    a.random.seed(seed)  # other nonces: the other side wins in some of the runs
    a.ike.rekey_child(only_pair(a), net.now)
    if seed % 3 == 0:
        net.run(0.02)
    b.ike.rekey_child(next(iter(b.pairs)), net.now)
    net.run(300)
    assert_one_tunnel(a, b)
    assert_never_without_a_tunnel(a, b)


@pytest.mark.parametrize("seed", range(30))
def test_simultaneous_ike_rekeys_end_in_one_ike_sa(seed: int) -> None:
    """Both sides rekey the IKE SA at once; what is left carries a child rekey by either side."""
    a, b, net = connected(PATIENT, seed, loss=0.3 if seed >= 10 else 0.0)
    a.random.seed(seed)
    a.ike.rekey_ike(only_session(a), net.now)
    if seed % 3 == 0:
        net.run(0.02)
    b.ike.rekey_ike(only_session(b), net.now)
    net.run(300)
    assert_one_tunnel(a, b)
    [mine], [theirs] = a.ike.sessions(), b.ike.sessions()
    assert (mine.spi_i, mine.spi_r) == (theirs.spi_i, theirs.spi_r)
    assert len(a.ike._context.by_spi) == len(b.ike._context.by_spi) == 1
    assert a.of(IkeRekeyed)
    for host in (a, b):
        host.ike.rekey_child(only_pair(host), net.now)
        net.run(200)
        assert_one_tunnel(a, b)
    assert_never_without_a_tunnel(a, b)


@pytest.mark.parametrize("seed", range(12))
def test_an_ike_rekey_and_a_child_rekey_at_once(seed: int) -> None:
    """One side rekeys the IKE SA while the other rekeys the child: TEMPORARY_FAILURE sorts it out."""
    settings = replace(PATIENT, lifetimes=Lifetimes(rekey_retry=2.0))
    a, b, net = connected(settings, seed, loss=0.3 if seed >= 6 else 0.0)
    a.ike.rekey_ike(only_session(a), net.now)
    b.ike.rekey_child(only_pair(b), net.now)
    net.run(300)
    assert_one_tunnel(a, b)
    assert len(a.ike._context.by_spi) == len(b.ike._context.by_spi) == 1
    assert_never_without_a_tunnel(a, b)


@pytest.mark.parametrize("by_initiator", [True, False])
def test_deleting_the_child_deletes_it_in_pairs(by_initiator: bool) -> None:
    """Delete of one child: both sides lose the pair, the childless IKE SA follows."""
    a, b, net = connected()
    host, peer = (a, b) if by_initiator else (b, a)
    host.ike.delete_child(only_pair(host), net.now)
    net.run(5)
    assert not a.pairs
    assert not b.pairs
    [mine], [theirs] = host.of(ChildDown), peer.of(ChildDown)
    assert isinstance(mine, ChildDown)
    assert isinstance(theirs, ChildDown)
    assert mine.reason is DownReason.LOCAL
    assert theirs.reason is DownReason.PEER_DELETE
    assert theirs.remaining is None
    net.run(60)
    assert not a.ike.sessions()
    assert not b.ike.sessions()


def test_both_sides_delete_at_once() -> None:
    """Crossing Deletes of the same child end on both sides in nothing, without an error."""
    a, b, net = connected()
    a.ike.delete_child(only_pair(a), net.now)
    b.ike.delete_child(only_pair(b), net.now)
    net.run(5)
    assert not a.pairs
    assert not b.pairs


def test_terminate_takes_everything_down() -> None:
    """Both sides hear the end: local here, peer-delete there."""
    a, b, net = connected()
    a.ike.terminate(only_session(a), net.now)
    net.run(5)
    [here], [there] = a.of(SessionDown), b.of(SessionDown)
    assert isinstance(here, SessionDown)
    assert isinstance(there, SessionDown)
    assert (here.reason, there.reason) == (DownReason.LOCAL, DownReason.PEER_DELETE)
    assert not a.pairs
    assert not b.pairs
    assert a.ike.next_timer() is None


@pytest.mark.parametrize("seed", range(40))
def test_both_sides_begin_at_once_and_keep_one_tunnel(seed: int) -> None:
    """Simultaneous initiation, INITIAL_CONTACT in both: one tunnel in the end and never none in between."""
    a, b = two_hosts(PATIENT)
    a.random.seed(seed)
    net = Net([a, b], seed, loss=0.3 if seed >= 15 else 0.0, copies=0.2 if seed >= 15 else 0.0)
    if seed % 4 == 3:
        b.delay = 0.3
    a.ike.initiate(request(a, b), net.now)
    net.run((seed % 5) * 0.006)
    b.ike.initiate(request(b, a), net.now)
    net.run(300)
    assert_one_tunnel(a, b)
    assert_never_without_a_tunnel(a, b)
    assert len(a.ike.sessions()) == len(b.ike.sessions()) == 1
    failed = [event for host in (a, b) for event in host.of(SessionFailed)]
    assert all(isinstance(event, SessionFailed) and event.kind is FailureKind.SUPERSEDED for event in failed)


@pytest.mark.parametrize("seed", range(20))
def test_the_authenticated_of_two_simultaneous_tunnels_stays(seed: int) -> None:
    """One side begins with AUTH NULL, the other with its key: the tunnel of the keys is what is left."""
    a, b = two_hosts(PATIENT)
    net = Net([a, b], seed, loss=0.2 if seed >= 10 else 0.0)
    a.ike.initiate(request(a, b, own_auth="null"), net.now)
    net.run((seed % 5) * 0.008)
    b.ike.initiate(request(b, a), net.now)
    net.run(300)
    one, two = assert_one_tunnel(a, b)
    assert one.authenticated is two.authenticated is Authenticated.DNS
    assert_never_without_a_tunnel(a, b)


def test_a_null_peer_cannot_touch_an_authenticated_tunnel() -> None:
    """An established pair of keys stays; the nobody from the same address gets TS_UNACCEPTABLE."""
    a, b, net = connected()
    attacker = replace(a, seed=9, name="attacker", pairs={}, sendable=set(), events=[], gaps=[], replaced={})
    net.hosts[a.at.address] = attacker
    attacker.ike.initiate(request(attacker, b, own_auth="null"), net.now)
    net.run(3)
    [failed] = attacker.of(SessionFailed)
    assert isinstance(failed, SessionFailed)
    assert failed.notify == "TS_UNACCEPTABLE"
    assert len(b.pairs) == 1
    assert not b.of(ChildDown)


def test_a_restarted_peer_replaces_its_old_tunnel() -> None:
    """INITIAL_CONTACT after a crash: the survivor drops the old pair and has exactly the new one."""
    a, b, net = connected()
    a.restart()
    net.run(1)
    a.ike.initiate(request(a, b), net.now)
    net.run(5)
    assert_one_tunnel(a, b)
    [down] = b.of(ChildDown)
    assert isinstance(down, ChildDown)
    assert down.reason is DownReason.SUPERSEDED


def test_a_restarted_peer_without_initial_contact_is_found_out() -> None:
    """The survivor asks over the old SA whether it still lives, and lets it go."""
    a, b, net = connected()
    a.restart()
    net.run(1)
    a.ike.initiate(request(a, b, initial_contact=False), net.now)
    net.run(60)
    assert_one_tunnel(a, b)


def test_initial_contact_of_another_identity_touches_nothing() -> None:
    """Only SAs of the same proven identity go."""
    a, b, net = connected()
    c = Host("c", "192.0.2.3", a.key, QUIET, 5)
    net.hosts[c.at.address] = c
    b.keys[c.address] = list(c.public)
    c.ike.initiate(request(c, b), net.now)
    net.run(5)
    assert len(b.pairs) == 2
    assert not b.of(ChildDown)
    assert len(a.pairs) == len(c.pairs) == 1


def test_initial_contact_at_another_address_of_ours_touches_nothing() -> None:
    """A host with several addresses: a tunnel to one does not end those to the others."""
    a, b, net = connected()
    second = replace(b.at, address=ip_address("192.0.2.22"))
    net.hosts[second.address] = b
    net.run(1)
    a.ike.initiate(request(a, b, remote=second), net.now)
    net.run(5)
    assert not b.of(ChildDown)
    assert len(b.pairs) == 2


def test_a_dead_peer_is_noticed() -> None:
    """Liveness: silence for the interval, then an unanswered question, then ChildDown(liveness)."""
    a, b, net = connected(replace(QUIET, liveness_interval=10.0))
    del net.hosts[b.at.address]
    net.run(60)
    [down] = a.of(ChildDown)
    assert isinstance(down, ChildDown)
    assert down.reason is DownReason.LIVENESS
    assert not a.ike.sessions()


def test_a_living_peer_is_left_alone() -> None:
    """With liveness on, nothing goes down in an hour, and only few messages are spent."""
    a, b, net = connected(replace(QUIET, liveness_interval=60.0, lifetimes=Lifetimes(child_rekey=7200.0)))
    carried = len(net.carried)
    net.run(3000)
    assert_one_tunnel(a, b)
    assert len(net.carried) - carried <= 2 * 2 * 3000 / 60


@pytest.mark.parametrize("seed", range(4))
def test_a_day_of_lifetimes(seed: int) -> None:
    """Twelve hours with loss: child and IKE rekeys by both sides' timers, always one tunnel, no gap."""
    settings = replace(PATIENT, lifetimes=Lifetimes(ike_rekey=4000.0, child_rekey=1000.0, child_hard=1300.0))
    a, b, net = connected(settings, seed, loss=0.1)
    net.run(12 * 3600)
    assert_one_tunnel(a, b)
    assert_never_without_a_tunnel(a, b)
    assert a.ike.counters["ike_rekeyed"] >= 8
    assert len(a.of(ChildUp)) >= 30
    assert len(a.ike._context.by_spi) <= 2


def test_a_late_answer_does_not_leave_half_a_tunnel() -> None:
    """The initiator gave up while the responder was still looking for its key: the late answer is met
    with a Delete, and the responder keeps nothing."""
    a, b = two_hosts()
    b.delay = 1.5
    net = Net([a, b])
    a.ike.initiate(request(a, b, retransmission=Retransmission(total=3.0)), net.now)
    net.run(3.5)
    [failed] = a.of(SessionFailed)
    assert isinstance(failed, SessionFailed)
    assert failed.kind is FailureKind.SILENT
    net.run(60)
    assert a.ike.counters["late_auth"] == 1
    assert b.of(ChildUp)
    assert not a.ike.sessions()
    assert not b.ike.sessions()
    assert not b.pairs


def test_a_mirror_is_checked_by_the_tests_themselves() -> None:
    """The helper refuses pairs that do not fit: the tests above can fail."""
    a, _, _ = connected()
    pair = next(iter(a.pairs.values()))
    with pytest.raises(AssertionError):
        assert_mirror(pair, pair)


def test_a_peer_that_rekeys_on_and_on_and_deletes_nothing_fills_no_memory() -> None:
    """Of the IKE SAs that await their Delete only a few are kept; the tunnel stays as it is."""
    a, b, net = connected(QUIET)
    net.filter = lambda _, __, data: parse_header(data).exchange != Exchange.INFORMATIONAL
    for _ in range(12):
        a.ike.rekey_ike(a.ike.sessions()[0].session, net.now)
        net.run(1)
        assert len(b.ike._context.by_spi) <= 1 + MAX_PREDECESSORS
    assert len(b.of(IkeRekeyed)) == 12
    net.run(400)
    assert len(b.ike._context.by_spi) == len(a.ike._context.by_spi) == 1
    assert_one_tunnel(a, b)


def test_a_replaced_ike_sa_outlives_the_retransmissions_of_its_peer() -> None:
    """Its Delete may come late: strongSwan repeats a request for 165 s."""
    a, b, net = connected(QUIET)
    net.filter = lambda _, __, data: parse_header(data).exchange != Exchange.INFORMATIONAL
    a.ike.rekey_ike(only_session(a), net.now)
    net.run(170)
    assert len(b.ike._context.by_spi) == 2
    net.run(20)
    assert len(b.ike._context.by_spi) == 1


@pytest.mark.parametrize("seed", range(40))
def test_simultaneous_child_rekeys_end_in_one_pair_also_with_a_slow_daemon(seed: int) -> None:
    """Our own rekey may be over while the daemon still thinks about the peer's (§2.8.1): the loser is known
    all the same, and neither side is left with two tunnels."""
    a, b, net = connected(QUIET, seed)
    a.random.seed(seed)
    b.random.seed(seed + 99)
    a.delay, b.delay = (seed % 3) * 0.15, (seed % 7) * 0.1
    a.ike.rekey_child(only_pair(a), net.now)
    net.run((seed % 5) * 0.02)
    b.ike.rekey_child(next(iter(b.pairs)), net.now)
    net.run(30)
    assert_one_tunnel(a, b)
    assert_never_without_a_tunnel(a, b)


def test_a_refused_rekey_of_the_peer_does_not_end_ours() -> None:
    """Ours gave way to the peer's, which the daemon then refused: the child is rekeyed later, not never."""
    settings = replace(QUIET, lifetimes=Lifetimes(rekey_retry=2.0))
    for seed in range(12):
        a, b, net = connected(settings, seed)
        a.random.seed(seed)
        before = only_pair(a)
        a.delay, a.refuse = 0.4, Refused("not now")
        a.ike.rekey_child(before, net.now)
        b.ike.rekey_child(only_pair(b), net.now)
        net.run(1.5)
        a.delay, a.refuse = 0.0, None
        net.run(20)
        assert_one_tunnel(a, b)
        assert only_pair(a) != before


def test_a_peer_that_rekeys_again_and_again_into_ours_makes_one_candidate() -> None:
    """While our own IKE rekey is unanswered, only one of the peer's is kept beside it."""
    a, b, net = connected(replace(QUIET, ike_offers=QUIET.ike_offers[1:]))  # no additional key exchange
    net.filter = lambda *_: False
    a.ike.rekey_ike(only_session(a), net.now)
    net.flush(a)
    hostile = b.ike._context.by_number[only_session(b)]
    offers = QUIET.ike_offers[1:]
    for number in range(6):
        spi = bytes((number + 1,)) * 8
        share = generate("x25519", b.random.randbytes)
        payloads = [
            (PayloadType.SA, build_sa(SaPayload(to_proposals(offers, spi)))),
            (PayloadType.NONCE, b.random.randbytes(32)),
            (PayloadType.KE, build_ke(31, share.public)),
        ]
        [data] = hostile.build(Exchange.CREATE_CHILD_SA, number, payloads, response=False)
        ports = hostile.remote, hostile.local
        a.ike.receive(data, *ports, net.now)
        net.flush(a)
    assert len(a.ike._context.by_spi) == 2
