"""What ends a tunnel, and what becomes of it then: uniqueness, inactivity, Deletes, silence, limits, names that
lead elsewhere, peers without proof; whole daemons in memory on a virtual clock."""

from __future__ import annotations

import asyncio
import random
import socket
from typing import Any

import pytest
import yaml

from oepy.connections.manager import State
from oepy.connections.messages import Asked, Down, Up
from oepy.interfaces import DatapathEvent, Way
from oepy.keys import HostKey
from oepy.model import Authenticated, Flow, Mark, Marks, Verdict
from tests.fakes.clock import run_virtual
from tests.fakes.connections import between, good, read
from tests.sim.test_connections import PSK, A, B, child, pair, quiet, up
from tests.sim.world import Host, Router, matching_pairs

HUB = "198.18.0.100"


def spoke(
    router: Router, number: int, *, secret: str = "psk", own: str = "", start: str = "start", **more: Any
) -> Host:
    own = own or f"s{number}.branch.example"
    text = yaml.safe_dump(
        {
            "connections": {
                "hub": {
                    "remote_addrs": [HUB],
                    "local": {"auth": "psk", "id": own},
                    "remote": {"auth": "psk", "id": "hub.example"},
                    "children": {
                        "net": {
                            "local_ts": [f"10.{number}.0.0/16"],
                            "remote_ts": ["10.0.0.0/8"],
                            "start_action": start,
                        }
                    },
                    "keyingtries": 1,
                    **more,
                }
            },
            "secrets": [{"type": "ike", "id": [own, "hub.example"], "secret_file": secret}],
        }
    )
    return Host(router, f"198.18.0.{number}", {}, configured=good(text, FILES))


FILES = {"psk": b"for all branches\n", "own": b"for this one alone\n"}


def hub(router: Router, **more: Any) -> Host:
    side = {"local_addrs": [HUB], "local": {"auth": "psk", "id": "hub.example"}, **more}
    text = yaml.safe_dump(
        {
            "connections": {
                "branches": {
                    **side,
                    "remote": {"auth": "psk", "id": "*.branch.example"},
                    "children": {"net": {"local_ts": ["10.0.0.0/8"], "remote_ts": ["10.0.0.0/8"]}},
                },
                "special": {
                    **side,
                    "remote": {"auth": "psk", "id": "s3.branch.example"},
                    "children": {"lan": {"local_ts": ["10.0.0.0/8"], "remote_ts": ["10.3.0.0/16"]}},
                },
            },
            "secrets": [
                {"type": "ike", "id": ["hub.example", "*.branch.example"], "secret_file": "psk"},
                {"type": "ike", "id": ["hub.example", "s3.branch.example"], "secret_file": "own"},
            ],
        }
    )
    return Host(router, HUB, {}, configured=good(text, FILES))


def test_a_hub_with_spokes() -> None:
    """%any and a wildcard for all; the connection and the secret that name a spoke exactly come before them. Each
    spoke has the network that it proposes and no other; strangers and wrong secrets get nothing; one that goes
    takes nobody with it."""

    async def main() -> None:
        router = Router(random.Random(1), loss=0.1, duplication=0.1, jitter=0.02)
        center = hub(router)
        spokes = [spoke(router, number, secret="own" if number == 3 else "psk") for number in range(1, 6)]
        stranger = spoke(router, 8, own="s8.elsewhere.example")
        wrong = spoke(router, 9, own="s3.branch.example")
        await asyncio.sleep(30)
        found = {str(p.peer): p for p in center.datapath.pairs.values()}
        assert set(found) == {f"s{number}.branch.example" for number in range(1, 6)}
        for number in range(1, 6):
            one = found[f"s{number}.branch.example"]
            assert [str(ts.start) for ts in one.remote_ts] == [f"10.{number}.0.0"]
            assert one.connection == ("special/lan" if number == 3 else "branches/net")
        assert not stranger.datapath.pairs
        assert not wrong.datapath.pairs
        number = child(center, "branches/net").number
        assert len(center.trap.joined[number]) == 4
        spokes[0].core.connections.feed(Down("hub/net"))
        await asyncio.sleep(30)
        assert len(center.datapath.pairs) == 4
        assert child(center, "branches/net").state is State.UP
        assert quiet(center, *spokes, stranger, wrong)

    run_virtual(main())


