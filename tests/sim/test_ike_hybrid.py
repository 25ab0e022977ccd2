"""ML-KEM between two endpoints: agreed on where both know it, left out in the same exchange where one doesn't."""

from __future__ import annotations

from dataclasses import replace

import pytest

from oepy.ike.algorithms import parse_ike_proposal
from oepy.ike.events import IkeKeys, SessionFailed
from oepy.ike.followup import PATIENCE
from oepy.ike.header import FLAG_INITIATOR, Exchange, Header, PayloadType, parse_header
from oepy.ike.inbound import MAX_UNPROVEN_MESSAGE
from oepy.ike.key_exchange import generate
from oepy.ike.message import _seal
from oepy.ike.notify import NotifyType
from oepy.ike.payloads import Payload, build_chain, build_ke, notify
from oepy.ike.settings import IkeSettings
from tests.sim.ike_net import Host, Net, assert_one_tunnel, request, two_hosts
from tests.sim.test_ike_lifecycle import PATIENT, connected, only_pair, only_session

QUIET = IkeSettings(liveness_interval=0.0)
CLASSIC = replace(QUIET, ike_offers=QUIET.ike_offers[1:])
PLAIN = (parse_ike_proposal("aes256gcm16-prfsha256-x25519"),)
TWO = (parse_ike_proposal("aes256gcm16-prfsha384-x25519-ke1_mlkem768-ke2_mlkem1024"),)


def suite(host: Host) -> str:
    [info] = host.ike.sessions()
    return info.suite


def exchanges(net: Net) -> list[int]:
    return [parse_header(data).exchange for *_, data in net.carried if len(data) > 1]


@pytest.mark.parametrize(
    ("first", "second", "hybrid"), [(0, 0, True), (0, 1, False), (1, 0, False), (1, 1, False)]
)
def test_it_is_used_where_both_know_it(first: int, second: int, hybrid: bool) -> None:
    """By default, whoever begins; else the next proposal is taken, without a further round trip."""
    a, b = two_hosts((QUIET, CLASSIC)[first])
    b.settings = (QUIET, CLASSIC)[second]
    b.__post_init__()
    net = Net([a, b])
    a.ike.initiate(request(a, b), net.now)
    net.run(3)
    assert_one_tunnel(a, b)
    assert suite(a) == suite(b)
    assert suite(a).endswith("-ke1_mlkem768") == hybrid
    kinds = exchanges(net)
    assert kinds.count(Exchange.IKE_SA_INIT) == 2
    assert (Exchange.IKE_INTERMEDIATE in kinds) == hybrid


def test_where_it_is_demanded_there_is_no_way_around_it() -> None:
    """A connection that names nothing else fails with NO_PROPOSAL_CHOSEN at a peer that does not know it."""
    a, b = two_hosts(CLASSIC)
    net = Net([a, b])
    a.ike.initiate(request(a, b, ike_offers=TWO), net.now)
    net.run(10)
    [failed] = a.of(SessionFailed)
    assert isinstance(failed, SessionFailed)
    assert failed.notify == "NO_PROPOSAL_CHOSEN"


def test_a_wish_is_left_out_where_the_peer_does_not_know_it() -> None:
    """`ke1_none` beside it: one proposal does for both kinds of peers."""
    wish = replace(
        QUIET, ike_offers=(parse_ike_proposal("aes256gcm16-prfsha256-x25519-ke1_mlkem768-ke1_none"),)
    )
    for other, hybrid in ((wish, True), (replace(QUIET, ike_offers=PLAIN), False)):
        for settings in ((wish, other), (other, wish)):
            a, b = two_hosts(settings[0])
            b.settings = settings[1]
            b.__post_init__()
            net = Net([a, b])
            a.ike.initiate(request(a, b), net.now)
            net.run(3)
            assert_one_tunnel(a, b)
            assert ("mlkem" in suite(a)) == hybrid


