"""MOBIKE between whole daemons in memory: hosts whose addresses change, over a network that loses and reorders."""

from __future__ import annotations

import asyncio
import random
from ipaddress import ip_address

import pytest

from oepy.connections.manager import State
from oepy.ike.events import PathLost
from oepy.model import Endpoint
from tests.fakes.clock import run_virtual
from tests.sim.test_connections import pair
from tests.sim.test_connections_clients import child, gateway, quiet, warrior
from tests.sim.world import Host, Router, matching_pairs


def goes_to(host: Host, address: str) -> None:
    """The host has this address instead of its own, and its kernel has told so."""
    del host.router.hosts[host.address]
    host.address = ip_address(address)
    host.router.hosts[host.address] = host
    host.core.connections.paths.changed()


def esp_ends(host: Host) -> set[tuple[str, str]]:
    return {(str(p.local.address), str(p.remote.address)) for p in host.datapath.pairs.values()}


@pytest.mark.parametrize("seed", range(4))
def test_a_warrior_travels(seed: int) -> None:
    """Three addresses, one after the other, under loss: the same SAs and the same inner address all the time, ESP
    of both sides where the warrior is, and rekeys go on."""

    async def main() -> None:
        router = Router(random.Random(seed), loss=0.1 * (seed % 3), duplication=0.1, jitter=0.02)
        gate = gateway(router)
        client = warrior(router, 1, child={"rekey_time": "60", "rand_time": "10"})
        await asyncio.sleep(10)
        assert matching_pairs(client, gate)
        for place in ("198.18.2.1", "203.0.113.7", "198.18.1.1"):
            goes_to(client, place)
            await asyncio.sleep(35)
            assert esp_ends(client) == {(place, "198.18.0.1")}
            assert esp_ends(gate) == {("198.18.0.1", place)}
        assert matching_pairs(client, gate)
        assert not client.named("connection-down")
        assert set(client.host_addresses.history) == {frozenset({ip_address("10.3.0.1")})}
        assert child(client).state is State.UP
        assert quiet(gate, client)

    run_virtual(main())


@pytest.mark.parametrize("asks", ["client", "gateway"])
def test_a_warrior_that_has_moved_proves_itself_from_where_it_is(asks: str) -> None:
    """Reauthentication, by its own rule or the gateway's: from the new address, and the tunnel is never down."""

    async def main() -> None:
        router = Router(random.Random(4))
        times = {"reauth_time": "600", "rand_time": "0", "over_time": "60"}
        gate = gateway(router, unique="replace", **(times if asks == "gateway" else {}))
        client = warrior(router, 1, **(times if asks == "client" else {}))
        await asyncio.sleep(10)
        goes_to(client, "198.18.2.1")
        await asyncio.sleep(1900)
        assert client.core.negotiator.endpoint.counters["established"] >= 4
        assert esp_ends(client) == {("198.18.2.1", "198.18.0.1")}
        assert matching_pairs(client, gate)
        assert {event["reason"] for event in client.named("connection-down")} == {"superseded"}
        assert quiet(gate, client)

    run_virtual(main())


def test_mobike_no_is_obeyed() -> None:
    """`mobike: no` on either side: the address that is gone is noticed by asking, and the tunnel begins anew."""

    async def main() -> None:
        router = Router(random.Random(7))
        gate = gateway(router, mobike=False, unique="replace")
        client = warrior(router, 1, child={"dpd_action": "start"})
        await asyncio.sleep(5)
        before = set(client.datapath.pairs)
        assert not any(info.mobike for info in client.core.negotiator.endpoint.sessions())
        goes_to(client, "198.18.2.1")
        await asyncio.sleep(120)
        assert before.isdisjoint(client.datapath.pairs)
        assert esp_ends(client) == {("198.18.2.1", "198.18.0.1")}
        assert matching_pairs(client, gate)

    run_virtual(main())


def test_a_gateway_with_two_addresses_loses_one() -> None:
    """The gateway names both; when the first is silent the client goes on with the other, also without any news."""

    async def main() -> None:
        router = Router(random.Random(8))
        gate = gateway(router, local_addrs=["198.18.0.1", "198.18.9.1"])
        client = warrior(router, 1, dpd_delay="10")
        await asyncio.sleep(5)
        del router.hosts[gate.address]
        router.hosts[ip_address("198.18.9.1")] = gate
        await asyncio.sleep(60)
        assert esp_ends(client) == {("198.18.1.1", "198.18.9.1")}
        assert esp_ends(gate) == {("198.18.9.1", "198.18.1.1")}
        assert matching_pairs(client, gate)
        assert not client.named("connection-down")

    run_virtual(main())


def test_changes_are_looked_at_once_and_nobody_moves_without_need() -> None:
    """A swarm of changes is one look; a lost path that nobody can mend, and hosts at their places, move nothing."""

    async def main() -> None:
        one, other = pair(Router(random.Random(9)), "start")
        await asyncio.sleep(3)
        looks: list[float] = []
        check = one.core.connections.paths.check
        loop = asyncio.get_running_loop()

        def spy() -> None:
            looks.append(loop.time())
            check()

        one.core.connections.paths.check = spy  # type: ignore[method-assign]
        for _ in range(500):
            one.core.connections.paths.changed()
        await asyncio.sleep(5)
        assert len(looks) == 1
        (info,) = one.core.negotiator.endpoint.sessions()
        one.core.connections.paths.lost(PathLost(info.session, info.remote))
        one.core.connections.paths.lost(PathLost(12345, Endpoint(one.address, 4500)))
        assert not one.named("connection-moves")
        assert matching_pairs(one, other)

    run_virtual(main())