@pytest.mark.parametrize(
    ("unique", "survivors"), [("no", 2), ("keep", "first"), ("replace", "second"), ("never", 2)]
)
def test_unique(unique: str, survivors: object) -> None:
    """A second host with the identity of the first: beside it, refused, or in its place."""

    async def main() -> None:
        router = Router(random.Random(2))
        center = hub(router, unique=unique)
        first = spoke(router, 1)
        await asyncio.sleep(5)
        second = spoke(router, 2, own="s1.branch.example", start="none")
        second.core.connections._contacted.add(("hub", center.address))  # no INITIAL_CONTACT
        up(second, "hub/net")
        await asyncio.sleep(30)
        here = {str(p.remote.address) for p in center.datapath.pairs.values()}
        expected = {"first": {"198.18.0.1"}, "second": {"198.18.0.2"}}.get(
            str(survivors), {"198.18.0.1", "198.18.0.2"}
        )
        assert here == expected
        assert bool(first.datapath.pairs) is ("198.18.0.1" in here)
        assert bool(second.datapath.pairs) is ("198.18.0.2" in here)

    run_virtual(main())


@pytest.mark.parametrize(("unique", "left"), [("no", 1), ("never", 2)])
def test_initial_contact_is_heeded_but_for_never(unique: str, left: int) -> None:
    """A peer that says it knows no other IKE SA ends its older ones, unless the configuration says never."""

    async def main() -> None:
        router = Router(random.Random(3))
        center = hub(router, unique=unique, dpd_delay="0")
        first = spoke(router, 1)
        await asyncio.sleep(5)
        first.crash()
        first.start()
        await asyncio.sleep(5)
        assert len(center.datapath.pairs) == left

    run_virtual(main())


@pytest.mark.parametrize("unique", ["no", "keep", "replace", "never"])
def test_reauthentication_is_no_second_peer(unique: str) -> None:
    """Whoever reauthenticates comes twice at one place: it is let in, and the old session has time to end."""

    async def main() -> None:
        router = Router(random.Random(4))
        center = hub(router, unique=unique)
        client = spoke(router, 1, reauth_time="300", rand_time="0", over_time="60")
        await asyncio.sleep(1000)
        assert matching_pairs(client, center)
        assert len(center.datapath.pairs) == 1
        assert center.core.negotiator.endpoint.counters["established"] >= 4
        assert child(client, "hub/net").state is State.UP
        downs = [event["reason"] for event in client.named("connection-down")]
        assert downs == ["superseded"] * len(downs)

    run_virtual(main())


def test_inactivity_ends_what_nobody_uses() -> None:
    """Also over rekeys, which are no use; and not while there is traffic. A load does not double the looks."""

    async def main() -> None:
        life = {"inactivity": "100", "rekey_time": "60", "rand_time": "0"}
        one, other = pair(Router(random.Random(5)), "start", child=life)
        await asyncio.sleep(5)
        for _ in range(20):
            await asyncio.sleep(30)
            for spi in one.datapath.pairs:
                one.datapath.packets[spi] = one.datapath.packets.get(spi, 0) + 1
            for spi in other.datapath.pairs:
                other.datapath.packets[spi] = other.datapath.packets.get(spi, 0) + 1
        assert child(one).state is State.UP
        await asyncio.sleep(90)
        assert child(one).state is State.UP
        await asyncio.sleep(120)
        assert child(one).state is State.DOWN
        assert not one.datapath.pairs
        assert not other.datapath.pairs
        timers = len(one.core.connections.manager._timers)
        one.core.connections.load(good(between(A, B, own="a.example", peer="b.example", child=life), PSK), {})
        one.core.connections.load(one.configured, {})
        await asyncio.sleep(300)
        assert len(one.core.connections.manager._timers) <= timers + 1

    run_virtual(main())