@pytest.mark.parametrize("seed", range(12))
def test_a_lossy_network_with_fragments(seed: int) -> None:
    """Two KEMs in fragments of 500 bytes, 30 % loss, duplicates and reordering; then rekeys by both."""
    settings = replace(PATIENT, ike_offers=TWO, fragment_size=700, half_open_lifetime=60.0)
    a, b = two_hosts(settings)
    net = Net([a, b], seed, loss=0.2, copies=0.3, delay=0.05)
    a.ike.initiate(request(a, b, retransmission=replace(QUIET.established, total=100.0)), net.now)
    net.run(200)
    assert_one_tunnel(a, b)
    assert len(a.established()) == len(b.established()) == 1
    for host in (a, b):
        host.ike.rekey_ike(only_session(host), net.now)
        net.run(300)
        assert_one_tunnel(a, b)
    assert suite(a) == suite(b) == "aes256gcm16-prfsha384-x25519-ke1_mlkem768-ke2_mlkem1024"
    assert a.ike.counters["ike_rekeyed"] == b.ike.counters["ike_rekeyed"] == 2
    assert all(len(data) <= 700 for *_, data in net.carried)


@pytest.mark.parametrize("seed", range(30))
def test_simultaneous_rekeys_with_further_key_exchanges(seed: int) -> None:
    """Both rekey the IKE SA at once, each in three exchanges: one IKE SA in the end, with ML-KEM again."""
    settings = replace(PATIENT, ike_offers=TWO if seed % 2 else QUIET.ike_offers)
    a, b, net = connected(settings, seed, loss=0.3 if seed >= 20 else 0.0)
    a.random.seed(seed)
    a.delay = b.delay = 0.0
    a.ike.rekey_ike(only_session(a), net.now)
    net.run((seed % 6) * 0.012)
    b.ike.rekey_ike(only_session(b), net.now)
    net.run(400)
    assert_one_tunnel(a, b)
    assert len(a.ike._context.by_spi) == len(b.ike._context.by_spi) == 1
    [mine], [theirs] = a.ike.sessions(), b.ike.sessions()
    assert (mine.spi_i, mine.spi_r) == (theirs.spi_i, theirs.spi_r)
    assert "mlkem" in mine.suite
    for host in (a, b):
        assert not host.gaps
        host.ike.rekey_child(only_pair(host), net.now)
        net.run(100)
        assert_one_tunnel(a, b)


# ---- hostile -------------------------------------------------------------------------------------------


def half_open(settings: IkeSettings = QUIET) -> tuple[Host, Host, Net]:
    """IKE_SA_INIT is answered; the initiator's next message got lost."""
    a, b = two_hosts(settings)
    net = Net([a, b])
    net.filter = lambda _, __, data: parse_header(data).exchange == Exchange.IKE_SA_INIT
    a.ike.initiate(request(a, b), net.now)
    net.run(0.1)
    return a, b, net


def throw(a: Host, b: Host, net: Net, exchange: int, payloads: list[Payload], number: int = 1) -> None:
    """A message of the initiator's as the test wants it, with the right keys."""
    ours = next(iter(a.ike._context.by_number.values()))
    assert ours.transmit is not None
    first, plain = build_chain(payloads)
    header = Header(ours.spi_i, ours.spi_r, 0, 0x20, exchange, FLAG_INITIATOR, number)
    data = _seal(header, ours.transmit, kind=PayloadType.SK, first=first, fields=b"", plain=plain)
    b.ike.receive(data, replace(b.at, port=4500), replace(a.at, port=4500), net.now)
    net.flush(b)


def test_ike_auth_cannot_come_before_the_key_exchange() -> None:
    """Nor IKE_INTERMEDIATE where none was agreed on: both only count, and ask the daemon nothing."""
    payloads: list[Payload] = [
        (PayloadType.IDI, b"\x02\0\0\0a"),
        (PayloadType.AUTH, b"\x02\0\0\0" + bytes(32)),
    ]
    a, b, net = half_open()
    throw(a, b, net, Exchange.IKE_AUTH, payloads)
    assert b.ike.counters["request_out_of_place"] == 1
    a, b, net = half_open(CLASSIC)
    throw(a, b, net, Exchange.IKE_INTERMEDIATE, [(PayloadType.KE, build_ke(36, bytes(1184)))])
    assert b.ike.counters["request_out_of_place"] == 1
    assert not b.events


