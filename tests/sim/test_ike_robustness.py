"""IKE under attack and on bad roads: floods cost bounded memory and keep no real peer out, every exchange ends, and
each malformed message costs a counter."""

from __future__ import annotations

import random
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address

import pytest

from oepy.ike.algorithms import parse_ike_proposal
from oepy.ike.context import Context
from oepy.ike.events import IkeEstablished, NeedPpk, Question, SessionFailed
from oepy.ike.header import Exchange, parse_header
from oepy.ike.notify import NotifyType
from oepy.ike.payloads import Notify, parse_chain
from oepy.ike.settings import IkeSettings, Ppk
from oepy.model import Endpoint, IpAddress, Secret
from tests.sim.ike_net import Host, Net, assert_one_tunnel, request, two_hosts
from tests.sim.test_ike_addresses import EVERYTHING, Gateway

QUIET = IkeSettings(liveness_interval=0.0)
FORGED = 100_000
FLOOD_SECONDS = 20.0


def first_message() -> bytearray:
    """An IKE_SA_INIT request as a stranger would send it, to be changed."""
    a, b = two_hosts(QUIET)
    net = Net([a, b])
    net.filter = lambda *_: False
    a.ike.initiate(request(a, b), net.now)
    net.flush(a)
    [(*_, data)] = net.carried
    return bytearray(data)


def another(data: bytearray, dice: random.Random) -> bytes:
    """With an SPI of its own."""
    data[:8] = dice.randbytes(8)
    return bytes(data)


def address(dice: random.Random) -> IpAddress:
    if dice.random() < 0.5:
        return IPv4Address(dice.getrandbits(32))
    return IPv6Address((0x2001 << 112) | dice.getrandbits(100))


def held(context: Context) -> int:
    """Everything that an endpoint keeps because of what others sent."""
    tables = (
        *(context.by_spi, context.by_number, context.half_open, context.half_open_of, context.questions),
        *(context.by_remote, context.by_identity, context.by_child, context.events, context.datagrams),
    )
    return sum(map(len, tables)) + len(context._heap) + len(context.counters)


