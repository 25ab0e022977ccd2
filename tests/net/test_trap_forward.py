"""Forwarded packets. Topology:

inner (10.9.0.2, 2001:2:9::2) ── gateway (trap) ── outer (198.18.0.2, 2001:2::2)
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from oepy.lab.capture import Capture
from oepy.lab.namespaces import Lab, Namespace
from oepy.model import Direction, Verdict
from tests.net.harness import (
    GROUP,
    address,
    listen_udp,
    pinged,
    policy,
    received,
    rule,
    trapping,
    udp,
    until,
)

pytestmark = [pytest.mark.root, pytest.mark.any_kernel]

INNER4, INNER6, OUTER4, OUTER6 = "10.9.0.2", "2001:2:9::2", "198.18.0.2", "2001:2::2"


@dataclass
class Gateway:
    inner: Namespace
    gateway: Namespace
    outer: Namespace


@pytest.fixture(scope="module")
def net() -> Iterator[Gateway]:
    with Lab() as lab:
        inner, gateway, outer = (lab.namespace(label) for label in ("inner", "gateway", "outer"))
        lab.veth(inner, gateway, "eth0", "lan")
        lab.veth(gateway, outer, "wan", "eth0")
        inner.address("eth0", f"{INNER4}/24", f"{INNER6}/64")
        gateway.address("lan", "10.9.0.1/24", "2001:2:9::1/64")
        gateway.address("wan", "198.18.0.1/24", "2001:2::1/64")
        outer.address("eth0", f"{OUTER4}/24", f"{OUTER6}/64")
        for host, four, six in ((inner, "10.9.0.1", "2001:2:9::1"), (outer, "198.18.0.1", "2001:2::1")):
            host.ip("route", "add", "default", "via", four)
            host.ip("-6", "route", "add", "default", "via", six)
        gateway.sysctl("net.ipv4.ip_forward", 1)
        gateway.sysctl("net.ipv6.conf.all.forwarding", 1)
        yield Gateway(inner, gateway, outer)


@pytest.mark.parametrize("destination", [OUTER4, OUTER6])
async def test_a_forwarded_burst_is_held_and_released_in_order(net: Gateway, destination: str) -> None:
    """Packets from behind the gateway wait there, and go on in their order when the verdict is clear."""
    with (
        trapping(net.gateway, policy()) as trap,
        listen_udp(net.outer, destination, 7000) as listener,
        udp(net.inner, destination, 7000) as sender,
    ):
        for number in range(5):
            sender.send(bytes([number]))
        await until(lambda: trap.trap.held().get((GROUP.PRIVATE_OR_CLEAR, address(destination))) == 5)
        assert received(listener) == []
        assert trap.asked[0][1].direction is Direction.FORWARD
        assert len(trap.asked) == 1
        trap.decide(GROUP.PRIVATE_OR_CLEAR, destination, Verdict.CLEAR)
        await asyncio.sleep(0.05)
        assert received(listener) == [bytes([number]) for number in range(5)]
        sender.send(b"later")
        await asyncio.sleep(0.05)
        assert received(listener) == [b"later"]


async def test_a_forwarded_private_packet_is_routed_by_its_mark(net: Gateway, tmp_path: Path) -> None:
    """PRIVATE sends held and later forwarded packets to the mark's table (here unreachable), not out."""
    net.gateway.ip("rule", "add", "pref", "99", "fwmark", "0x10000000/0x30000000", "lookup", "99")
    net.gateway.ip("route", "add", "unreachable", "default", "table", "99")
    with trapping(net.gateway, policy(), Verdict.PRIVATE) as trap:
        with Capture(net.outer, "eth0", tmp_path / "outer.pcap") as capture:
            assert await pinged(net.inner, OUTER4, count=3, within=0.2) == 0
            assert [packet for packet in capture.packets() if packet.kind == "clear"] == []
        assert trap.trap.statistics()["released_private"] == 1
    net.gateway.ip("rule", "del", "pref", "99")
    assert await pinged(net.inner, OUTER4) == 1