@pytest.mark.parametrize(
    "body", [build_ke(36, bytes(1183)), build_ke(37, bytes(1184)), build_ke(36, b"\xff" * 1184), b"\0", b""]
)
def test_a_broken_key_share_ends_the_half_open_session(body: bytes) -> None:
    """Wrong length, wrong method, coefficients beyond the modulus: nothing is left of it."""
    a, b, net = half_open()
    throw(a, b, net, Exchange.IKE_INTERMEDIATE, [(PayloadType.KE, body)])
    assert not b.ike.sessions()
    assert b.ike.counters["half_open"] == 0
    assert not b.of(NotImplementedError)


def test_fragments_of_an_unproven_peer_are_bounded() -> None:
    """More than 16 KiB in fragments that never become a message are thrown away."""
    a, b, net = half_open()
    ours = next(iter(a.ike._context.by_number.values()))
    assert ours.transmit is not None
    header = Header(ours.spi_i, ours.spi_r, 0, 0x20, Exchange.IKE_INTERMEDIATE, FLAG_INITIATOR, 1)
    for number in range(1, 60):
        fields = number.to_bytes(2, "big") + (64).to_bytes(2, "big")
        piece = bytes(1000)
        data = _seal(header, ours.transmit, kind=PayloadType.SKF, first=34, fields=fields, plain=piece)
        b.ike.receive(data, replace(b.at, port=4500), replace(a.at, port=4500), net.now)
        [theirs] = b.ike._context.by_number.values()
        assert theirs.reassembly is not None
        held = sum(len(one.plain) for one in theirs.reassembly._pieces.values())
        assert held <= MAX_UNPROVEN_MESSAGE
    assert b.ike.counters["malformed"] == 3


def test_a_follow_up_that_nobody_knows_is_told_so() -> None:
    """STATE_NOT_FOUND, also with another link and after too long a time; the IKE SA stays as it is."""
    a, b, net = connected(QUIET)
    mine = a.ike._context.by_number[only_session(a)]
    share = generate("mlkem768", a.random.randbytes)
    links: list[Payload] = [notify(NotifyType.ADDITIONAL_KEY_EXCHANGE, b"x" * 16)]
    ke: Payload = (PayloadType.KE, build_ke(36, share.public))
    throw(a, b, net, Exchange.IKE_FOLLOWUP_KE, [ke, *links], mine.window.next_own)
    answered = net.carried[-1][3]
    assert parse_header(answered).exchange == Exchange.IKE_FOLLOWUP_KE
    before = b.ike.sessions()[0].spi_i
    net.filter = lambda _, __, data: parse_header(data).exchange != Exchange.IKE_FOLLOWUP_KE
    mine.window.next_own += 1
    a.ike.rekey_ike(only_session(a), net.now)
    net.run(0.3)
    waiting = b.ike._context.by_number[only_session(b)]
    assert waiting.followup is not None
    waiting.followup.since -= PATIENCE + 1
    net.filter = lambda *_: True
    net.run(3)
    assert waiting.followup is None
    assert a.ike.counters["rekeys_refused"] == 1
    assert b.ike.sessions()[0].spi_i == before
    net.run(30)
    assert a.ike.counters["ike_rekeyed"] == 1


def test_the_key_log_has_the_keys_that_ike_auth_is_read_with() -> None:
    """One entry for each IKE SA and side, although there were two sets of keys."""
    a, b = two_hosts(replace(QUIET, key_log=True))
    net = Net([a, b])
    number = a.ike.initiate(request(a, b), net.now)
    net.run(3)
    [keys] = a.of(IkeKeys)
    assert isinstance(keys, IkeKeys)
    assert keys.spi_i == a.ike._context.by_number[number].spi_i