def test_a_hundred_thousand_forged_requests_from_everywhere() -> None:
    """5,000 a second, each from an address of its own: so many are half open as may be without a cookie, the rest
    costs nothing that stays. Meanwhile ten peers come, and each gets its tunnel."""
    dice = random.Random(1)
    _, b = two_hosts(QUIET)
    peers = [Host(f"h{n}", f"198.18.{n}.1", b.key, QUIET, 50 + n) for n in range(10)]
    for peer in peers:
        b.keys[peer.address] = list(peer.public)
    net = Net([b, *peers])
    forged, begun, most = first_message(), net.now, 0
    batch = 500

    def flood(number: int) -> None:
        nonlocal most
        for _ in range(batch):
            source = Endpoint(address(dice), dice.randrange(1024, 65536))
            b.ike.receive(another(forged, dice), b.at, source, net.now)
        b.ike.datagrams()
        most = max(most, held(b.ike._context))
        if number % 20 == 10:
            peer = peers[number // 20]
            peer.ike.initiate(request(peer, b), net.now)
            net.flush(peer)

    for number in range(FORGED // batch):
        net.at(begun + number * FLOOD_SECONDS * batch / FORGED, lambda number=number: flood(number))  # type: ignore[misc]
    net.run(FLOOD_SECONDS + 5)
    assert all(len(peer.pairs) == 1 for peer in peers)
    assert len(b.pairs) == len(peers)
    counters = b.ike.counters
    assert counters["cookies_sent"] > FORGED * 0.95
    # The threshold once, and again whenever the first ones are given up
    assert counters["state_half-open"] <= 4 * QUIET.cookie_threshold
    assert most < 20 * QUIET.cookie_threshold
    net.run(60)
    assert counters["half_open"] <= QUIET.cookie_threshold
    assert b.ike.counters["half_open"] == 0
    assert len(b.ike._context.by_spi) == len(peers)


def with_cookie(b: Host, data: bytes, source: Endpoint, now: float) -> bytes | None:
    """The request again with the cookie that `b` asks for; None where it did not ask for one."""
    b.ike.receive(data, b.at, source, now)
    [answer] = [one.data for one in b.ike.datagrams() if one.remote == source] or [b""]
    if not answer:
        return None
    chain = parse_chain(answer, parse_header(answer).next_payload, 28)
    notifies = chain.parsed.get(41, [])
    cookie = next((n.data for n in notifies if isinstance(n, Notify) and n.type == NotifyType.COOKIE), None)
    if cookie is None:
        return None
    body = (0).to_bytes(1, "big") * 2 + int(NotifyType.COOKIE).to_bytes(2, "big") + cookie
    payload = bytes((data[16], 0)) + (len(body) + 4).to_bytes(2, "big") + body
    again = bytearray(data[:28] + payload + data[28:])
    again[16] = 41
    again[24:28] = len(again).to_bytes(4, "big")
    return bytes(again)


@pytest.mark.parametrize("network", ["203.0.113.0", "2001:db8:66::"])
def test_a_botnet_in_one_prefix_that_answers_cookies(network: str) -> None:
    """Its addresses are true, and it never goes on to IKE_AUTH: its prefix has its limit, and peers from elsewhere
    come in, while one from the same prefix has to wait until the half-open ones are given up."""
    dice = random.Random(2)
    first = IPv4Address(network) if "." in network else IPv6Address(network)
    a, b = two_hosts(QUIET)
    neighbour = Host("n", str(first + 200), a.key, QUIET, 9)
    b.keys[neighbour.address] = list(neighbour.public)
    net = Net([a, b, neighbour])
    data = first_message()
    for _ in range(2_000):
        source = Endpoint(first + dice.randrange(200), dice.randrange(1024, 65536))
        message = another(data, dice)
        again = with_cookie(b, message, source, net.now)
        if again is not None:
            b.ike.receive(again, b.at, source, net.now)
            b.ike.datagrams()
    assert b.ike.counters["half_open"] == QUIET.max_half_open_per_prefix
    assert b.ike.counters["half_open_refused"] > 1_900 - QUIET.max_half_open_per_prefix
    a.ike.initiate(request(a, b), net.now)
    neighbour.ike.initiate(request(neighbour, b), net.now)
    net.run(5)
    assert_one_tunnel_of(a, b)
    assert not neighbour.pairs
    net.run(30)
    neighbour.ike.initiate(request(neighbour, b), net.now)
    net.run(5)
    assert len(neighbour.pairs) == 1


def assert_one_tunnel_of(a: Host, b: Host) -> None:
    [pair] = a.pairs.values()
    assert b.pairs[pair.spi_out].spi_out == pair.spi_in


def test_a_botnet_of_the_whole_world_that_answers_cookies() -> None:
    """The limit in all holds, and with it memory; when it lets go, peers come in again."""
    dice = random.Random(3)
    small = replace(QUIET, max_half_open=300)
    a, b = two_hosts(small)
    net = Net([a, b])
    data = first_message()
    for _ in range(1_500):
        source = Endpoint(address(dice), 500)
        message = another(data, dice)
        again = with_cookie(b, message, source, net.now)
        if again is not None:
            b.ike.receive(again, b.at, source, net.now)
            b.ike.datagrams()
    assert b.ike.counters["half_open"] == small.max_half_open
    net.run(small.half_open_lifetime + 1)
    assert b.ike.counters["half_open"] == 0
    a.ike.initiate(request(a, b), net.now)
    net.run(5)
    assert_one_tunnel(a, b)


# ---- every exchange ends ---------------------------------------------------------------------------------------


class PpkGateway(Gateway):
    def reply(self, question: Question) -> object:
        return SECRET if isinstance(question, NeedPpk) else super().reply(question)


SECRET = Secret(b"of the moon, and of nobody else...")
HYBRID = (parse_ike_proposal("aes256gcm16-prfsha256-x25519-ke1_mlkem768"),)
BAD_ROADS = range(12)


def bad_road(seed: int, **changes: object) -> tuple[Host, PpkGateway, Net]:
    settings = IkeSettings(
        liveness_interval=15.0, ike_offers=HYBRID, ppk="accept", childless="accept", **changes
    )  # type: ignore[arg-type]
    a, plain = two_hosts(settings)
    b = PpkGateway("b", plain.address, plain.key, settings, 2, plain.keys)
    b.serve()
    return a, b, Net([a, b], seed=seed, loss=0.3, copies=0.3, delay=0.05)


def assert_ended(a: Host, b: Host, net: Net) -> None:
    """Nothing is under way, nothing waits, and both know the same tunnels: what one side alone has is found by its
    liveness check, whose last packet may still be on its way."""
    net.loss = net.copies = 0.0
    net.run(16)
    net.run(1)
    for host in (a, b):
        for info in host.ike.sessions():
            assert (info.state, info.exchange) == ("established", "")
        assert host.ike._context.questions == {}
        assert host.ike.counters["half_open"] == 0
    assert {pair.spi_out for pair in a.pairs.values()} == set(b.pairs)


@pytest.mark.parametrize("seed", BAD_ROADS)
def test_a_handshake_with_everything_ends(seed: int) -> None:
    """IKE_INTERMEDIATE with ML-KEM in fragments, a PPK and an assigned address, under 30 % loss, duplicates and
    reordering: up on both sides or failed on both."""
    a, b, net = bad_road(seed)
    wanted = {"local_ts": (), "remote_ts": EVERYTHING, "want_addresses": (4, 6), "ppk": Ppk(b"moon", SECRET)}
    a.ike.initiate(request(a, b, **wanted), net.now)
    net.run(120)
    assert_ended(a, b, net)
    assert a.of(IkeEstablished, SessionFailed)
    if a.pairs:
        assert a.ike.counters["ppk_used"] == 1
        [pair] = a.pairs.values()
        assert len(pair.local_ts) == 2
    leased = sum(len(list(pool.holders())) for pool in b.pools.values())
    assert leased <= 2 * (len(a.of(SessionFailed)) + 1)


def test_most_of_these_handshakes_succeed() -> None:
    """They retransmit, and do not just give up: two thirds at least, of those above."""
    came_up = 0
    for seed in BAD_ROADS:
        a, b, net = bad_road(seed)
        a.ike.initiate(request(a, b, ppk=Ppk(b"moon", SECRET)), net.now)
        net.run(120)
        came_up += len(a.pairs)
    assert came_up >= 8


@pytest.mark.parametrize("seed", BAD_ROADS)
def test_whatever_follows_ends_too(seed: int) -> None:
    """Rekeys of both kinds with ML-KEM in IKE_FOLLOWUP_KE, a further child, a liveness check and a Delete, begun by
    both sides at random, on the same bad road: in the end nothing waits, and both know the same tunnels."""
    a, b, net = bad_road(seed)
    net.loss = net.copies = 0.0
    session = a.ike.initiate(request(a, b), net.now)
    net.run(3)
    assert len(a.pairs) == 1
    net.loss = net.copies = 0.3
    dice = random.Random(seed)
    for _ in range(12):
        host = dice.choice((a, b))
        [info] = host.ike.sessions() or [None]
        if info is None:
            break
        action = dice.randrange(4)
        if action == 0 and host.pairs:
            host.ike.rekey_child(dice.choice(list(host.pairs)), net.now)
        elif action == 1:
            host.ike.rekey_ike(info.session, net.now)
        elif action == 2:
            host.ike.check_liveness(info.session, net.now)
        net.flush(host)
        net.run(dice.choice((0.1, 1.0, 5.0)))
    net.run(240)
    assert_ended(a, b, net)
    a.ike.terminate(session, net.now)
    net.run(240)
    assert a.pairs == {}
    assert not a.ike.sessions()


# ---- malformed messages ----------------------------------------------------------------------------------------


def sized(data: bytes) -> bytes:
    return data[:24] + len(data).to_bytes(4, "big") + data[28:]


def payload(following: int, body: bytes, flags: int = 0) -> bytes:
    return bytes((following, flags)) + (len(body) + 4).to_bytes(2, "big") + body


def head(first: int, **changes: int) -> bytes:
    fields = {"version": 0x20, "exchange": 34, "flags": 0x08, "message_id": 0} | changes
    numbers = bytes((first, fields["version"], fields["exchange"], fields["flags"]))
    return b"initiate" + bytes(8) + numbers + fields["message_id"].to_bytes(4, "big") + bytes(4)


NONCE = payload(0, bytes(32))
TRANSFORMS = (
    bytes.fromhex("0300000c01000014800e0100")  # AES-256-GCM
    + bytes.fromhex("0300000802000005")  # PRF_HMAC_SHA2_256
    + bytes.fromhex("000000080400001f")  # X25519
)
PROPOSAL = bytes.fromhex("0000") + (8 + len(TRANSFORMS)).to_bytes(2, "big") + b"\1\1\0\3" + TRANSFORMS
KE = bytes.fromhex("001f0000") + b"\x09" + bytes(31)


def init(sa: bytes = PROPOSAL, ke: bytes = KE, nonce: bytes = bytes(32), more: bytes = b"") -> bytes:
    body = payload(34, sa) + payload(40, ke) + payload(41 if more else 0, nonce) + more
    return sized(head(33) + body)


MALFORMED = {
    "empty": (b"", "malformed"),
    "a keepalive": (b"\xff", "keepalives"),
    "shorter than a header": (bytes(27), "malformed"),
    "a header of zeros": (bytes(28), "malformed"),
    "length too large": (init()[:24] + b"\0\0\xff\xff" + init()[28:], "malformed"),
    "length too small": (init()[:24] + b"\0\0\0\x1c" + init()[28:], "malformed"),
    "the initiator's SPI is zero": (bytes(8) + init()[8:], "malformed"),
    "IKEv1": (sized(init()[:17] + b"\x10" + init()[18:]), "ikev1"),
    "a version to come": (sized(init()[:17] + b"\x30" + init()[18:]), "other_version"),
    "no payload at all": (sized(head(0)), "malformed"),
    "a payload of length 0": (sized(head(33) + bytes(4)), "malformed"),
    "a payload of length 3": (sized(head(33) + b"\0\0\0\3"), "malformed"),
    "a payload beyond the end": (sized(head(33) + b"\0\0\xff\xff" + bytes(8)), "malformed"),
    "bytes after the last payload": (sized(init() + b"\0\0"), "malformed"),
    "too many payloads": (sized(head(43) + payload(43, b"") * 80), "malformed"),
    "an unknown critical payload": (sized(head(200) + payload(0, b"", 0x80)), "malformed"),
    "no nonce": (sized(head(33) + payload(34, PROPOSAL) + payload(0, KE)), "malformed"),
    "two nonces": (init(more=b"")[:0] + sized(init()[:-36] + payload(40, bytes(32)) + NONCE), "malformed"),
    "a short nonce": (init(nonce=bytes(15)), "malformed"),
    "a long nonce": (init(nonce=bytes(257)), "malformed"),
    "an empty SA": (init(sa=b""), "malformed"),
    "a proposal beyond the SA": (init(sa=PROPOSAL[:2] + b"\xff\xff" + PROPOSAL[4:]), "malformed"),
    "a proposal without transforms": (init(sa=b"\0\0\0\x08\1\1\0\0"), "malformed"),
    "a transform count that is wrong": (init(sa=PROPOSAL[:7] + b"\4" + PROPOSAL[8:]), "malformed"),
    "a transform of length 0": (init(sa=PROPOSAL[:10] + b"\0\0" + PROPOSAL[12:]), "malformed"),
    "an SPI size beyond the proposal": (init(sa=PROPOSAL[:6] + b"\xff" + PROPOSAL[7:]), "malformed"),
    "a proposal for ESP": (init(sa=PROPOSAL[:5] + b"\3" + PROPOSAL[6:]), "no_proposal_chosen"),
    "a KE of three bytes": (init(ke=b"\0\x1f\0"), "malformed"),
    "a KE for another group than offered": (init(ke=b"\0\x13" + KE[2:]), "invalid_ke"),
    "an X25519 value that is too short": (init(ke=KE[:-1]), "malformed"),
    "an X25519 value of small order": (init(ke=KE[:4] + bytes(32)), "malformed"),
    "a notify whose SPI goes beyond it": (init(more=payload(0, b"\1\xff\0\0")), "malformed"),
    "a notify of 5,000 bytes": (init(more=payload(0, b"\0\0\x40\x04" + bytes(5000))), "malformed"),
    "IKE_AUTH of nobody": (sized(head(46, exchange=35, message_id=1) + payload(0, bytes(64))), "unknown_spi"),
    "INFORMATIONAL of nobody": (sized(head(0, exchange=37)), "unknown_spi"),
    "an exchange that does not exist": (sized(head(0, exchange=99)), "unknown_spi"),
    "IKE_SA_INIT with a message ID": (init()[:20] + b"\0\0\0\1" + init()[24:], "unknown_spi"),
    "IKE_SA_INIT as a response": (init()[:19] + b"\x28" + init()[20:], "unknown_spi"),
    "IKE_SA_INIT not from an initiator": (init()[:19] + b"\0" + init()[20:], "unknown_spi"),
    "IKE_SA_INIT with the responder's SPI": (init()[:8] + b"responds" + init()[16:], "unknown_spi"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_message_costs_a_counter(name: str) -> None:
    """Exactly one, and nothing else: no session, no timer, no event, at most one small answer that says why."""
    data, counter = MALFORMED[name]
    _, b = two_hosts(QUIET)
    stranger = Endpoint(IPv4Address("203.0.113.9"), 500)
    b.ike.receive(data, b.at, stranger, 100.0)
    found = {key: value for key, value in b.ike.counters.items() if value}
    assert found == {"received": 1, counter: 1}
    assert b.ike.next_timer() is None
    assert b.ike.events() == []
    answers = b.ike.datagrams()
    assert len(answers) == (counter in ("other_version", "no_proposal_chosen", "invalid_ke"))
    assert all(len(answer.data) <= 64 for answer in answers)


def test_the_table_begins_with_a_good_message() -> None:
    """What the malformed ones are made of is answered: they fail for what was changed."""
    _, b = two_hosts(QUIET)
    b.ike.receive(init(), b.at, Endpoint(IPv4Address("203.0.113.9"), 500), 100.0)
    assert b.ike.counters["half_open"] == 1
    [answer] = b.ike.datagrams()
    assert parse_header(answer.data).exchange == Exchange.IKE_SA_INIT
    assert len(answer.data) > 200