async def test_clear_packets_from_a_private_prefix_are_not_forwarded(net: Gateway) -> None:
    """What outer sends in the clear reaches neither the gateway nor the host behind it, though the host's own
    prefix is clear."""
    chosen = policy(
        rule(GROUP.PRIVATE, "198.18.0.0/24"),
        rule(GROUP.PRIVATE, "2001:2::/64"),
        rule(GROUP.CLEAR, "10.9.0.0/24"),
        rule(GROUP.CLEAR, "2001:2:9::/64"),
    )
    with trapping(net.gateway, chosen) as trap:
        for target in (INNER4, "198.18.0.1", INNER6, "2001:2::1"):
            assert await pinged(net.outer, target, within=0.2) == 0, target
        assert not trap.asked
        assert await pinged(net.inner, "10.9.0.1") == 1


async def test_replies_to_inbound_clear_connections_are_forwarded_unasked(net: Gateway) -> None:
    """private-or-clear: outer reaches a host behind the gateway, and the replies need no verdict, once the
    direction towards it is decided."""
    chosen = policy(rule(GROUP.CLEAR, "10.9.0.0/24"))
    with trapping(net.gateway, chosen) as trap:
        assert await pinged(net.outer, INNER4) == 1
        assert not trap.asked


async def test_packets_for_the_gateway_itself_are_not_trapped_as_forwarded(net: Gateway) -> None:
    """inner pings the gateway's two addresses: no question."""
    with trapping(net.gateway, policy(rule(GROUP.CLEAR, "10.9.0.0/24"))) as trap:
        for target in ("10.9.0.1", "198.18.0.1", "2001:2:9::1"):
            assert await pinged(net.inner, target) == 1
        assert not trap.asked


@pytest.mark.parametrize(("destination", "source"), [(OUTER4, INNER4), (OUTER6, INNER6)])
async def test_what_a_bystander_sends_passes_by(net: Gateway, destination: str, source: str) -> None:
    """Not asked about, whatever is decided of its destination, until its time is over; held packets go on."""
    with (
        trapping(net.gateway, policy()) as trap,
        listen_udp(net.outer, destination, 7000) as listener,
        udp(net.inner, destination, 7000) as sender,
    ):
        sender.send(b"first")
        await until(lambda: trap.trap.held().get((GROUP.PRIVATE_OR_CLEAR, address(destination))) == 1)
        assert trap.trap.pass_by(address(source), 2.0)
        await until(lambda: received(listener) == [b"first"])
        trap.decide(GROUP.PRIVATE_OR_CLEAR, destination, Verdict.PRIVATE)
        sender.send(b"second")
        await until(lambda: received(listener) == [b"second"])
        assert len(trap.asked) == 1
        trap.trap.forget([(GROUP.PRIVATE_OR_CLEAR, address(destination))])
        await asyncio.sleep(2.5)
        sender.send(b"third")
        await until(lambda: len(trap.asked) == 2)
        assert received(listener) == []


async def test_a_bystander_gets_nothing_from_what_fails_closed(net: Gateway) -> None:
    """`private`: dropped, held or not; its neighbour is asked about as ever."""
    chosen = policy(rule(GROUP.PRIVATE, "198.18.0.0/24"))
    with (
        trapping(net.gateway, chosen) as trap,
        listen_udp(net.outer, OUTER4, 7000) as listener,
        udp(net.inner, OUTER4, 7000) as sender,
    ):
        sender.send(b"first")
        await until(lambda: trap.trap.held().get((GROUP.PRIVATE, address(OUTER4))) == 1)
        assert trap.trap.pass_by(address(INNER4), 60.0)
        sender.send(b"second")
        await until(lambda: trap.trap.held() == {})
        assert received(listener) == []
        with udp(net.gateway, OUTER4, 7000) as own:
            own.send(b"own")
            await until(lambda: len(trap.asked) == 2)