@pytest.mark.parametrize(
    ("action", "after"), [("none", State.DOWN), ("trap", State.TRAPPED), ("start", State.UP)]
)
def test_close_action(action: str, after: State) -> None:
    """The peer deletes the child: it stays down, its traffic is held from now on, or it comes again."""

    async def main() -> None:
        one, other = pair(Router(random.Random(6)), "start", child={"close_action": action})
        await asyncio.sleep(5)
        before = set(one.datapath.pairs)
        other.core.connections.feed(Down("site/net"))
        await asyncio.sleep(1.5)
        assert before.isdisjoint(one.datapath.pairs)
        await asyncio.sleep(20)
        assert child(one).state is after
        assert any(rule.required for rule in one.core.connections.traffic.rules()) is (after is State.TRAPPED)
        if after is State.TRAPPED:
            flow = Flow(one.address, other.address, 6, 40000, 80)
            one.core.connections.feed(Asked(child(one).number, flow))
            await asyncio.sleep(3)
            assert child(one).state is State.UP

    run_virtual(main())


@pytest.mark.parametrize(("action", "after"), [("clear", State.DOWN), ("trap", State.TRAPPED)])
def test_dpd_action(action: str, after: State) -> None:
    """The peer is silent: `start` is tested elsewhere; trap holds the traffic, and the first packet of it tries."""

    async def main() -> None:
        one, other = pair(Router(random.Random(7)), "start", child={"dpd_action": action}, dpd_delay="5")
        await asyncio.sleep(5)
        other.crash()
        await asyncio.sleep(60)
        assert child(one).state is after
        assert not one.datapath.pairs
        other.start()
        if after is State.TRAPPED:
            flow = Flow(one.address, other.address, 6, 40000, 80)
            one.core.connections.feed(Asked(child(one).number, flow))
        await asyncio.sleep(5)
        assert (child(one).state is State.UP) is (after is State.TRAPPED)

    run_virtual(main())


