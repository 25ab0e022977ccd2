"""Road warriors and their gateway: assigned addresses, pools, PPKs, IKE SAs without a child, reauthentication; with
whole daemons in memory on a virtual clock."""

from __future__ import annotations

import asyncio
import random
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml

from oepy.connections.manager import State
from oepy.connections.messages import Down, Up
from oepy.interfaces import Way
from oepy.model import TrafficSelector
from tests.fakes.clock import run_virtual
from tests.fakes.connections import good, read
from tests.sim.world import Host, Router, matching_pairs

GATE = "198.18.0.1"
FILES = {"psk": b"of all the warriors\n", "moon": b"0x" + b"11" * 32, "sun": b"0x" + b"22" * 32}
SECRETS = [
    {"type": "ike", "id": ["gate.example", "*.road.example"], "secret_file": "psk"},
    {"type": "ppk", "id": ["moon"], "secret_file": "moon"},
]
POOLS = {
    "four": {
        "addrs": "10.3.0.0/29",
        "dns": ["10.1.0.53"],
        "subnet": ["10.1.0.0/16"],
        "domain": "corp.example",
    },
    "six": {"addrs": "2001:db8:3::/120"},
}
BEHIND = ["10.1.0.0/16", "2001:db8:1::/48"]


def gateway(
    router: Router, leases: Path | None = None, child: dict[str, Any] | None = None, **more: Any
) -> Host:
    secrets = more.pop("secrets", SECRETS)
    connection = {
        "local_addrs": [GATE],
        "local": {"auth": "psk", "id": "gate.example"},
        "remote": {"auth": "psk", "id": "*.road.example"},
        "pools": ["four", "six"],
        "children": {"net": {"local_ts": BEHIND, **(child or {})}},
        **more,
    }
    text = yaml.safe_dump({"connections": {"road": connection}, "secrets": secrets, "pools": POOLS})
    return Host(router, GATE, {}, configured=good(text, FILES), leases=leases)


def warrior(router: Router, number: int, child: dict[str, Any] | None = None, **more: Any) -> Host:
    secrets = more.pop("secrets", SECRETS)
    connection = {
        "remote_addrs": [GATE],
        "local": {"auth": "psk", "id": f"w{number}.road.example"},
        "remote": {"auth": "psk", "id": "gate.example"},
        "vips": ["0.0.0.0"],
        "children": {"net": {"remote_ts": BEHIND, "start_action": "start", **(child or {})}},
        **more,
    }
    text = yaml.safe_dump({"connections": {"home": connection}, "secrets": secrets})
    return Host(router, f"198.18.1.{number}", {}, configured=good(text, FILES))


def child(host: Host, label: str = "home/net") -> Any:
    return host.core.connections.manager.children[label]


def selectors(*texts: str) -> tuple[TrafficSelector, ...]:
    return tuple(TrafficSelector.of(ip_network(text)) for text in texts)


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def quiet(*hosts: Host) -> bool:
    return not any(host.named("internal-error") for host in hosts)


def test_a_peer_at_a_known_address_is_reached_by_the_assigned_one() -> None:
    """The gateway's rules are for what was assigned, also where the outer address of the peer is configured."""

    async def main() -> None:
        router = Router(random.Random(1))
        gate = gateway(router, remote_addrs=["198.18.1.1"])
        client = warrior(router, 1)
        await asyncio.sleep(5)
        assert child(client).state is State.UP
        (rule,) = (
            rule
            for rule in gate.core.connections.traffic.rules()
            if rule.way is Way.OUT and rule.source == ip_network("10.1.0.0/16")
        )
        assert ip_network("10.3.0.1/32").subnet_of(rule.destination)
        assert not rule.required
        assert quiet(gate, client)

    run_virtual(main())