def test_a_name_that_leads_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """remote_addrs by name: looked up, and again; when the old address is silent the peer is found at the new one.
    As responder the peer is known by its name's addresses as well."""

    async def main() -> None:
        leads = {"gw.example": B}
        loop = asyncio.get_running_loop()

        async def getaddrinfo(host: str, *_: object, **__: object) -> list[Any]:
            if host not in leads:
                raise socket.gaierror(socket.EAI_NONAME, "unknown")
            return [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", (leads[host], 0))]

        monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
        router = Router(random.Random(8))
        named = between(A, "gw.example", own="a.example", peer="b.example").replace(
            "gw.example/32", f"{B}/32"
        )
        text = named.replace("start_action: none", "start_action: start\n        dpd_action: start")
        one = Host(router, A, {}, configured=good(text, PSK))
        two = Host(router, B, {}, configured=good(between(B, A, own="b.example", peer="a.example"), PSK))
        watch = asyncio.ensure_future(one.core.connections.whereabouts.watch_names())
        await asyncio.sleep(5)
        assert matching_pairs(one, two)
        del router.hosts[two.address]
        moved = Host(
            router,
            "198.18.0.7",
            {},
            configured=good(
                between("198.18.0.7", A, own="b.example", peer="a.example", child={"local_ts": [f"{B}/32"]}),
                PSK,
            ),
        )
        leads["gw.example"] = "198.18.0.7"
        await asyncio.sleep(200)
        watch.cancel()
        assert matching_pairs(one, moved)
        assert {str(p.remote.address) for p in one.datapath.pairs.values()} == {"198.18.0.7"}
        assert len(one.named("name-resolved")) == 2
        leads.clear()
        up(moved)
        await asyncio.sleep(5)
        assert quiet(one, moved)

    run_virtual(main())


def test_one_side_may_prove_nothing() -> None:
    """`auth: null` as initiator: whoever comes gets its own outer address and nothing else; two of them are two
    peers, whatever `unique` says, as nobody has a name."""
    key = HostKey.generate("ed25519")

    def anonymous(number: int, **more: Any) -> Any:
        connection = {
            "remote_addrs": [HUB],
            "local": {"auth": "null"},
            "remote": {"auth": "pubkey", "id": "hub.example", "pubkeys": ["hub"]},
            "children": {"net": {"remote_ts": ["10.0.0.0/8"], "start_action": "start", **more}},
            "keyingtries": 1,
        }
        text = yaml.safe_dump({"connections": {"hub": connection}})
        return good(text, public={"hub": key.public})

    async def main() -> None:
        router = Router(random.Random(9))
        connection = {
            "local_addrs": [HUB],
            "local": {"auth": "pubkey", "id": "hub.example"},
            "remote": {"auth": "null"},
            "unique": "replace",
            "children": {"net": {"local_ts": ["10.0.0.0/8"]}},
        }
        text = yaml.safe_dump({"connections": {"guests": connection}})
        center = Host(router, HUB, {}, key=key, configured=good(text))
        guests = [Host(router, f"198.18.0.{n}", {}, configured=anonymous(n)) for n in (1, 2)]
        greedy = Host(router, "198.18.0.3", {}, configured=anonymous(3, local_ts=["10.9.0.0/16"]))
        await asyncio.sleep(10)
        pairs = list(center.datapath.pairs.values())
        assert {str(p.remote_ts[0].start) for p in pairs} == {"198.18.0.1", "198.18.0.2"}
        assert {p.authenticated for p in pairs} == {Authenticated.NULL}
        assert all(len(guest.datapath.pairs) == 1 for guest in guests)
        assert not greedy.datapath.pairs
        assert quiet(center, *guests, greedy)

    run_virtual(main())


def test_limits_in_bytes_and_packets_rekey_and_end() -> None:
    """The datapath counts by the pair's limits; a soft one rekeys, a hard one ends the child."""

    async def main() -> None:
        life = {"rekey_bytes": 10_000, "rekey_packets": 100, "life_packets": 150}
        one, other = pair(Router(random.Random(10)), "start", child=life)
        await asyncio.sleep(5)
        (sa,) = one.datapath.pairs.values()
        limits = sa.lifetime
        assert (limits.soft_bytes, limits.hard_bytes) == (10_000, 11_000)
        assert (limits.soft_packets, limits.hard_packets) == (100, 150)
        one.core.on_datapath_event(DatapathEvent("soft-expire", sa.spi_in, sa.remote.address))
        await asyncio.sleep(2)
        (fresh,) = one.datapath.pairs.values()
        assert fresh.spi_in != sa.spi_in
        assert fresh.lifetime.soft_packets == 100
        assert matching_pairs(one, other)
        assert not one.named("connection-down")
        one.core.on_datapath_event(DatapathEvent("hard-expire", fresh.spi_in, fresh.remote.address))
        await asyncio.sleep(2)
        assert not one.datapath.pairs
        assert not other.datapath.pairs

    run_virtual(main())


@pytest.mark.parametrize("encap", [False, True])
def test_encap(encap: bool) -> None:
    """Where the datapath has ESP of its own, UDP is for NATs, and for `encap: yes` on either side."""

    async def main() -> None:
        router = Router(random.Random(11))
        text = between(A, B, own="a.example", peer="b.example", encap=encap)
        one = Host(router, A, {}, configured=good(text, PSK), force_encap=False)
        mirrored = good(between(B, A, own="b.example", peer="a.example"), PSK)
        two = Host(router, B, {}, configured=mirrored, force_encap=False)
        one.core.connections.feed(Up("site/net"))
        await asyncio.sleep(3)
        for host in (one, two):
            (sa,) = host.datapath.pairs.values()
            assert sa.encap is encap

    run_virtual(main())


@pytest.mark.parametrize(
    ("child", "words"),
    [
        ({"if_id_in": 17733, "if_id_out": 17733}, "oepy's own"),
        ({"if_id_in": "%unique", "if_id_out": "%unique"}, "of an XFRM interface"),
        ({"if_id_in": 42, "if_id_out": 42, "start_action": "trap"}, "nothing is held"),
        ({"if_id_in": 42, "start_action": "trap"}, "nothing is held"),
        ({"if_id_in": 42, "if_id_out": 42, "mode": "transport"}, "tunnel mode"),
    ],
)
def test_interfaces_that_cannot_be(child: dict[str, Any], words: str) -> None:
    """Each is named with its mend."""
    _, problems = read(between(A, B, own="a.example", peer="b.example", child=child), PSK)
    assert any(words in problem.text for problem in problems), problems


def test_marks_reach_the_datapath_and_leave_the_rest_to_the_groups() -> None:
    """The pair and the trap's rules have them; the engine is kept off nothing, but no offer is answered while what
    comes back needs no mark; a reload with another mark makes the tunnel anew."""

    async def main() -> None:
        one, other = pair(Router(random.Random(12)), "start", child={"mark_out": "0x11/0xff"})
        await asyncio.sleep(5)
        assert {p.marks for p in one.datapath.pairs.values()} == {Marks(outward=Mark(0x11, 0xFF))}
        assert matching_pairs(one, other)
        traffic = one.core.connections.traffic
        assert {rule.mark for rule in traffic.rules() if rule.way is Way.OUT} == {Mark(0x11, 0xFF)}
        assert {rule.mark for rule in traffic.rules() if rule.way is not Way.OUT} == {None}
        assert traffic.settles(other.address) is None
        assert traffic.marked(other.address) == ["site/net"]
        assert traffic.claims(other.address) == "site/net"
        (before,) = one.datapath.pairs
        marks = {"mark_out": "0x12/0xff", "mark_in": 5}
        again = between(A, B, own="a.example", peer="b.example", start="start", child=marks)
        one.core.connections.load(good(again, PSK), {})
        await asyncio.sleep(5)
        (sa,) = one.datapath.pairs.values()
        assert sa.spi_in != before
        assert sa.marks == Marks(Mark(5, 0xCFFFFFFF), Mark(0x12, 0xFF))
        assert {rule.mark for rule in traffic.rules() if rule.way is not Way.OUT} == {sa.marks.inward}
        assert traffic.claims(other.address) is None
        assert one.trap.joined[child(one).number]

    run_virtual(main())


@pytest.mark.parametrize("key", ["if_id_in", "if_id_out"])
def test_one_direction_by_an_interface(key: str) -> None:
    """The trap lets that one pass as it is; the other is the tunnel's, and the trap is told of its addresses."""

    async def main() -> None:
        one, other = pair(Router(random.Random(12)), "start", child={key: 42})
        await asyncio.sleep(5)
        (sa,) = one.datapath.pairs.values()
        assert (sa.if_id_in, sa.if_id_out) == ((42, 0) if key == "if_id_in" else (0, 42))
        assert matching_pairs(one, other)
        assert one.trap.joined[child(one).number]
        for rule in one.core.connections.traffic.rules():
            passes = (rule.way is Way.OUT) is (key == "if_id_out")
            assert (rule.verdict is Verdict.CLEAR and not rule.number) is passes

    run_virtual(main())


def test_if_id_goes_past_the_trap() -> None:
    """The pair carries the number; the trap lets its traffic pass as it is, holds none of it, and is told of no
    addresses; the engine keeps off."""

    async def main() -> None:
        child_keys = {"if_id_in": "0x2a", "if_id_out": 42}
        one, other = pair(Router(random.Random(12)), "start", child=child_keys)
        await asyncio.sleep(5)
        assert {(p.if_id_in, p.if_id_out) for p in one.datapath.pairs.values()} == {(42, 42)}
        assert matching_pairs(one, other)
        assert not one.trap.joined.get(child(one).number)
        rules = one.core.connections.traffic.rules()
        assert {rule.verdict for rule in rules} == {Verdict.CLEAR}
        assert not any(rule.number or rule.required for rule in rules)
        assert one.core.connections.traffic.settles(other.address) == "site/net"

    run_virtual(main())