def test_each_warrior_has_an_address_and_the_gateway_reaches_them() -> None:
    """One connection with wildcard IDs, several clients: addresses of their own, on the host with routes that name
    them as source, and taken away with the tunnel; the gateway's trap leads each one's address into its tunnel."""

    async def main() -> None:
        router = Router(random.Random(1))
        gate = gateway(router)
        two = [warrior(router, 1), warrior(router, 2, vips=["0.0.0.0", "::"])]
        await asyncio.sleep(5)
        first, second = (next(iter(host.datapath.pairs.values())) for host in two)
        assert first.local_ts == selectors("10.3.0.1/32")
        assert second.local_ts == selectors("10.3.0.2/32", "2001:db8:3::1/128")
        assert first.remote_ts == selectors(*BEHIND)
        for pair in (first, second):
            assert gate.datapath.pairs[pair.spi_out].keys_in == pair.keys_out
        assert two[0].host_addresses.routes == {ip_network("10.1.0.0/16"): ip_address("10.3.0.1")}
        assert two[1].host_addresses.routes == {
            ip_network("10.1.0.0/16"): ip_address("10.3.0.2"),
            ip_network("2001:db8:1::/48"): ip_address("2001:db8:3::1"),
        }
        number = child(gate, "road/net").number
        joined = {str(one) for one, _ in gate.trap.joined[number]}
        assert joined == {"10.3.0.1", "10.3.0.2", "2001:db8:3::1"}
        (told,) = two[0].named("addresses-assigned")
        assert (told["reason"], told["servers"]) == ("10.3.0.1", "10.1.0.53")

        two[0].core.connections.feed(Down("home/net"))
        await asyncio.sleep(2)
        assert two[0].host_addresses.routes == {}
        two[0].core.connections.feed(Up("home/net"))  # on the IKE SA that is there still
        await asyncio.sleep(2)
        (again,) = two[0].datapath.pairs.values()
        assert again.local_ts == selectors("10.3.0.1/32")
        two[0].core.connections.feed(Down("home/net"))
        await asyncio.sleep(30)
        assert two[0].host_addresses.addresses == frozenset()
        assert two[0].host_addresses.routes == {}
        assert {str(one) for one, _ in gate.trap.joined[number]} == {"10.3.0.2", "2001:db8:3::1"}
        two[0].core.connections.feed(Up("home/net"))
        await asyncio.sleep(2)
        assert two[0].host_addresses.addresses == {ip_address("10.3.0.1")}
        assert quiet(gate, *two)

    run_virtual(main())


def test_leases_survive_the_gateway_and_the_pool_has_an_end(tmp_path: Path) -> None:
    """After a restart that nobody announced each client has its address again, in whatever order they come. The
    seventh client of a pool for six is refused, and told."""

    async def main() -> None:
        router = Router(random.Random(2))
        gate = gateway(router, tmp_path)
        clients = [warrior(router, number, dpd_delay="5") for number in range(1, 7)]
        await asyncio.sleep(5)
        before = [host.host_addresses.addresses for host in clients]
        assert len(set(before)) == 6
        late = warrior(router, 7, keyingtries=1)
        await asyncio.sleep(5)
        assert "INTERNAL_ADDRESS_FAILURE" in child(late).last_error
        assert gate.named("no-address-left")
        assert not late.datapath.pairs
        assert mode_of(tmp_path / "four.json") == 0o600
        gate.crash()
        for host in clients:
            host.crash()
        gate.start()
        for host in reversed(clients):
            host.start()
            await asyncio.sleep(1)
        await asyncio.sleep(5)
        assert [host.host_addresses.addresses for host in clients] == before
        assert quiet(gate, *clients)

    run_virtual(main())


def test_nobody_gets_what_belongs_to_another_client() -> None:
    """The gateway's remote_ts names the whole pool; a client gets its own address of it, and one that asks for no
    address gets none of it, whatever it proposes."""

    async def main() -> None:
        router = Router(random.Random(3))
        gate = gateway(router, child={"remote_ts": ["10.3.0.0/24"]})
        good_one = warrior(router, 1)
        thief = warrior(router, 2, child={"local_ts": ["10.3.0.1/32"]}, vips=[], keyingtries=1)
        await asyncio.sleep(5)
        (pair,) = gate.datapath.pairs.values()
        assert pair.remote_ts == selectors("10.3.0.1/32")
        assert good_one.datapath.pairs
        assert not thief.datapath.pairs
        assert "TS_UNACCEPTABLE" in child(thief).last_error

    run_virtual(main())


def test_reauthentication_makes_before_it_breaks() -> None:
    """reauth_time: new IKE SAs, with the same address, which never leaves the host; no moment without a tunnel, and
    in the end one on each side."""

    async def main() -> None:
        router = Router(random.Random(4))
        gate = gateway(router, unique="replace")
        client = warrior(router, 1, reauth_time="600", rand_time="0", over_time="60")
        await asyncio.sleep(5)
        before = {session.session for session in client.core.negotiator.endpoint.sessions()}
        await asyncio.sleep(1900)
        sessions = client.core.negotiator.endpoint.sessions()
        assert len(sessions) == 1
        assert before.isdisjoint(session.session for session in sessions)
        assert client.core.negotiator.endpoint.counters["established"] >= 4
        assert set(client.host_addresses.history) == {frozenset({ip_address("10.3.0.1")})}
        assert len(client.datapath.pairs) == 1
        assert matching_pairs(client, gate)
        downs = [event for event in client.events if event["event"] == "connection-down"]
        ups = [event for event in client.events if event["event"] == "connection-up"]
        assert len(ups) == len(downs) + 1
        assert client.events.index(ups[1]) < client.events.index(downs[0])
        assert child(client).state is State.UP
        assert quiet(gate, client)

    run_virtual(main())


def test_a_gateway_says_when_its_clients_are_to_prove_themselves_again() -> None:
    """reauth_time on the gateway alone: clients have new IKE SAs in time, and keep address and tunnel."""

    async def main() -> None:
        router = Router(random.Random(4))
        gate = gateway(router, unique="replace", reauth_time="600", rand_time="0", over_time="60")
        client = warrior(router, 1)
        await asyncio.sleep(1900)
        assert gate.core.negotiator.endpoint.counters["established"] in (4, 5)
        assert len(client.core.negotiator.endpoint.sessions()) == 1
        assert set(client.host_addresses.history) == {frozenset({ip_address("10.3.0.1")})}
        assert matching_pairs(client, gate)
        downs = [event for event in client.events if event["event"] == "connection-down"]
        ups = [event for event in client.events if event["event"] == "connection-up"]
        assert len(ups) == len(downs) + 1
        assert quiet(gate, client)

    run_virtual(main())


def test_a_failed_reauthentication_ends_the_ike_sa_in_the_end() -> None:
    """The old SA goes on while the peer refuses the new one, and ends over_time after its time."""

    async def main() -> None:
        router = Router(random.Random(5))
        gate = gateway(router)
        client = warrior(router, 1, reauth_time="600", rand_time="0", over_time="60")
        await asyncio.sleep(5)
        gate.core.negotiator._closing = True  # answers nothing that begins
        await asyncio.sleep(640)
        assert child(client).state is State.UP
        await asyncio.sleep(60)
        assert child(client).state is not State.UP
        assert "expired" in str(client.named("connection-down"))

    run_virtual(main())


@pytest.mark.parametrize(
    ("ours", "theirs", "comes_up"),
    [
        ({"ppk_id": "moon", "ppk_required": True}, {"ppk_required": True}, True),
        ({"ppk_id": "moon"}, {}, True),
        ({"ppk_id": "moon"}, {"ppk_id": "moon", "ppk_required": True}, True),
        ({"ppk_id": "moon", "ppk_required": True}, {"secrets": SECRETS[:1]}, False),
        ({}, {"ppk_required": True}, False),
        ({"ppk_id": "moon", "ppk_required": True}, {"ppk_id": "sun"}, False),
        ({"ppk_id": "moon"}, {"ppk_id": "sun"}, True),
        ({"ppk_id": "saturn"}, {}, False),
    ],
)
def test_ppks(ours: dict[str, Any], theirs: dict[str, Any], comes_up: bool) -> None:
    """RFC 8784 by `ppk_id`, `ppk_required` and secrets of type ppk: who insists gets it or no tunnel."""

    async def main() -> None:
        router = Router(random.Random(6))
        gate = gateway(router, **theirs)
        client = warrior(router, 1, keyingtries=1, **ours)
        await asyncio.sleep(20)
        assert bool(client.datapath.pairs) is comes_up
        assert bool(gate.datapath.pairs) is comes_up
        if not comes_up:
            assert child(client).last_error
        used = client.core.negotiator.endpoint.counters.get("ppk_used", 0)
        required = any(side.get("ppk_required") for side in (ours, theirs))
        assert used >= (comes_up and required)
        assert quiet(gate, client)

    run_virtual(main())


@pytest.mark.parametrize(
    ("ours", "theirs", "comes_up", "exchanges"),
    [
        ("prefer", "allow", True, 1),
        ("prefer", "never", True, 0),
        ("force", "allow", True, 1),
        ("force", "never", False, 0),
        ("allow", "force", False, 0),
        ("prefer", "force", True, 1),
        ("allow", "allow", True, 0),
    ],
)
def test_childless(ours: str, theirs: str, comes_up: bool, exchanges: int) -> None:
    """RFC 6023: with prefer and force the child has an exchange of its own after IKE_AUTH; who never wants it, and
    who wants nothing else, say so. Addresses come all the same."""

    async def main() -> None:
        router = Router(random.Random(7))
        gate = gateway(router, childless=theirs)
        client = warrior(router, 1, childless=ours, keyingtries=1)
        await asyncio.sleep(20)
        assert bool(client.datapath.pairs) is comes_up
        assert bool(gate.datapath.pairs) is comes_up
        if comes_up:
            assert child(client).state is State.UP
            (pair,) = client.datapath.pairs.values()
            assert pair.local_ts == selectors("10.3.0.1/32")
            (session,) = client.core.negotiator.endpoint.sessions()
            assert session.message_ids[0] == 3 + exchanges  # INTERMEDIATE for ML-KEM, AUTH, and the child's
        assert quiet(gate, client)

    run_virtual(main())


@pytest.mark.parametrize(
    ("change", "where", "words"),
    [
        ({"vips": ["10.0.0.300"]}, "vips", "an address"),
        ({"vips": ["0.0.0.0", "10.0.0.1"]}, "vips", "one address of each family"),
        ({"vips": ["::"], "remote_addrs": ["%any"]}, "vips", "name the peer"),
        ({"pools": ["nowhere"]}, "pools", "no pool 'nowhere'"),
        ({"ppk_id": "x" * 300}, "ppk_id", "255"),
        ({"childless": "sometimes"}, "childless", "allow, prefer, force, never"),
        ({"reauth_time": "soon"}, "reauth_time", "no time"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], where: str, words: str) -> None:
    """Each with its place and its mend."""
    connection = {
        "remote_addrs": [GATE],
        "local": {"auth": "psk"},
        "remote": {"auth": "psk", "id": "gate.example"},
        "children": {"net": {}},
        **change,
    }
    _, problems = read(yaml.safe_dump({"connections": {"home": connection}}), FILES)
    assert any(where in problem.path and words in problem.text for problem in problems), problems


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"start_action": "trap"}, "before the first packet"),
        ({"local_ts": ["dynamic", "10.0.0.0/8"]}, "alone"),
        ({"local_ts": ["dynamic[tcp/80]"]}, "alone"),
        ({"mode": "transport"}, "no vips"),
    ],
)
def test_children_that_vips_do_not_go_with(change: dict[str, Any], words: str) -> None:
    """What could not work is refused beforehand."""
    connection = {
        "remote_addrs": [GATE],
        "local": {"auth": "psk"},
        "remote": {"auth": "psk", "id": "gate.example"},
        "vips": ["0.0.0.0"],
        "children": {"net": change},
    }
    _, problems = read(yaml.safe_dump({"connections": {"home": connection}}), FILES)
    assert any("children" in problem.path and words in problem.text for problem in problems), problems


def test_an_address_out_of_a_pool_cannot_be_trapped() -> None:
    """It would take everything."""
    connection = {
        "remote_addrs": ["198.18.1.1"],
        "local": {"auth": "psk"},
        "remote": {"auth": "psk", "id": "one.example"},
        "pools": ["four"],
        "children": {"net": {"local_ts": BEHIND, "start_action": "trap"}},
    }
    _, problems = read(yaml.safe_dump({"connections": {"home": connection}, "pools": POOLS}), FILES)
    assert any("remote_ts" in problem.path and "out of the pools" in problem.text for problem in problems)


@pytest.mark.parametrize(
    ("pool", "words"),
    [
        ({}, "addrs is missing"),
        ({"addrs": "10.3.0.0-2001:db8::"}, "from one family into the other"),
        ({"addrs": "10.3.0.0/24", "dns": ["x"]}, "does not appear"),
        ({"addrs": "10.3.0.0/24", "domain": "a b"}, "no domain"),
        ({"addrs": "10.3.0.0/24", "nbns": "10.0.0.1"}, "unknown key"),
        ([], "a mapping is expected"),
    ],
)
def test_pools_with_mistakes(pool: Any, words: str) -> None:
    """Each is a problem under pools."""
    _, problems = read(yaml.safe_dump({"pools": {"p": pool}}))
    assert any(problem.path[:2] == ("pools", "p") and words in problem.text for problem in problems), problems


def test_a_changed_pool_ends_the_tunnels_out_of_it() -> None:
    """A load with another range: who had an address of the old one comes again and gets one of the new one."""

    async def main() -> None:
        router = Router(random.Random(8))
        gate = gateway(router)
        client = warrior(router, 1, child={"close_action": "start"})
        await asyncio.sleep(5)
        other = {**POOLS, "four": {"addrs": "10.4.0.0/24"}}
        text = yaml.safe_dump(
            {
                "connections": {
                    "road": {
                        "local_addrs": [GATE],
                        "local": {"auth": "psk", "id": "gate.example"},
                        "remote": {"auth": "psk", "id": "*.road.example"},
                        "pools": ["four", "six"],
                        "children": {"net": {"local_ts": BEHIND}},
                    }
                },
                "secrets": SECRETS,
                "pools": other,
            }
        )
        gate.core.connections.load(good(text, FILES), {})
        await asyncio.sleep(30)
        assert client.host_addresses.addresses == {ip_address("10.4.0.1")}
        assert matching_pairs(client, gate)
        assert quiet(gate, client)

    run_virtual(main())
